"""Building blocks of every package's configuration: the base class, shared types, and errors a user can act on.

Nothing here imports torch, so that bad configuration is reported before torch is loaded.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, TypeVar

import pydantic
from pydantic import Field


class UserError(ValueError):
    """An error that the user can fix. Its message says what is wrong, where, and what to do; the exit code is 2."""


class ConfigError(UserError):
    """The configuration is wrong: an unknown key, a value of the wrong type or out of range, sections that disagree."""


class InputError(UserError):
    """Something that the configuration points to is wrong: a file, folder, dataset, checkpoint or the network."""


class Section(pydantic.BaseModel):
    """Base class of every package's configuration: frozen, strict, and an unknown key is an error.

    Sections have no default values: all values come from YAML.
    """

    renamed: ClassVar[Mapping[str, str]] = {}
    """Renamed keys, as dotted paths from this section: old -> new."""

    tag: ClassVar[str] = ""
    """What a union calls this section if its `kind` does not tell."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


_UNITS = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1.0),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), 60.0),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), 3600.0),
    **dict.fromkeys(("d", "day", "days"), 86400.0),
}
_PART = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*")


def parse_duration(value: Any) -> Any:
    """Seconds from a number of seconds or from text such as `90s`, `5m`, `3h`, `1h30m`, `3 hours`.

    Raises ValueError, naming the accepted forms, for any other text; other types are left to the field's own check.
    """
    if not isinstance(value, str):
        return value
    text, seconds, at = value.strip().lower(), 0.0, 0
    while match := _PART.match(text, at):
        number, unit = match.groups()
        if unit not in _UNITS:
            break
        seconds += float(number) * _UNITS[unit]
        at = match.end()
    if not text or at != len(text):
        raise ValueError(f"'{value}' is not a time; write seconds (300) or units: 90s, 5m, 3h, 1h30m, '3 hours'")
    return seconds


Seconds = Annotated[float, pydantic.BeforeValidator(parse_duration), Field(gt=0)]
"""A positive duration in seconds; text with units is accepted."""

FilePath = Annotated[str, pydantic.AfterValidator(os.path.expanduser)]
"""A file or folder on this machine; `~` at its beginning is the home folder."""

Count = Annotated[int, Field(ge=1)]
"""A number of things, at least one."""

Every = Count | None
"""An interval in steps; null means never."""

Fraction = Annotated[float, Field(ge=0, le=1)]
"""A fraction between 0 and 1, inclusive."""

MAY_DIFFER = "may differ on resume"
"""Marks a field (`Annotated[..., MAY_DIFFER]`) that a resume may change, because it affects only what is done with a
run, where it is shown or how fast it computes, not what it computes. On a section it covers all its keys."""

MAX_FAULTS = 12
"""Errors of a configuration that are listed; with a section missing, there are as many as it has keys."""

T = TypeVar("T", bound=Section)


def validate(section: type[T], mapping: Mapping[str, Any]) -> T:
    """Parse a plain mapping as `section`; raise ConfigError with one line per error, suggesting the nearest key."""
    try:
        # JSON mode is strict about types but still turns lists into tuples, which a frozen section needs.
        return section.model_validate_json(json.dumps(mapping))
    except pydantic.ValidationError as error:
        faults = list(_explained(section, error.errors()))
        more = [f"and {len(faults) - MAX_FAULTS} more"] if len(faults) > MAX_FAULTS else []
        raise ConfigError("\n".join(faults[:MAX_FAULTS] + more)) from None


def missing_keys(section: type[Section], mapping: Mapping[str, Any]) -> list[str]:
    """The keys that `mapping` lacks, as dotted paths; a section that is lacking as a whole is one of them."""
    try:
        section.model_validate_json(json.dumps(mapping))
    except pydantic.ValidationError as error:
        paths = (_drop_union_tags(section, fault["loc"])[0] for fault in error.errors() if fault["type"] == "missing")
        return [".".join(map(str, path)) for path in paths]
    return []


