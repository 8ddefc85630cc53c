"""Blocks of a benchmark's output, as text in aligned columns or as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Block:
    """A title; facts (name, value); a table whose first row names its columns; and lines. What is empty is left out."""

    title: str
    facts: Sequence[tuple[str, str]] = ()
    rows: Rows = ()
    lines: Sequence[str] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing but the title."""
        return not (self.facts or self.rows or self.lines)


def as_text(blocks: Iterable[Block]) -> str:
    """The blocks for a terminal."""
    return "\n\n".join("\n".join([block.title, *_body(block)]) for block in blocks if not block.empty)


def _body(block: Block) -> list[str]:
    width = max((len(name) for name, _ in block.facts), default=0)
    facts = [f"  {name:<{width}}  {value}" for name, value in block.facts]
    return [*facts, *_columns(block.rows), *(f"  {line}" for line in block.lines)]


def as_markdown(blocks: Iterable[Block], title: str) -> str:
    """The blocks as a Markdown document with a title."""
    parts = [f"# {_cell(title)}"]
    for block in blocks:
        if block.empty:
            continue
        parts.append(f"## {_cell(block.title)}")
        if block.facts:
            parts.append("\n".join(f"- {_cell(name)}: {_cell(value)}" for name, value in block.facts))
        if block.rows:
            head, *rest = ["| " + " | ".join(map(_cell, row)) + " |" for row in block.rows]
            rule = "|---|" + "---:|" * (len(block.rows[0]) - 1)
            parts.append("\n".join([head, rule, *rest]))
        if block.lines:
            parts.append("\n".join(f"- {_cell(line)}" for line in block.lines))
    return "\n\n".join(parts) + "\n"


def printable(text: str) -> str:
    """Text from a file, without what would steer a terminal or break a line."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def _columns(rows: Rows) -> list[str]:
    if not rows:
        return []
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([f"  {row[0]:<{first}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths, strict=True))])
        for row in rows
    ]
