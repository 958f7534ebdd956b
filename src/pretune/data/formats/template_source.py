"""Where a chat template comes from: Jinja text, a file, another model, or one of those below, for base models.

Those below are the turns of three families, without a system message or a date of their own. They write no BOS, because
a document begins with it where the tokenizer has it so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretune.core.config import ConfigError, InputError, nearest
from pretune.data.formats.config import ChatFormat, FormatConfig, chat_format
from pretune.data.formats.special_tokens import TemplateTokens
from pretune.data.sources import hub
from pretune.data.tokenizer_files import ABOUT, CHAT_TEMPLATE, TOKENIZER, read_keys, saved_template

_CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
_LLAMA3 = """\
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
_GEMMA = """\
{%- set told = messages[0].content | trim + '\\n\\n' if messages[0].role == 'system' else '' %}
{%- for message in (messages[1:] if told else messages) %}
{%- set role = 'model' if message.role == 'assistant' else message.role %}
{{- '<start_of_turn>' + role + '\\n' + (told if loop.first else '') + message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<start_of_turn>model\\n' }}
{%- endif %}
"""

_MARKER = re.compile(r"<\|[^\s|<>{}'\"]+\|>")
"""What special tokens of chat templates mostly look like."""


@dataclass(frozen=True)
class TemplateSource:
    """A template's text, and the special tokens of the tokenizer that it was written for, as far as they are known."""

    text: str
    special: tuple[str, ...] = ()


NAMED = {
    "chatml": TemplateSource(_CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama3": TemplateSource(_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "gemma": TemplateSource(_GEMMA, ("<start_of_turn>", "<end_of_turn>")),
}
"""The templates that come with Pretune, by their names in data.format.template."""


def template_of(section: ChatFormat, tokens: TemplateTokens) -> str | None:
    """The text of the template of a section: what data.format.template names, or else the tokenizer's own, which is
    None if it has none. A tokenizer keeps the template that was copied for it, so that a run needs no other place.

    Raises ConfigError for a template that writes special tokens which the tokenizer lacks, and what template_source
    raises.
    """
    if section.template is None or section.template == tokens.template_from:
        return tokens.template
    source = template_source(section.template)
    if lacking := [one for one in source.special if one in source.text and not tokens.has(one)]:
        raise ConfigError(
            f"data.format.template = {section.template} writes {', '.join(lacking)}, which the tokenizer does not "
            "have; append them with data.tokenizer.add_tokens=template, or choose a template that needs no tokens of "
            "its own, such as data/format=chat_plain"
        )
    return source.text


def rendered_by(format: FormatConfig, tokens: TemplateTokens) -> dict[str, Any] | None:
    """What a format's chat template writes depends on, beside its section: the key of caches; None without one. A
    template is not always in the section: it may be the tokenizer's own, or in a file that the section names."""
    chat = chat_format(format)
    if chat is None:
        return None
    text = template_of(chat, tokens)
    return {"template": text, "bos": tokens.bos, "eos": tokens.eos, "special": tokens.special}


def written_tokens(section: ChatFormat, tokens: TemplateTokens) -> tuple[str, ...]:
    """The special tokens that the template of a section writes: those of the tokenizer that it was written for or,
    where that is not known, whatever has the form <|name|>.

    Raises what template_source raises.
    """
    own = section.template is None or section.template == tokens.template_from
    source = TemplateSource(tokens.template or "") if own else template_source(section.template or "")
    return tuple(one for one in source.special if one in source.text) or tuple(_MARKER.findall(source.text))


def is_jinja(value: str) -> bool:
    """Whether a data.format.template is a template itself, and no place to take one from."""
    return "{{" in value or "{%" in value


def template_source(value: str) -> TemplateSource:
    """The template that `data.format.template` names: Jinja text, which has braces, or a name of NAMED, a file with
    Jinja text, the folder of a model, or `owner/name` on the hub, whose template is copied.

    Raises ConfigError for a value that is none of these, InputError for a place without a template.
    """
    if is_jinja(value):
        return TemplateSource(value)
    if value in NAMED:
        return NAMED[value]
    path = Path(value).expanduser()
    if path.is_dir():
        return _of_folder(path, value)
    if path.is_file():
        try:
            return TemplateSource(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"data.format.template: cannot read {path} as text ({error})") from None
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", value) and path.suffix != ".jinja":
        return _of_folder(hub_folder(value), value)
    raise ConfigError(
        f"data.format.template = {value[:60]!r} is no Jinja text, and there is no such file or folder; the templates "
        f"that come with Pretune are {', '.join(NAMED)}{nearest(value, NAMED)}"
    )


def hub_folder(repository: str) -> Path:
    """The folder in the Hugging Face cache with what says a model's chat template."""
    about = hub.download_file(repository, ABOUT)
    if saved_template(about.parent, read_keys(about)) is None:
        hub.download_file(repository, CHAT_TEMPLATE)
    return about.parent


def _of_folder(folder: Path, value: str) -> TemplateSource:
    about = read_keys(folder / ABOUT)
    text = saved_template(folder, about)
    if text is None:
        raise InputError(f"data.format.template: '{value}' has no chat template; name an instruction-tuned model")
    listed = about.get("added_tokens_decoder")
    added: list[Any] = (
        [*listed.values()] if isinstance(listed, dict) else read_keys(folder / TOKENIZER).get("added_tokens", [])
    )
    known = [one for one in added if isinstance(one, dict) and isinstance(one.get("content"), str)]
    return TemplateSource(text, tuple(one["content"] for one in known if one.get("special")))
