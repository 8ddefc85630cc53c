"""The names of classes that a source tells by numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from duallora_edge.errors import DataError
from duallora_edge.files import read_limited
from duallora_edge.learner.data.folders import checked_name, is_file

NAMES_FILES = ("classnames.txt", "classes.txt")
MAX_NAMES_BYTES = 2**20


class ClassNames:
    """What class numbers mean: positions in ``names``, which ``source`` lists; without names a number is its own."""

    def __init__(self, names: Sequence[str], source: str) -> None:
        """Raises `DataError` where two numbers have one name."""
        self.names, self.source = [checked_name(name) for name in names], source
        self._has_numbers = False
        name, times = next(iter(Counter(self.names).most_common(1)), ("", 0))
        if times > 1:
            raise DataError(f"{source} names the class {name[:40]!r} {times} times; give each number its own name.")

    @classmethod
    def beside(cls, folder: Path) -> ClassNames:
        """The lines of classnames.txt or classes.txt in a folder, where it has one of them."""
        for name in NAMES_FILES:
            if is_file(file := folder / name):
                try:
                    lines = read_limited(file, MAX_NAMES_BYTES).decode().splitlines()
                except (OSError, ValueError) as error:
                    raise DataError(f"{file} cannot be read ({error}); list one class per line in UTF-8.") from error
                return cls([line.strip() for line in lines if line.strip()], str(file))
        return cls([], "")

    def of_number(self, number: int, where: str) -> str:
        """The name of a class number, which stands at ``where``. Raises `DataError` for one that is not listed."""
        if not self.names and number >= 0:
            self._has_numbers = True
            return str(number)
        if not 0 <= number < len(self.names):
            listed = f"{self.source} lists {len(self.names)} classes from 0 on" if self.names else "they start at 0"
            raise DataError(f"{where} has the class number {number}, but {listed}; correct one of them.")
        return self.names[number]

    def notes(self) -> list[str]:
        """How to name classes that are called by their numbers, if there are any."""
        return (
            ["classes have only numbers; list their names in a file classes.txt beside them"]
            if self._has_numbers
            else []
        )
