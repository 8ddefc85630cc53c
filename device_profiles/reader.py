"""Reading a YAML file that may hold anything: within limits, and with all its problems reported at once."""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from duallora_edge.errors import ProfileError

MAX_BYTES = 16 * 2**10
MAX_TEXT = 2000


def read_yaml(path: Path) -> Any:
    """Parse a YAML file of at most `MAX_BYTES`.

    Raises `ProfileError` when it cannot be read, is too large, or is not plain YAML. Anchors are refused:
    profiles do not need them, and a few nested ones can expand to gigabytes.
    """
    import yaml  # here, for whoever reads a bundle needs only `Section`

    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ProfileError(f"{path} cannot be read ({error.strerror}); give the path of a YAML file.") from error
    if len(raw) > MAX_BYTES:
        raise ProfileError(f"{path} is larger than {MAX_BYTES // 1024} KiB, so it is not a device profile.")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(raw, Loader=loader)):
            raise ProfileError(f"{path} uses a YAML alias (*name); write the value out.")
        return yaml.load(raw, Loader=loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = " ".join(str(error).split())[:200]
        raise ProfileError(f"{path} is not valid YAML ({where}); correct it.") from error


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` with a leading space, or an empty string if nothing is similar."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


class Section:
    """One mapping of a YAML file. Every problem is added, with its dotted path, to one list for the file.

    A getter that finds a problem returns an empty value of its type, so that reading goes on; the caller
    raises at the end when the list is not empty.
    """

    def __init__(self, value: object, path: str, problems: list[str]) -> None:
        self.path = path
        self.problems = problems
        self.asked: list[str] = []
        self.values: dict[Any, Any] = value if isinstance(value, dict) else {}
        if not isinstance(value, dict):
            self.problem("", f"must be a mapping of keys to values, not {reprlib.repr(value)}")

    def problem(self, key: str, what: str) -> None:
        dotted = ".".join(part for part in (self.path, key) if part) or "file"
        self.problems.append(f"{dotted}: {what}")

    def has(self, key: str) -> bool:
        self.asked.append(key)
        return key in self.values

    def _get(self, key: str, expected: str) -> Any:
        if not self.has(key):
            self.problem(key, f"is missing; give {expected}")
        return self.values.get(key)

    def _wrong(self, key: str, expected: str) -> None:
        if key in self.values:  # otherwise reported as missing
            self.problem(key, f"must be {expected}, not {reprlib.repr(self.values[key])}")

    def section(self, key: str) -> Section:
        value = self._get(key, "a mapping")
        path = f"{self.path}.{key}" if self.path else key
        return Section(value if key in self.values else {}, path, self.problems)

    def text(self, key: str, expected: str = "text") -> str:
        value = self._get(key, expected)
        if isinstance(value, str) and 0 < len(value) <= MAX_TEXT:
            return value
        self._wrong(key, "text in quotes" if isinstance(value, (int, float)) else expected)
        return ""

    def choice(self, key: str, choices: Iterable[str]) -> str:
        known = list(choices)
        value = self.text(key, "one of " + ", ".join(known))
        if value and value not in known:
            hint = did_you_mean(value, known) or f" Use one of {', '.join(known)}."
            self.problem(key, f"{reprlib.repr(value)} is unknown.{hint}")
        return value

    def number(self, key: str, low: float, high: float) -> float:
        """A finite number in ``low..high``."""
        expected = f"a number from {low:g} to {high:g}"
        value = self._get(key, expected)
        if _is_number(value) and low <= value <= high:
            return float(value)
        self._wrong(key, expected)
        return low

    def integer(self, key: str, low: int, high: int) -> int:
        expected = f"a whole number from {low} to {high}"
        value = self._get(key, expected)
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        self._wrong(key, expected)
        return low

    def boolean(self, key: str) -> bool:
        value = self._get(key, "true or false")
        if not isinstance(value, bool):
            self._wrong(key, "true or false")
        return value is True

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._get(key, "a list of texts")
        if isinstance(value, list) and all(isinstance(item, str) and 0 < len(item) <= MAX_TEXT for item in value):
            return tuple(value)
        self._wrong(key, "a list of texts")
        return ()

    def numbers(self, key: str, low: float, high: float) -> tuple[float, ...]:
        expected = f"a list of numbers from {low:g} to {high:g}"
        value = self._get(key, expected)
        if isinstance(value, list) and value and all(_is_number(item) and low <= item <= high for item in value):
            return tuple(float(item) for item in value)
        self._wrong(key, expected)
        return ()

    def finish(self) -> None:
        """Report unknown keys."""
        for key in self.values:
            if key not in self.asked:
                self.problem("", f"unknown key {reprlib.repr(key)}.{did_you_mean(str(key), self.asked)}")


def _is_number(value: object) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
