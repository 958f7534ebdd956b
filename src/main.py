"""The command line: argv -> Hydra -> a plain mapping -> pretune.run. The only file that knows Hydra.

python src/main.py --config FILE [task=TASK] [group=option] [key.path=value] [-m]
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretune.config import ConfigError, UserError, field_paths, nearest
from pretune.guards import EXIT_STOPPED

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONFIGS = Path(__file__).parent / "config"


def main(argv: list[str]) -> int:
    """Run what `argv` asks for; return the exit code: 0 done, 2 bad input, 75 stopped by a signal and saved."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    known, rest = parser.parse_known_args(argv)
    try:
        # Hydra's own page would list no groups: ours come through its search path.
        if {"-h", "--help"} & set(rest) or argv == []:
            print(overview())
            return 0
        if known.config is None:
            raise ConfigError(f"--config FILE is missing; there is\n{run_files()}")
        return compose_and_run(Path(known.config), rest)
    except UserError as error:
        return report_error(error)
    except KeyboardInterrupt:
        # Training has handlers of its own; whatever else is stopped has nothing to save.
        print("stopped", file=sys.stderr)
        return EXIT_STOPPED


def compose_and_run(file: Path, rest: list[str]) -> int:
    """Compose `file` and the overrides in `rest` with Hydra, and run each job (`-m` makes several)."""
    file = file.absolute()
    if not file.is_file():
        there = "" if file.suffix == ".yaml" else nearest(file.name, (p.name for p in file.parent.glob("*.yaml")))
        raise ConfigError(f"--config {file}: no such file{there or nearest(file.stem, run_names())}\n{run_files()}")
    if file.suffix != ".yaml":
        raise ConfigError(f"--config {file}: the name must end in .yaml")

    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    codes: list[int] = []

    def job(config: DictConfig) -> None:
        if EXIT_STOPPED in codes:
            return  # one signal ends the whole sweep
        # Reported here and not raised: Hydra would add a line of its own, and the other jobs of a sweep go on.
        try:
            codes.append(run_job(config, file))
        except UserError as error:
            codes.append(report_error(error))
        except OmegaConfBaseException as error:
            codes.append(report_error(ConfigError(explain(error, file))))

    # Overrides must stand together, behind Hydra's flags and what belongs to these (`--cfg job`).
    overrides = [word for word in rest if word[:1] in "~+" or (word[:1] != "-" and "=" in word)]
    flags = [word for word in rest if word not in overrides]
    sys.argv = [sys.argv[0], *flags, *quiet_hydra(), *overrides]
    # Hydra would print its own errors and exit with 1; this hands them to us.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        with tempfile.TemporaryDirectory() as folder:
            composed = with_groups(file, overrides, Path(folder))
            hydra.main(version_base="1.3", config_path=str(composed.parent), config_name=composed.stem)(job)()
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(explain(error, file)) from None
    except RecursionError:
        hint = "a file of your own must not be named like one of Pretune's that it includes (base.yaml)"
        raise ConfigError(f"{file.name}: its defaults list leads back to itself; {hint}") from None
    return max(codes, default=0)


def with_groups(file: Path, overrides: list[str], folder: Path) -> Path:
    """`file`; or, where it has no defaults list (a run's own config.yaml), a copy in `folder` in which the groups that
    `overrides` choose stand in one: Hydra exchanges nothing else."""
    from omegaconf import OmegaConf

    groups = [name for name, _, option in (word.partition("=") for word in overrides) if option and is_group(name)]
    content: Any = OmegaConf.to_container(OmegaConf.load(file)) if groups else None
    if not isinstance(content, dict) or "defaults" in content:
        return file
    for group in groups:
        *outer, last = group.split("/")
        section: Any = content
        for key in outer:
            section = section.get(key, {}) if isinstance(section, dict) else {}
        section.pop(last, None)
    chosen = [{group: sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))[0]} for group in groups]
    copy = folder / file.name
    OmegaConf.save({"defaults": [*chosen, "_self_"], **content}, copy)
    return copy


def is_group(name: str) -> bool:
    """Whether `name` is that of a folder of options, and not a key's."""
    return name[:1].isalpha() and any((CONFIGS / name).glob("*.yaml"))


