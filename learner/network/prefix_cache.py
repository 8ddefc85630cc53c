"""Images behind the frozen prefix: the expensive part, computed once for each image and kept where memory allows."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from duallora_edge.files import cache_folder
from duallora_edge.learner import distributed
from duallora_edge.learner.data import PixelSet
from duallora_edge.learner.data.augment import random_views
from duallora_edge.learner.data.cache import release
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.timing import phase

BATCH = 64
MAX_CACHE_SHARE = 0.4


class PrefixCache:
    """Outputs of the untouched network by the content of the image, for several runs over the same images.

    All runs must share prefix and precision; their backbones may differ in the base adaptation. ``seconds`` is how
    long the prefix took for ``images`` images.
    """

    def __init__(self) -> None:
        self.seconds, self.images = 0.0, 0
        self._known: dict[bytes, tuple[Tensor, Tensor]] = {}
        self._features: dict[bytes, Tensor] = {}

    def __call__(self, backbone: Backbone, pixels: npt.NDArray[np.uint8], precision: str) -> tuple[Tensor, Tensor]:
        """Tokens float16 [B, L, d] and phi float32 of frames uint8 [B, S, S, 3], on the CPU."""
        keys = _keys(backbone, pixels)
        new = [i for i, key in enumerate(keys) if key not in self._known]
        if new:
            started = time.monotonic()
            tokens, phi = backbone.prefix(torch.from_numpy(pixels[new]).to(backbone.device), precision)
            for i, image_tokens, image_phi in zip(new, tokens.half().cpu(), phi.cpu(), strict=True):
                self._known[keys[i]] = (image_tokens.clone(), image_phi.clone())
            self.seconds += time.monotonic() - started
            self.images += len(new)
        known = [self._known[key] for key in keys]
        return torch.stack([tokens for tokens, _ in known]), torch.stack([phi for _, phi in known])

    def features(
        self, backbone: Backbone, pixels: npt.NDArray[np.uint8], compute: Callable[[], tuple[Tensor, object]]
    ) -> Tensor:
        """Features [B, D] of the untouched network for frames uint8 [B, S, S, 3].

        Where they are not known yet, they are the first thing that ``compute`` returns.
        """
        keys = _keys(backbone, pixels)
        if any(key not in self._features for key in keys):
            self._features.update(zip(keys, compute()[0].unbind(), strict=True))
        return torch.stack([self._features[key] for key in keys])


def _keys(backbone: Backbone, pixels: npt.NDArray[np.uint8]) -> list[bytes]:
    base = (backbone.info.base or "").encode()
    return [hashlib.blake2b(frame.tobytes(), digest_size=16, key=base).digest() for frame in pixels]


class TokenStore:
    """Tokens float16 [L, d] of images in the order in which they are appended, in memory or in a temporary file.

    ``limit`` bytes of those of ``count`` images are kept in memory (all by default), the others in a file that vanishes
    with the process. The file is read, since a mapped one would count as memory.
    """

    def __init__(self, count: int, shape: Sequence[int], limit: int | None = None) -> None:
        row = 2 * math.prod(shape)
        self._row, self._length = row, 0
        self.in_memory = torch.empty(count if limit is None else min(count, limit // row), *shape, dtype=torch.float16)
        self._file: IO[bytes] | None = None
        if len(self.in_memory) < count:
            cache_folder().mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=cache_folder(), buffering=0)  # noqa: SIM115 - as long as this object

    def append(self, tokens: Tensor) -> None:
        """Store the tokens float16 [B, L, d] of the next images."""
        room = max(len(self.in_memory) - self._length, 0)
        self.in_memory[self._length :][: len(tokens)] = tokens[:room]
        if self._file is not None and room < len(tokens):
            self._file.write(tokens[room:].numpy().data)
        self._length += len(tokens)

    def rows(self, indices: Tensor) -> Tensor:
        """Tokens float16 [B, L, d] of images by their numbers."""
        if self._file is None:
            return self.in_memory[indices]
        tokens = torch.empty(len(indices), *self.in_memory.shape[1:], dtype=torch.float16)
        for image, index in zip(tokens, indices.tolist(), strict=True):
            if index < len(self.in_memory):
                image.copy_(self.in_memory[index])
            else:
                position = (index - len(self.in_memory)) * self._row
                os.preadv(self._file.fileno(), [image.numpy().data], position)
        return tokens


class Encoded:
    """Labelled images behind the frozen prefix.

    ``labels`` int64 [N] are indices into ``classes``. Summaries ``phi`` float32 [N, summary_dim] are always kept.
    Tokens are kept as float16 while they fit into a share of the free memory, else recomputed for every batch. With
    ``cache_bytes`` that many bytes of them are kept in memory, the others in a file that vanishes with the process.
    ``batch_size`` images go through the network at once, with matrix multiplications in ``precision``.

    Behind the ``images`` come ``views`` random views of each (see `random_views`), all views of a kind together; which
    ones they are depends on ``seed`` alone.

    Of several processes each encodes neighbouring batches as a whole, so that every image is in the same batch as with
    one process; ``counts`` are their numbers of images. All processes know all summaries, and all tokens once
    `share_tokens` was called.
    """

    def __init__(
        self,
        backbone: Backbone,
        images: PixelSet,
        classes: Sequence[str],
        on_batch: Callable[[int, int], None] = lambda done, total: None,
        cache: PrefixCache | None = None,
        *,
        precision: str = "fp32",
        batch_size: int = BATCH,
        cache_bytes: int | None = None,
        views: int = 0,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        self.cache, self.precision, self.batch_size = cache, precision, batch_size
        self.backbone, self.pixels = backbone, images.pixels
        index = {name: number for number, name in enumerate(classes)}
        self.images, self.views, self._flip = len(images), views, flip
        self.labels = torch.tensor([index[name] for name in images.labels], dtype=torch.long).repeat(1 + views)
        self._draws = torch.rand(views * len(images), 8, generator=torch.Generator().manual_seed(seed))
        count = len(self.labels)
        row = token_bytes(backbone)
        self.tokens: TokenStore | None = None
        parts = distributed.shards(self._batches())
        self._own = parts[distributed.rank()]
        self.counts = [sum(map(len, part)) for part in parts]
        self._first = sum(self.counts[: distributed.rank()])  # number of the image in the first row of the tokens
        self._shared = distributed.world_size() == 1
        own = self.counts[distributed.rank()]
        fits = distributed.all_agree(
            count * row * distributed.local_world_size() < MAX_CACHE_SHARE * _available_memory()
        )
        if cache_bytes is not None or fits:
            self.tokens = TokenStore(own, (row // (2 * backbone.dim), backbone.dim), cache_bytes)
        summaries = torch.empty(own, backbone.summary_dim)
        for batch in self._own:
            rows = batch - self._first
            tokens, summaries[rows] = self._encode(batch)
            if self.tokens is not None:
                self.tokens.append(tokens)
            on_batch(int(rows[-1]) + 1, own)
        self.phi = distributed.all_gather(summaries, self.counts)

    def __len__(self) -> int:
        return len(self.labels)

    def share_tokens(self) -> None:
        """Give every process the tokens of all images, where tokens are kept, for batches of any images."""
        if self.tokens is not None and not self._shared:
            self.tokens.in_memory = distributed.all_gather(self.tokens.in_memory, self.counts)
            self._first, self._shared = 0, True

    def frames(self, indices: Tensor) -> npt.NDArray[np.uint8]:
        """Frames uint8 [B, S, S, 3]; the file from which they are mapped does not stay in memory."""
        pixels = self.pixels[indices.numpy() % max(self.images, 1)]
        release(self.pixels)
        rows = indices >= self.images
        if bool(rows.any()):
            views = random_views(
                torch.from_numpy(pixels[rows.numpy()]), self._draws[indices[rows] - self.images], flip=self._flip
            )
            pixels[rows.numpy()] = views.numpy()
        return pixels

    @torch.no_grad()
    def _encode(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens float16 and phi float32 of some images, on the CPU."""
        with phase("frozen prefix"):
            pixels = self.frames(indices)
            if self.cache is not None:
                return self.cache(self.backbone, pixels, self.precision)
            tokens, phi = self.backbone.prefix(torch.from_numpy(pixels).to(self.backbone.device), self.precision)
            return tokens.half().cpu(), phi.cpu()

    @torch.no_grad()
    def batch(self, indices: Tensor) -> Tensor:
        """Prefix tokens float32 [B, L, d] of some images.

        They are rounded to float16 even where they are recomputed, so that results do not depend on free memory.
        """
        if self.tokens is None:
            tokens = torch.cat([self._encode(part)[0] for part in indices.split(self.batch_size)])
        else:
            tokens = self.tokens.rows(indices - self._first)
        return tokens.to(self.backbone.device).float()

    def batches(self, stride: int = 1) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(indices, tokens, phi) of all images in order, or of those of this process where there are several.

        Of ``stride`` images only the first one is taken.
        """
        for batch in self._own:
            indices = batch[batch % stride == 0]
            if not len(indices):
                continue
            yield indices, self.batch(indices), self.phi[indices].to(self.backbone.device)

    def _batches(self) -> Sequence[Tensor]:
        """The numbers of all images in batches; no batch without images, where `Tensor.split` gives an empty one."""
        return torch.arange(len(self)).split(self.batch_size) if len(self) else ()


def token_bytes(backbone: Backbone) -> int:
    """Bytes of the stored tokens of one image, float16 [L, d]."""
    return ((backbone.info.size // backbone.patch_size) ** 2 + backbone.special_tokens) * backbone.dim * 2


def _available_memory() -> int:
    """Bytes that can be used without swapping (MemAvailable), or 4 GiB where the system does not tell."""
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 << 30
