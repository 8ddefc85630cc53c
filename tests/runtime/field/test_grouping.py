"""Groups: what looks alike is together, each frame is in one of them, and the tree leads to all."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duallora_edge.errors import StoreError
from duallora_edge.runtime.field.grouping import grouped
from duallora_edge.runtime.field.keeping import Kept


def kept(index: int, features: np.ndarray, novelty: float = 0.5, version: int = 1) -> Kept:
    return Kept(index, 1.8e9 + index, "site", version, "a", 0.5, novelty, features.astype(np.float16), b"")


def frames_of(counts: dict[int, int], seed: int = 0) -> list[Kept]:
    """Random features, so many frames of each version of a bundle, in any order."""
    rng = np.random.default_rng(seed)
    versions = rng.permutation(np.repeat(list(counts), list(counts.values())))
    features = rng.normal(size=(len(versions), 8))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return [kept(i, x, rng.random(), int(v)) for i, (x, v) in enumerate(zip(features, versions, strict=True))]


@given(st.dictionaries(st.integers(1, 3), st.integers(1, 12), max_size=3), st.integers(0, 100))
def test_each_frame_is_in_one_group_and_the_tree_joins_all(counts: dict[int, int], seed: int) -> None:
    frames = frames_of(counts, seed)
    pairs, groups = grouped(frames)
    assert sorted(index for group in groups for index in group) == list(range(len(frames)))
    assert all(len({frames[index].version for index in group}) == 1 for group in groups)
    assert len(pairs) == max(len(frames) - 1, 0)
    below: list[set[int]] = [{index} for index in range(len(frames))]
    for left, right in pairs:
        assert left < len(below) and right < len(below) and not below[left] & below[right]
        below.append(below[left] | below[right])
    assert not frames or below[-1] == set(range(len(frames)))
    novelty = [np.mean([frames[index].novelty for index in group]) for group in groups]
    assert novelty == sorted(novelty, reverse=True)


def test_kinds_are_apart() -> None:
    rng = np.random.default_rng(0)
    kinds = np.repeat(np.arange(5), 40)
    centres = rng.normal(size=(5, 32))
    features = centres[kinds] + 0.3 * rng.normal(size=(200, 32))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    _, groups = grouped([kept(index, each) for index, each in enumerate(features)])
    assert len(groups) == 14 and all(len(set(kinds[group])) == 1 for group in groups)


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.cluster.hierarchy", None)
    with pytest.raises(StoreError, match="pip install 'scipy>="):
        grouped(frames_of({1: 3}))