def run_job(config: DictConfig, file: Path) -> int:
    """Run one composed configuration; return its exit code."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from pretune.run import run

    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"{file.name} leaves {', '.join(missing)} open (???); set it: {missing[0]}=VALUE")
    mapping = OmegaConf.to_container(config, resolve=True)
    assert isinstance(mapping, dict)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        mapping["name"] = job_name(mapping["name"], HydraConfig.get().job.override_dirname)
    return run({str(key): value for key, value in mapping.items()})


def report_error(error: Exception) -> int:
    """Print what the user can mend; return the exit code that says so."""
    print(f"error: {error}", file=sys.stderr)
    return 2


def quiet_hydra() -> list[str]:
    """Overrides that let Hydra find our groups and keep it from writing folders and logs of its own."""
    return [
        f"hydra.searchpath=['file://{CONFIGS.absolute()}']",
        "hydra/job_logging=disabled",
        "hydra/hydra_logging=disabled",
        "hydra.output_subdir=null",
        "hydra.run.dir=.",
        "hydra.sweep.dir=${output_dir}/.sweeps",
        "hydra.sweep.subdir=.",
    ]


def job_name(name: str, overrides: str) -> str:
    """Name of one job of a sweep: the run's name and what the sweep set for it."""
    words = [word for word in overrides.split(",") if not word.startswith(("hydra", "name=", "output_dir="))]
    return re.sub(r"[^A-Za-z0-9._=,+-]", "-", ",".join([name, *words]))


def explain(error: Exception, file: Path) -> str:
    """One readable message for what Hydra, OmegaConf or YAML complains of, with the nearest name there is."""
    text = str(error)
    if override := getattr(error, "override", None):
        return f"cannot read '{override}': {text.splitlines()[0]}; quote values that have brackets, commas or spaces"
    if (unknown := re.search(r"Could not override '([^']+)'", text)) and unknown[1] in known_keys():
        cause = " ".join(str(error.__cause__ or "").split())
        return f"cannot set '{unknown[1]}' over what is there ({cause}); pick its option instead: GROUP=OPTION"
    if unknown := re.search(r"Could not override '([^']+)'", text):
        return f"unknown key '{unknown[1]}'{nearest_key(unknown[1])}"
    if option := re.search(r"Could not find '([\w./]+)/([^'/]+)'", text):
        group, name = option.groups()
        options = sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
        if options:
            return f"{group} has no option '{name}'{nearest(name, options) or '.'} There is: {', '.join(options)}"
    if line := getattr(error, "problem_mark", None):
        return f"{line.name}, line {line.line + 1}: {getattr(error, 'problem', 'not valid YAML')}"
    return f"{file.name}: " + " ".join(text.split())


def nearest_key(key: str) -> str:
    """`; did you mean ...?` for a dotted key, by its last word among its siblings first, then by the whole."""
    known = known_keys()
    parent, _, last = key.rpartition(".")
    siblings = {path.rpartition(".")[2]: path for path in known if path.rpartition(".")[0] == parent}
    near = nearest(last, siblings)
    return near.replace("'", f"'{parent}.", 1) if near and parent else near or nearest(key, known)


def known_keys() -> list[str]:
    """Every key that a configuration may have."""
    from pretune.run_config import RunConfig

    return list(dict.fromkeys(path for path, _ in field_paths(RunConfig)))


def run_names() -> list[str]:
    """Names of the run files that ship with Pretune."""
    return sorted(path.stem for path in (CONFIGS / "run").glob("*.yaml"))


def run_files() -> str:
    """A line per run file: its path as `--config` takes it, and the first sentence of its comment."""
    lines = []
    for name in run_names():
        path = CONFIGS / "run" / f"{name}.yaml"
        comments = [line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("# ")]
        comment = " ".join(line for line in comments if "$schema" not in line)
        shown = os.path.relpath(path) if len(os.path.relpath(path)) < len(str(path)) else str(path)
        lines.append(f"  {shown}\n      {comment.split('. ')[0].rstrip('.')}")
    return "\n".join(lines)


def overview() -> str:
    """What there is to run, for a call without `--config`."""
    from pretune.run_config import RunConfig

    tasks: Any = RunConfig.model_fields["task"].annotation
    files = [path for path in CONFIGS.glob("*/**/*.yaml") if path.parent.name not in ("run", "common")]
    groups = sorted({str(path.parent.relative_to(CONFIGS)) for path in files})
    options = "\n".join(
        f"  {group:<15} " + ", ".join(sorted(path.stem for path in (CONFIGS / group).glob("*.yaml")))
        for group in groups
    )
    return f"""Pretune: one YAML-driven loop that pretrains a small language model and then fine-tunes it.

python src/main.py --config FILE [task=TASK] [group=option] [key.path=value] [-m]

FILE, one of these or your own:
{run_files()}

TASK (default train): {", ".join(tasks.__args__)}

group=option:
{options}

key.path=value sets any key of the configuration (all of them: docs/reference, or --config FILE --cfg job).
-m runs every combination of comma-separated values: -m optimizer.lr=1e-3,2e-3 seed=1,2
Start here: make quickstart"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
