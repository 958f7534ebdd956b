"""The command line: python src/main.py --config FILE [task=TASK] [group=option] [key.path=value] [-m]"""

from pretune.launch.command_line import main, program

if __name__ == "__main__":
    program(main)
