"""The command line: one run or a sweep, with exit code 0 (done), 1 (a check failed), 2 (bad input), 3 (diverged) or 75
(stopped and saved)."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from pretune.core.config import ConfigError, UserError, nearest
from pretune.core.launched import adopt_slurm
from pretune.core.system_errors import explained
from pretune.core.terminal import say, warn
from pretune.launch.groups import groups, options, run_files, run_names
from pretune.training.signals import EXIT_STOPPED, Interrupts

FLAGS = {
    "--config": "the run file",
    "-m, --multirun": "run every combination of comma-separated values",
    "--cfg job": "print the configuration and run nothing",
    "--resolve": "with --cfg: replace interpolations by their values",
    "-h, --help": "print this help",
}


def program(main: Callable[[list[str]], int]) -> NoReturn:
    """Run `main` with the program's arguments, and end with its exit code: a run that is stopped ends with that code,
    however many more signals arrive."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # for what has no handlers of its own, like SIGINT
    adopt_slurm(os.environ)
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt:  # one more, while the first was being handled
        code = EXIT_STOPPED
    if code == EXIT_STOPPED:
        for number in Interrupts.SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def main(argv: list[str]) -> int:
    """Run what `argv` asks for and return the exit code."""
    try:
        return _main(argv)
    except UserError as error:
        warn(f"error: {error}")
        return 2
    except BrokenPipeError:
        # Whoever reads the output has ended (`| head`). Python would try once more to write it, when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except OSError as error:
        told = explained(error, " ".join(argv))
        if told is None:
            raise
        warn(f"error: {told}")
        return 2
    except KeyboardInterrupt:
        # Training has its own signal handlers; nothing else needs to be saved.
        warn("stopped")
        return EXIT_STOPPED


def _main(argv: list[str]) -> int:
    asked = _parse(argv)
    if asked.help or not argv:
        say(_overview())
        return 0
    file = _run_file(asked.config)
    # Hydra is slow to import, so import it only when needed.
    from pretune.launch.compose import composed, plain, shown
    from pretune.launch.explain import naming_origins
    from pretune.launch.inspected import composer
    from pretune.launch.model_of_start import with_model
    from pretune.launch.older import completed
    from pretune.launch.overrides import readable
    from pretune.launch.place import placed

    overrides = placed(file, readable(asked.overrides, asked.multirun))
    if asked.cfg:
        say(shown(file, overrides, asked.resolve))
        return 0
    if asked.multirun:
        from pretune.launch.sweep import sweep

        return sweep(file, overrides)
    from pretune.dispatch import run

    with composed(file, overrides) as config:
        mapping = plain(with_model(config), file)
    mapping = completed(mapping, file)
    with naming_origins(file, overrides):
        return run(mapping, compose=composer(overrides))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("--cfg", choices=["job"])
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    try:
        known, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; --help shows the usage") from None
    for word in rest:
        if word.startswith("-"):
            raise ConfigError(f"unknown option {word}; the options are {', '.join(FLAGS)}")
        if "=" not in word and not word.startswith("~"):
            raise ConfigError(f"'{word}' is neither an option nor key=value; --help shows the usage")
    known.overrides = rest
    return known


def _run_file(given: str | None) -> Path:
    """The file given with `--config`; ConfigError, listing the run files, if there is none."""
    if given is None:
        raise ConfigError(f"--config FILE is missing; the run files are\n{run_files()}")
    file = Path(given).absolute()
    if not file.is_file():
        there = "" if file.suffix == ".yaml" else nearest(file.name, (p.name for p in file.parent.glob("*.yaml")))
        raise ConfigError(f"--config {file}: no such file{there or nearest(file.stem, run_names())}\n{run_files()}")
    if file.suffix != ".yaml":
        raise ConfigError(f"--config {file}: the name must end in .yaml")
    return file


def _overview() -> str:
    """The help text, with everything that can be run."""
    from pretune.run.config import RunConfig

    tasks: Any = RunConfig.model_fields["task"].annotation
    choices = "\n".join(f"  {group:<15} {', '.join(options(group))}" for group in groups())
    flags = "\n".join(f"  {flag:<15} {meaning}" for flag, meaning in FLAGS.items())
    return f"""Pretune: one YAML-driven loop that pretrains a small language model and then fine-tunes it.

python src/main.py --config FILE [task=TASK] [group=option] [key.path=value] [-m]

FILE, one of these or your own:
{run_files()}

TASK (default train): {", ".join(tasks.__args__)}

group=option:
{choices}

key.path=value sets any key of the configuration (all of them: docs/reference, or --config FILE --cfg job).
-m runs every combination of comma-separated values: -m optimizer.lr=1e-3,2e-3 seed=1,2

{flags}

Start here: make quickstart"""