def nearest(word: str, candidates: Iterable[str]) -> str:
    """`; did you mean ...?` for a misspelt word, or an empty string when no candidate is close."""
    found = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean '{found[0]}'?" if found else ""


def field_paths(section: type[Section], prefix: str = "") -> Iterator[tuple[str, pydantic.fields.FieldInfo]]:
    """Every key of a section and its nested sections, as dotted paths, in declaration order."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        if typing.get_origin(field.annotation) is dict:
            continue  # its keys are the user's
        for inner in _sections_in(field.annotation):
            yield from field_paths(inner, f"{prefix}{name}.")


def _explained(section: type[Section], faults: Iterable[Any]) -> Iterator[str]:
    """One line per error; the complaints of all members of a union about one value are joined into one line."""
    complaints: dict[str, list[str]] = {}
    for fault in faults:
        subject, complaint = _explain(section, fault)
        complaints.setdefault(subject, []).append(complaint)
    for subject, said in complaints.items():
        # A key may hold a line break.
        named = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in subject)
        yield named + " or ".join([said[0], *(complaint.removeprefix("input should be ") for complaint in said[1:])])


def _explain(section: type[Section], fault: Any) -> tuple[str, str]:
    """The subject of an error (the key, perhaps with its value) and the complaint about it."""
    loc, owner = _drop_union_tags(section, fault["loc"])
    key, complaint = ".".join(str(part) for part in loc), f"{fault['msg'][0].lower()}{fault['msg'][1:]}"
    match fault["type"]:
        case "extra_forbidden" if key in section.renamed:
            return f"'{key}'", f" was renamed to '{section.renamed[key]}'"
        case "extra_forbidden":
            return f"unknown key '{key}'", nearest(str(loc[-1]), owner.model_fields if owner else ())
        case "missing":
            return f"'{key}'", " is missing"
        case "union_tag_invalid" | "union_tag_not_found":
            return f"'{key}.kind': ", complaint
        case "too_short":
            return f"'{key}': ", f"needs at least {fault['ctx']['min_length']}"
        case "value_error":
            return f"'{key}': " if key else "", str(fault["ctx"]["error"])
        case "string_type" if isinstance(fault["input"], int | float):
            return f"'{key}' = {json.dumps(fault['input'])}: ", f"{complaint}; write it in quotes"
        case _:
            got = fault["input"]
            shown = repr(got) if isinstance(got, str | int | float | bool | None) else "a mapping or list"
            return f"'{key}' = {shown}: ", complaint


def _drop_union_tags(section: type[Section], loc: tuple[Any, ...]) -> tuple[list[Any], type[Section] | None]:
    """The path as the user writes it, and the section that contains its last key.

    pydantic's path also contains the tag of a union's section, or the type that it tried; both are dropped.
    """
    path: list[Any] = []
    options: list[type[Section]] = [section]
    owner: type[Section] | None = section
    # What the next part is: the user's own key in a mapping (data.mix.NAME), or a type of a union that pydantic tried.
    names_an_entry = names_a_type = False
    for part in loc:
        tagged = [option for option in options if len(options) > 1 and part in _tags(option)]
        if tagged:
            options = tagged
            continue
        if names_a_type and isinstance(part, str):
            continue
        path.append(part)
        if names_an_entry:
            names_an_entry = False
            continue
        owner = options[0] if options else None
        fields = owner.model_fields if owner else {}
        if isinstance(part, str):
            annotation = fields[part].annotation if part in fields else None
            options = list(_sections_in(annotation))
            names_an_entry = typing.get_origin(annotation) is dict
            names_a_type = typing.get_origin(annotation) in (typing.Union, types.UnionType) and not options
    return path, owner


def _tags(section: type[Section]) -> tuple[Any, ...]:
    kind = section.model_fields.get("kind")
    return typing.get_args(kind.annotation) if kind else (section.tag,)


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType, Annotated, tuple, list, dict):
        for argument in typing.get_args(annotation):
            yield from _sections_in(argument)
