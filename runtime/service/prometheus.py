"""The text format of Prometheus, version 0.0.4: https://prometheus.io/docs/instrumenting/exposition_formats/."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
PREFIX = "duallora_edge_"


class Histogram:
    """Counts of values in seconds up to each of `BUCKETS_S`, and above."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS_S) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        """Count a value."""
        self.counts[bisect_left(BUCKETS_S, seconds)] += 1
        self.sum += seconds

    def copy(self) -> Histogram:
        """The same at this moment."""
        other = Histogram()
        other.counts, other.sum = list(self.counts), self.sum
        return other


def counter(name: str, words: str, value: float) -> str:
    """A number that only grows; ``name`` ends in ``_total``."""
    return f"{_head(name, 'counter', words)}{PREFIX}{name} {value}\n"


def gauge(name: str, words: str, value: float | None) -> str:
    """A number that rises and falls; nothing where it is None."""
    return "" if value is None else f"{_head(name, 'gauge', words)}{PREFIX}{name} {value}\n"


def info(name: str, words: str, labels: Mapping[str, str]) -> str:
    """Texts, as labels of a gauge that is always 1."""
    pairs = ",".join(f'{key}="{_escape(text)}"' for key, text in labels.items())
    return f"{_head(name, 'gauge', words)}{PREFIX}{name}{{{pairs}}} 1\n"


def histogram(name: str, words: str, values: Histogram) -> str:
    """Counts in buckets, their sum and number."""
    lines, total = [_head(name, "histogram", words)], 0
    for bound, count in zip((*map(str, BUCKETS_S), "+Inf"), values.counts, strict=True):
        total += count
        lines.append(f'{PREFIX}{name}_bucket{{le="{bound}"}} {total}\n')
    return "".join((*lines, f"{PREFIX}{name}_sum {values.sum}\n", f"{PREFIX}{name}_count {total}\n"))


def _head(name: str, kind: str, words: str) -> str:
    return f"# HELP {PREFIX}{name} {words}\n# TYPE {PREFIX}{name} {kind}\n"


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
