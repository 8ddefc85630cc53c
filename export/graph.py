"""The deployable graph: an ONNX model of a `ComposedModel`, built node by node.

Building it directly instead of tracing gives exact control over names, opset and form:

* frames uint8 [N, S, S, 3] go in; normalisation is folded into the patch embedding;
* weights have the names and the layout of the PyTorch state dict, so that they can be updated in place; shapes, axes
  and scalars are named after what they are for, never after their value;
* orthogonal adapters are folded into the qkv weights; the residual adapters of all tasks are one pair of stacked
  matrices in each block, gated for each image;
* tokens are rows of a matrix [N * L, d], so that every linear layer is one Gemm with its bias;
* the last block is computed for the class token alone where the backbone pools by it;
* in fp16 the matrix products of the blocks, and what lies between them, are half precision. The sums along the depth,
  every normalisation, the patch embedding, the dynamic memory and the classifier stay fp32, because values there are
  large, differences of large numbers are taken, or hardly anything would be saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from timm.layers import LayerScale
from torch import Tensor, nn

from duallora_edge import __version__
from duallora_edge.errors import ExportError
from duallora_edge.learner.network.adapters import AdaptedBlock
from duallora_edge.learner.network.answers import LEAST_REMOTENESS, MOST_REMOTENESS, ComposedModel
from duallora_edge.learner.network.backbone import NEWTON_STEPS, SECOND_ORDER_EPS
from duallora_edge.runtime.bundle import BETWEEN, INPUT, OUTPUTS

LAYER_NORM_OPSET = 17
GELU_OPSET = 20
MIN_OPSET = 14

Array = npt.NDArray[Any]
Part = Literal["whole", "prefix", "suffix"]


class Builder:
    """Collects nodes and initializers. Every method returns the name of the tensor it makes.

    With ``half`` tensors between `low` and `high` are fp16. The weights used there are stored in fp32 all the same, so
    that graphs of both precisions share them: runtimes round them once, when they load the graph. ``sums``: see
    `project`.
    """

    def __init__(self, opset: int, half: bool = False, sums: bool = False) -> None:
        self.opset = opset
        self.half = half
        self._sums = sums
        self._low = False
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, Array] = {}
        self._count = 0
        self._halves: set[str] = set()

    def weight(self, name: str, value: Tensor | Array) -> str:
        """An initializer; the same name twice must carry the same value."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        if name in self.initializers:
            assert np.array_equal(self.initializers[name], array), name
        self.initializers[name] = np.asarray(array, order="C")
        if not self._low or array.dtype != np.float32:
            return name
        if (half := f"{name}.half") not in self._halves:
            self._halves.add(half)
            self.node("Cast", name, name=half, to=TensorProto.FLOAT16)
        return half

    def ints(self, name: str, *values: int) -> str:
        """A vector of int64, shared between all uses of the same name."""
        return self.weight(name, np.array(values, np.int64))

    def number(self, name: str, value: float) -> str:
        """A scalar, shared between all uses of the same name."""
        return self.weight(name, np.array(value, np.float32))

    def axis(self, axis: int) -> str:
        """An axis (0, 1 or -1) as an input, of operators that no longer take it as an attribute."""
        return self.ints({0: "axis.first", 1: "axis.second", -1: "axis.last"}[axis], axis)

    def low(self, x: str) -> str:
        """x where half precision begins: what is made from here on is fp16, until `high`."""
        if not self.half:
            return x
        self._low = True
        return self.node("Cast", x, to=TensorProto.FLOAT16)

    def high(self, x: str) -> str:
        """x where half precision ends."""
        if not self.half:
            return x
        self._low = False
        return self.node("Cast", x, to=TensorProto.FLOAT)

    def node(self, op: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Add a node with one output, named ``name`` or by a running number."""
        self._count += 1
        output = name or f"{op.lower()}_{self._count}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def split(self, x: str, what: str, sizes: Sequence[int]) -> list[str]:
        """Split the last axis; the sizes are named after ``what`` is split."""
        self._count += 1
        outputs = [f"split_{self._count}_{part}" for part in range(len(sizes))]
        self.nodes.append(
            helper.make_node("Split", [x, self.ints(f"split.{what}", *sizes)], outputs, name=outputs[0], axis=-1)
        )
        return outputs

    def reshape(self, x: str, what: str, *shape: int, output: str = "") -> str:
        """x in another shape, which is named after ``what`` it makes."""
        return self.node("Reshape", x, self.ints(f"shape.{what}", *shape), name=output)

    def slice(self, x: str, what: str, start: int, end: int, axis: int) -> str:
        """A part of an axis; its bounds are named after ``what`` it is."""
        bounds = self.ints(f"slice.{what}.start", start), self.ints(f"slice.{what}.end", end)
        return self.node("Slice", x, *bounds, self.axis(axis))

    def gemm(self, x: str, weight: str, bias: str | None) -> str:
        """x weight^T + bias for a matrix x and a weight in the (out, in) layout."""
        return self.node("Gemm", x, weight, *([bias] if bias else []), transB=1)

    def project(self, x: str, name: str, weight: Tensor, bias: Tensor | None = None, output: str = "") -> str:
        """x weight^T + bias in fp32, for rows x [N, D] and a small weight [K, D] outside the blocks.

        With ``sums`` it is written as multiplications and sums: beside fp16, TensorRT-RTX has no fp32 matrix product
        for GPUs of compute capability 7.5. All K products of an image are then in memory at once. The bias is a node
        of its own beside fp16, because trtexec keeps layers in fp32 by the names of nodes.
        """
        stored = self.weight(f"{name}.weight", weight)
        added = None if bias is None else self.weight(f"{name}.bias", bias)
        if not self.half:
            return self.node("Gemm", x, stored, *([added] if added else []), name=output, transB=1)
        first = "" if added else output
        if self._sums:
            terms = self.node("Mul", self.reshape(x, f"{name}.inputs", -1, 1, weight.shape[1]), stored)
            product = self.node("ReduceSum", terms, self.axis(-1), name=first, keepdims=0)
        else:
            product = self.node("Gemm", x, stored, name=first, transB=1)
        return self.node("Add", product, added, name=output) if added else product

    def product(self, x: str, y: str) -> str:
        """The matrix products x y of fp32 tensors; in half precision where there is one, see `project`."""
        return self.high(self.node("MatMul", self.low(x), self.low(y)))

    def layer_norm(self, x: str, name: str, scale: str, bias: str | None, eps: float) -> str:
        """Normalise the last axis; decomposed where the opset has no such operator. ``name`` is that of the layer."""
        if self.opset >= LAYER_NORM_OPSET:
            return self.node("LayerNormalization", x, scale, *([bias] if bias else []), axis=-1, epsilon=eps)
        centred = self.node("Sub", x, self._mean(x))
        variance = self._mean(self.node("Mul", centred, centred))
        deviation = self.node("Sqrt", self.node("Add", variance, self.number(f"{name}.epsilon", eps)))
        y = self.node("Mul", self.node("Div", centred, deviation), scale)
        return self.node("Add", y, bias) if bias else y

    def _mean(self, x: str) -> str:
        return self._reduced("ReduceMean", x, -1)

    def mean_over_tokens(self, x: str) -> str:
        """Mean over axis 1, kept with length 1."""
        return self._reduced("ReduceMean", x, 1)

    def max_last(self, x: str) -> str:
        """Maximum over the last axis, kept with length 1."""
        return self._reduced("ReduceMax", x, -1)

    def _reduced(self, op: str, x: str, axis: int) -> str:
        if self.opset >= 18:
            return self.node(op, x, self.axis(axis), keepdims=1)
        return self.node(op, x, axes=[axis], keepdims=1)

    def gelu(self, x: str) -> str:
        """The exact Gaussian error linear unit, x Phi(x)."""
        if self.opset >= GELU_OPSET:
            return self.node("Gelu", x)
        erf = self.node("Erf", self.node("Div", x, self.number("gelu.divisor", 2.0**0.5)))
        shifted = self.node("Add", erf, self.number("gelu.summand", 1.0))
        return self.node("Mul", self.node("Mul", x, shifted), self.number("gelu.factor", 0.5))


@dataclass(frozen=True)
class Residual:
    """The residual adapters of one block: down-projected rows ``hidden`` [N * L, R], opened for each image, and the
    up-projection ``up`` [R, 3d] as names of tensors; ``name`` begins the names of their shapes, ``rank`` is R."""

    name: str
    rank: int
    hidden: str
    up: str


class VitGraph:
    """Translates the parts of a `ComposedModel` into nodes of a `Builder`."""

    def __init__(self, model: ComposedModel, opset: int, half: bool, batch: int | None, sums: bool) -> None:
        self.model = model
        self.batch = batch
        self.backbone = model.network.backbone
        self.vit = self.backbone.model
        self.dim = self.backbone.dim
        self.special = self.backbone.special_tokens
        self.length = self.special + (self.backbone.info.size // self.vit.patch_embed.patch_size[0]) ** 2
        self.b = Builder(opset, half, sums)

    def build(self, part: Part = "whole") -> onnx.GraphProto:
        """The whole graph, or the part of it before or after the end of the frozen prefix."""
        rows, size, b = self.batch or "N", self.backbone.info.size, self.b
        classes, tasks = len(self.model.catalogue.classes), len(self.model.catalogue.tasks)
        image = helper.make_tensor_value_info(INPUT, TensorProto.UINT8, [rows, size, size, 3])
        columns: dict[str, list[int]] = {
            "probabilities": [classes],
            "task_probabilities": [tasks],
            "novelty": [],
            "features": [self.dim + self.backbone.summary_dim],
            "tokens": [self.length, self.dim],
            "phi": [self.backbone.summary_dim],
        }
        floats = {
            name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, *shape])
            for name, shape in columns.items()
        }
        between, answers = [floats[name] for name in BETWEEN], [floats[name] for name in OUTPUTS]
        if part == "suffix":
            x, phi = self._rows("tokens"), "phi"
        else:
            x, phi = self._prefix()
        if part == "prefix":
            self._tokens(x, "tokens")
        else:
            self._classify(self._feature(self._suffix(x, phi)), phi)
        initializers = [numpy_helper.from_array(value, name) for name, value in b.initializers.items()]
        inputs = between if part == "suffix" else [image]
        outputs = between if part == "prefix" else answers
        return helper.make_graph(b.nodes, "duallora_edge", inputs, outputs, initializers)

    def _prefix(self) -> tuple[str, str]:
        """Rows [N * L, d] and the summary phi at the end of the frozen blocks."""
        x = self._embed()
        summaries = []
        for index, block in enumerate(self.vit.blocks[: self.backbone.info.prefix_blocks]):
            x = self._block(f"blocks.{index}", AdaptedBlock(block), x, None)
            if index in self.backbone.info.summary_blocks:
                summaries += self._summary(x)
        if not len(self.backbone.directions):
            return x, self._normalised(summaries, output="phi")
        return x, self.b.node("Concat", self._normalised(summaries), self._second_order(x), axis=1, name="phi")

    def _suffix(self, x: str, phi: str) -> str:
        """What the adapted blocks make of it: rows [N * L, d], or [N, d] where the class token is all that counts."""
        posterior = self._posterior(phi)
        prefix, blocks = self.backbone.info.prefix_blocks, self.model.network.blocks
        for offset, block in enumerate(blocks):
            last = offset == len(blocks) - 1 and self.backbone.pools_class_token
            x = self._block(f"blocks.{prefix + offset}", block, x, posterior, class_token_only=last)
        return x

    # -- before the blocks ------------------------------------------------------------------------------------

    def _embed(self) -> str:
        """Tokens [N * L, d]. w (p - mean) / std + bias = (w / std) p + (bias - sum w mean / std): exact, no padding."""
        b, proj = self.b, self.vit.patch_embed.proj
        mean, std = self.backbone.pixel_mean.double().cpu(), self.backbone.pixel_std.double().cpu()
        weight = proj.weight.double().cpu() / std[None, :, None, None]
        bias = -(weight * mean[None, :, None, None]).sum(dim=(1, 2, 3))
        if proj.bias is not None:
            bias = bias + proj.bias.double().cpu()
        # Cast comes first: parsers of TensorRT refuse to transpose uint8.
        pixels = b.node("Transpose", b.node("Cast", INPUT, to=TensorProto.FLOAT), perm=[0, 3, 1, 2])
        x = b.node(
            "Conv",
            pixels,
            b.weight("patch_embed.proj.weight", weight.float()),
            b.weight("patch_embed.proj.bias", bias.float()),
            strides=list(proj.stride),
            kernel_shape=list(proj.kernel_size),
        )
        x = b.node("Transpose", b.reshape(x, "patches", 0, self.dim, -1), perm=[0, 2, 1])
        if not isinstance(self.vit.patch_embed.norm, nn.Identity):
            x = self._norm("patch_embed.norm", self.vit.patch_embed.norm, x)
        # Class and register tokens are constants: padding makes room and one addition brings them and the positions.
        x = b.node("Pad", x, b.ints("padding.special_tokens", 0, self.special, 0, 0, 0, 0)) if self.special else x
        x = b.node("Add", x, b.weight("token_embed", self._token_embedding()))
        return self._norm("norm_pre", self.vit.norm_pre, self._rows(x))

    def _rows(self, x: str) -> str:
        """Tokens as rows [N * L, d]."""
        return self.b.reshape(x, "rows", -1, self.dim)

    def _tokens(self, rows: str, output: str = "") -> str:
        """Rows as tokens [N, L, d]."""
        return self.b.reshape(rows, "tokens", -1, self.length, self.dim, output=output)

    def _token_embedding(self) -> Array:
        """Class token, register tokens and positions as one constant [1, L, d], by the backbone's own code."""
        vit = self.vit
        side = self.backbone.info.size // vit.patch_embed.patch_size[0]
        shape = (1, side, side, self.dim) if vit.dynamic_img_size else (1, side * side, self.dim)
        blank = vit.patch_embed.proj.weight.new_zeros(shape)
        constant: Array = vit._pos_embed(blank).detach().cpu().numpy()
        return constant

    def _norm(self, name: str, norm: nn.Module, x: str) -> str:
        if isinstance(norm, nn.Identity):
            return x
        if not isinstance(norm, nn.LayerNorm):
            raise ExportError(
                f"The normalisation {type(norm).__name__} of {name} cannot be exported; use a LayerNorm ViT."
            )
        scale = self.b.weight(f"{name}.weight", norm.weight)
        bias = None if norm.bias is None else self.b.weight(f"{name}.bias", norm.bias)
        return self.b.layer_norm(x, name, scale, bias, norm.eps)

    # -- blocks -----------------------------------------------------------------------------------------------

    def _block(
        self, name: str, adapted: AdaptedBlock, x: str, posterior: str | None, *, class_token_only: bool = False
    ) -> str:
        """One block on rows x [N * L, d]; with ``class_token_only`` the result is [N, d]."""
        b, block = self.b, adapted.block
        gates = self._gates(name, adapted, posterior)
        y = b.low(self._norm(f"{name}.norm1", block.norm1, x))
        heads = self._attention(name, adapted, y, gates, class_token_only)
        attended = b.high(b.gemm(heads, *self._linear(f"{name}.attn.proj", block.attn.proj)))
        if class_token_only:
            x = self._class_rows(x)
        x = b.node("Add", x, self._scaled(f"{name}.ls1", block.ls1, attended))
        y = b.low(self._norm(f"{name}.norm2", block.norm2, x))
        return b.node("Add", x, self._scaled(f"{name}.ls2", block.ls2, b.high(self._mlp(f"{name}.mlp", block.mlp, y))))

    def _gates(self, name: str, adapted: AdaptedBlock, posterior: str | None) -> str | None:
        """The gates [N, R] of the residual adapters of all tasks, None for a block without any."""
        if adapted.adapter is None or adapted.gate_map is None or posterior is None:
            return None
        return self.b.project(posterior, f"{name}.residual.gate_map", adapted.gate_map.T)

    def _attention(self, name: str, adapted: AdaptedBlock, y: str, gates: str | None, class_token_only: bool) -> str:
        """Heads concatenated, rows [N * Lq, d], before the output projection."""
        b, attn = self.b, adapted.block.attn
        shape = (attn.num_heads, attn.head_dim)
        q, k, v = self._qkv(name, adapted, y, gates, class_token_only)
        q = (
            b.reshape(q, "class_heads", -1, 1, *shape)
            if class_token_only
            else b.reshape(q, "heads", -1, self.length, *shape)
        )
        k = b.reshape(k, "heads", -1, self.length, *shape)
        v = b.reshape(v, "heads", -1, self.length, *shape)
        if not isinstance(attn.q_norm, nn.Identity):
            q, k = b.high(q), b.high(k)
            q, k = self._norm(f"{name}.attn.q_norm", attn.q_norm, q), self._norm(f"{name}.attn.k_norm", attn.k_norm, k)
            q, k = b.low(q), b.low(k)
        q = b.node("Mul", b.node("Transpose", q, perm=[0, 2, 1, 3]), b.number("attention.scale", attn.scale))
        scores = b.node("MatMul", q, b.node("Transpose", k, perm=[0, 2, 3, 1]))
        heads = b.node("MatMul", b.node("Softmax", scores, axis=-1), b.node("Transpose", v, perm=[0, 2, 1, 3]))
        return self._rows(b.node("Transpose", heads, perm=[0, 2, 1, 3]))

    def _qkv(
        self, name: str, adapted: AdaptedBlock, y: str, gates: str | None, class_token_only: bool
    ) -> tuple[str, str, str]:
        """Query, key and value rows [N * L, d] (queries [N, d] with ``class_token_only``), adapters included.

        Weights keep their PyTorch names also where only a part is used: runtimes fold the slices when they load.
        """
        b, d = self.b, self.dim
        weight, bias = self._linear(f"{name}.attn.qkv", adapted.block.attn.qkv, adapted.weight)
        residual = self._residual(name, adapted, y, gates)
        if not class_token_only:
            q, k, v = b.split(self._updated(b.gemm(y, weight, bias), residual), "query_key_value", [d, d, d])
            return q, k, v
        q = self._part(self._class_rows(y), "query", (0, d), weight, bias, residual and self._class_residual(residual))
        k, v = b.split(self._part(y, "key_value", (d, 3 * d), weight, bias, residual), "key_value", [d, d])
        return q, k, v

    def _part(
        self, x: str, what: str, bounds: tuple[int, int], weight: str, bias: str | None, residual: Residual | None
    ) -> str:
        """Rows x through a part of the fused projection, its residual included."""
        b = self.b
        y = b.gemm(x, b.slice(weight, what, *bounds, 0), None if bias is None else b.slice(bias, what, *bounds, 0))
        if residual is None:
            return y
        return self._updated(y, replace(residual, up=b.slice(residual.up, what, *bounds, 1)))

    def _updated(self, x: str, residual: Residual | None) -> str:
        """x + hidden up, as one Gemm."""
        return x if residual is None else self.b.node("Gemm", residual.hidden, residual.up, x)

    def _residual(self, name: str, adapted: AdaptedBlock, y: str, gates: str | None) -> Residual | None:
        """The residual adapters of all tasks, for rows y [N * L, d] and gates [N, R]."""
        b, adapter = self.b, adapted.adapter
        if adapter is None or gates is None:
            return None
        rank, name = len(adapter.q_down), f"{name}.residual"
        hidden = b.gemm(y, b.weight(f"{name}.down", adapter.q_down), None)
        opened = b.low(b.reshape(gates, f"{name}.gates", -1, 1, rank))
        gated = b.node("Mul", b.reshape(hidden, f"{name}.tokens", -1, self.length, rank), opened)
        up = torch.cat([adapter.q_up, torch.zeros_like(adapter.q_up), adapter.v_up], dim=1)
        return Residual(name, rank, b.reshape(gated, f"{name}.rows", -1, rank), b.weight(f"{name}.up", up))

    def _class_residual(self, residual: Residual) -> Residual:
        """The residual of the class tokens alone."""
        b, name, rank = self.b, residual.name, residual.rank
        tokens = b.reshape(residual.hidden, f"{name}.tokens", -1, self.length, rank)
        return replace(residual, hidden=b.reshape(b.slice(tokens, "class_token", 0, 1, 1), f"{name}.rows", -1, rank))

    def _linear(self, name: str, layer: nn.Linear, weight: Tensor | None = None) -> tuple[str, str | None]:
        """Names of weight and bias of a linear layer; ``weight`` replaces its own."""
        stored = self.b.weight(f"{name}.weight", layer.weight if weight is None else weight)
        return stored, None if layer.bias is None else self.b.weight(f"{name}.bias", layer.bias)

    def _scaled(self, name: str, scale: nn.Module, x: str) -> str:
        if isinstance(scale, LayerScale):
            return self.b.node("Mul", x, self.b.weight(f"{name}.gamma", scale.gamma))
        return x

    def _mlp(self, name: str, mlp: Any, x: str) -> str:
        """fc1, activation, fc2; a gated or normalised MLP is refused."""
        children = {key for key, child in mlp.named_children() if not isinstance(child, (nn.Identity, nn.Dropout))}
        if children != {"fc1", "act", "fc2"}:
            raise ExportError(f"The MLP {type(mlp).__name__} of {name} cannot be exported; use a ViT with a plain MLP.")
        hidden = self.b.gemm(x, *self._linear(f"{name}.fc1", mlp.fc1))
        return self.b.gemm(self._activation(name, mlp.act, hidden), *self._linear(f"{name}.fc2", mlp.fc2))

    def _activation(self, name: str, act: nn.Module, x: str) -> str:
        kind = type(act).__name__
        if kind in ("GELU", "Gelu") and getattr(act, "approximate", "none") == "none":
            return self.b.gelu(x)
        if kind in ("QuickGELU", "QuickGelu"):
            return self.b.node(
                "Mul", x, self.b.node("Sigmoid", self.b.node("Mul", x, self.b.number("quick_gelu.slope", 1.702)))
            )
        if kind == "ReLU":
            return self.b.node("Relu", x)
        raise ExportError(f"The activation {kind} of {name} cannot be exported; use a ViT with GELU.")

    def _class_rows(self, x: str) -> str:
        """Rows [N, d] of the class tokens of rows [N * L, d]."""
        return self._rows(self._class_token(self._tokens(x)))

    def _class_token(self, tokens: str) -> str:
        """The class token [N, 1, d] of tokens [N, L, d]."""
        return self.b.slice(tokens, "class_token", 0, 1, 1)

    def _patches(self, tokens: str) -> str:
        """The patch tokens of tokens [N, L, d]."""
        return self.b.slice(tokens, "patches", self.special, self.length, 1)

    # -- after the blocks -------------------------------------------------------------------------------------

    def _summary(self, x: str) -> list[str]:
        """Class token (if any), mean and standard deviation of the patches, [N, 1, d] each, of rows [N * L, d]."""
        b = self.b
        tokens = self._tokens(x)
        patches = self._patches(tokens)
        mean = b.mean_over_tokens(patches)
        centred = b.node("Sub", patches, mean)
        deviation = b.node("Sqrt", b.mean_over_tokens(b.node("Mul", centred, centred)))
        return [self._class_token(tokens), mean, deviation] if self.vit.has_class_token else [mean, deviation]

    def _second_order(self, x: str) -> str:
        """The upper triangle [N, m (m + 1) / 2] of the root of the patches' covariance, of rows [N * L, d].

        As `Backbone.second_order` computes it; the first of the iterations is shorter, since the inverse begins as the
        unit matrix.
        """
        b, directions = self.b, self.backbone.directions
        m, patches = len(directions), self._patches(self._tokens(x))
        centred = b.node("Sub", patches, b.mean_over_tokens(patches))
        z = b.product(centred, b.weight("second_order.directions", directions.T))
        unit = np.eye(m, dtype=np.float32)[None]
        share = b.number("second_order.share", 1 / (self.length - self.special))
        products = b.node("Mul", b.product(b.node("Transpose", z, perm=[0, 2, 1]), z), share)
        covariance = b.node("Add", products, b.weight("second_order.floor", np.float32(SECOND_ORDER_EPS) * unit))
        diagonal = b.node("Mul", covariance, b.weight("second_order.unit", unit))
        trace = b.node("ReduceSum", b.node("ReduceSum", diagonal, b.axis(-1), keepdims=1), b.axis(1), keepdims=1)
        root, inverse = b.node("Div", covariance, trace), None
        one_and_half, half = b.weight("second_order.centre", 1.5 * unit), b.number("second_order.half", 0.5)
        for step in range(NEWTON_STEPS):
            product = root if inverse is None else b.product(inverse, root)
            factor = b.node("Sub", one_and_half, b.node("Mul", product, half))
            root = b.product(root, factor)
            if step < NEWTON_STEPS - 1:
                inverse = factor if inverse is None else b.product(factor, inverse)
        flat = b.reshape(b.node("Mul", root, b.node("Sqrt", trace)), "second_order", -1, m * m)
        rows, columns = np.triu_indices(m)
        return b.node("Gather", flat, b.ints("second_order.triangle", *(m * rows + columns).tolist()), axis=1)

    def _normalised(self, parts: Sequence[str], output: str = "") -> str:
        """The summaries of the blocks [N, D'], every part normalised on its own."""
        b = self.b
        ones = b.weight("summary.scale", np.ones(self.dim, np.float32))
        joined = b.layer_norm(b.node("Concat", *parts, axis=1), "summary", ones, None, 1e-6)
        return b.reshape(joined, "summary", -1, len(parts) * self.dim, output=output)

    def _posterior(self, phi: str) -> str:
        """The task posterior [N, T]; the temperature is folded into the weights."""
        b, memory = self.b, self.model.network.dynamic_memory
        logits = b.project(phi, "dynamic_memory", memory.weight / memory.temperature, memory.bias / memory.temperature)
        return b.project(b.node("Softmax", logits, axis=-1), "dynamic_memory.task_sums", memory.task_sums.T)

    def _feature(self, x: str) -> str:
        """The final feature f [N, d]; x is [N, d] when the last block gave the class token alone."""
        if self.backbone.pools_class_token:
            pooled = self._norm("norm", self.vit.norm, x)
        else:
            tokens = self._tokens(self._norm("norm", self.vit.norm, x))
            pooled = self._rows(self.b.mean_over_tokens(self._patches(tokens)))
        return self._norm("fc_norm", self.vit.fc_norm, pooled)

    def _classify(self, f: str, phi: str) -> None:
        """The four outputs. The temperatures are folded into the classifier's weights."""
        b, c = self.b, self.model.classifier
        features = b.node("Concat", f, phi, axis=1, name="features")
        read = features
        if c.expansion.numel():
            read = b.node("Relu", b.project(features, "classifier.expansion", c.expansion))
        mixture = c.mixture
        gaussian = b.project(read, "classifier", c.weight / mixture.temperature, c.bias / mixture.temperature)
        logits = self._within_tasks(gaussian, features) if len(c.within_bias) else gaussian
        centred = b.node("Sub", features, b.weight("classifier.centre", c.centre))
        distance = b.project(b.node("Mul", centred, centred), "classifier.precision", c.precision[None, :])
        limits = (
            b.number("classifier.least_remoteness", LEAST_REMOTENESS),
            b.number("classifier.most_remoteness", MOST_REMOTENESS),
        )
        logits = b.node("Div", logits, b.node("Clip", distance, *limits))
        components = b.node("Softmax", logits, axis=-1)
        if mixture.share:
            flat = b.node(
                "Softmax", b.node("Mul", logits, b.number("classifier.flat_scale", 1 / mixture.spread)), axis=-1
            )
            components = b.node(
                "Add",
                b.node("Mul", components, b.number("classifier.sharp_share", 1 - mixture.share)),
                b.node("Mul", flat, b.number("classifier.flat_share", mixture.share)),
            )
        b.project(components, "classifier.class_sums", c.class_sums.T, output="probabilities")
        b.project(components, "classifier.task_sums", c.task_sums.T, output="task_probabilities")
        if torch.equal(c.gaussian_weight, c.weight) and torch.equal(c.gaussian_bias, c.bias):
            gaussian = b.node("Mul", gaussian, b.number("classifier.temperature", mixture.temperature))
        else:
            gaussian = b.project(features, "novelty", c.gaussian_weight, c.gaussian_bias)
        self._novelty(gaussian)

    def _within_tasks(self, logits: str, features: str) -> str:
        """Logits [N, K] in the order of the task's own discriminants within each task, see `Classifier.logits`."""
        b, c = self.b, self.model.classifier
        weight, bias = (value / c.mixture.temperature for value in (c.within_weight, c.within_bias))
        within = b.project(features, "classifier.within", weight, bias)
        tasks, longest = c.members.shape

        def best(x: str) -> str:
            members = b.node("Gather", x, b.ints("classifier.members", *c.members.flatten().tolist()), axis=1)
            return b.reshape(b.max_last(b.reshape(members, "members", -1, tasks, longest)), "tasks", -1, tasks)

        gap = b.node("Sub", best(logits), best(within))
        return b.node("Add", within, b.project(gap, "classifier.task_of", c.task_sums))

    def _novelty(self, gaussian: str) -> None:
        """Relative Mahalanobis distance from the Gaussian logits [N, K], on the scale of validation images."""
        b, c = self.b, self.model.classifier
        white = b.project(gaussian, "novelty.background", c.background.T, c.background_bias)
        squared = b.node("ReduceSum", b.node("Mul", white, white), b.axis(-1), keepdims=1)
        raw = b.node("Sub", squared, b.node("Mul", b.max_last(gaussian), b.number("novelty.factor", 2.0)))
        steps = b.node(
            "Mul",
            b.node("Sub", raw, b.weight("novelty.start", c.novelty_start)),
            b.weight("novelty.slope", 1 / c.novelty_width),
        )
        clipped = b.node("Clip", steps, b.number("novelty.lowest", 0.0), b.number("novelty.highest", 1.0))
        b.reshape(b.project(clipped, "novelty.height", c.novelty_height[None, :]), "novelty", -1, output="novelty")


def build_model(
    model: ComposedModel,
    opset: int,
    ir_version: int,
    *,
    half: bool = False,
    batch: int | None = None,
    part: Part = "whole",
    sums: bool = False,
) -> onnx.ModelProto:
    """The ONNX model of a composed model, checked by `onnx.checker` with shape inference.

    ``half``: fp16 with fp32 where it is needed; inputs and outputs are the same. ``batch``: images in one run, any
    number by default. ``part``: ``prefix`` ends, and ``suffix`` begins, with the tokens float32 [N, L, d] and the
    summary phi [N, summary_dim] behind the frozen blocks; the same backbone gives the same prefix, byte for byte,
    whatever was learned. ``sums``: see `Builder.project`. Raises `ExportError` when the opset is below 14 or a part of
    the backbone cannot be expressed.
    """
    if opset < MIN_OPSET:
        raise ExportError(f"Opset {opset} is too old for this graph; targets need at least {MIN_OPSET}.")
    graph = VitGraph(model, opset, half, batch, sums).build(part)
    built = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=ir_version,
        producer_name="duallora-edge",
        producer_version=__version__,
    )
    onnx.checker.check_model(built, full_check=True)
    return built
