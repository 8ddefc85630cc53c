"""A setting is declared once: options of the command line, checks, docs/settings.md and examples/train.yaml follow."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

# The groups in the order in which they are shown, each with a sentence about it.
GROUPS = {
    "Essentials": "What most calls set.",
    "Data": "Which images are learned, how they form tasks, and how they are split and resized.",
    "Method": "How much a task may learn, and what protects the tasks before it.",
    "Only task_arithmetic": "Other methods ignore these.",
    "Optimisation": "How long and how fast each task is trained.",
    "Resources": "Where the work runs and what it may use. A memory budget chooses the last four by itself.",
    "Ablations": "Parts of the method that can be exchanged in order to study it.",
}

_WORDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number", tuple: "a list of names"}
_KEY = "setting"


class _Quoted(reprlib.Repr):
    """Values as messages quote them: short, whatever they are."""

    maxlevel, maxstring, maxother = 1, 60, 60

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write out whole numbers of more than 4300 digits."""
        return super().repr_int(x, level) if abs(x) < 2**64 else "a huge number"


quoted = _Quoted().repr


@dataclass(frozen=True)
class Setting:
    """What is known about one setting.

    Attributes:
        help: one sentence for users, with the trade-off where there is one.
        group: a key of `GROUPS`.
        low, high: the range of a number, both ends included.
        choices: the values that a text may have; empty for any.
        unset: what happens without a value, where the default does not tell.
        metavar: the word for a value in the help of the command line.
        flag: whether the command line has an option for it; otherwise it is set in YAML or from Python.
        scope: ``run`` for what defines a run; ``call`` for what later calls of the same run may change; ``source``
            for what says where images come from, which is stored beside each task.
        key, kind, optional, default: the name, type (``str``, ``bool``, ``int``, ``float`` or ``tuple`` of names),
            whether None is allowed, and the default; all taken from the field itself.
    """

    help: str
    group: str
    low: float | None = None
    high: float | None = None
    choices: Collection[str] = ()
    unset: str = ""
    metavar: str = ""
    flag: bool = True
    scope: Literal["run", "call", "source"] = "run"
    key: str = ""
    kind: type = str
    optional: bool = False
    default: Any = None

    def problem(self, value: Any) -> str | None:
        """What is wrong with ``value``, as a clause that begins with the key; None when it is fine."""
        if value is None:
            return None if self.optional else f"{self.key} cannot be null; leave it out for the default"
        if not self._has_type(value):
            hint = ""
            if self.kind is float and isinstance(value, str) and _is_float(value):
                hint = f" (YAML reads this as text; write {float(value)!r})"
            return f"{self.key} must be {_WORDS[self.kind]}, not {quoted(value)}{hint}"
        if self.choices and value not in self.choices:
            near = difflib.get_close_matches(value[:60], self.choices, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            return f"{self.key} must be one of {', '.join(self.choices)}, not {quoted(value)}{hint}"
        if self.low is not None and self.high is not None and not self.low <= value <= self.high:
            return f"{self.key} must be between {_number(self.low)} and {_number(self.high)}, not {quoted(value)}"
        return None

    @property
    def default_text(self) -> str:
        """The default in words."""
        if self.unset:
            return self.unset
        if isinstance(self.default, bool):
            return "yes" if self.default else "no"
        return str(self.default)

    @property
    def range_text(self) -> str:
        """The allowed values in words; empty where the type says it all."""
        if self.choices:
            return ", ".join(self.choices)
        if self.low is not None and self.high is not None:
            return f"{self.low} or more" if self.high >= 2**63 - 1 else f"{_number(self.low)} to {_number(self.high)}"
        return "yes, no" if self.kind is bool else ""

    def _has_type(self, value: Any) -> bool:
        if self.kind is tuple:
            return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
        if self.kind in (int, float):
            kinds = int if self.kind is int else (int, float)
            return isinstance(value, kinds) and not isinstance(value, bool)
        return isinstance(value, self.kind)


def setting(default: Any, help: str, group: str, **more: Any) -> Any:
    """A field of a configuration that declares a setting; ``more`` are attributes of `Setting`."""
    return field(default=default, metadata={_KEY: Setting(help, group, **more)})


def settings_of(config: type) -> dict[str, Setting]:
    """The settings that a dataclass declares, by key."""
    hints = get_type_hints(config)
    found = {}
    for declared in fields(config):
        kind, optional = _kind(hints[declared.name])
        found[declared.name] = replace(
            declared.metadata[_KEY], key=declared.name, kind=kind, optional=optional, default=declared.default
        )
    return found


def sorted_by_group(settings: Mapping[str, Setting]) -> dict[str, list[Setting]]:
    """The settings of each group, in the order of `GROUPS`."""
    return {group: [one for one in settings.values() if one.group == group] for group in GROUPS}


def _kind(hint: Any) -> tuple[type, bool]:
    """``int | None`` as (int, True), ``tuple[str, ...]`` as (tuple, False)."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    (only,) = (part for part in parts if part is not type(None))
    return get_origin(only) or only, len(parts) > 1


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _is_float(text: str) -> bool:
    try:
        return float(text) == float(text)
    except ValueError:
        return False
