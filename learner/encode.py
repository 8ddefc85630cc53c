"""Images behind the frozen prefix: the expensive part, done once an image and kept where memory allows."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from duallora_edge.learner.backbone import Backbone
from duallora_edge.learner.data import PixelSet
from duallora_edge.learner.profile import phase

BATCH = 64
MAX_CACHE_SHARE = 0.4


class PrefixCache:
    """Outputs of the untouched network by the content of the image, for several runs over the same images.

    All runs must share backbone, prefix and precision. ``seconds`` is what the prefix took for the ``images`` it was
    run on.
    """

    def __init__(self) -> None:
        self.seconds, self.images = 0.0, 0
        self._known: dict[bytes, tuple[Tensor, Tensor]] = {}
        self._features: dict[bytes, Tensor] = {}

    def __call__(self, backbone: Backbone, pixels: npt.NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        """Tokens float16 [B, L, d] and phi float32 of frames uint8 [B, S, S, 3], on the CPU."""
        keys = _keys(pixels)
        new = [i for i, key in enumerate(keys) if key not in self._known]
        if new:
            started = time.monotonic()
            tokens, phi = backbone.prefix(torch.from_numpy(pixels[new]).to(backbone.device))
            for i, image_tokens, image_phi in zip(new, tokens.half().cpu(), phi.cpu(), strict=True):
                self._known[keys[i]] = (image_tokens.clone(), image_phi.clone())
            self.seconds += time.monotonic() - started
            self.images += len(new)
        known = [self._known[key] for key in keys]
        return torch.stack([tokens for tokens, _ in known]), torch.stack([phi for _, phi in known])

    def features(self, pixels: npt.NDArray[np.uint8], compute: Callable[[], tuple[Tensor, object]]) -> Tensor:
        """Features [B, D] of the untouched network for frames uint8 [B, S, S, 3].

        The first of what ``compute`` gives is taken where they are unknown.
        """
        keys = _keys(pixels)
        if any(key not in self._features for key in keys):
            self._features.update(zip(keys, compute()[0].unbind(), strict=True))
        return torch.stack([self._features[key] for key in keys])


def _keys(pixels: npt.NDArray[np.uint8]) -> list[bytes]:
    return [hashlib.blake2b(frame.tobytes(), digest_size=16).digest() for frame in pixels]


class Encoded:
    """Labelled images behind the frozen prefix.

    ``labels`` int64 [N] are indices into ``classes``; summaries ``phi`` float32 [N, summary_dim] are kept; tokens are
    kept as float16 while they fit into a share of the free memory, else recomputed for every batch.
    """

    def __init__(
        self,
        backbone: Backbone,
        images: PixelSet,
        classes: Sequence[str],
        on_batch: Callable[[int, int], None] = lambda done, total: None,
        cache: PrefixCache | None = None,
    ) -> None:
        self.cache = cache
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
            batch_tokens, phi = self._encode(batch)
            summaries.append(phi)
            if keep:
                tokens.append(batch_tokens)
            on_batch(int(batch[-1]) + 1, count)
        self.phi = torch.cat(summaries) if summaries else torch.zeros(0, backbone.summary_dim)
        if tokens:
            self.tokens = torch.cat(tokens)

    def __len__(self) -> int:
        return len(self.labels)

    @torch.no_grad()
    def _encode(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens float16 and phi float32 of some images as they are, on the CPU."""
        with phase("frozen prefix"):
            pixels = self.pixels[indices.numpy()]
            if self.cache is not None:
                return self.cache(self.backbone, pixels)
            tokens, phi = self.backbone.prefix(torch.from_numpy(pixels).to(self.backbone.device))
            return tokens.half().cpu(), phi.cpu()

    @torch.no_grad()
    def batch(self, indices: Tensor, transform: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Prefix tokens float32 [B, L, d] of some images; ``transform`` augments their pixels first.

        They are rounded to float16 also where they are recomputed, so that free memory does not change results.
        """
        if transform is not None:
            with phase("frozen prefix"):
                pixels = torch.from_numpy(self.pixels[indices.numpy()]).to(self.backbone.device)
                return self.backbone.prefix(transform(pixels))[0].half().float()
        tokens = self._encode(indices)[0] if self.tokens is None else self.tokens[indices]
        return tokens.to(self.backbone.device).float()

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
