"""task=generate: continue a prompt (streamed), continue each prompt of a file, or chat."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import torch

from pretune.checkpoint import store as checkpoint
from pretune.compute.device import pick_device
from pretune.core.config import ConfigError, InputError
from pretune.core.terminal import say, warn
from pretune.data.tokenizer import Tokenizer
from pretune.generation.decode import LanguageModel
from pretune.run.config import RunConfig
from pretune.run.folder import RunFolder
from pretune.run.generator import TextGenerator, assemble_generator
from pretune.run.model import evaluation_model
from pretune.run.parts import Parts
from pretune.run.precision import resolved_config
from pretune.run.tokenizer import assemble_tokenizer
from pretune.run.weights import chosen_checkpoint, evaluated_run
from pretune.tasks.generate.chat import chat
from pretune.tasks.generate.file import answer_file
from pretune.training.signals import EXIT_STOPPED, Interrupts, Stop


def generate(config: RunConfig) -> int:
    """task=generate: continue generate.prompt, or each prompt of generate.file, or chat, with a checkpoint
    (checkpoint.use) of the run that `config` names. Ctrl-C ends it; generated text is kept."""
    section = config.generate
    if not (section.prompt or section.file or section.chat):
        raise ConfigError(
            "there is no prompt; set generate.prompt='some text', generate.file=prompts.txt (or .jsonl), or "
            "generate.chat=true"
        )
    folder = evaluated_run(config)
    if section.runtime == "pretune":
        config = resolved_config(config, folder)
        section = config.generate
    with Interrupts() as interrupts:
        try:
            device, tokenizer = _device(config), assemble_tokenizer(config)
            model, named = _model(config, folder, tokenizer, device)
            rows = section.batch_size if section.compile and section.file else None
            generator = assemble_generator(config, section, model, tokenizer, device, rows)
            with generator.autocast():
                if section.file:
                    return answer_file(generator, section, folder.path / "generated", named, interrupts)
                if section.prompt:
                    return answer_prompt(generator, section.prompt, section.template)
        except Stop:
            warn("\nstopped.")
            return EXIT_STOPPED
    # A chat handles Ctrl-C itself: the first one ends an answer, not the chat.
    with generator.autocast():
        return chat(generator, config)


def _device(config: RunConfig) -> torch.device:
    return torch.device("cpu") if config.generate.runtime == "executorch" else pick_device(config.device)


def _model(
    config: RunConfig, folder: RunFolder, tokenizer: Tokenizer, device: torch.device
) -> tuple[LanguageModel, str]:
    """The run's model, or its exported program; and a name for it, used in output file names."""
    if config.generate.runtime == "pretune":
        rounding = "" if config.quantization.kind == "none" else f"{config.quantization.kind}-"
        name = f"{rounding}step-{checkpoint.step_of(chosen_checkpoint(folder))}"
        return evaluation_model(config, folder, device), name
    from pretune.runtimes.executorch.program import Program
    from pretune.runtimes.manifest import checked_program, newest_program

    named = config.generate.export
    exported = newest_program(folder.path / "export") if named is None else Path(named)
    if exported is None:
        raise InputError(
            f"{folder.name} has no .pte yet; export one: python src/main.py --config {folder.config} task=export "
            "export.format=executorch" + (" quantization=int8_int4" if config.quantization.kind == "none" else "")
        )
    return Program(checked_program(exported, tokenizer.fingerprint)), exported.name


def answer_prompt(generator: TextGenerator, prompt: str, template: bool) -> int:
    """Stream the text after a prompt to the terminal; print the prompt first if it is continued unchanged."""
    if not prompt.strip():
        raise InputError("generate.prompt is empty; write some text")
    segments = generator.prompt_segments(prompt, template)
    pieces = generator.stream(generator.ids(segments))
    first = next(pieces)  # before printing anything, because it raises InputError if the prompt is too long
    if "".join(segment.text for segment in segments) == prompt.rstrip(" "):
        say(prompt, end="")
    for piece in chain([first], pieces):
        say(piece.text, end="")
    say()
    return 0


def sample(config: RunConfig, parts: Parts) -> list[str]:
    """The texts that the model in training generates for samples.prompts."""
    section = config.samples
    generator = assemble_generator(config, section, parts.model, parts.tokenizer, parts.device)
    prompts = [generator.ids(generator.prompt_segments(prompt, section.template)) for prompt in section.prompts]
    with generator.autocast():
        texts = dict(generator.generate(prompts, max(len(prompts), 1)))
    return [texts[place].text for place in range(len(prompts))]
