"""The command line: python src/main.py --config FILE [task=TASK] [group=option] [key.path=value] [-m]"""

import sys

from pretune.launch.command_line import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
