"""Generate multiple-choice arithmetic problems with MathQA's fields and style.

All problems are different, every wrong option is the result of a wrong operation or a slip, and the right option is
equally likely in each of the five places.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pretune.core.config import InputError
from pretune.data.sources.config import WordProblemsSource

VERSION = 1
"""Increment when the same section would give different problems: it is part of the cache key of prepared data."""

LETTERS = "abcde"
MAX_TRIES = 100
"""After this many consecutive draws without a new problem, all problems count as found."""


@dataclass(frozen=True)
class Sum:
    """The arithmetic of a problem: its numbers, the working, the answer, and the results of wrong operations."""

    numbers: tuple[int, ...]
    working: str
    answer: int
    wrong: tuple[int, ...]


Draw = Callable[[random.Random, int], Sum | None]
"""Draws numbers up to a maximum for one kind of problem; None if the draw gives no integer answer in range."""


def rows(config: WordProblemsSource, max_tries: int = MAX_TRIES) -> Iterator[dict[str, str]]:
    """`num_problems` different rows {Problem, Rationale, options, correct, category}, determined by the seed.

    Raises InputError if there are not that many different problems with numbers up to `max_number`.
    """
    random_numbers = random.Random(config.seed)
    seen: set[str] = set()
    for count in range(config.num_problems):
        for _ in range(max_tries):
            row = _problem(random_numbers, config.max_number)
            if row is not None and row["Problem"] not in seen:
                break
        else:
            raise InputError(
                f"word_problems finds only {count} different problems with numbers up to {config.max_number}; lower "
                f"data.source.num_problems ({config.num_problems}) or raise data.source.max_number"
            )
        seen.add(row["Problem"])
        yield row


def _problem(draw: random.Random, max_number: int) -> dict[str, str] | None:
    kind = draw.choice(tuple(TEMPLATES))
    template, unit = draw.choice(TEMPLATES[kind])
    # Retry, because kinds that reject most draws would otherwise be rare. Some are impossible with small numbers.
    made = next(filter(None, (SUMS[kind](draw, max_number) for _ in range(50))), None)
    if made is None:
        return None
    first, second = draw.sample(NAMES, 2)
    words = {"name": first, "other": second, "thing": draw.choice(THINGS), "place": draw.choice(PLACES)}
    letter, options = _options(draw, made, unit)
    return {
        "Problem": template.format(*made.numbers, **words),
        "Rationale": f"explanation : {made.working} = {made.answer} answer : {letter}",
        "options": options,
        "correct": letter,
        "category": kind,
    }


def _options(draw: random.Random, made: Sum, unit: str) -> tuple[str, str]:
    """The right option's letter, and the five options as MathQA writes them."""
    wrong = list(dict.fromkeys(value for value in made.wrong if value > 0 and value != made.answer))
    draw.shuffle(wrong)
    wrong = wrong[:4]
    while len(wrong) < 4:  # a slip in the working
        value = made.answer + draw.choice((-1, 1)) * draw.randint(1, max(5, made.answer // 2))
        if value > 0 and value != made.answer and value not in wrong:
            wrong.append(value)
    right = draw.randrange(5)
    values = [*wrong[:right], made.answer, *wrong[right:]]
    texts = [unit.format(value) for value in values]
    return LETTERS[right], " , ".join(f"{letter} ) {text}" for letter, text in zip(LETTERS, texts, strict=True))


def _add(draw: random.Random, high: int) -> Sum:
    a, b = draw.randint(1, high), draw.randint(1, high)
    return Sum((a, b), f"{a} + {b}", a + b, (abs(a - b), a * b, 2 * a + b, a + 2 * b))


def _subtract(draw: random.Random, high: int) -> Sum | None:
    a, b = draw.randint(1, high), draw.randint(1, high)
    return Sum((a, b), f"{a} - {b}", a - b, (a + b, a * b, a, b)) if a > b else None


def _multiply(draw: random.Random, high: int) -> Sum:
    a, b = draw.randint(2, high), draw.randint(2, high)
    return Sum((a, b), f"{a} * {b}", a * b, (a + b, abs(a - b), a * b + a, a * b + b, (a - 1) * b))


def _divide(draw: random.Random, high: int) -> Sum | None:
    a, b = draw.randint(2, high), draw.randint(2, high)
    return Sum((a, b), f"{a} / {b}", a // b, (a - b, a + b, a * b, a // b + 1)) if a % b == 0 and a > b else None


def _add_three(draw: random.Random, high: int) -> Sum:
    a, b, c = (draw.randint(1, high) for _ in range(3))
    return Sum((a, b, c), f"{a} + {b} + {c}", a + b + c, (a + b, abs(a + b - c), a * b + c, b + c))


def _add_then_subtract(draw: random.Random, high: int) -> Sum | None:
    a, b, c = (draw.randint(1, high) for _ in range(3))
    return Sum((a, b, c), f"{a} + {b} - {c}", a + b - c, (a + b + c, a - b + c, a + b, a - c)) if a + b > c else None


def _subtract_twice(draw: random.Random, high: int) -> Sum | None:
    a, b, c = (draw.randint(1, high) for _ in range(3))
    return Sum((a, b, c), f"{a} - {b} - {c}", a - b - c, (a - b, a + b + c, a - c, a - b + c)) if a > b + c else None


def _multiply_then_add(draw: random.Random, high: int) -> Sum:
    a, b, c = draw.randint(2, min(high, 10)), draw.randint(2, min(high, 10)), draw.randint(1, high)
    return Sum((a, b, c), f"{a} * {b} + {c}", a * b + c, (a * b, a + b + c, a * b - c, a * (b + c)))


def _change(draw: random.Random, high: int) -> Sum | None:
    a, b, c = draw.randint(2, high), draw.randint(2, min(high, 10)), draw.randint(2, min(high, 10))
    return Sum((a, b, c), f"{a} - {b} * {c}", a - b * c, (a - b, a - c, b * c, a + b * c)) if a > b * c else None


def _share_rest(draw: random.Random, high: int) -> Sum | None:
    a, b, c = draw.randint(4, high), draw.randint(1, high), draw.randint(2, min(high, 10))
    if a - b < 2 * c or (a - b) % c:
        return None
    return Sum((a, b, c), f"( {a} - {b} ) / {c}", (a - b) // c, (a - b, a // c, (a + b) // c, a - b - c))


def _average(draw: random.Random, high: int) -> Sum | None:
    a, b = draw.randint(1, high), draw.randint(1, high)
    return Sum((a, b), f"( {a} + {b} ) / 2", (a + b) // 2, (a + b, a, b, a * b)) if (a + b) % 2 == 0 else None


def _average_three(draw: random.Random, high: int) -> Sum | None:
    a, b, c = (draw.randint(1, high) for _ in range(3))
    total = a + b + c
    return Sum((a, b, c), f"( {a} + {b} + {c} ) / 3", total // 3, (total, total // 2, b, c)) if total % 3 == 0 else None


def _percent(draw: random.Random, high: int) -> Sum | None:
    share, whole = draw.choice((5, 10, 20, 25, 40, 50, 75)), draw.randint(1, high)
    if share > high or share * whole % 100:
        return None
    part = share * whole // 100
    return Sum((share, whole), f"{whole} * {share} / 100", part, (whole - part, whole, whole + part, share))


def _percent_off(draw: random.Random, high: int) -> Sum | None:
    made = _percent(draw, high)
    if made is None:
        return None
    (share, whole), part = made.numbers, made.answer
    return Sum((whole, share), f"{whole} - {whole} * {share} / 100", whole - part, (part, whole + part, whole, share))


NAMES = (
    "tom",
    "anna",
    "ravi",
    "maria",
    "john",
    "lucy",
    "sam",
    "priya",
    "david",
    "emma",
    "omar",
    "nina",
    "carl",
    "ella",
)
THINGS = ("apples", "books", "pencils", "marbles", "stamps", "cookies", "cards", "oranges", "shells", "coins", "eggs",
          "toys")  # fmt: skip
PLACES = ("shop", "school", "farm", "library", "market", "factory", "bakery", "garden")

SUMS: dict[str, Draw] = {
    "add": _add, "subtract": _subtract, "multiply": _multiply, "divide": _divide, "add three": _add_three,
    "add then subtract": _add_then_subtract, "subtract twice": _subtract_twice, "multiply then add": _multiply_then_add,
    "change": _change, "share the rest": _share_rest, "average": _average, "average of three": _average_three,
    "percent": _percent, "percent off": _percent_off, "distance": _multiply, "speed": _divide, "price": _multiply,
}  # fmt: skip

TEMPLATES: dict[str, tuple[tuple[str, str], ...]] = {
    "add": (
        ("{name} has {0} {thing} and buys {1} more . how many {thing} does {name} have now ?", "{}"),
        ("there are {0} {thing} in one box and {1} in another . how many {thing} are there in all ?", "{}"),
        ("{name} read {0} pages on monday and {1} pages on tuesday . how many pages did {name} read ?", "{} pages"),
        ("{name} is {0} years old . how old will {name} be in {1} years ?", "{} years"),
    ),
    "subtract": (
        ("{name} had {0} {thing} and gave {1} of them to {other} . how many {thing} does {name} have left ?", "{}"),
        ("a {place} had {0} {thing} and sold {1} . how many {thing} remain ?", "{}"),
        ("{name} has {0} {thing} and {other} has {1} . how many more {thing} does {name} have than {other} ?", "{}"),
        ("a rope is {0} m long . {name} cuts off {1} m . how long is the rest ?", "{} m"),
    ),
    "multiply": (
        ("there are {0} rows with {1} chairs in each row . how many chairs are there ?", "{}"),
        ("each box in a {place} holds {1} {thing} . how many {thing} are there in {0} boxes ?", "{}"),
        ("{name} earns rs . {0} an hour . how much does {name} earn in {1} hours ?", "rs . {}"),
        ("a rectangle is {0} cm long and {1} cm wide . what is its area ?", "{} sq . cm"),
    ),
    "divide": (
        ("{name} shares {0} {thing} equally among {1} friends . how many {thing} does each friend get ?", "{}"),
        ("{0} {thing} are packed into bags of {1} . how many bags are needed ?", "{}"),
        ("a tape of {0} m is cut into {1} equal pieces . how long is each piece ?", "{} m"),
        ("a {place} pays rs . {0} to {1} workers in equal parts . what does each get ?", "rs . {}"),
    ),
    "add three": (
        ("{name} has {0} red , {1} blue and {2} green {thing} . how many {thing} does {name} have ?", "{}"),
        ("a triangle has sides of {0} cm , {1} cm and {2} cm . what is its perimeter ?", "{} cm"),
        ("{name} spent rs . {0} , rs . {1} and rs . {2} at the {place} . how much is that in all ?", "rs . {}"),
    ),
    "add then subtract": (
        ("{name} had {0} {thing} , found {1} more and then lost {2} . how many {thing} are left ?", "{}"),
        ("a bus had {0} people . {1} got on and {2} got off . how many people are on the bus ?", "{}"),
        ("a {place} had {0} {thing} , received {1} and sold {2} . how many {thing} does it have ?", "{}"),
    ),
    "subtract twice": (
        ("{name} had {0} {thing} , gave {1} to {other} and lost {2} . how many {thing} are left ?", "{}"),
        ("a tank held {0} liters . {1} liters leaked and {2} liters were used . how much is left ?", "{} liters"),
        ("{name} had rs . {0} and spent rs . {1} and rs . {2} . how much money is left ?", "rs . {}"),
    ),
    "multiply then add": (
        ("{name} has {0} boxes of {1} {thing} and {2} single ones . how many {thing} does {name} have ?", "{}"),
        ("a taxi costs rs . {0} per km and rs . {2} to start . what does a ride of {1} km cost ?", "rs . {}"),
        ("{name} saves rs . {0} a week for {1} weeks and already had rs . {2} . how much is it now ?", "rs . {}"),
    ),
    "change": (
        ("{name} has rs . {0} and buys {1} {thing} at rs . {2} each . how much money is left ?", "rs . {}"),
        ("a farm of {0} trees loses {1} trees a year for {2} years . how many trees are left ?", "{}"),
        ("{name} had {0} {thing} and gave {1} to each of {2} friends . how many {thing} remain ?", "{}"),
    ),
    "share the rest": (
        ("{name} had {0} {thing} , kept {1} and shared the rest among {2} friends . what did each get ?", "{}"),
        ("from rs . {0} , rs . {1} is paid for rent and the rest is split by {2} . what is a share ?", "rs . {}"),
        ("{1} of {0} {thing} are broken . the others fill {2} boxes equally . how many are in a box ?", "{}"),
    ),
    "average": (
        ("what is the average of {0} and {1} ?", "{}"),
        ("{name} scored {0} and {1} in two games . what is the average score ?", "{}"),
        ("{name} weighs {0} kg and {other} weighs {1} kg . what is their average weight ?", "{} kg"),
    ),
    "average of three": (
        ("what is the average of {0} , {1} and {2} ?", "{}"),
        ("a {place} sold {0} , {1} and {2} {thing} in three days . what is the average a day ?", "{}"),
        ("{name} ran {0} km , {1} km and {2} km . what is the average distance ?", "{} km"),
    ),
    "percent": (
        ("what is {0} % of {1} ?", "{}"),
        ("{0} % of the {1} {thing} in a {place} are old . how many {thing} are old ?", "{}"),
        ("{name} got {0} % of {1} votes . how many votes did {name} get ?", "{} votes"),
    ),
    "percent off": (
        ("a book costs rs . {0} . {name} gets a discount of {1} % . what does {name} pay ?", "rs . {}"),
        ("a {place} had {0} {thing} and sold {1} % of them . how many {thing} are left ?", "{}"),
        ("{name} earns rs . {0} and saves {1} % of it . how much does {name} spend ?", "rs . {}"),
    ),
    "distance": (
        ("a train runs at {0} kmph for {1} hours . how far does it go ?", "{} km"),
        ("{name} walks {0} m in a minute . how many meters does {name} walk in {1} minutes ?", "{} m"),
        ("a pump fills {0} liters in an hour . how many liters does it fill in {1} hours ?", "{} liters"),
    ),
    "speed": (
        ("a car goes {0} km in {1} hours . what is its speed ?", "{} kmph"),
        ("{name} runs {0} km in {1} days , the same each day . how far does {name} run in a day ?", "{} km"),
        ("a tap gives {0} liters in {1} minutes . how many liters does it give in a minute ?", "{} liters"),
    ),
    "price": (
        ("{0} {thing} cost rs . {1} each . what do they cost in all ?", "rs . {}"),
        ("{name} buys {0} tickets at $ {1} each . how much does {name} pay ?", "$ {}"),
        ("a {place} sells {thing} at $ {1} a box . what do {0} boxes cost ?", "$ {}"),
    ),
}
