"""Templates are programs of others: they end, or they are refused in one line."""

from __future__ import annotations

import signal
import threading

import pytest

from pretune.core.config import ConfigError
from pretune.core.time_limit import time_limit
from pretune.data.formats.conversations import Conversation
from pretune.data.formats.messages import Turn
from pretune.data.formats.rendering import CHARACTERS, Template

CHAT = Conversation([Turn({"role": "user", "content": "hi"}, None)])
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
ENDS = "{% endfor %}{% endfor %}{% endfor %}"
CALLS = (
    "{% macro f(n) %}{% for i in [1, 2, 3] %}{% if n %}{{ f(n - 1) }}{% endif %}{% endfor %}{% endmacro %}{{ f(60) }}"
)


@pytest.mark.parametrize("text", [LOOPS + ENDS, CALLS], ids=["loops", "calls"])
def test_a_template_that_does_not_end_is_stopped(text: str) -> None:
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(ConfigError, match=r"the chat template fails: .*(takes longer than 0\.2 s|recursion)"):
        Template(text, {}, seconds=0.2).render(CHAT)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_an_error_in_handling_the_end_of_the_time_is_the_end_of_the_time() -> None:
    def fails() -> None:
        try:
            while True:
                pass
        except TimeoutError as error:
            raise TypeError("no line number") from error

    with pytest.raises(TimeoutError, match=r"takes longer than 0\.05 s"), time_limit(0.05):
        fails()
    with pytest.raises(TypeError, match="no number"), time_limit(60):
        raise TypeError("no number")


@pytest.mark.parametrize("size", [CHARACTERS + 1, 2**62], ids=["long", "endless"])
def test_a_template_that_writes_too_much_is_refused(size: int) -> None:
    with pytest.raises(
        ConfigError, match=r"the chat template (writes 16,777,217 characters|fails: (Memory|Overflow)Error)"
    ):
        Template("{{ 'x' * " + str(size) + " }}", {}).render(CHAT)


def test_a_block_within_its_time_is_left_alone_in_any_thread() -> None:
    with time_limit(60):
        pass
    passed = []

    def work() -> None:
        with time_limit(60):
            passed.append(Template("{{ messages[0]['content'] }}", {}).render(CHAT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert passed == ["hi"]
