"""Generate a text for each prompt in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pretune.core.config import InputError
from pretune.core.files import check_writable, fingerprint, write_atomic
from pretune.core.progress_bar import counted
from pretune.core.terminal import say
from pretune.data.formats.segments import Absent, Place, Segment, Unusable
from pretune.data.sources.config import FilesSource
from pretune.data.sources.local_files import listed
from pretune.run.generator import TextGenerator
from pretune.run.task_config import GenerateConfig
from pretune.training.signals import EXIT_STOPPED, Interrupts, Stop


def answer_file(
    generator: TextGenerator, section: GenerateConfig, folder: Path, model: str, interrupts: Interrupts
) -> int:
    """Write a row for each prompt in generate.file: `prompt` (as in the file), `text`, `ended`, `tokens`.

    If generate.output is null, the output is in `folder`, named after the prompt file, `model` and, in eight hex
    digits, the place of the prompt file and the settings: only the same command writes there again. On Ctrl-C, the
    finished texts are written.
    """
    assert section.file is not None
    path = Path(section.file)
    rows = list(listed(path))
    if not rows:
        raise InputError(f"generate.file: {path} has no prompts")
    prompts = [generator.ids(segments(generator, path, at, row, section.template)) for at, row in enumerate(rows)]
    own = folder / f"{path.stem}-{model}-{_told_apart(path, section)}.jsonl"
    output = Path(section.output) if section.output else own
    if output.exists() and output.samefile(path):
        raise InputError(f"generate.output: {output} is generate.file itself; choose another path for the texts")
    try:
        check_writable(output)  # before anything is computed
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"generate.output: cannot write {output} ({reason}); choose another path") from None
    done: dict[int, dict[str, Any]] = {}
    code = 0
    try:
        for at, text in counted(generator.generate(prompts, section.prompts_at_once), "writing", len(prompts)):
            done[at] = {"prompt": rows[at], "text": text.text, "ended": text.reason, "tokens": text.num_tokens}
    except Stop:
        code = EXIT_STOPPED
    with interrupts.shielded():
        lines = (json.dumps(done[at], ensure_ascii=False) for at in sorted(done))
        # Lone surrogates are valid in JSON files, but not in UTF-8.
        write_atomic(output, "".join(f"{line}\n" for line in lines).encode("utf-8", "replace"))
    say(f"{len(done):,} of {len(prompts):,} texts, {sum(row['tokens'] for row in done.values()):,} tokens: {output}")
    return code


def _told_apart(path: Path, section: GenerateConfig) -> str:
    settings = section.model_dump(exclude={"prompt", "file", "output", "chat", "batch_size", "compile"})
    return fingerprint([str(path.resolve()), settings])[:8]


def segments(generator: TextGenerator, path: Path, at: int, row: Any, template: bool) -> list[Segment]:
    """The prompt of one row: text, {prompt}, or the fields of the run's data, such as {messages}."""
    place = Place(FilesSource(kind="files", files=(str(path),), format="json", max_rows=None), at)
    text = row.get("prompt") if isinstance(row, dict) else row
    if isinstance(text, str):
        if not text.strip():
            raise InputError(f"{place} is an empty prompt; write some text there")
        return generator.prompt_segments(text, template)
    if isinstance(row, dict) and ("messages" not in row or generator.formatter.has_turns):
        try:
            return generator.formatter.prompt(row, place)
        except Absent as reason:
            raise InputError(reason.explain()) from None
        except Unusable as reason:
            raise InputError(f"{place} cannot be a prompt: {reason}") from None
    if isinstance(row, dict) and is_chat(row["messages"]):
        return generator.formatter.render_prompt(row["messages"])
    raise InputError(
        f"{place} is neither text nor a record with 'prompt', 'messages' {{role, content}} or the data's fields"
    )


def is_chat(messages: Any) -> bool:
    """Whether these are messages, each with a role and text."""
    return isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    )
