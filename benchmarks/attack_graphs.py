"""Hostile ONNX graphs: what the check of the runtime says of each, and what ONNX Runtime does without it.

    python benchmarks/attack_graphs.py --python .venv/bin/python --python /tmp/ort-1.17/bin/python
    python benchmarks/attack_graphs.py --mutations 20000 BUNDLE/model.onnx BUNDLE/suffix-fp16.onnx

The first prints a table: every graph must be refused by `check_graph`, for the reason it was made for, without a file
being opened; then each Python runs it in ONNX Runtime, from bytes and from a file, in a process of its own with 4 GB of
address space and 20 seconds. The second mutates exported graphs: the check refuses or accepts, never anything else, and
what it accepts must end in ONNX Runtime with an answer or an error.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from duallora_edge.errors import BundleError
from duallora_edge.runtime.bundle import BETWEEN, INPUT, OUTPUTS
from duallora_edge.runtime.graph_check import check_graph
from duallora_edge.runtime.graph_weights import WEIGHTS, inlined
from duallora_edge.runtime.tensor_file import TensorFile

READS, RETURNS = ("image",), ("answer",)
SECRET = 1234.5
MAPPED = 0x10000000
"""Where the child keeps the secret in its memory as well."""
LARGE = 2**40
UNKNOWN = "an operator that no exported graph needs"
F, I = np.float32, np.int64  # noqa: E741

CHILD = r"""
import ctypes, json, mmap, os, resource, signal, sys
import numpy as np, onnxruntime
os.environ["OMP_NUM_THREADS"] = "1"
mode, mapped, secret, names = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.stdin.read().splitlines()
types = {"uint8": np.uint8, "float": np.float32, "int64": np.int64, "double": np.float64}

def run(name):
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    assert libc.mmap(mapped, 4096, 3, 0x32, -1, 0) == mapped
    ctypes.memmove(mapped, np.full(1024, secret, np.float32).tobytes(), 4096)
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(20)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    try:
        with open(name, "rb") as file:
            model = file.read() if mode == "bytes" else name
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        feeds = {}
        for value in session.get_inputs():
            shape = [size if isinstance(size, int) else 1 for size in value.shape]
            feeds[value.name] = np.zeros(shape, types[value.type[7:-1]])
        answers = session.run(None, feeds)
    except Exception as error:
        return "error"
    for answer in answers:
        if getattr(answer, "dtype", None) == np.float32 and (np.abs(answer - secret) < 1e-3).any():
            return "READ SECRET"
    return "answer"

