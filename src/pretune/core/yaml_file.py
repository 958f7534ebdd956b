"""YAML files, as OmegaConf reads them, at the speed of libyaml."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any


def read_yaml(path: Path) -> Any:
    """What the file holds by OmegaConf's rules: `1e-3` is a number, no key comes twice, `${...}` is resolved. Its own
    reader, in Python, takes ten times as long, and the configurations of a chain of runs are read many times.

    Raises OSError, UnicodeDecodeError, yaml.YAMLError or OmegaConfBaseException if it cannot be read.
    """
    import yaml
    from omegaconf import OmegaConf

    text = path.read_text(encoding="utf-8")
    found = yaml.load(text, Loader=_loader())
    return OmegaConf.to_container(OmegaConf.create(found), resolve=True) if "${" in text else found


@functools.cache
def _loader() -> Any:
    import yaml
    from omegaconf._utils import get_yaml_loader

    if not yaml.__with_libyaml__:
        return get_yaml_loader()
    from yaml.constructor import SafeConstructor
    from yaml.cyaml import CParser  # pyright: ignore[reportAttributeAccessIssue]
    from yaml.resolver import Resolver

    class Loader(CParser, get_yaml_loader()):
        def __init__(self, stream: str) -> None:
            CParser.__init__(self, stream)
            SafeConstructor.__init__(self)
            Resolver.__init__(self)

    return Loader
