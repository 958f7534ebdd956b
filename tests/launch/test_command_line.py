"""The command line from a user's view: the output and the exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "src" / "config" / "run"


def pretune(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "src" / "main.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def refused(*arguments: str | Path, cwd: Path = ROOT) -> str:
    done = pretune(*arguments, cwd=cwd)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    return done.stderr


@pytest.mark.parametrize("arguments", [(), ("--help",), ("--config", "src/config/run/smoke.yaml", "--help")])
def test_it_shows_what_there_is_to_run(arguments: tuple[str, ...]) -> None:
    done = pretune(*arguments)
    assert done.returncode == 0
    for word in ("quickstart_pretrain", "slimpajama_3h_baseline", "noam_wide", "generate", "cycle"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lrr=3", "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        ("optimizr=lion", "unknown key 'optimizr'; did you mean 'optimizer'?"),
        ("optimizer=lyon", "optimizer has no option 'lyon'; did you mean 'lion'?"),
        ("model.dim=wide", "'model.dim' = 'wide': input should be a valid integer"),
        ("model.num_layers=0", "'model.num_layers' = 0: input should be greater than or equal to 1"),
        ("model.num_layers=100000", "'model.num_layers' = 100000: input should be less than or equal to 1024"),
        ("model.dim=10000000", "'model.dim' = 10000000: input should be less than or equal to 1048576"),
        ("model.vocab_size=1000000000000", "'model.vocab_size' = 1000000000000: input should be less than"),
        ("model.activation=swigly", "'model.activation' = 'swigly': input should be 'swiglu'"),
        ("budget.time=3x", "'3x' is not a time; write seconds (300) or units"),
        ("budget.time=1e400", "'budget.time' = inf: input should be a finite number"),
        ("batch.micro_batch=atuo", "'batch.micro_batch' = 'atuo': input should be a valid integer or 'auto'\n"),
        ("batch.tokens=1024000000000", "'batch.tokens' = 1024000000000: input should be less than or equal to"),
        ("seed=99999999999999999999", "'seed' = 99999999999999999999: input should be less than"),
        ("budget.steps=null", "the budget is empty"),
        ("batch.tokens=1000", "batch.tokens (1000) is not a multiple of"),
        ("data.sequence_length=4096", "exceeds the model"),
        ("stage.kind=finetune", "fine-tuning needs weights to start from"),
        ("evaluation.option_accuracy=true", "needs data.format.kind = multiple_choice"),
        ("data.source.kind=webb", "'data.source.kind'"),
        ("+data.source.colour=red", "unknown key 'data.source.colour'"),
        ("name=../escape", "'name' = '../escape'"),
        ("model.dim=[1", "cannot read 'model.dim=[1'"),
    ],
)
def test_a_bad_override_is_one_clear_line(override: str, expected: str, tmp_path: Path) -> None:
    message = refused("--config", RUNS / "smoke.yaml", override, f"output_dir={tmp_path}/runs")
    assert expected in message
    assert not (tmp_path / "runs").exists()


def test_a_key_that_the_run_file_sets_for_another_option_is_traced_to_it(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(
        "defaults: [/base, override /data: python_docs_small, override /schedule: trapezoid, _self_]\nname: one\n"
        "budget: {steps: 1}\nschedule: {decay: 0.3}\ndata: {tokenizer: {split_digits: false}}\n"
    )
    message = refused("--config", file, "schedule=cosine", "data/tokenizer=gpt2", "task=plan")
    assert "'schedule.decay': own.yaml sets it, and the chosen option of schedule has no such key" in message
    assert "add ~schedule.decay" in message
    assert "add ~data.tokenizer.split_digits" in message
    removed = ["~schedule.decay", "~data.tokenizer.split_digits"]
    message = refused("--config", file, "schedule=cosine", "data/tokenizer=gpt2", *removed, "+schedule.decai=1")
    assert "unknown key 'schedule.decai'" in message
    assert "own.yaml" not in message


def test_a_key_with_a_line_break_is_named_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text('defaults: [/run/smoke, _self_]\nmodel: {"a\\nb\\x1bé": 1}\n')
    assert r"unknown key 'model.a\nb\x1bé'" in refused("--config", file)


def test_several_faults_are_reported_together() -> None:
    message = refused("--config", RUNS / "smoke.yaml", "model.dim=0", "optimizer.lr=-1")
    assert "model.dim" in message
    assert "optimizer.lr" in message


def test_a_missing_file_names_the_nearest_run() -> None:
    assert "did you mean 'smoke'" in refused("--config", "smok")
    assert "no such file" in refused("--config", RUNS / "nothing_like_it.yaml")


def test_yaml_that_is_not_yaml_names_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text("name: x\nmodel: [1\nseed: {\n")
    message = refused("--config", file)
    assert "broken.yaml" in message
    assert "line" in message


def test_a_config_that_includes_itself(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("defaults:\n  - /base\n  - _self_\n")
    assert "its defaults list includes itself" in refused("--config", tmp_path / "base.yaml")


def test_what_a_run_file_leaves_open_is_named(tmp_path: Path) -> None:
    assert "data.source.files" in refused("--config", RUNS / "smoke.yaml", "data=files")


def test_hydras_own_flags_work(tmp_path: Path) -> None:
    done = pretune("--config", RUNS / "smoke.yaml", "--cfg", "job", "--resolve", "optimizer.lr=1e-3", cwd=tmp_path)
    assert done.returncode == 0
    shown = yaml.safe_load(done.stdout)
    assert shown["name"] == "smoke"
    assert float(shown["optimizer"]["lr"]) == 1e-3
    assert list(tmp_path.iterdir()) == []


def test_a_config_outside_the_repository_and_numbers_in_yaml_style(tmp_path: Path) -> None:
    folder = tmp_path / "a folder, with=odd 'signs'"
    folder.mkdir()
    file = folder / "mine.yaml"
    file.write_text("defaults:\n  - /run/smoke\n  - _self_\nname: mine\noptimizer: {lr: 1e-3}\n")
    done = pretune("--config", file, "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "name: mine" in done.stdout


def test_a_group_of_a_runs_own_config_is_exchanged(tmp_path: Path) -> None:
    done = pretune("--config", RUNS / "smoke.yaml", "--cfg", "job", "--resolve", "quantization=qat_int8_int4")
    (tmp_path / "config.yaml").write_text(done.stdout)
    chosen = ("quantization=int8_int4", "quantization.group_size=16", "data/source=word_problems", "seed=7")
    done = pretune("--config", tmp_path / "config.yaml", "--cfg", "job", *chosen)
    assert done.returncode == 0, done.stderr
    shown = yaml.safe_load(done.stdout)
    assert shown["quantization"] == {"kind": "int8_int4", "group_size": 16, "embedding": "int4", "head": "int4"}
    assert shown["data"]["source"]["kind"] == "word_problems"
    assert (shown["name"], shown["seed"]) == ("smoke", 7)
    assert "quantization has no option 'int5'" in refused("--config", tmp_path / "config.yaml", "quantization=int5")


def test_bad_configuration_is_found_without_torch() -> None:
    code = (
        "import sys; sys.path.insert(0, 'src'); import main\n"
        f"assert main.main(['--config', {str(RUNS / 'smoke.yaml')!r}, 'model.dim=0']) == 2\n"
        "heavy = {'torch', 'datasets', 'wandb', 'transformers', 'tokenizers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_options_are_named() -> None:
    assert "unknown option --confg" in refused("--confg", "smoke")
    assert "'smoke' is neither" in refused("smoke")
    assert "invalid choice" in refused("--config", RUNS / "smoke.yaml", "--cfg", "everything")
