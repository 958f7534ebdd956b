"""Writes what can be known from the configuration's types: docs/reference.md and src/config/schema.json.

    make schema

The types say what a key may be, the YAML files say what it is; neither says it twice.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema

from pretune.core.config import Section, parse_duration
from pretune.core.files import write_atomic
from pretune.launch.groups import groups, options
from pretune.run.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "src" / "config"
REFERENCE = ROOT / "docs" / "reference.md"
SCHEMA = CONFIGS / "schema.json"
INTERPOLATION = {"type": "string", "pattern": r"\$\{.+\}|^\?\?\?$", "description": "${another.key}, or ??? for open"}
DURATION = {"type": "string", "pattern": r"^\s*(\d+(\.\d+)?\s*[a-zA-Z]+\s*)+$", "description": "90s, 5m, 3h, 1h30m"}


def main() -> None:
    write_atomic(SCHEMA, schema_text())
    write_atomic(REFERENCE, reference_text())
    print(f"wrote {SCHEMA.relative_to(ROOT)} and {REFERENCE.relative_to(ROOT)}")


# ---- the JSON schema, for editors


class EditorSchema(GenerateJsonSchema):
    """RunConfig's schema as an editor needs it while a run file is written.

    A run file holds what differs from base.yaml, so nothing is required; a value may be an interpolation; options of a
    union are told apart by what they hold, since `kind` may come from base.yaml.
    """

    def function_before_schema(self, schema: Any) -> dict[str, Any]:
        inner = self.generate_inner(schema["schema"])
        return {"anyOf": [inner, DURATION]} if schema["function"]["function"] is parse_duration else inner

    def tagged_union_schema(self, schema: Any) -> dict[str, Any]:
        return {"anyOf": super().tagged_union_schema(schema)["oneOf"]}


def schema_text() -> str:
    """The schema of run files."""
    schema = RunConfig.model_json_schema(schema_generator=EditorSchema)
    for section in (schema, *schema["$defs"].values()):
        section.pop("required", None)
        section["properties"] = {name: _open(field) for name, field in section["properties"].items()}
    schema["properties"]["defaults"] = {
        "description": "The options that this file starts from, in Hydra's words: base, overrides of groups, _self_",
        "type": "array",
    }
    schema["title"] = "Pretune run file"
    return json.dumps(schema, indent=1) + "\n"


def _open(field: dict[str, Any]) -> dict[str, Any]:
    """A field's schema, or an interpolation in its place; its description stays where editors look for it."""
    inner = {key: value for key, value in field.items() if key not in ("description", "title")}
    described = {"description": field["description"]} if "description" in field else {}
    options = inner["anyOf"] if set(inner) == {"anyOf"} else [inner]
    return {**described, "anyOf": [*(_open_items(option) for option in options), INTERPOLATION]}


def _open_items(option: dict[str, Any]) -> dict[str, Any]:
    return {**option, "items": {"anyOf": [option["items"], INTERPOLATION]}} if "items" in option else option


# ---- the page of keys, for people


def reference_text() -> str:
    """The page that describes every key."""
    values = yaml_values()
    sections = [(name, field) for name, field in RunConfig.model_fields.items() if next(_sections(field), None)]
    top = [(name, field) for name, field in RunConfig.model_fields.items() if (name, field) not in sections]
    parts = [INTRODUCTION, "## Top level", *_table("", top, values)]
    for name, field in sections:
        parts += [f"## {name}", field.description or "", *_options(name), *_section(name, field, values)]
    return "\n\n".join(part for part in parts if part) + "\n"


INTRODUCTION = """# Every key

<!-- Written by `make schema` from the types in src/pretune and the values in src/config. Do not edit. -->

A key is written as a dotted path: `optimizer.lr=3e-4` on the command line, nested in a YAML file. **Value** is what
`src/config` gives, per option where options differ; `open` means that whoever picks the option must set it. The types
have no defaults: `python src/main.py --config FILE --cfg job` prints every value that a run file ends up with."""


HEADING = ["| key | type | value | meaning |", "|---|---|---|---|"]


def _options(group: str) -> list[str]:
    """A group's options, each with the first sentence of its file's comment."""
    lines = [f"- `{group}={path.stem}`{_about(path)}" for path in sorted((CONFIGS / group).glob("*.yaml"))]
    return ["\n".join(lines)] if lines else []


def _about(path: Path) -> str:
    comment = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.strip("# "))
    first = " ".join(comment).split(". ")[0].rstrip(".")
    return f": {first}" if first else ""