lines = os.fdopen(os.dup(1), "w")  # what libraries print goes elsewhere
quiet = os.open(os.devnull, os.O_WRONLY)
os.dup2(quiet, 1)
for name in names:
    lines.flush()
    child = os.fork()
    if child == 0:
        os.chdir(os.path.dirname(name))
        os.dup2(quiet, 2)
        print(json.dumps([name, run(name)]), file=lines, flush=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        said = "HANG" if number == signal.SIGALRM else "CRASH " + signal.Signals(number).name
        print(json.dumps([name, said]), file=lines)
    elif os.WEXITSTATUS(status):
        print(json.dumps([name, "CRASH exit %d" % os.WEXITSTATUS(status)]), file=lines)
print(json.dumps(["version", onnxruntime.__version__]), file=lines, flush=True)
"""

Node = onnx.NodeProto
Array = np.ndarray[Any, Any]


Make = Callable[[Path], onnx.ModelProto | bytes]
"""Makes a model, or the bytes of one, for the folder of a bundle; the file ``secret`` lies beside that folder."""
FUNCTIONS: dict[str, tuple[str, Make]] = {}


def attack(reason: str) -> Callable[[Make], Make]:
    """Add a function under its name to the attacks that must be refused with a sentence that contains ``reason``."""

    def add(make: Make) -> Make:
        FUNCTIONS[make.__name__] = (reason, make)
        return make

    return add


# -- building -------------------------------------------------------------------------------------------------


def model(nodes: Sequence[Node], constants: dict[str, Array] | None = None, opset: int = 17) -> onnx.ModelProto:
    """image uint8 [N, 4, 4, 3] becomes x float32 [N, 48]; ``nodes`` make the float32 ``answer`` [N, 48] of it."""
    before = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["pixels", "flat"], ["x"]),
    ]
    known = {"flat": np.array([-1, 48], I), **(constants or {})}
    graph = helper.make_graph(
        [*before, *nodes],
        "attack",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 4, 4, 3])],
        [helper.make_tensor_value_info("answer", TensorProto.FLOAT, ["N", 48])],
        [numpy_helper.from_array(value, name) for name, value in known.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def harmless() -> onnx.ModelProto:
    """What every attack is made of; `check_graph` accepts it."""
    return model([helper.make_node("Relu", ["x"], ["answer"])])


def one(op: str, *inputs: str | Array, outputs: int = 1, domain: str = "", **attributes: Any) -> onnx.ModelProto:
    """A graph around one node; arrays become constants. Its first output is cast to the answer."""
    constants = {f"c{index}": value for index, value in enumerate(inputs) if not isinstance(value, str)}
    names = [value if isinstance(value, str) else f"c{index}" for index, value in enumerate(inputs)]
    made = ["y", *(f"y{index}" for index in range(1, outputs))]
    node = helper.make_node(op, names, made, domain=domain or None, **attributes)
    built = model([node, helper.make_node("Cast", ["y"], ["answer"], to=TensorProto.FLOAT)], constants)
    if domain:
        built.opset_import.append(helper.make_opsetid(domain, 1))
    return built


def with_tensor(tensor: TensorProto) -> onnx.ModelProto:
    """x plus a hand-made constant named ``c``."""
    built = model([helper.make_node("Add", ["x", "c"], ["answer"])])
    tensor.name = "c"
    built.graph.initializer.append(tensor)
    return built


def external(location: str, sizes: Sequence[int] = (48,), **settings: object) -> onnx.ModelProto:
    """x plus weights that lie elsewhere."""
    tensor = TensorProto(data_type=TensorProto.FLOAT, dims=sizes, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **settings}.items():
        tensor.external_data.add(key=key, value=str(value))
    return with_tensor(tensor)


def varint(value: int) -> bytes:
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def chunk(number: int, content: bytes) -> bytes:
    """A field with a length."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def subgraph(*nodes: Node, output: str = "inner", elem_type: int = TensorProto.FLOAT) -> onnx.GraphProto:
    value = helper.make_tensor_value_info(output, elem_type, None)
    return helper.make_graph(nodes, "body", [], [value])


def function(name: str, *nodes: Node) -> onnx.FunctionProto:
    return helper.make_function(
        "local", name, ["a"], ["b"], nodes, [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    )


def with_functions(*functions: onnx.FunctionProto) -> onnx.ModelProto:
    """A graph that calls the first one."""
    built = one(functions[0].name, "x", domain="local")
    built.functions.extend(functions)
    return built


def call(name: str, source: str, target: str) -> Node:
    return helper.make_node(name, [source], [target], domain="local")


# -- attacks: one node ----------------------------------------------------------------------------------------

HUGE = np.array([LARGE], I)
IMAGE4 = np.ones((1, 1, 4, 4), F)
INTEGERS = "an input of type 7"
INDICES = "of the integers"
NODES: dict[str, tuple[str, Make]] = {
    "int_div_by_zero": (INTEGERS, lambda _: one("Div", np.array([1, 2], I), np.array([0, 0], I))),
    "int32_div_by_zero": ("type 6 of", lambda _: one("Div", np.array([1], "i4"), np.array([0], "i4"))),
    "int_mod_by_zero": (UNKNOWN, lambda _: one("Mod", np.array([1, 2], I), np.array([0, 0], I))),
    "int_min_div_minus_one": ("value too large", lambda _: one("Div", np.array([-(2**63)], I), np.array([-1], I))),
    "int_min_mod_minus_one": ("value too large", lambda _: one("Mod", np.array([-(2**31)], I), np.array([-1], I))),
    "div_by_zero_of_the_input": ("an input of type 2", lambda _: one("Div", "image", "image")),
    "bit_shift_beyond": ("field 4 with", lambda _: one("BitShift", "image", "image", direction="LEFT")),
    "constant_of_shape_giant": ("value too large", lambda _: one("ConstantOfShape", HUGE)),
    "constant_of_shape_negative": (UNKNOWN, lambda _: one("ConstantOfShape", np.array([-5], I))),
    "expand_giant": ("value too large", lambda _: one("Expand", "x", np.array([LARGE, 48], I))),
    "expand_large": (UNKNOWN, lambda _: one("Expand", "x", np.array([2**30, 48], I))),
    "tile_giant": (UNKNOWN, lambda _: one("Tile", "x", np.array([2**30, 2**30], I))),
    "tile_overflow": ("value too large", lambda _: one("Tile", "x", np.array([2**62, 4], I))),
    "range_endless": ("of the integers", lambda _: one("Range", np.array(0, I), np.array(2**62, I), np.array(1, I))),
    "range_float_step_zero": (UNKNOWN, lambda _: one("Range", np.array(0, F), np.array(1, F), np.array(0, F))),
    "eye_like_giant": ("value too large", lambda _: one("EyeLike", np.array([2**40], I), k=2**40)),
    "random_normal_giant": (UNKNOWN, lambda _: one("RandomNormal", shape=[2**20, 2**20])),
    "bernoulli": (UNKNOWN, lambda _: one("Bernoulli", "x")),
    "pad_giant": ("amounts", lambda _: one("Pad", "x", np.array([0, 0, 2**30, 2**30], I))),
    "pad_negative": ("amounts", lambda _: one("Pad", "x", np.array([0, -500, 0, -500], I))),
    "pad_reflect": ("field 4 with", lambda _: one("Pad", "x", np.array([0, 4096, 0, 4096], I), mode="reflect")),
    "pad_too_few_amounts": ("amounts", lambda _: one("Pad", "x", np.array([0, 1], I))),
    "pad_of_images": ("some images", lambda _: one("Pad", "x", np.array([1, 0, 0, 0], I))),
    "resize_giant": ("shape [0] of", lambda _: one("Resize", IMAGE4, np.array([], F), np.array([1, 1, 1e9, 1e9], F))),
    "resize_negative": (UNKNOWN, lambda _: one("Resize", IMAGE4, np.ones(1, F), np.array([1, 1, -2, -2], F))),
    "top_k_giant": ("value too large", lambda _: one("TopK", "x", HUGE, outputs=2)),
    "top_k_negative": (UNKNOWN, lambda _: one("TopK", "x", np.array([-7], I), outputs=2)),
    "one_hot_giant": (UNKNOWN, lambda _: one("OneHot", np.array([1], I), np.array([2**31 - 1], I), np.zeros(2, F))),
    "reshape_giant": ("value too large", lambda _: one("Reshape", "x", np.array([LARGE, LARGE], I))),
    "reshape_overflow": ("that does not fit", lambda _: one("Reshape", "x", np.array([2**31 - 1] * 4, I))),
    "reshape_to_many_axes": ("62 axes", lambda _: one("Reshape", "x", np.array([-1, 48, *[1] * 60], I))),
    "reshape_two_unknown": ("shape (-1, -1)", lambda _: one("Reshape", "x", np.array([-1, -1], I))),
    "reshape_negative": ("shape (-3, 48)", lambda _: one("Reshape", "x", np.array([-3, 48], I))),
    "reshape_zero_of_nothing": ("shape (48, -1, 0)", lambda _: one("Reshape", "x", np.array([48, -1, 0], I))),
    "reshape_allow_zero": ("'allowzero'", lambda _: one("Reshape", "x", np.array([0, 48], I), allowzero=1)),
    "slice_beyond": (
        "from 40 to",
        lambda _: one("Slice", "x", np.array([40], I), np.array([900], I), np.array([1], I)),
    ),
    "slice_step_zero": ("5 inputs", lambda _: one("Slice", "x", *(np.array([n], I) for n in (0, 9, 1, 0)))),
    "slice_axis_beyond": ("axis 77", lambda _: one("Slice", "x", *(np.array([n], I) for n in (0, 9, 77)))),
    "split_negative": ("sizes (-2, 50)", lambda _: one("Split", "x", np.array([-2, 50], I), outputs=2, axis=-1)),
    "split_too_much": ("sizes (40, 40)", lambda _: one("Split", "x", np.array([40, 40], I), outputs=2, axis=-1)),
    "transpose_twice_the_same": ("order [0, 0]", lambda _: one("Transpose", "x", perm=[0, 0])),
    "transpose_beyond": ("order [0, 9]", lambda _: one("Transpose", "x", perm=[0, 9])),
    "softmax_axis": ("axis 2147483647", lambda _: one("Softmax", "x", axis=2**31 - 1)),
    "concat_axis": ("axis -9", lambda _: one("Concat", "x", "x", axis=-9)),
    "reduce_axes": ("axis 64", lambda _: one("ReduceMean", "x", axes=[64], keepdims=1)),
    "reduce_axes_twice": ("axes [1, 1]", lambda _: one("ReduceMax", "x", axes=[1, 1], keepdims=1)),
    "reduce_sum_of_nothing": ("axis 3", lambda _: one("ReduceSum", "x", np.array([3], I), keepdims=0)),
    "layer_norm_scale": ("do not fit", lambda _: one("LayerNormalization", "x", np.ones(7, F), axis=-1, epsilon=1e-6)),
    "layer_norm_axis": ("axis or", lambda _: one("LayerNormalization", "x", np.ones(48, F), axis=-9, epsilon=1e-6)),
    "gemm_shapes": ("do not fit", lambda _: one("Gemm", "x", np.ones((7, 9), F), transB=1)),
    "gemm_bias": ("do not fit", lambda _: one("Gemm", "x", np.ones((9, 48), F), np.ones(7, F), transB=1)),
    "matmul_scalar": ("do not fit", lambda _: one("MatMul", "x", np.array(1, F))),
    "cast_to_string": ("to 8", lambda _: one("Cast", "x", to=TensorProto.STRING)),
    "cast_to_unknown": ("to 2147483000", lambda _: one("Cast", "x", to=2147483000)),
    "clip_of_vectors": ("not scalars", lambda _: one("Clip", "x", np.zeros(5, F), np.zeros(5, F))),
    "conv_stride_zero": (
        "[1, 1], [0, 0]",
        lambda _: one("Conv", IMAGE4, np.ones((1, 1, 1, 1), F), kernel_shape=[1, 1], strides=[0, 0]),
    ),
    "conv_kernel_negative": (
        "[-1, -1], [1, 1]",
        lambda _: one("Conv", IMAGE4, np.ones((1, 1, 1, 1), F), kernel_shape=[-1, -1], strides=[1, 1]),
    ),
    "conv_kernel_other": (
        "[4, 4], [1, 1]",
        lambda _: one("Conv", IMAGE4, np.ones((1, 1, 1, 1), F), kernel_shape=[4, 4], strides=[1, 1]),
    ),
    "conv_group_zero": (
        "'group'",
        lambda _: one("Conv", IMAGE4, np.ones((1, 1, 1, 1), F), kernel_shape=[1, 1], strides=[1, 1], group=0),
    ),
    "conv_dilation_giant": (
        "'dilations'",
        lambda _: one("Conv", IMAGE4, np.ones((1, 1, 2, 2), F), dilations=[2**62, 2**62]),
    ),
    "max_pool_kernel_zero": (UNKNOWN, lambda _: one("MaxPool", IMAGE4, kernel_shape=[0, 0], strides=[0, 0])),
    "max_pool_pads": (UNKNOWN, lambda _: one("MaxPool", IMAGE4, kernel_shape=[2, 2], pads=[2**62, 0, 0, 0])),
    "average_pool_stride_negative": (
        UNKNOWN,
        lambda _: one("AveragePool", IMAGE4, kernel_shape=[2, 2], strides=[-1, -1]),
    ),
    "lp_pool": (UNKNOWN, lambda _: one("LpPool", IMAGE4, kernel_shape=[2, 2], p=0)),
    "max_unpool_beyond": (
        INDICES,
        lambda _: one("MaxUnpool", IMAGE4, np.full((1, 1, 4, 4), 2**40, I), kernel_shape=[2, 2], strides=[2, 2]),
    ),
    "depth_to_space_zero": (UNKNOWN, lambda _: one("DepthToSpace", IMAGE4, blocksize=0)),
    "space_to_depth_negative": (UNKNOWN, lambda _: one("SpaceToDepth", IMAGE4, blocksize=-2)),
    "roi_align_beyond": (
        UNKNOWN,
        lambda _: one(
            "RoiAlign", IMAGE4, np.ones((1, 4), F), np.array([2**31 - 1], I), output_height=4, output_width=4
        ),
    ),
    "grid_sample": (UNKNOWN, lambda _: one("GridSample", IMAGE4, np.full((1, 2, 2, 2), np.nan, F))),
    "gather_beyond": ("positions outside", lambda _: one("Gather", "x", np.array([2**31 - 1], I), axis=1)),
    "gather_elements_beyond": (INDICES, lambda _: one("GatherElements", "x", np.array([[-(2**31)]]), axis=1)),
    "gather_nd_beyond": (INDICES, lambda _: one("GatherND", "x", np.array([[2**31 - 1, 7]], I))),
    "scatter_elements_beyond": (
        INDICES,
        lambda _: one("ScatterElements", "x", np.array([[2**31 - 1]], I), np.ones((1, 1), F), axis=1),
    ),
    "scatter_nd_beyond": (INDICES, lambda _: one("ScatterND", "x", np.array([[2**31 - 1, 5]], I), np.ones(1, F))),
    "reverse_sequence_beyond": (
        UNKNOWN,
        lambda _: one("ReverseSequence", np.ones((4, 4), F), np.full(4, 2**31 - 1, I)),
    ),
    "compress": (UNKNOWN, lambda _: one("Compress", "x", "x")),
    "einsum_nonsense": ("field 4 with", lambda _: one("Einsum", "x", "x", equation="...->,ij->" + "abc" * 99)),
    "einsum_giant": ("field 4 with", lambda _: one("Einsum", *["x"] * 6, equation="ab,cd,ef,gh,ij,kl->abcdefghijkl")),
    "non_zero": (UNKNOWN, lambda _: one("NonZero", "x")),
    "unique": (UNKNOWN, lambda _: one("Unique", "x", axis=77)),
    "dft_giant": ("value too large", lambda _: one("DFT", np.ones((1, 4, 1), F), HUGE)),
    "hann_window_giant": ("of the integers", lambda _: one("HannWindow", np.array(2**40, I))),
    "lstm_nonsense": (
        UNKNOWN,
        lambda _: one(
            "LSTM", np.ones((1, 1, 1), F), np.ones((1, 4, 1), F), np.ones((1, 4, 1), F), hidden_size=2**31 - 1
        ),
    ),
    "dequantize_axis": (
        "type 3 of",
        lambda _: one("DequantizeLinear", np.ones((2, 4), np.int8), np.ones(99, F), axis=1),
    ),
    "non_max_suppression": (
        UNKNOWN,
        lambda _: one("NonMaxSuppression", np.ones((1, 9, 4), F), np.ones((1, 1, 9), F), np.array([2**31 - 1], I)),
    ),
    "string_normalizer": (UNKNOWN, lambda _: one("StringNormalizer", "x")),
    "operator_of_no_name": (UNKNOWN, lambda _: one("", "x")),
    "microsoft_fused_gemm": (
        "field 4 with",
        lambda _: one("FusedGemm", "x", np.ones((48, 48), F), domain="com.microsoft", activation="x"),
    ),
    "microsoft_aten": (
        "field 4 with",
        lambda _: one("ATen", "x", domain="com.microsoft", operator="system", overload_name=""),
    ),
    "microsoft_sampling": ("field 7", lambda _: one("Sampling", *["x"] * 4, domain="com.microsoft", eos_token_id=1)),
    "microsoft_attention": (
        "field 7",
        lambda _: one("Attention", "x", "x", "x", domain="com.microsoft", num_heads=0),
    ),
    "microsoft_quick_gelu": ("field 7", lambda _: one("QuickGelu", "x", domain="com.microsoft")),
    "microsoft_crop_and_resize": (
        "field 7",
        lambda _: one("CropAndResize", IMAGE4, np.ones((1, 4), F), np.full(1, 2**30, "i4"), domain="com.microsoft"),
    ),
    "training_adam": ("field 7", lambda _: one("Adam", *["x"] * 5, domain="ai.onnx.preview.training")),
    "unknown_domain": ("field 7", lambda _: one("Relu", "x", domain="elsewhere")),
    "tree_ensemble_beyond": (
        "field 9 with",
        lambda _: one(
            "TreeEnsembleRegressor",
            "x",
            domain="ai.onnx.ml",
            n_targets=1,
            nodes_treeids=[0],
            nodes_nodeids=[0],
            nodes_featureids=[2**31 - 1],
            nodes_values=[0.0],
            nodes_modes=["BRANCH_LEQ"],
            nodes_truenodeids=[2**31 - 1],
            nodes_falsenodeids=[-(2**31)],
            target_treeids=[0],
            target_nodeids=[9],
            target_ids=[99],
            target_weights=[1.0],
        ),
    ),
    "tree_ensemble_cycle": (
        "field 9 with",
        lambda _: one(
            "TreeEnsembleRegressor",
            "x",
            domain="ai.onnx.ml",
            n_targets=1,
            nodes_treeids=[0, 0],
            nodes_nodeids=[0, 1],
            nodes_featureids=[0, 0],
            nodes_values=[0.0, 0.0],
            nodes_modes=["BRANCH_LEQ", "BRANCH_LEQ"],
            nodes_truenodeids=[1, 0],
            nodes_falsenodeids=[1, 0],
            target_treeids=[0],
            target_nodeids=[0],
            target_ids=[0],
            target_weights=[1.0],
        ),
    ),
    "label_encoder": ("field 7", lambda _: one("LabelEncoder", "x", domain="ai.onnx.ml", keys_floats=[1.0])),
    "too_few_inputs": ("1 inputs", lambda _: one("MatMul", "x")),
    "too_many_inputs": ("9 inputs", lambda _: one("Relu", *["x"] * 9)),
    "no_inputs": ("0 inputs", lambda _: one("Add")),
    "empty_input": ("reads ''", lambda _: one("Add", "x", "")),
    "too_many_outputs": ("5 outputs", lambda _: one("Relu", "x", outputs=5)),
    "sequence": (UNKNOWN, lambda _: one("SequenceConstruct", "x")),
    "optional": (UNKNOWN, lambda _: one("Optional", "x")),
    "attribute_of_type_proto": (
        "field 14 with",
        lambda _: one("Optional", "x", type=helper.make_tensor_type_proto(TensorProto.FLOAT, [1])),
    ),
    "attribute_of_strings": ("field 9 with", lambda _: one("Relu", "x", names=["a", "b"])),
    "attribute_of_tensors": ("field 10 with", lambda _: one("Relu", "x", tensors=[numpy_helper.from_array(IMAGE4)])),
    "attributes_of_another_type": ("the type of the attribute 'axis'", lambda _: one("Softmax", "x", axis=[1, 2])),
    "attribute_of_two_values": (
        "the type of the attribute 'axis'",
        lambda _: edited(
            lambda m: [
                setattr(m.graph.node[-1], "op_type", "Softmax"),
                m.graph.node[-1].attribute.add(name="axis", type=2, i=1, f=0.0),
            ]
        ),
    ),
    "name_of_another_node": ("a name other than", lambda _: one("Relu", "x", name="answer")),
    "attribute_without_need": ("the attribute 'alpha'", lambda _: one("Relu", "x", alpha=1.0)),
    "attribute_missing": ("no attribute 'axis'", lambda _: one("Softmax", "x")),
    "types_mixed": ("an input of type 10", lambda _: one("Add", "x", np.ones(48, np.float16))),
    "shape_from_floats": ("not constants", lambda _: one("Reshape", "x", np.ones(2, F))),
    "shape_from_the_input": ("not constants", lambda _: one("Reshape", "x", "x")),
}


# -- attacks: files -------------------------------------------------------------------------------------------

PLACES: dict[str, Make] = {
    "external_parent": lambda folder: external("../secret"),
    "external_absolute": lambda folder: external(str(folder.parent / "secret")),
    "external_link": lambda folder: external("link"),
    "external_hard_link": lambda folder: external("hard"),
    "external_folder_link": lambda folder: external("up/secret"),
    "external_dot_dot_inside": lambda folder: external("x/../../secret"),
    "external_memory_zero": lambda folder: external("*/_ORT_MEM_ADDR_/*", offset=0, length=192),
    "external_memory_mapped": lambda folder: external("*/_ORT_MEM_ADDR_/*", offset=MAPPED, length=192),
    "external_memory_low": lambda folder: external("*/_ORT_MEM_ADDR_/*", offset=4096, length=192),
    "external_offset_giant": lambda folder: external("../secret", offset=2**63 - 1, length=192),
    "external_offset_negative": lambda folder: external("../secret", offset=-4096, length=192),
    "external_length_nonsense": lambda folder: external("../secret", length="1e9 \x00"),
    "external_length_giant": lambda folder: external("../secret", [2**40], length=2**42),
    "external_model_itself": lambda folder: external("model.onnx"),
    "external_zero_device": lambda folder: external("/dev/zero"),
    "external_random_device": lambda folder: external("/dev/urandom", [2**29]),
    "external_fifo": lambda folder: external("fifo"),
    "external_proc_memory": lambda folder: external("/proc/self/mem", offset=MAPPED, length=192),
    "external_folder": lambda folder: external("."),
    "external_empty": lambda folder: external(""),
    "external_long": lambda folder: external("a" * 10**7),
}


@attack("no weights of 'c'")
def external_without_a_place(folder: Path) -> onnx.ModelProto:
    return with_tensor(TensorProto(data_type=1, dims=[48], data_location=TensorProto.EXTERNAL))


@attack("no weights of 'c'")
def external_beside_raw(folder: Path) -> onnx.ModelProto:
    tensor = numpy_helper.from_array(np.ones(48, F))
    tensor.external_data.add(key="location", value="../secret")
    return with_tensor(tensor)


@attack("field 5 with wire type 2 in Attribute")
def external_constant_node(folder: Path) -> onnx.ModelProto:
    tensor = external("../secret").graph.initializer[-1]
    nodes = [helper.make_node("Constant", [], ["c2"], value=tensor), helper.make_node("Add", ["x", "c2"], ["answer"])]
    return model(nodes)


# -- attacks: tensors -----------------------------------------------------------------------------------------


def raw(dims: Sequence[int], size: int, kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    return with_tensor(TensorProto(data_type=kind, dims=dims, raw_data=bytes(size)))


TENSORS: dict[str, tuple[str, Make]] = {
    "raw_too_short": ("4 bytes instead of 192", lambda _: raw([48], 4)),
    "raw_empty": ("0 bytes instead of 192", lambda _: raw([48], 0)),
    "raw_too_long": ("193 bytes instead of 192", lambda _: raw([48], 193)),
    "dims_overflow": ("shape [4611686018427387904, 4, 48]", lambda _: raw([2**62, 4, 48], 192)),
    "dims_overflow_to_fit": ("bytes instead of", lambda _: raw([2**31 - 1] * 8, 4)),
    "dims_giant": ("shape [1099511627776]", lambda _: raw([LARGE], 192)),
    "dims_negative": ("shape [-48]", lambda _: raw([-48], 192)),
    "dims_two_negative": ("shape [-6, -8]", lambda _: raw([-6, -8], 192)),
    "dims_zero": ("shape [0, 48]", lambda _: raw([0, 48], 0)),
    "dims_too_many": ("more than 8 dims", lambda _: raw([1] * 4000, 4)),
    "tensor_of_unknown_type": ("type 99", lambda _: raw([48], 192, 99)),
    "tensor_of_no_type": ("type 0", lambda _: raw([48], 192, 0)),
    "tensor_of_doubles": ("type 11", lambda _: raw([48], 384, TensorProto.DOUBLE)),
    "tensor_of_complex": ("type 14", lambda _: raw([48], 384, TensorProto.COMPLEX64)),
    "tensor_of_int4": ("type 22", lambda _: raw([47], 24, TensorProto.INT4)),
    "tensor_of_bool": ("type 9", lambda _: raw([48], 48, TensorProto.BOOL)),
    "float_data": ("field 4 with", lambda _: with_tensor(TensorProto(data_type=1, dims=[48], float_data=[1.0] * 7))),
    "int32_data": ("field 5 with", lambda _: with_tensor(TensorProto(data_type=10, dims=[48], int32_data=[1 << 30]))),
    "int64_data": ("field 7 with", lambda _: with_tensor(TensorProto(data_type=7, dims=[48], int64_data=[1]))),
    "string_data": ("field 6 with", lambda _: with_tensor(TensorProto(data_type=8, dims=[9], string_data=[b"\xff"]))),
    "segment": (
        "field 3 with",
        lambda _: with_tensor(TensorProto(data_type=1, dims=[48], segment=TensorProto.Segment(begin=9, end=-9))),
    ),
}


def sparse(indices: Array, dims: Sequence[int] = (48,)) -> onnx.SparseTensorProto:
    values = numpy_helper.from_array(np.full(len(indices), 7, F), "c")
    return helper.make_sparse_tensor(values, numpy_helper.from_array(indices, "indices"), dims)


def with_sparse(indices: Array, dims: Sequence[int] = (48,)) -> onnx.ModelProto:
    built = model([helper.make_node("Add", ["x", "c"], ["answer"])])
    built.graph.sparse_initializer.append(sparse(indices, dims))
    return built


@attack("field 15 with")
def sparse_index_beyond(folder: Path) -> onnx.ModelProto:
    return with_sparse(np.array([2**40], I))


@attack("field 15 with")
def sparse_index_negative(folder: Path) -> onnx.ModelProto:
    return with_sparse(np.array([-(2**33)], I))


@attack("field 15 with")
def sparse_giant(folder: Path) -> onnx.ModelProto:
    return with_sparse(np.array([1], I), [2**40])


@attack("field 22 with")
def sparse_constant_node(folder: Path) -> onnx.ModelProto:
    node = helper.make_node("Constant", [], ["c"], sparse_value=sparse(np.array([2**40], I)))
    return model([node, helper.make_node("Add", ["x", "c"], ["answer"])])


# -- attacks: subgraphs and functions -------------------------------------------------------------------------


@attack("field 6 with")
def if_subgraph(folder: Path) -> onnx.ModelProto:
    body = subgraph(helper.make_node("Relu", ["x"], ["inner"]))
    return one("If", np.array(True), then_branch=body, else_branch=body)


@attack("field 6 with")
def loop_forever(folder: Path) -> onnx.ModelProto:
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Relu", ["a"], ["b"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("a", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("b", TensorProto.FLOAT, None),
        ],
    )
    return one("Loop", np.array(2**63 - 1, I), np.array(True), "x", body=body)


@attack("field 6 with")
def scan_subgraph(folder: Path) -> onnx.ModelProto:
    body = helper.make_graph(
        [helper.make_node("Relu", ["a"], ["b"])],
        "body",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, [48])],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, [48])],
    )
    return one("Scan", "x", body=body, num_scan_inputs=1, scan_input_axes=[99])


