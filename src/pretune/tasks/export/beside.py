"""What lies beside the weights in every export: the tokenizer, and what ends a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretune.data.formats.config import chat_format
from pretune.data.tokenizer import Tokenizer
from pretune.run.config import RunConfig
from pretune.run.endings import Endings, run_endings


def write_tokenizer(config: RunConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer's files, with data.format.variables in the chat template: clients do not pass them."""
    section = chat_format(config.data.format)
    if section is None or tokenizer.chat_template is None or not section.variables:
        tokenizer.save(folder)
        return
    given = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {value!r} %}}{{% endif %}}"
        for name, value in section.variables.items()
    )
    # An empty expression at the end, because Jinja removes a newline after a block.
    template = f"{given}{{{{ '' }}}}{tokenizer.chat_template}"
    Tokenizer(tokenizer.backend, tokenizer.eos, tokenizer.bos, template).save(folder)


def what_ends_a_text(config: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """For the JSON file of a format that has none of its own for this: `eos_ids`, and the strings `stop`."""
    ends = run_endings(config, tokenizer)
    return {"eos_ids": sorted(ends.ids), "stop": list(ends.strings)}


def generation_config(eos_id: int, ends: Endings) -> dict[str, Any]:
    """The content of generation_config.json: what ends a text here ends it in transformers. An empty prompt begins with
    EOS, as here. Stop strings need generate(..., tokenizer=tokenizer)."""
    ids = [eos_id, *sorted(ends.ids - {eos_id})]
    content = {"bos_token_id": eos_id, "eos_token_id": ids if len(ids) > 1 else eos_id, "pad_token_id": eos_id}
    return content | ({"stop_strings": list(ends.strings)} if ends.strings else {})
