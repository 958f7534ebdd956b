"""Chat with the model on the terminal."""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import Any

from pretune.core.config import InputError
from pretune.core.terminal import say
from pretune.run.config import RunConfig
from pretune.run.generator import TextGenerator
from pretune.training.signals import Interrupts, Stop

NEW, QUIT = "/new", "/quit"


def chat(generator: TextGenerator, config: RunConfig) -> int:
    """Answer typed questions until the input ends (Ctrl-D, /quit). Ctrl-C ends an answer or, between answers, the
    chat."""
    template = config.generate.template
    turns = template and generator.formatter.has_turns
    say(f"{config.name}: ask something. Ctrl-C ends an answer, Ctrl-D or {QUIT} ends the chat" + (
        f", {NEW} starts another." if turns else "; each question stands alone, as in the run's data."
    ))  # fmt: skip
    start: list[dict[str, Any]] = [{"role": "system", "content": config.generate.system}]
    start = start if turns and config.generate.system else []
    messages = list(start)
    while (question := ask()) is not None:
        if question == NEW:
            messages = list(start)
            continue
        messages = [*(messages if turns else []), {"role": "user", "content": question}]
        try:
            prompt = (
                generator.formatter.render_prompt(messages)
                if template
                else generator.prompt_segments(question, template)
            )
            answer = answer_aloud(generator, generator.ids(prompt))
        except InputError as error:
            say(f"{error}; {NEW} starts another chat")
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})
    return 0


def ask() -> str | None:
    """The next nonempty line; None at the end of the input, at /quit and at Ctrl-C."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # enables line editing and history in `input`
    while True:
        try:
            line = input("\n> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            say()
            return None
        except UnicodeDecodeError as error:
            say(f"cannot read that as text ({error.reason})")
            continue
        if line == QUIT:
            return None
        if line:
            return line


def answer_aloud(generator: TextGenerator, prompt: list[int]) -> str:
    """Stream an answer to the terminal until it ends or is interrupted; return the text so far."""
    answer = ""
    with Interrupts():
        try:
            for piece in generator.stream(prompt):
                say(piece.text, end="")
                answer += piece.text
        except Stop:
            say(" ...", end="")
    say()
    return answer.strip(" ")
