"""What lies beside the weights in every export: the tokenizer, and what begins and ends a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretune.data.formats.build import build_formatter
from pretune.data.formats.config import chat_format
from pretune.data.tokenizer import Tokenizer
from pretune.run.config import RunConfig
from pretune.run.endings import Endings, run_endings


def write_tokenizer(config: RunConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer's files. Clients render its chat template and add nothing to that, so the template of a run
    on chats gets what they do not pass, data.format.variables, and the BOS that began each chat, if it lacks it."""
    section = chat_format(config.data.format)
    if section is None or tokenizer.chat_template is None:
        tokenizer.save(folder)
        return
    prompt = build_formatter(config.data.format, tokenizer.template_tokens).render_prompt(
        [{"role": "user", "content": "?"}]
    )
    lacking = tokenizer.document_start(tokenizer.encode_segments(prompt))
    first = "".join(str(tokenizer.backend.id_to_token(one)) for one in lacking)
    given = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {value!r} %}}{{% endif %}}"
        for name, value in section.variables.items()
    )
    if given or first:
        # Jinja removes a newline after a block, but not after an expression, which may be empty.
        tokenizer = tokenizer.with_template(f"{given}{{{{ {first!r} }}}}{tokenizer.chat_template}")
    tokenizer.save(folder)


def what_ends_a_text(config: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """For the JSON file of a format that has none of its own for this: `bos_ids`, which begin a text, `eos_ids`, and
    the strings `stop`."""
    ends = run_endings(config, tokenizer)
    return {"bos_ids": [*tokenizer.beginning], "eos_ids": sorted(ends.ids), "stop": list(ends.strings)}


def generation_config(tokenizer: Tokenizer, ends: Endings) -> dict[str, Any]:
    """The content of generation_config.json: what ends a text here ends it in transformers. An empty prompt begins with
    BOS or, where the tokenizer puts none before a text, with EOS, as here. Stop strings need generate(...,
    tokenizer=tokenizer)."""
    eos_id = tokenizer.eos_id
    ids, bos_id = [eos_id, *sorted(ends.ids - {eos_id})], [*tokenizer.beginning, eos_id][0]
    content = {"bos_token_id": bos_id, "eos_token_id": ids if len(ids) > 1 else eos_id, "pad_token_id": eos_id}
    return content | ({"stop_strings": list(ends.strings)} if ends.strings else {})
