"""The network that a list of learned tasks makes: backbone, folded updates and gated residual adapters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from duallora_edge.learner.network.adapters import AdaptedBlock, Adapter, Collect, Rows, fold
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.network.dynamic_memory import DynamicMemory, gate_matrix
from duallora_edge.learner.network.task_info import TaskInfo
from duallora_edge.learner.network.task_record import BlockRecord


class Network(nn.Module):
    """Backbone plus the updates of a list of tasks; weights are summed anew from the immutable base, in fp32.

    ``updates`` holds a sequence of block records for each task; ``is_untouched`` tells whether they change nothing.
    """

    def __init__(
        self,
        backbone: Backbone,
        infos: Sequence[TaskInfo],
        updates: Sequence[Sequence[BlockRecord]],
        dynamic_memory: DynamicMemory,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.dynamic_memory = dynamic_memory
        self.blocks = [AdaptedBlock(block) for block in backbone.suffix]
        adapters = [a for blocks in updates for block in blocks for a in (block.orthogonal, block.residual)]
        self.is_untouched = not any(len(a.q_down) or len(a.v_down) for a in adapters)
        for index, block in enumerate(self.blocks):
            records = [blocks[index] for blocks in updates]
            block.weight = fold_all(block.weight, [record.orthogonal for record in records])
            ranks = [len(record.residual.q_down) for record in records]
            if sum(ranks):
                stacked = (torch.cat(parts) for parts in zip(*(r.residual for r in records), strict=True))
                block.adapter = Adapter(*(part.to(block.weight) for part in stacked))
                block.gate_map = gate_matrix(infos, ranks).to(block.weight)

    def from_prefix(self, tokens: Tensor, phi: Tensor, *, collect: Collect = "none") -> tuple[Tensor, list[Rows]]:
        """Features [f ; phi] [B, D] of prefix tokens [B, L, d] and summaries phi, each under its own gates.

        With ``collect`` it also returns what the projections of each block read (see `run_suffix`).
        """
        with torch.autocast(phi.device.type, enabled=False):  # gates and phi keep full precision
            posterior = self.dynamic_memory(phi)
        f, rows = run_suffix(self.backbone, self.blocks, tokens, posterior, collect=collect)
        return torch.cat([f.float(), phi], dim=1), rows

    def forward(self, images: Tensor) -> Tensor:
        """Features [f ; phi] [B, D] of RGB frames uint8 [B, S, S, 3]."""
        return self.from_prefix(*self.backbone.prefix(images))[0]


def fold_all(weight: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """The fused qkv weight with adapters folded in one after the other."""
    for adapter in adapters:
        weight = fold(weight, adapter)
    return weight


def run_suffix(
    backbone: Backbone,
    blocks: Iterable[AdaptedBlock],
    tokens: Tensor,
    posterior: Tensor | None = None,
    *,
    collect: Collect = "none",
    recompute: bool = False,
) -> tuple[Tensor, list[Rows]]:
    """Final features f [B, d] of prefix tokens [B, L, d], and what the projections of each block read.

    Args:
        backbone: pools the tokens after the last block. Where it pools by the class token, the last block is computed
            for that token alone; where it pools over the tokens, every token counts and ``class`` means ``all``.
        blocks: the adapted suffix.
        tokens: tokens at the end of the prefix.
        posterior: task posterior [B, T], for blocks with a gate map.
        collect: ``none``, ``class`` or ``all`` (see `AdaptedBlock.forward`).
        recompute: whether only the input of each block is kept for the gradient and the rest computed again.
    """
    collected = []
    blocks = list(blocks)
    if collect == "class" and not backbone.pools_class_token:
        collect = "all"
    for block in blocks:
        last = block is blocks[-1]
        run = partial(block, class_token_only=last and backbone.pools_class_token, collect=collect)
        if recompute:
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        tokens, rows = run(tokens, posterior)
        if rows is not None:
            collected.append(rows)
    return backbone.feature(tokens), collected
