"""Images behind the frozen prefix: the expensive part, done once an image and kept where memory allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from duallora_edge.learner.backbone import Backbone
from duallora_edge.learner.data import PixelSet

BATCH = 64
MAX_CACHE_SHARE = 0.4


class Encoded:
    """Labelled images behind the frozen prefix.

    ``labels`` int64 [N] are indices into ``classes``; summaries ``phi`` float32 [N, 3d] are kept; tokens are kept
    as float16 while they fit into a share of the free memory, else recomputed for every batch.
    """

    def __init__(
        self,
        backbone: Backbone,
        images: PixelSet,
        classes: Sequence[str],
        on_batch: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.backbone, self.pixels = backbone, images.pixels
        index = {name: number for number, name in enumerate(classes)}
        self.labels = torch.tensor([index[name] for name in images.labels], dtype=torch.long)
        count = len(images)
        side, patch = backbone.info.size, backbone.model.patch_embed.patch_size[0]
        size = count * ((side // patch) ** 2 + backbone.special_tokens) * backbone.dim * 2
        self.tokens: Tensor | None = None
        summaries, tokens = [], []
        keep = size < MAX_CACHE_SHARE * _available_memory()
        for batch in _batches(count):
            encoded = self._prefix(batch)
            summaries.append(backbone.summary(encoded).cpu())
            if keep:
                tokens.append(encoded.half().cpu())
            on_batch(int(batch[-1]) + 1, count)
        self.phi = torch.cat(summaries) if summaries else torch.zeros(0, backbone.summary_dim)
        if tokens:
            self.tokens = torch.cat(tokens)

    def __len__(self) -> int:
        return len(self.labels)

    @torch.no_grad()
    def _prefix(self, indices: Tensor, transform: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        pixels = torch.from_numpy(self.pixels[indices.numpy()]).to(self.backbone.device)
        return self.backbone.prefix(pixels if transform is None else transform(pixels))

    def batch(self, indices: Tensor, transform: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Prefix tokens float32 [B, L, d] of some images; ``transform`` augments their pixels first.

        They are rounded to float16 also where they are recomputed, so that free memory does not change results.
        """
        if self.tokens is None or transform is not None:
            return self._prefix(indices, transform).half().float()
        return self.tokens[indices].to(self.backbone.device).float()

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(indices, tokens, phi) of all images in order."""
        for indices in _batches(len(self)):
            yield indices, self.batch(indices), self.phi[indices].to(self.backbone.device)


def _batches(count: int) -> Sequence[Tensor]:
    """The numbers 0..count-1 in batches; none for 0, where `Tensor.split` would give an empty one."""
    return torch.arange(count).split(BATCH) if count else ()


def _available_memory() -> int:
    """Bytes that can be taken without swapping (MemAvailable), or 4 GiB where the system does not say."""
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 << 30