def nested(depth: int) -> bytes:
    """A graph whose only node has a graph as an attribute, and so on."""
    content = b""
    for _ in range(depth):
        content = chunk(1, chunk(4, b"If") + chunk(5, chunk(1, b"then_branch") + chunk(6, content) + b"\xa0\x01\x05"))
    return b"\x08\x08" + chunk(7, content) + chunk(8, b"\x10\x11")


@attack("field 6 with")
def nested_subgraphs(folder: Path) -> bytes:
    return nested(30)


@attack("field 6 with")
def nested_beyond_the_stack(folder: Path) -> bytes:
    return nested(2_000)


@attack("field 6 with")
def graphs_attribute(folder: Path) -> onnx.ModelProto:
    return one("Relu", "x", body=subgraph(helper.make_node("Relu", ["x"], ["inner"])))


@attack("field 7 with")
def function_of_itself(folder: Path) -> onnx.ModelProto:
    return with_functions(function("f", call("f", "a", "b")))


@attack("field 7 with")
def functions_of_each_other(folder: Path) -> onnx.ModelProto:
    return with_functions(function("f", call("g", "a", "b")), function("g", call("f", "a", "b")))


@attack("field 7 with")
def function_expansion(folder: Path) -> onnx.ModelProto:
    def level(index: int) -> onnx.FunctionProto:
        names = ["a", *(f"t{step}" for step in range(9)), "b"]
        return function(f"f{index}", *(call(f"f{index + 1}", *pair) for pair in itertools.pairwise(names)))

    return with_functions(*map(level, range(12)), function("f12", helper.make_node("Relu", ["a"], ["b"])))