def _section(path: str, field: FieldInfo, values: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The tables of a section, one for each of its kinds, and those of the sections inside it."""
    options = list(_sections(field))
    for option in options:
        kind = option.model_fields.get("kind")
        if len(options) > 1 and kind:
            (tag,) = typing.get_args(kind.annotation)
            yield f"### {path}, kind {tag}"
            yield kind.description or ""
            theirs = {name for name, value in values.get(f"{path}.kind", {}).items() if value == tag}
        else:
            theirs = None
        own = {key: _only(given, theirs) for key, given in values.items()}
        yield from _table(f"{path}.", list(option.model_fields.items()), own, skip_kind=len(options) > 1)
        for name, inner in option.model_fields.items():
            if next(_sections(inner), None):
                yield f"### {path}.{name}"
                yield inner.description or ""
                if typing.get_origin(inner.annotation) is dict:
                    (entry,) = _sections(inner)
                    rows = [_row(f"{path}.{name}.NAME.{key}", field, own) for key, field in entry.model_fields.items()]
                    yield "\n".join([*HEADING, *rows])
                else:
                    yield from _section(f"{path}.{name}", inner, own)


def _only(given: Mapping[str, Any], options: set[str] | None) -> dict[str, Any]:
    return {option: value for option, value in given.items() if options is None or option in options}


def _table(
    prefix: str, fields: list[tuple[str, FieldInfo]], values: Mapping[str, Mapping[str, Any]], skip_kind: bool = False
) -> Iterator[str]:
    rows = [
        _row(prefix + name, field, values)
        for name, field in fields
        if not next(_sections(field), None) and not (skip_kind and name == "kind")
    ]
    if rows:
        yield "\n".join([*HEADING, *rows])


def _row(key: str, field: FieldInfo, values: Mapping[str, Mapping[str, Any]]) -> str:
    sections = any(True for _ in _sections(field))
    type_ = "section" if sections else _cell(_type(field.annotation, tuple(field.metadata)))
    meaning = _cell(field.description or "")
    return f"| `{key}` | {type_} | {_value_of(key, values)} | {meaning} |"


def yaml_values() -> dict[str, dict[str, Any]]:
    """For each dotted key, its value in base.yaml or in each option of its group, common parts included:
    {key: {option: value}}."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        base = _composed("base")
        values = {key: {"base": value} for key, value in _flatten(base, "") if key.partition(".")[0] not in groups()}
        for group in groups():
            for option in [] if "/" in group else options(group):
                for key, value in _flatten(_composed(f"{group}/{option}"), ""):
                    values.setdefault(key, {})[option] = value
    return values


def _composed(name: str) -> dict[str, Any]:
    content = OmegaConf.to_container(compose(name))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _flatten(mapping: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _value_of(key: str, values: Mapping[str, Mapping[str, Any]]) -> str:
    """What the YAML files give: one value, or the options that share each value."""
    by_value: dict[str, list[str]] = {}
    for option, value in values.get(key, {}).items():
        by_value.setdefault(_shown(value), []).append(option)
    if len(by_value) <= 1:
        return next(iter(by_value), "")
    return "<br>".join(f"{value} ({', '.join(options)})" for value, options in by_value.items())


def _shown(value: Any) -> str:
    if value == "???":
        return "open"
    return f"`{_cell(json.dumps(value) if not isinstance(value, str) else value)}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _type(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """A type in words with its range: `int ≥ 1 or null`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        inner, *more = arguments
        return _type(inner, (*metadata, *more))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if option is types.NoneType else _type(option, metadata) for option in arguments)
    if origin is Literal:
        return " or ".join(f"`{option}`" for option in arguments)
    if origin is tuple:
        many = "list" if arguments[-1] is Ellipsis else f"list of {len(arguments)}"
        return f"{many}: {_type(arguments[0])}"
    if origin is dict:
        return f"mapping of names to {_type(arguments[1])}"
    if any(getattr(note, "func", None) is parse_duration for note in metadata):
        return "time > 0 s"
    name = {str: "text", bool: "true or false"}.get(annotation) or str(annotation.__name__)
    return f"{name} {', '.join(_range(metadata))}".strip()


def _range(metadata: tuple[Any, ...]) -> Iterator[str]:
    for note in metadata:
        for inner in (note, *getattr(note, "metadata", ())):
            for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"), ("multiple_of", "multiple of")):
                if getattr(inner, name, None) is not None:
                    yield f"{sign} {getattr(inner, name)}"


def _sections(field: FieldInfo) -> Iterator[type[Section]]:
    """The sections that a field may hold."""

    def inside(annotation: Any) -> Iterator[type[Section]]:
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield annotation
        for argument in typing.get_args(annotation) if not isinstance(annotation, type) else ():
            yield from inside(argument)

    return inside(field.annotation)


if __name__ == "__main__":
    main()
