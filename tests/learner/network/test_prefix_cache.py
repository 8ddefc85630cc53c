"""The prefix of images: cached by content, the same with and without a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from duallora_edge.learner.data import PreparedTask
from duallora_edge.learner.data.augment import random_views
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.network.prefix_cache import Encoded, PrefixCache, token_bytes


def test_a_cache_gives_the_same_and_runs_the_prefix_once(
    tiny_backbone: Backbone, make_task: Callable[..., PreparedTask]
) -> None:
    images = make_task("a", ["x", "y"], [0, 1]).train
    plain = Encoded(tiny_backbone, images, ["x", "y"])
    cache = PrefixCache()
    for _ in range(2):
        cached = Encoded(tiny_backbone, images, ["x", "y"], cache=cache)
        torch.testing.assert_close(cached.phi, plain.phi)
        assert plain.tokens is not None
        assert cached.tokens is not None
        torch.testing.assert_close(cached.tokens.in_memory, plain.tokens.in_memory, rtol=1e-2, atol=1e-2)
        assert torch.equal(cached.labels, plain.labels)
    assert cache.images == len(images)
    assert cache.seconds > 0


@pytest.mark.parametrize("kept", [0, 1, 7, 100])
@pytest.mark.parametrize("batch_size", [4, 64])
def test_tokens_in_a_file_are_those_in_memory(
    tiny_backbone: Backbone, make_task: Callable[..., PreparedTask], kept: int, batch_size: int
) -> None:
    images = make_task("a", ["x", "y"], [0, 1]).train
    plain = Encoded(tiny_backbone, images, ["x", "y"], batch_size=batch_size)
    room = kept * token_bytes(tiny_backbone) + 1
    split = Encoded(tiny_backbone, images, ["x", "y"], batch_size=batch_size, cache_bytes=room)
    assert split.tokens is not None and len(split.tokens.in_memory) == min(kept, len(images))
    chosen = torch.tensor([23, 0, 6, 7, 8, 0])
    assert torch.equal(split.batch(chosen), plain.batch(chosen))
    for one, two in zip(split.batches(), plain.batches(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(("views", "flip"), [(0, False), (1, False), (2, True)])
def test_views_come_behind_the_images(
    tiny_backbone: Backbone, make_task: Callable[..., PreparedTask], views: int, flip: bool
) -> None:
    images = make_task("a", ["x", "y"], [0, 1]).train
    before, n = images.pixels.copy(), len(images)
    encoded = Encoded(tiny_backbone, images, ["x", "y"], batch_size=7, views=views, flip=flip, seed=5)
    assert (encoded.images, encoded.views, len(encoded)) == (n, views, n * (1 + views))
    draws = torch.rand(views * n, 8, generator=torch.Generator().manual_seed(5))
    pixels = torch.from_numpy(before.copy())
    parts = [random_views(pixels, part, flip=flip) for part in draws.split(n)] if views else []
    frames = torch.cat([pixels, *parts])
    tokens, phi = tiny_backbone.prefix(frames)
    torch.testing.assert_close(encoded.batch(torch.arange(len(frames))), tokens, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(encoded.phi, phi)
    assert encoded.labels.tolist() == encoded.labels[:n].tolist() * (1 + views)
    assert np.array_equal(images.pixels, before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tokens_do_not_depend_on_the_batch(
    tiny_backbone: Backbone, make_task: Callable[..., PreparedTask], precision: str
) -> None:
    images = make_task("a", ["x", "y"], [0, 1]).train
    kept = Encoded(tiny_backbone, images, ["x", "y"], precision=precision)
    made_anew = Encoded(tiny_backbone, images, ["x", "y"], precision=precision, batch_size=5)
    made_anew.tokens = None
    chosen = torch.tensor([23, 0, 6, 7, 8, 0])
    assert torch.equal(made_anew.batch(chosen), kept.batch(chosen))
    assert torch.equal(made_anew.phi, kept.phi)


def test_bf16_stays_near_fp32(tiny_backbone: Backbone, make_task: Callable[..., PreparedTask]) -> None:
    images = make_task("a", ["x", "y"], [0, 1]).train
    full, half = (Encoded(tiny_backbone, images, ["x", "y"], precision=name) for name in ("fp32", "bf16"))
    assert half.phi.dtype == torch.float32
    assert not torch.equal(half.phi, full.phi)
    torch.testing.assert_close(half.phi, full.phi, rtol=0.1, atol=0.1)


def test_features_are_computed_for_unknown_images_only(
    tiny_backbone: Backbone, make_task: Callable[..., PreparedTask]
) -> None:
    pixels = make_task("a", ["x"], [0]).train.pixels[:4]
    cache, calls = PrefixCache(), []

    def compute() -> tuple[torch.Tensor, None]:
        calls.append(1)
        return torch.arange(8.0).reshape(4, 2), None

    first = cache.features(tiny_backbone, pixels, compute)
    assert torch.equal(cache.features(tiny_backbone, pixels[::-1], compute), first.flip(0))
    assert len(calls) == 1


def test_another_base_adaptation_has_features_of_its_own(
    make_backbone: Callable[..., Backbone], make_task: Callable[..., PreparedTask]
) -> None:
    pixels, cache = make_task("a", ["x"], [0]).train.pixels[:2], PrefixCache()
    plain, adapted = make_backbone(), make_backbone()
    adapted.info = replace(adapted.info, base="1" * 64)
    zeros, ones = torch.zeros(2, 1), torch.ones(2, 1)
    assert torch.equal(cache.features(plain, pixels, lambda: (zeros, None)), zeros)
    assert torch.equal(cache.features(adapted, pixels, lambda: (ones, None)), ones)