@attack("field 25 with")
def function_named_as_an_operator(folder: Path) -> onnx.ModelProto:
    built = harmless()
    built.functions.append(helper.make_function("", "Relu", ["a"], ["b"], [], [helper.make_opsetid("", 17)]))
    return built


# -- attacks: the form of the graph ---------------------------------------------------------------------------


def relu(source: str, target: str) -> Node:
    return helper.make_node("Relu", [source], [target])


GRAPHS: dict[str, tuple[str, Make]] = {
    "cycle": ("reads 'b', which nothing", lambda _: model([relu("b", "a"), relu("a", "b"), relu("b", "answer")])),
    "node_of_itself": ("reads 'answer', which", lambda _: model([relu("answer", "answer")])),
    "order_reversed": ("reads 'a', which", lambda _: model([relu("a", "answer"), relu("x", "a")])),
    "input_of_nowhere": ("reads 'nowhere', which", lambda _: model([relu("nowhere", "answer")])),
    "output_twice": ("the name 'a' twice", lambda _: model([relu("x", "a"), relu("x", "a"), relu("a", "answer")])),
    "output_over_the_input": ("the name 'image' twice", lambda _: model([relu("x", "image"), relu("x", "answer")])),
    "constant_over_the_input": ("the name 'image' twice", lambda _: model([relu("x", "answer")], {"image": IMAGE4})),
    "output_over_a_constant": ("the name 'flat' twice", lambda _: model([relu("x", "flat"), relu("x", "answer")])),
    "output_without_a_name": ("the name '' twice or empty", lambda _: model([relu("x", ""), relu("x", "answer")])),
    "no_nodes_for_the_output": ("'answer' is not made", lambda _: model([])),
    "output_of_another_shape": (
        "'answer' is not made",
        lambda _: model([helper.make_node("Reshape", ["x", "to"], ["answer"])], {"to": np.array([-1, 4], I)}),
    ),
    "output_of_one_image": (
        "constants computed that are larger",
        lambda _: model(
            [helper.make_node("ReduceMax", ["x"], ["a"], axes=[0], keepdims=1), relu("a", "answer")],
        ),
    ),
    "doubling": (
        "too much memory or work",
        lambda _: model(
            [
                helper.make_node("Concat", [a, a], [b], axis=-1)
                for a, b in zip(["x", *map(str, range(40))], [*map(str, range(40)), "answer"], strict=True)
            ]
        ),
    ),
    "outer_sum": (
        "too much memory or work",
        lambda _: model(
            [helper.make_node("Add", ["a", "b"], ["c"]), helper.make_node("Add", ["c", "x"], ["answer"])],
            {"a": np.ones((2**16, 1), F), "b": np.ones((1, 2**16), F)},
        ),
    ),
    "constants_that_grow": (
        "constants computed that are larger than the file",
        lambda _: model(
            [helper.make_node("Add", ["a", "b"], ["c"]), relu("x", "answer")],
            {"a": np.ones((2**10, 1), F), "b": np.ones((1, 2**10), F)},
        ),
    ),
    "images_times_images": (
        "too much memory or work",
        lambda _: model(
            [
                helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0]),
                helper.make_node("MatMul", ["x", "t"], ["m"]),
                helper.make_node("MatMul", ["m", "x"], ["answer"]),
            ]
        ),
    ),
    "endless_products": (
        "too much memory or work",
        lambda _: model(
            [
                helper.make_node("Pad", ["x", "pads"], ["p0"]),
                *(helper.make_node("Concat", [f"p{i}"] * 4, [f"p{i + 1}"], axis=1) for i in range(2)),
                helper.make_node("Reshape", ["p2", "long"], ["l"]),
                helper.make_node("Reshape", ["p2", "wide"], ["w"]),
                helper.make_node("MatMul", ["l", "w"], ["m0"]),
                *(helper.make_node("MatMul", [f"m{i}", f"m{i}"], [f"m{i + 1}"]) for i in range(2000)),
                relu("x", "answer"),
            ],
            {
                "pads": np.array([0, 0, 0, 4048], I),
                "long": np.array([-1, 16384, 4], I),
                "wide": np.array([-1, 4, 16384], I),
            },
        ),
    ),
}


