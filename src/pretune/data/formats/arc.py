"""Tasks of grids, as in the Abstraction and Reasoning Corpus: the pairs and a test's input, then its output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pretune.data.formats.config import ArcFormat
from pretune.data.formats.formatter import Formatter
from pretune.data.formats.grid_variants import leave_one_out, variants
from pretune.data.formats.grids import GridTask, GridText, Pair, read_task
from pretune.data.formats.messages import Message, Turn
from pretune.data.formats.segments import Place, Segment, Unusable
from pretune.data.sources.rows import Row


class Arc(Formatter):
    """Rows of id, train and test; `template` writes the prompt and its answer."""

    columns = frozenset({"id", "train", "test"})

    def __init__(self, config: ArcFormat, template: Formatter) -> None:
        self._config, self._template, self.text = config, template, GridText(config.grid)
        self.end_of_turn, self.has_turns = template.end_of_turn, template.has_turns

    def documents(self, row: Row, place: Place) -> list[list[Segment]]:
        task = read_task(row, place)
        found = [document for one in self._examples(task) for document in self.example(one, place)]
        if not found:
            raise Unusable("none of its tests has an output")
        return found

    def example(self, task: GridTask, place: Place) -> list[list[Segment]]:
        """The document of a task's first test, which has an output, after its pairs."""
        test = task.test[0]
        assert test.output is not None
        said: list[Message] = [
            {"role": "user", "content": self._question(task.train, test)},
            {"role": "assistant", "content": self.text.write(test.output)},
        ]
        return self._template.answer_documents([Turn(message, None) for message in said], {}, place)

    def ask(self, task: GridTask, test: Pair) -> list[Segment]:
        """The prompt for a test of a task, whether its output is known or not."""
        return self.render_prompt([{"role": "user", "content": self._question(task.train, test)}])

    def prompt(self, row: Row, place: Place) -> list[Segment]:
        task = read_task(row, place)
        return self.ask(task, task.test[0])

    def render_prompt(self, messages: Sequence[Message]) -> list[Segment]:
        return self._template.render_prompt(messages)

    def task(self, row: Row, place: Place) -> GridTask:
        return read_task(row, place)

    def _examples(self, task: GridTask) -> Iterator[GridTask]:
        """A task with a single test for all that is learned from it: each test with an output in each variant."""
        tests = [GridTask(task.name, task.train, (test,)) for test in task.test if test.output is not None]
        for one in (*tests, *(leave_one_out(task) if self._config.leave_one_out else ())):
            for variant in variants(one, self._config.augment):
                yield variant.of_task(one)

    def _question(self, pairs: Sequence[Pair], test: Pair) -> str:
        write = self.text.write
        shown = "".join(f"input\n{write(one.input)}\noutput\n{write(one.output)}\n\n" for one in pairs if one.output)
        before = f"{self._config.instruction}\n\n" if self._config.instruction else ""
        return f"{before}{shown}input\n{write(test.input)}\noutput\n"
