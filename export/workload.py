"""What one image costs in an exported graph: multiply-adds, weights and activations, for estimates."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnxruntime
from onnx import TensorProto, shape_inference

from duallora_edge.device_profiles import Workload

FP16_BYTES = 2


def workload(model: onnx.ModelProto) -> Workload:
    """The workload of one image (batch 1) when the graph runs in fp16.

    FLOPs are two a multiply-add of MatMul, Gemm and Conv; element-wise work is left out, as usual. Peak activation
    memory is taken as the inputs and outputs of the node that has the most of both.
    """
    single = onnx.ModelProto()
    single.CopyFrom(model)
    for value in (*single.graph.input, *single.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    graph = shape_inference.infer_shapes(single, strict_mode=True, data_prop=True).graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
    weights = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    known = {**shapes, **weights}
    flops = sum(_flops(node, known) for node in graph.node)
    fixed = set(weights)  # weights, and what is computed from weights alone when the graph is loaded
    for node in graph.node:
        if fixed.issuperset(node.input):
            fixed.update(node.output)
    activations = max(
        sum(math.prod(shapes[name]) for name in {*node.input, *node.output} - fixed) for node in graph.node
    )
    parameters = sum(math.prod(dims) for dims in weights.values())
    return Workload(flops=flops, weight_bytes=FP16_BYTES * parameters, activation_bytes=FP16_BYTES * activations)


def _flops(node: onnx.NodeProto, shapes: dict[str, list[int]]) -> int:
    if node.op_type not in ("MatMul", "Gemm", "Conv"):
        return 0
    out = math.prod(shapes[node.output[0]])
    first, second = shapes[node.input[0]], shapes[node.input[1]]
    if node.op_type == "Conv":
        return 2 * out * math.prod(second[1:])
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return 2 * out * first[-2 if transposed else -1]


def node_counts(model: onnx.ModelProto) -> dict[str, int]:
    """Number of nodes by operator, most frequent first, with the total under ``total``."""
    names: Sequence[str] = [node.op_type for node in model.graph.node]
    counts = {name: names.count(name) for name in sorted(set(names))}
    return {"total": len(names), **dict(sorted(counts.items(), key=lambda item: -item[1]))}


def optimized_nodes(model: onnx.ModelProto) -> int:
    """Number of nodes that ONNX Runtime's own fusions leave of the graph, on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return len(onnx.load(options.optimized_model_filepath).graph.node)


def full_precision_nodes(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes whose result is fp32, without conversions."""
    graph = shape_inference.infer_shapes(model, strict_mode=True).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    return [
        node.name
        for node in model.graph.node
        if node.op_type != "Cast" and kinds.get(node.output[0]) == TensorProto.FLOAT
    ]
