"""Features of all images of a task, and the second moments of what the projections of each block read for them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from duallora_edge.learner import distributed
from duallora_edge.learner.network.adapters import AdaptedBlock, Collect, Rows
from duallora_edge.learner.network.backbone import Backbone, autocast
from duallora_edge.learner.network.network import Network, run_suffix
from duallora_edge.learner.network.prefix_cache import Encoded
from duallora_edge.learner.statistics.subspace import second_moment
from duallora_edge.learner.timing import phase, timed

Moments = list[tuple[Tensor, Tensor]]
"""Second moments, float64 [d, d], of what the query and the value projection of each adapted block read."""


@torch.no_grad()
def collect_features(
    network: Network, encoded: Encoded, precision: str, collect: Collect = "none"
) -> tuple[Tensor, Moments]:
    """Features [f ; phi], float32 [n, D], of all images under the gates of inference, and the second moments.

    Matrix multiplications run in ``precision``. What enters the moments is chosen by ``collect`` (see `run_suffix`);
    for ``none`` there are no moments. Everything is on the CPU.
    """
    features: list[Tensor] = []
    moments: Moments = []

    def run(tokens: Tensor, phi: Tensor) -> tuple[Tensor, list[Rows]]:
        with autocast(precision, network.backbone.device):
            batch, rows = network.from_prefix(tokens, phi, collect=collect)
        return batch.float().cpu(), rows

    for indices, tokens, phi in encoded.batches():
        if encoded.cache is not None and network.is_untouched and collect == "none":
            features.append(
                encoded.cache.features(network.backbone, encoded.frames(indices), partial(run, tokens, phi))
            )
            continue
        batch, rows = run(tokens, phi)
        features.append(batch)
        if rows:
            moments = add_moments(moments, rows)
    size = network.backbone.dim + network.backbone.summary_dim
    known = torch.cat(features) if features else torch.zeros(0, size)
    if collect != "none":
        moments = all_reduce_moments(moments, network.backbone)
    return distributed.all_gather(known, encoded.counts), moments


@torch.no_grad()
def suffix_features(
    backbone: Backbone, blocks: Sequence[AdaptedBlock], encoded: Encoded, precision: str, collect: Collect
) -> tuple[Tensor, Moments]:
    """Features f, float32 [n, d], of all images behind the suffix ``blocks`` as they are, and the second moments.

    Unlike `collect_features` it has no dynamic memory: blocks must not have a gate map.
    """
    features: list[Tensor] = []
    moments: Moments = []
    for _, tokens, _ in encoded.batches():
        with phase("suffix forward"), autocast(precision, backbone.device):
            f, rows = run_suffix(backbone, blocks, tokens, collect=collect)
        moments = add_moments(moments, rows)
        features.append(f.float().cpu())
    known = torch.cat(features) if features else torch.zeros(0, backbone.dim)
    return distributed.all_gather(known, encoded.counts), all_reduce_moments(moments, backbone)


@timed("bases")
def add_moments(totals: Moments, rows: Sequence[Rows]) -> Moments:
    """Running second moments with one more batch of rows."""
    new = [(second_moment(r.q).cpu(), second_moment(r.v).cpu()) for r in rows]
    return [(q + a, v + b) for (q, v), (a, b) in zip(totals, new, strict=True)] if totals else new


def all_reduce_moments(moments: Moments, backbone: Backbone) -> Moments:
    """The sums of moments over all processes, in one all-reduce; a process without images has no moments."""
    if distributed.world_size() == 1:
        return moments
    totals = torch.zeros(len(backbone.suffix), 2, backbone.dim, backbone.dim, dtype=torch.float64)
    for total, pair in zip(totals, moments, strict=False):
        total.copy_(torch.stack(pair))
    distributed.all_reduce(totals)
    return [(q, v) for q, v in totals]
