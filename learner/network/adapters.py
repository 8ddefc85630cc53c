"""The adapted suffix: ViT blocks whose query and value projections carry low-rank updates.

Notation: row vectors, y = x W^T with the (out, in) weights of `torch.nn.Linear`. An adapter of rank r is a pair
``down`` [r, d] and ``up`` [r, d]; it adds ``(x down^T) up`` to a projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

Collect = Literal["none", "class", "all"]


class Adapter(NamedTuple):
    """Low-rank update of the query and the value projection of one block: down [r, d], up [r, d] each.

    The ranks of query and value may differ, and may be 0.
    """

    q_down: Tensor
    q_up: Tensor
    v_down: Tensor
    v_up: Tensor

    def product(self) -> tuple[Tensor, Tensor]:
        """The updates as dense matrices [d, d] in the (out, in) layout, for query and value."""
        return self.q_up.T @ self.q_down, self.v_up.T @ self.v_down


def fold(weight: Tensor, adapter: Adapter) -> Tensor:
    """A fused qkv weight [3d, d] with the adapter added to its query and value rows."""
    d = weight.shape[1]
    query, value = adapter.product()
    merged = weight.clone()
    merged[:d] += query.to(weight)
    merged[2 * d :] += value.to(weight)
    return merged


@dataclass
class Rows:
    """What the query and the value projection of one block read, as rows [n, d] each, for the second moments."""

    q: Tensor
    v: Tensor


class AdaptedBlock(nn.Module):
    """A frozen block with its own qkv weight and an optional adapter beside it.

    ``gate_map`` [T, r] opens the ranks of the adapter for each image: its gates are ``posterior @ gate_map``. Without
    one the adapter is always on.
    """

    weight: Tensor

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("weight", block.attn.qkv.weight.detach().clone(), persistent=False)
        self.adapter: Adapter | None = None
        self.gate_map: Tensor | None = None

    def forward(
        self,
        x: Tensor,
        posterior: Tensor | None = None,
        *,
        class_token_only: bool = False,
        collect: Collect = "none",
    ) -> tuple[Tensor, Rows | None]:
        """Tokens [B, L, d] to tokens [B, L, d] (or [B, 1, d] with ``class_token_only``, exact for that token).

        ``posterior`` [B, T] is the task posterior of each image; a block with a gate map needs it. With ``collect``
        the inputs that later tasks must not disturb are returned too: for ``class`` the class token [B, d] for the
        query and the mean of all tokens, weighted by the attention of the class token, [B, d] for the value; for
        ``all`` every token [B * L, d] for both.
        """
        block = self.block
        y = block.norm1(x)
        gates = None if self.gate_map is None or posterior is None else posterior @ self.gate_map
        attended, attention = self._attention(y, gates, class_token_only)
        x = (x[:, :1] if class_token_only else x) + block.ls1(attended)
        x = x + block.ls2(block.mlp(block.norm2(x)))
        if collect == "none":
            return x, None
        if collect == "all":
            rows = y.reshape(-1, y.shape[-1])
            return x, Rows(rows, rows)
        class_attention = attention[:, :, 0].mean(dim=1)  # [B, L], averaged over heads
        return x, Rows(y[:, 0], torch.einsum("bl,bld->bd", class_attention, y))

    def _attention(self, y: Tensor, gates: Tensor | None, class_token_only: bool) -> tuple[Tensor, Tensor]:
        """Multi-head attention of y [B, L, d]; returns the projected output and the attention [B, h, Lq, L].

        It is written out instead of fused because the constraint needs the attention of the class token, and because
        the backward pass of the fused kernel is slow on CPUs in bf16.
        """
        attn = self.block.attn
        B, _, d = y.shape
        bias = attn.qkv.bias
        if class_token_only:
            q = F.linear(y[:, :1], self.weight[:d], None if bias is None else bias[:d])
            kv = F.linear(y, self.weight[d:], None if bias is None else bias[d:])
            k, v = kv.split(d, dim=-1)
        else:
            q, k, v = F.linear(y, self.weight, bias).split(d, dim=-1)
        if self.adapter is not None:
            scale = None if gates is None else gates[:, None]
            q = q + _low_rank(y[:, : q.shape[1]], self.adapter.q_down, self.adapter.q_up, scale)
            v = v + _low_rank(y, self.adapter.v_down, self.adapter.v_up, scale)
        q, k, v = (t.reshape(B, -1, attn.num_heads, attn.head_dim).transpose(1, 2) for t in (q, k, v))
        q, k = attn.q_norm(q), attn.k_norm(k)
        attention = ((q * attn.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        return attn.proj((attention.to(v) @ v).transpose(1, 2).reshape(B, -1, d)), attention


def _low_rank(x: Tensor, down: Tensor, up: Tensor, gates: Tensor | None) -> Tensor:
    hidden = x @ down.T
    return (hidden if gates is None else hidden * gates) @ up