def edited(change: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    built = harmless()
    change(built)
    return built


def typed(kind: onnx.TypeProto) -> onnx.ModelProto:
    """A second input of another type."""
    return edited(lambda m: m.graph.input.append(helper.make_value_info("more", kind)))


def with_image(colours: bytes, rows: bytes = b"\x12\x01N") -> bytes:
    """The input in raw bytes of its first and last size."""
    built = edited(lambda m: m.graph.ClearField("input"))
    sizes = b"".join(chunk(1, size) for size in (rows, b"\x08\x04", b"\x08\x04", colours))
    image = chunk(1, b"image") + chunk(2, chunk(1, b"\x08\x02" + chunk(2, sizes)))
    return b"\x08\x08" + chunk(7, built.graph.SerializeToString() + chunk(11, image)) + chunk(8, b"\x10\x11")


FLOATS = helper.make_tensor_type_proto(TensorProto.FLOAT, [1])
EDITS: dict[str, tuple[str, Make]] = {
    "input_of_sequence": ("field 4 with", lambda _: typed(helper.make_sequence_type_proto(FLOATS))),
    "input_of_optional": ("field 9 with", lambda _: typed(helper.make_optional_type_proto(FLOATS))),
    "input_of_map": ("field 5 with", lambda _: typed(helper.make_map_type_proto(TensorProto.INT64, FLOATS))),
    "input_of_sparse": ("field 8 with", lambda _: typed(helper.make_sparse_tensor_type_proto(TensorProto.FLOAT, [1]))),
    "input_more": ("inputs or outputs ['image', 'more']", lambda _: typed(FLOATS)),
    "input_of_another_type": (
        "type 8 of 'image'",
        lambda _: edited(lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", TensorProto.STRING)),
    ),
    "output_of_another_type": (
        "other than float32",
        lambda _: edited(lambda m: setattr(m.graph.output[0].type.tensor_type, "elem_type", TensorProto.UINT8)),
    ),
    "input_of_negative_size": (
        "shape [-4, 4, 3]",
        lambda _: edited(lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", -4)),
    ),
    "input_of_giant_size": (
        "shape [1099511627776, 4, 3]",
        lambda _: edited(lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", LARGE)),
    ),
    "input_of_free_size": (
        "shape [0, 4, 3]",
        lambda _: edited(lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[1], "dim_param", "H")),
    ),
    "input_without_a_shape": (
        "no number of images",
        lambda _: edited(lambda m: m.graph.input[0].type.tensor_type.ClearField("shape")),
    ),
    "input_of_a_size_and_a_name": ("a size of 'image' with a name", lambda _: with_image(b"\x08\x03\x12\x01C")),
    "batch_of_a_size_and_a_name": ("no number of images", lambda _: with_image(b"\x08\x03", b"\x08\x00\x12\x01N")),
    "batch_giant": (
        "1099511627776 images",
        lambda _: edited(
            lambda m: [
                setattr(value.type.tensor_type.shape.dim[0], "dim_value", 2**40)
                for value in (m.graph.input[0], m.graph.output[0])
            ]
        ),
    ),
    "opset_giant": ("opsets [('', 999)]", lambda _: edited(lambda m: setattr(m.opset_import[0], "version", 999))),
    "opset_negative": ("opsets [('', -1)]", lambda _: edited(lambda m: setattr(m.opset_import[0], "version", -1))),
    "opset_old": ("opsets [('', 9)]", lambda _: edited(lambda m: setattr(m.opset_import[0], "version", 9))),
    "opset_twice": ("opsets [", lambda _: edited(lambda m: m.opset_import.append(helper.make_opsetid("", 9)))),
    "opset_of_another_domain": (
        "opsets [",
        lambda _: edited(lambda m: m.opset_import.append(helper.make_opsetid("com.microsoft", 1))),
    ),
    "opset_missing": ("opsets []", lambda _: edited(lambda m: m.ClearField("opset_import"))),
    "ir_version_giant": ("IR version 999", lambda _: edited(lambda m: setattr(m, "ir_version", 999))),
    "ir_version_old": ("IR version 1", lambda _: edited(lambda m: setattr(m, "ir_version", 1))),
    "metadata_session": (
        "metadata ['session.use_env_allocators', 'ort_config']",
        lambda _: edited(lambda m: helper.set_model_props(m, {"session.use_env_allocators": "1", "ort_config": "{}"})),
    ),
    "metadata_settings_of_onnxruntime": (
        "metadata ['ort_config']",
        lambda _: edited(lambda m: helper.set_model_props(m, {"ort_config": '{"session_options": {"profile": 1}}'})),
    ),
    "metadata_twice": (
        "metadata ['classes', 'classes']",
        lambda _: edited(lambda m: [m.metadata_props.add(key="classes", value="[]") for _ in range(2)]),
    ),
    "metadata_many": (
        "more than 2 metadata",
        lambda _: edited(lambda m: [m.metadata_props.add(key="classes", value="[]") for _ in range(10**4)]),
    ),
    "metadata_giant": (
        "metadata of 20000000 bytes",
        lambda _: edited(lambda m: helper.set_model_props(m, {"classes": "a" * 2 * 10**7})),
    ),
    "metadata_of_control_characters": (
        "metadata with characters other than",
        lambda _: edited(lambda m: helper.set_model_props(m, {"classes": '["\x1b[2J\x1b]0;owned\x07"]'})),
    ),
    "metadata_right_to_left": (
        "metadata with characters other than",
        lambda _: edited(lambda m: helper.set_model_props(m, {"classes": '["model\u202egnp.exe"]'})),
    ),
    "metadata_name_long": (
        "a key of 100000 bytes",
        lambda _: edited(lambda m: helper.set_model_props(m, {"a" * 10**5: ""})),
    ),
    "metadata_of_a_node": (
        "field 9 with",
        lambda _: edited(lambda m: m.graph.node[0].metadata_props.add(key="a", value="b")),
    ),
    "quantization_annotation": (
        "field 14 with",
        lambda _: edited(lambda m: m.graph.quantization_annotation.add(tensor_name="x")),
    ),
    "value_info": ("field 13 with", lambda _: edited(lambda m: m.graph.value_info.append(m.graph.output[0]))),
    "training_info": ("field 20 with", lambda _: edited(lambda m: m.training_info.add())),
    "model_documentation": ("field 6 with", lambda _: edited(lambda m: setattr(m, "doc_string", "a" * 10**6))),
    "upsample": (UNKNOWN, lambda _: one("Upsample", IMAGE4, np.array([1, 1, 1e5, 1e5], F))),
    "name_long": ("of 10000000 bytes", lambda _: edited(lambda m: setattr(m.graph.node[0], "name", "a" * 10**7))),
    "name_of_control_characters": (
        "printable ASCII",
        lambda _: edited(lambda m: setattr(m.graph.node[0], "name", "\x1b[2J\x1b]0;owned\x07")),
    ),
    "name_right_to_left": (
        "printable ASCII",
        lambda _: edited(lambda m: setattr(m.graph, "name", "model\u202egnp.exe")),
    ),
    "producer_of_control_characters": (
        "printable ASCII",
        lambda _: edited(lambda m: setattr(m, "producer_name", "\r\nfake log line")),
    ),
    "outputs_missing": ("inputs or outputs []", lambda _: edited(lambda m: m.graph.ClearField("output"))),
    "graph_missing": ("inputs or outputs []", lambda _: edited(lambda m: m.ClearField("graph"))),
    "output_listed_twice": (
        "inputs or outputs ['answer', 'answer']",
        lambda _: edited(lambda m: m.graph.output.append(m.graph.output[0])),
    ),
}


# -- attacks: sizes and bytes ---------------------------------------------------------------------------------

PLAIN = harmless().SerializeToString()
BYTES: dict[str, tuple[str, Make]] = {
    "million_nodes": (
        "more than 10000 nodes",
        lambda _: b"\x08\x08" + chunk(7, chunk(1, chunk(1, b"x") + chunk(2, b"y") + chunk(4, b"Relu")) * 10**6),
    ),
    "million_inputs": (
        "more than 128 inputs",
        lambda _: chunk(7, chunk(1, chunk(1, b"x") * 10**6 + chunk(4, b"Concat"))),
    ),
    "million_initializers": ("more than 10000 initializers", lambda _: chunk(7, chunk(5, b"\x10\x01") * 10**6)),
    "million_attributes": ("more than 8 attributes", lambda _: chunk(7, chunk(1, chunk(5, b"\x0a\x01a") * 10**6))),
    "million_integers": ("more than 8 ints", lambda _: chunk(7, chunk(1, chunk(5, b"\x40\x01" * 10**6)))),
    "million_opsets": ("more than 8 opsets", lambda _: chunk(8, b"\x10\x11") * 10**6),
    "million_sizes": (
        "more than 8 dims",
        lambda _: chunk(7, chunk(11, chunk(2, chunk(1, chunk(2, chunk(1, b"") * 10**6))))),
    ),
    "packed_integers": ("field 8 with wire type 2", lambda _: chunk(7, chunk(1, chunk(5, chunk(8, b"\x01\x02"))))),
    "empty_file": ("a file of 0 bytes", lambda _: b""),
    "zeros": ("field 0 with wire type 0", lambda _: bytes(1000)),
    "text_file": ("with wire type", lambda _: b"this is no model"),
    "ir_version_twice": ("ir_version twice in Model", lambda _: b"\x08\x08" + PLAIN),
    "graph_twice": ("graph twice in Model", lambda _: PLAIN + chunk(7, b"")),
    "truncated": ("the end of the file within", lambda _: PLAIN[:-3]),
    "length_beyond": ("the end of the file within graph", lambda _: b"\x3a\xff\xff\xff\xff\x07" + PLAIN),
    "length_of_64_bits": ("the end of the file within graph", lambda _: b"\x3a" + b"\xff" * 9 + b"\x01" + PLAIN),
    "varint_of_66_bits": ("longer than it has to be", lambda _: b"\x08" + b"\xff" * 9 + b"\x7f"),
    "varint_endless": ("longer than it has to be", lambda _: b"\x08" + b"\x80" * 10**6),
    "varint_overlong": ("longer than it has to be", lambda _: b"\x08\x88\x80\x00" + PLAIN[2:]),
    "group": ("field 7 with wire type 3", lambda _: b"\x3b" * 10**6),
    "group_end": ("field 7 with wire type 4", lambda _: b"\x3c" + PLAIN),
    "wire_type_fixed": ("field 1 with wire type 1", lambda _: b"\x09" + bytes(8)),
    "wire_type_unknown": ("field 1 with wire type 7", lambda _: b"\x0f" + bytes(8)),
    "field_unknown": ("field 200 with", lambda _: PLAIN + b"\xc2\x0c\x00"),
    "name_of_broken_text": ("printable ASCII", lambda _: chunk(2, b"\xff\xfe\xc0\x80") + PLAIN),
}

ATTACKS: dict[str, tuple[str, Make]] = {
    **NODES,
    **{name: ("no weights of 'c'", make) for name, make in PLACES.items()},
    "external_length_nonsense": ("printable ASCII", PLACES["external_length_nonsense"]),
    "external_long": ("a value of 10000000 bytes", PLACES["external_long"]),
    **TENSORS,
    **GRAPHS,
    **EDITS,
    **BYTES,
    **FUNCTIONS,
}
"""By name: a part of the sentence with which it must be refused, and what makes it."""


def built(name: str, folder: Path) -> bytes:
    """The bytes of an attack on the bundle in ``folder``."""
    made = ATTACKS[name][1](folder)
    return made if isinstance(made, bytes) else made.SerializeToString()


# -- mutations ------------------------------------------------------------------------------------------------

NUMBERS = (0, 1, -1, 2, 3, 7, 16, 48, 255, 2**31 - 1, 2**31, -(2**31), 2**62, -(2**63))
OPERATORS = sorted({schema.name for schema in onnx.defs.get_all_schemas()})


def parts_of(name: str) -> tuple[Sequence[str], Sequence[str]]:
    """The inputs and outputs of a graph of a bundle, by the name of its file."""
    if name.startswith("prefix"):
        return (INPUT,), BETWEEN
    return BETWEEN if name.startswith("suffix") else (INPUT,), OUTPUTS


def mutate(graphs: Sequence[bytes], count: int, seed: int) -> Iterator[tuple[int, bytes]]:
    """``count`` times the index of a graph and a mutation of it: of its bytes, or of what they mean."""
    rng = random.Random(seed)
    parsed = [onnx.load_model_from_string(graph) for graph in graphs]
    for _ in range(count):
        index = rng.randrange(len(graphs))
        if rng.random() < 0.4:
            yield index, mutated_bytes(rng, graphs[index])
            continue
        changed = onnx.ModelProto()
        changed.CopyFrom(parsed[index])
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            rng.choice(CHANGES)(rng, changed)
        yield index, changed.SerializeToString()


def mutated_bytes(rng: random.Random, graph: bytes) -> bytes:
    """One to four changes; most of them among the nodes in front and the inputs and outputs behind the weights."""
    content = bytearray(graph)
    for _ in range(rng.choice((1, 1, 2, 4))):
        nodes = max(2, graph.find(b"weight") // 2)
        limit = rng.choice((min(60, len(content)), min(nodes, len(content)), len(content)))
        at = rng.randrange(limit) if rng.random() < 0.7 else max(0, len(content) - 1 - rng.randrange(400))
        other = rng.randrange(limit)
        length = rng.choice((1, 2, 8, 60))
        kind = rng.randrange(6)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            del content[at : at + length]
        elif kind == 3:
            content[at:at] = content[other : other + length]
        elif kind == 4:
            content[at : at + length] = content[other : other + length]
        else:
            del content[rng.choice((at, len(content) - rng.randrange(1, 100))) :]
        if len(content) < 2:
            return bytes(content)
    return bytes(content)


Change = Callable[[random.Random, onnx.ModelProto], object]


def _node(rng: random.Random, changed: onnx.ModelProto) -> Node:
    return rng.choice(changed.graph.node) if changed.graph.node else changed.graph.node.add()


def _names(changed: onnx.ModelProto) -> list[str]:
    graph = changed.graph
    made = [name for node in graph.node for name in node.output]
    return [*made, *(tensor.name for tensor in graph.initializer), *(value.name for value in graph.input), ""]


def change_operator(rng: random.Random, changed: onnx.ModelProto) -> None:
    used = [node.op_type for node in changed.graph.node]
    _node(rng, changed).op_type = rng.choice(used if used and rng.random() < 0.8 else OPERATORS)


def change_attribute(rng: random.Random, changed: onnx.ModelProto) -> None:
    chosen = [node for node in changed.graph.node if node.attribute]
    if not chosen:
        return
    attribute = rng.choice(rng.choice(chosen).attribute)
    kind = rng.randrange(4)
    if kind == 0:
        attribute.i = rng.choice(NUMBERS)
    elif kind == 1 and attribute.ints:
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(NUMBERS)
    elif kind == 2:
        attribute.f = rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e-30))
    else:
        attribute.name = rng.choice(("axis", "axes", "keepdims", "perm", "to", "transA", "transB", "alpha"))


def change_input(rng: random.Random, changed: onnx.ModelProto) -> None:
    node = _node(rng, changed)
    if node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(_names(changed))


def exchange_inputs(rng: random.Random, changed: onnx.ModelProto) -> None:
    node = _node(rng, changed)
    node.input[:] = rng.sample(node.input, len(node.input))


def change_inputs(rng: random.Random, changed: onnx.ModelProto) -> None:
    node = _node(rng, changed)
    if node.input and rng.random() < 0.5:
        del node.input[rng.randrange(len(node.input))]
    else:
        node.input.append(rng.choice(_names(changed)))


def change_output(rng: random.Random, changed: onnx.ModelProto) -> None:
    node = _node(rng, changed)
    node.output[:] = rng.choice(([], [rng.choice(_names(changed))], [*node.output, "more"]))


def remove_node(rng: random.Random, changed: onnx.ModelProto) -> None:
    """A node leaves, and those that read its output read its first input instead."""
    node = _node(rng, changed)
    if not node.input or not node.output:
        return
    source, made = node.input[0], node.output[0]
    changed.graph.node.remove(node)
    for other in changed.graph.node:
        other.input[:] = [source if name == made else name for name in other.input]


def repeat_node(rng: random.Random, changed: onnx.ModelProto) -> None:
    """A node works once more on its own output."""
    nodes = [*changed.graph.node]
    index = rng.randrange(max(1, len(nodes)))
    if not nodes or not nodes[index].input or not nodes[index].output:
        return
    again = onnx.NodeProto()
    again.CopyFrom(nodes[index])
    nodes[index].output[0] = again.input[0] = again.output[0] + "_first"
    nodes.insert(index + 1, again)
    del changed.graph.node[:]
    changed.graph.node.extend(nodes)


def swap_nodes(rng: random.Random, changed: onnx.ModelProto) -> None:
    nodes = [*changed.graph.node]
    first, second = rng.randrange(len(nodes) or 1), rng.randrange(len(nodes) or 1)
    if nodes:
        nodes[first], nodes[second] = nodes[second], nodes[first]
        del changed.graph.node[:]
        changed.graph.node.extend(nodes)


def change_constant(rng: random.Random, changed: onnx.ModelProto) -> None:
    chosen = [tensor for tensor in changed.graph.initializer if tensor.data_type == TensorProto.INT64]
    if chosen:
        tensor = rng.choice(chosen)
        values = numpy_helper.to_array(tensor).copy()
        values[rng.randrange(len(values))] = rng.choice((*NUMBERS, int(values[0]) + 1, int(values[-1]) - 1))
        tensor.raw_data = values.tobytes()


def change_tensor(rng: random.Random, changed: onnx.ModelProto) -> None:
    tensor = rng.choice(changed.graph.initializer) if changed.graph.initializer else changed.graph.initializer.add()
    kind = rng.randrange(5)
    if kind == 0 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(NUMBERS)
    elif kind == 1:
        tensor.dims[:] = rng.sample(tensor.dims, len(tensor.dims))
    elif kind == 2:
        tensor.data_type = rng.choice((0, 1, 2, 6, 7, 8, 9, 10, 11, 16, 22, 99))
    elif kind == 3:
        tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
    else:
        values = np.frombuffer(tensor.raw_data, np.uint8).copy()
        values[:] = rng.choice((0, 0x7F, 0xFF))
        tensor.raw_data = values.tobytes()


def exchange_tensors(rng: random.Random, changed: onnx.ModelProto) -> None:
    """Two constants trade their names."""
    if len(changed.graph.initializer) > 1:
        first, second = rng.sample([*changed.graph.initializer], 2)
        first.name, second.name = second.name, first.name


def change_edge(rng: random.Random, changed: onnx.ModelProto) -> None:
    edges = [*changed.graph.input, *changed.graph.output]
    if not edges:
        return
    value = rng.choice(edges)
    dims = value.type.tensor_type.shape.dim
    if dims and rng.random() < 0.6:
        rng.choice(dims).dim_value = rng.choice(NUMBERS)
    elif rng.random() < 0.5:
        value.type.tensor_type.elem_type = rng.choice((0, 1, 2, 7, 8, 10))
    else:
        value.name = rng.choice(_names(changed))


def change_version(rng: random.Random, changed: onnx.ModelProto) -> None:
    changed.opset_import[0].version = rng.choice((1, 6, 7, 11, 13, 14, 15, 16, 17, 18, 19, 20, 21, 99, -1))
    changed.ir_version = rng.choice((-1, 3, 7, 8, 9, 10, 11, 99))


CHANGES: tuple[Change, ...] = (
    change_operator, change_attribute, change_input, exchange_inputs, change_inputs, change_output, remove_node,
    repeat_node, swap_nodes, change_constant, change_tensor, exchange_tensors, change_edge, change_version,
)  # fmt: skip


# -- running --------------------------------------------------------------------------------------------------


def outcomes(python: Path, files: Sequence[Path], mode: str) -> tuple[dict[str, str], str]:
    """What ONNX Runtime makes of each file, by its path, and its version."""
    child = subprocess.run(
        [str(python), "-c", CHILD, mode, str(MAPPED), str(SECRET)],
        input="\n".join(map(str, files)), capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = [json.loads(line) for line in child.stdout.splitlines()]
    if not lines or lines[-1][0] != "version":
        raise SystemExit(f"{python} could not run ONNX Runtime: {child.stderr[-500:]}")
    return dict(lines[:-1]), lines[-1][1]


def lay_out(root: Path, names: Sequence[str]) -> list[Path]:
    """A folder for each attack with its model and the ways out of it; the secret is in ``root``. Returns the models."""
    (root / "secret").write_bytes(np.full(1024, SECRET, F).tobytes())
    files = []
    for name in names:
        folder = root / name
        folder.mkdir()
        (folder / "model.onnx").write_bytes(built(name, folder))
        if name.startswith("external"):
            (folder / "link").symlink_to("../secret")
            (folder / "up").symlink_to("..")
            (folder / "hard").hardlink_to(root / "secret")
            os.mkfifo(folder / "fifo")
        files.append(folder / "model.onnx")
    return files


def judge(content: bytes, reads: Sequence[str], returns: Sequence[str]) -> str | None:
    """The sentence of `check_graph`, None when it accepts."""
    try:
        check_graph(content, reads, returns)
    except BundleError as error:
        return str(error)
    return None


def show_attacks(names: Sequence[str], pythons: Sequence[Path]) -> None:
    opened: list[object] = []
    checking = False
    sys.addaudithook(lambda event, arguments: opened.append(arguments[0]) if checking and event == "open" else None)
    with tempfile.TemporaryDirectory() as folder:
        files = lay_out(Path(folder), names)
        wrong, slowest = [], 0.0
        for file in files:
            content, reason = file.read_bytes(), ATTACKS[file.parent.name][0]
            start, checking = time.perf_counter(), True
            said = judge(content, READS, RETURNS)
            checking, slowest = False, max(slowest, time.perf_counter() - start)
            if said is None or reason not in said:
                wrong.append(f"{file.parent.name}: {said}")
        columns = []
        for python in pythons:
            found = [outcomes(python, files, mode) for mode in ("bytes", "file")]
            columns.append((found[0][1], [each for each, _ in found]))
        click.echo("| graph | check | " + " | ".join(f"{version}: bytes, file" for version, _ in columns) + " |")
        click.echo("|---|---|" + "---|" * len(columns))
        for file in files:
            cells = [", ".join(dict.fromkeys(each[str(file)] for each in modes)) for _, modes in columns]
            click.echo(f"| {file.parent.name} | refused | " + " | ".join(cells) + " |")
        for version, modes in columns:
            for mode, each in zip(("bytes", "file"), modes, strict=True):
                counts = Counter(said.split()[0] for said in each.values())
                click.echo(f"ONNX Runtime {version}, from {mode}: {dict(counts)}")
    click.echo(f"{len(files)} attacks, {len(files) - len(wrong)} refused for their reason, slowest {slowest:.3f} s, "
               f"files opened by the check: {len(opened)}")  # fmt: skip
    if wrong or opened:
        raise SystemExit("\n".join(map(str, [*wrong, *opened])))


def with_weights(path: Path) -> bytes:
    """The graph in a file, with the weights that lie beside it."""
    return b"".join(inlined(path.read_bytes(), TensorFile(path.with_name(WEIGHTS).read_bytes())))


def show_mutations(paths: Sequence[Path], count: int, seed: int, pythons: Sequence[Path]) -> None:
    graphs = [with_weights(path) for path in paths]
    parts = [parts_of(path.name) for path in paths]
    ends: dict[str, Counter[str]] = {}
    slowest, before, total = 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    accepted: list[Path] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (index, content) in enumerate(mutate(graphs, count, seed)):
            start = time.perf_counter()
            said = judge(content, *parts[index])
            slowest = max(slowest, time.perf_counter() - start)
            if said is None:
                accepted.append(Path(folder) / f"{number}-{paths[index].name}")
                accepted[-1].write_bytes(content)
            if len(accepted) == 500 or (accepted and number == count - 1):
                for python in pythons:
                    found, version = outcomes(python, accepted, "file")
                    ends.setdefault(version, Counter()).update(found.values())
                    keep(found, f"mutation-{seed}")
                total += len(accepted)
                for path in accepted:
                    path.unlink()
                accepted.clear()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    click.echo(f"{count} mutations of {len(graphs)} graphs, seed {seed}: {total} accepted, {count - total} refused")
    click.echo(f"slowest check {1000 * slowest:.0f} ms, memory of this process grew by {grown:.0f} MiB")
    for version, each in ends.items():
        click.echo(f"accepted ones in ONNX Runtime {version}: {dict(each)}")


def keep(found: dict[str, str], prefix: str) -> None:
    """Copy what ended in neither an answer nor an error to the temporary folder."""
    for name, end in found.items():
        if end not in ("answer", "error"):
            kept = Path(tempfile.gettempdir()) / f"{prefix}-{Path(name).name}"
            kept.write_bytes(Path(name).read_bytes())
            click.echo(f"{end}: {kept}")


@click.command()
@click.argument("graphs", nargs=-1, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--python", "pythons", multiple=True, type=click.Path(path_type=Path), help="[this one]")
@click.option("--attack", "names", multiple=True, type=click.Choice([*ATTACKS]), metavar="NAME", help="[all]")
@click.option("--mutations", default=0, help="Mutate the exported GRAPHS this often instead.")
@click.option("--seed", default=0, show_default=True)
def main(
    graphs: tuple[Path, ...], pythons: tuple[Path, ...], names: tuple[str, ...], mutations: int, seed: int
) -> None:
    pythons = pythons or (Path(sys.executable),)
    if mutations and not graphs:
        raise click.UsageError("Give the ONNX files of an exported bundle to mutate.")
    if mutations:
        show_mutations(graphs, mutations, seed, pythons)
    else:
        show_attacks(names or [*ATTACKS], pythons)


if __name__ == "__main__":
    main()
