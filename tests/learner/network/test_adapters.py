"""Adapted blocks against timm's own blocks, against merged weights, and against slow loops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from duallora_edge.learner.network.adapters import AdaptedBlock, Adapter, fold
from duallora_edge.learner.network.backbone import Backbone

DIM = 48


def random_adapter(seed: int, q_rank: int, v_rank: int) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    return Adapter(*(torch.randn(rank, DIM, generator=g) * 0.3 for rank in (q_rank, q_rank, v_rank, v_rank)))


def random_tokens(batch: int = 3) -> Tensor:
    return torch.randn(batch, 17, DIM, generator=torch.Generator().manual_seed(7))


@given(seed=st.integers(0, 2**31), q_rank=st.integers(0, 6), v_rank=st.integers(0, 6))
def test_merged_equals_side_branch(seed: int, q_rank: int, v_rank: int) -> None:
    g = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(3 * DIM, DIM, generator=g).double(), torch.randn(5, DIM, generator=g).double()
    adapter = Adapter(*(part.double() for part in random_adapter(seed, q_rank, v_rank)))
    plain, merged = F.linear(x, weight), F.linear(x, fold(weight, adapter))
    torch.testing.assert_close(merged[:, :DIM], plain[:, :DIM] + x @ adapter.q_down.T @ adapter.q_up)
    torch.testing.assert_close(merged[:, 2 * DIM :], plain[:, 2 * DIM :] + x @ adapter.v_down.T @ adapter.v_up)
    assert torch.equal(merged[:, DIM : 2 * DIM], plain[:, DIM : 2 * DIM])


def test_fold_leaves_the_base_alone() -> None:
    weight = torch.randn(3 * DIM, DIM)
    before = weight.clone()
    fold(weight, random_adapter(0, 2, 2))
    assert torch.equal(weight, before)


VARIANTS = [{}, {"qk_norm": True}, {"init_values": 0.1}, {"qkv_bias": False}]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_without_adapter_a_block_is_the_block_of_timm(
    make_backbone: Callable[..., Backbone], variant: dict[str, object]
) -> None:
    block, x = make_backbone(**variant).suffix[0], random_tokens()
    torch.testing.assert_close(AdaptedBlock(block)(x)[0], block(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("ranks", [(0, 0), (4, 4), (2, 5)])
def test_class_token_alone_equals_the_class_token_of_the_whole_block(
    make_backbone: Callable[..., Backbone], variant: dict[str, object], ranks: tuple[int, int]
) -> None:
    block, x = AdaptedBlock(make_backbone(**variant).suffix[0]), random_tokens()
    block.adapter = random_adapter(1, *ranks)
    alone = block(x, class_token_only=True)[0]
    assert alone.shape == (3, 1, DIM)
    torch.testing.assert_close(alone, block(x)[0][:, :1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("class_token_only", [False, True])
def test_open_gates_equal_merged_weights_and_closed_gates_the_base(
    tiny_backbone: Backbone, class_token_only: bool
) -> None:
    base, x, adapter = tiny_backbone.suffix[0], random_tokens(), random_adapter(2, 4, 4)
    beside, merged, plain = AdaptedBlock(base), AdaptedBlock(base), AdaptedBlock(base)
    beside.adapter, beside.gate_map = adapter, torch.ones(1, 4)
    merged.weight = fold(merged.weight, adapter)
    for gate, expected in ((1.0, merged), (0.0, plain)):
        torch.testing.assert_close(
            beside(x, torch.full((3, 1), gate), class_token_only=class_token_only)[0],
            expected(x, class_token_only=class_token_only)[0],
            rtol=1e-5,
            atol=1e-5,
        )


def test_each_image_has_its_own_gates(tiny_backbone: Backbone) -> None:
    """A batch with another task in each image equals one network a task, each with that task's adapter merged."""
    base, x = tiny_backbone.suffix[0], random_tokens()
    adapters = [random_adapter(seed, rank, rank) for seed, rank in enumerate((2, 3, 1))]
    block = AdaptedBlock(base)
    block.adapter = Adapter(*(torch.cat(parts) for parts in zip(*adapters, strict=True)))
    block.gate_map = torch.eye(3).repeat_interleave(torch.tensor([2, 3, 1]), dim=1)
    together = block(x, torch.eye(3))[0]
    for image, adapter in enumerate(adapters):
        alone = AdaptedBlock(base)
        alone.weight = fold(alone.weight, adapter)
        torch.testing.assert_close(together[image], alone(x)[0][image], rtol=1e-5, atol=1e-5)


def test_collected_rows_equal_slow_loops(tiny_backbone: Backbone) -> None:
    block, x = tiny_backbone.suffix[0], random_tokens()
    _, rows = AdaptedBlock(block)(x, class_token_only=True, collect="class")
    attn, y = block.attn, block.norm1(x)
    heads, width = attn.num_heads, attn.head_dim
    for image in range(len(x)):
        q, k, _ = attn.qkv(y[image]).split(DIM, dim=-1)
        average = torch.zeros(17)
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            average += (q[0, part] @ k[:, part].T / width**0.5).softmax(dim=0) / heads
        torch.testing.assert_close(rows.q[image], y[image, 0])
        torch.testing.assert_close(rows.v[image], sum(a * row for a, row in zip(average, y[image], strict=True)))


def test_all_tokens_are_collected_on_demand(tiny_backbone: Backbone) -> None:
    x = random_tokens()
    _, rows = AdaptedBlock(tiny_backbone.suffix[0])(x, collect="all")
    expected = tiny_backbone.suffix[0].norm1(x).reshape(-1, DIM)
    assert torch.equal(rows.q, expected) and torch.equal(rows.v, expected)
