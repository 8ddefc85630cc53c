"""Reading a YAML file that anybody may have written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from duallora_edge.errors import ConfigError
from duallora_edge.learner.settings import quoted

MAX_YAML_BYTES = 1 << 16
MAX_YAML_DEPTH = 20


def read_yaml(path: Path) -> dict[Any, Any]:
    """The keys and values of a YAML file. Raises `ConfigError` when it cannot be read as such.

    Aliases are refused: settings do not need them, and a few lines of nested ones unfold to gigabytes. So is deep
    nesting, on which libyaml crashes.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_YAML_BYTES + 1)
        if len(raw) > MAX_YAML_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_YAML_BYTES} bytes; shorten it.")
        content = raw.decode()
        depth = 0
        for event in yaml.parse(content, Loader=loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(f"{path} uses a YAML alias (*{quoted(event.anchor)[1:-1]}); write the value out.")
            if depth > MAX_YAML_DEPTH:
                raise ConfigError(f"{path} is nested too deeply; write it flat.")
        value = yaml.load(content, Loader=loader)
    except (OSError, ValueError, ArithmeticError, yaml.YAMLError) as error:  # 2024-99-99, no UTF-8, 1:1:...:1.0
        reason = str(error).splitlines() or [type(error).__name__]
        raise ConfigError(f"{path} cannot be read as YAML ({reason[0][:200]}); correct it or leave it out.") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold keys and values, not a {type(value).__name__}.")
    return value
