"""Groups of kept frames that look alike, for somebody who names them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from duallora_edge.errors import StoreError
from duallora_edge.extras import install_hint
from duallora_edge.runtime.field.keeping import Kept

Pair = tuple[int, int]


def grouped(frames: Sequence[Kept]) -> tuple[list[Pair], list[list[int]]]:
    """A tree over n frames and about as many groups as the square root of n, the most novel one first.

    Node i below n is frame i, node n + j is what pair j joins; the last pair joins everything. Ward's method on the
    unit features (of scenes, hand signs and small photos it made the purest groups, measured). Features of different
    bundles cannot be compared, so their frames are in groups of their own. Raises `StoreError` without SciPy.
    """
    try:
        from scipy.cluster.hierarchy import cut_tree, linkage
    except ImportError as error:
        raise StoreError(f"Groups need SciPy ({error}): {install_hint('label')}") from error

    made_by: dict[tuple[str, int], list[int]] = {}
    for index, frame in enumerate(frames):
        made_by.setdefault((frame.bundle, frame.version), []).append(index)
    pairs: list[Pair] = []
    groups: list[list[int]] = []
    top: int | None = None
    for members in made_by.values():
        if len(members) == 1:
            groups.append(members)
            root = members[0]
        else:
            tree = linkage(np.stack([frames[index].features for index in members]).astype(np.float64), "ward")
            node = [*members, *range(len(frames) + len(pairs), len(frames) + len(pairs) + len(tree))]
            pairs += [(node[int(left)], node[int(right)]) for left, right, *_ in tree]
            number = cut_tree(tree, round(len(members) ** 0.5))[:, 0]
            groups += [[members[i] for i in np.flatnonzero(number == each)] for each in np.unique(number)]
            root = node[-1]
        if top is not None:
            pairs.append((top, root))
            root = len(frames) + len(pairs) - 1
        top = root
    groups.sort(key=lambda group: -float(np.mean([frames[index].novelty for index in group])))
    return pairs, groups
