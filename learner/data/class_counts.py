"""How many images each class has, in words, and what is to be feared of it."""

from __future__ import annotations

from collections.abc import Mapping

# Fewer images of a class than this are few; more than this many times as many as of another class are lopsided.
FEW, LOPSIDED = 10, 20
_MOST_NAMES = 12
_ENDS = 3
_NAME = 40


def describe_counts(counts: Mapping[str, int]) -> str:
    """One line: each class with its images, or of many classes the largest and the smallest."""
    ordered = sorted(counts, key=lambda name: (-counts[name], name))
    if len(ordered) <= _MOST_NAMES:
        return ", ".join(f"{_short(name)} {counts[name]}" for name in sorted(counts))
    most, fewest = counts[ordered[0]], counts[ordered[-1]]
    if most == fewest:
        names = [_short(name) for name in ordered]
        return f"{len(ordered)} classes of {most} each: {', '.join([*names[:_ENDS], '...', *names[-_ENDS:]])}"
    ends = [
        ", ".join(f"{_short(name)} {counts[name]}" for name in part) for part in (ordered[:_ENDS], ordered[-_ENDS:])
    ]
    return f"{len(ordered)} classes: most of {ends[0]}; fewest of {ends[1]}"


def concerns(counts: Mapping[str, int], *, alone: bool) -> list[str]:
    """What the images of a task make likely, in one sentence each.

    ``alone``: the run will know no other class than these.
    """
    found = []
    ordered = sorted(counts, key=lambda name: (counts[name], name))
    small, large = _short(ordered[0]), _short(ordered[-1])
    fewest, most = counts[ordered[0]], counts[ordered[-1]]
    if alone and len(ordered) == 1:
        found.append(
            f"{small!r} is the only class, so every image is answered with it and 100 % mean nothing; give images of "
            "what it is to be told from, in one folder per class"
        )
    if few := [name for name in ordered if counts[name] < FEW]:
        named = ", ".join(
            [*(f"{_short(name)} {counts[name]}" for name in few[:_ENDS]), *(["..."] if len(few) > _ENDS else [])]
        )
        which = f"{len(few)} of {len(ordered)} classes {'have' if len(few) > 1 else 'has'}"
        if len(few) == len(ordered):
            which = "Every class has" if len(few) > 1 else "The class has"
        found.append(
            f"{which} fewer than {FEW} images to learn from ({named}), so answers depend on which these are, and "
            "confidence is a guess; add images, or make more of them with --views"
        )
    if most > LOPSIDED * fewest:
        found.append(
            f"{large!r} has {most} images and {small!r} has {fewest}, so accuracy is mostly that of {large!r} and can "
            f"be high while {small!r} is never found; add images of rare classes"
        )
    return found


def _short(name: str) -> str:
    return name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"
