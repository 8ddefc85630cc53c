"""The graph answers as PyTorch does, for every kind of backbone and adapter, and has the promised form."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper, shape_inference
from timm.layers import PatchEmbed, SwiGLU
from torch import nn

from duallora_edge.errors import ExportError
from duallora_edge.export.graph import Part, build_model
from duallora_edge.export.parity import generated_images, onnx_outputs, torch_outputs
from duallora_edge.learner import embedded
from duallora_edge.learner.methods import METHODS
from duallora_edge.learner.methods.scoring import CLASSIFIERS
from duallora_edge.learner.network.answers import ComposedModel
from duallora_edge.learner.network.backbone import Backbone, load_backbone
from duallora_edge.learner.statistics.calibration import Mixture
from duallora_edge.runtime.bundle import BETWEEN, INPUT, OUTPUTS

Compose = Callable[..., ComposedModel]
IMAGES = generated_images(64, 32, seed=5)
PARTS: tuple[Part, ...] = ("whole", "prefix", "suffix")


def assert_same_answers(model: ComposedModel, opset: int = 17, batches: Sequence[int] = (5,)) -> onnx.ModelProto:
    """Build the graph, compare all outputs with those of PyTorch at each batch size, and return it."""
    graph = build_model(model, opset, 8)
    for count in batches:
        images = IMAGES[:count]
        expected, found = torch_outputs(model, images), onnx_outputs(graph, images)
        for name in OUTPUTS:
            assert found[name].shape == expected[name].shape and found[name].dtype == np.float32
        np.testing.assert_allclose(found["probabilities"], expected["probabilities"], atol=2e-5)
        np.testing.assert_allclose(found["task_probabilities"], expected["task_probabilities"], atol=2e-5)
        np.testing.assert_allclose(found["novelty"], expected["novelty"], rtol=1e-3)
        np.testing.assert_allclose(found["features"], expected["features"], rtol=1e-3, atol=5e-4)
    return graph


def dims(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def initializers(graph: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}


@pytest.fixture(scope="module")
def three_tasks(compose: Compose) -> ComposedModel:
    """Two isolated residuals and a previous one; class b is in two tasks."""
    return compose(["ab", "bc", "def"])


@pytest.mark.parametrize("opset", [14, 16, 17, 18, 20])
def test_every_opset_answers_as_pytorch(three_tasks: ComposedModel, opset: int) -> None:
    graph = assert_same_answers(three_tasks, opset, batches=(1, 5, 64))
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", opset)]


def test_the_answers_compared_are_soft(three_tasks: ComposedModel) -> None:
    """Saturated probabilities, gates and novelties would hide errors."""
    outputs = torch_outputs(three_tasks, IMAGES)
    phi = torch.from_numpy(outputs["features"][:, 48:])
    posterior = three_tasks.network.dynamic_memory(phi).numpy()
    for answers in (outputs["probabilities"], outputs["task_probabilities"], posterior):
        assert np.median(answers.max(axis=1)) < 0.99
    assert 0.05 < np.median(outputs["novelty"]) < 0.95


@pytest.mark.parametrize("batch", [1, 4])
def test_a_fixed_batch_answers_as_pytorch(three_tasks: ComposedModel, batch: int) -> None:
    graph = build_model(three_tasks, 17, 8, batch=batch)
    assert {dims(value)[0] for value in (*graph.graph.input, *graph.graph.output)} == {batch}
    expected, found = torch_outputs(three_tasks, IMAGES[:6]), onnx_outputs(graph, IMAGES[:6])
    np.testing.assert_allclose(found["probabilities"], expected["probabilities"], atol=2e-5)
    inferred = shape_inference.infer_shapes(graph, strict_mode=True, data_prop=True).graph.value_info
    assert all(isinstance(size, int) and size > 0 for value in inferred for size in dims(value))


@pytest.mark.parametrize(("half", "batch"), [(False, None), (False, 3), (True, 1)])
def test_prefix_and_suffix_answer_as_the_whole(three_tasks: ComposedModel, half: bool, batch: int | None) -> None:
    whole, prefix, suffix = (build_model(three_tasks, 17, 8, half=half, batch=batch, part=part) for part in PARTS)
    assert [value.name for value in prefix.graph.output] == [value.name for value in suffix.graph.input] == [*BETWEEN]
    expected, found = onnx_outputs(whole, IMAGES[:7]), onnx_outputs([prefix, suffix], IMAGES[:7])
    for name in OUTPUTS:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5 if not half else 5e-3)
    names = [set(initializers(graph)) for graph in (whole, prefix, suffix)]
    assert names[1] | names[2] >= names[0]


HALF_VARIANTS: list[dict[str, Any]] = [
    {},
    {"qk_norm": True, "init_values": 0.5},
    {"global_pool": "avg", "fc_norm": False},
]


@pytest.mark.parametrize(("opset", "sums"), [(16, False), (17, True), (17, False), (20, False)])
@pytest.mark.parametrize("variant", HALF_VARIANTS, ids=["plain", "norms and scales", "average"])
def test_half_precision(
    make_backbone: Callable[..., Backbone], compose: Compose, variant: dict[str, Any], opset: int, sums: bool
) -> None:
    """Close to PyTorch, with half the bytes in the blocks, and fp32 wherever it is promised."""
    model = compose(["ab", "bc", "def"], backbone=make_backbone(**variant))
    graph = build_model(model, opset, 8, half=True, sums=sums)
    expected, found = torch_outputs(model, IMAGES), onnx_outputs(graph, IMAGES)
    for name in ("probabilities", "task_probabilities"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-2)
    assert np.abs(found["probabilities"] - expected["probabilities"]).max() > 1e-7  # it is half precision
    whole = initializers(build_model(model, opset, 8))
    for name, value in initializers(graph).items():
        assert value.dtype in (np.float32, np.int64) and (name not in whole or np.array_equal(value, whole[name]))
        inside = name.startswith("blocks.") and ".norm" not in name and "_norm" not in name
        inside = inside and ".ls" not in name and "gate_map" not in name and value.dtype == np.float32
        read = [node.op_type for node in graph.graph.node if name in node.input]
        assert read == ["Cast"] if inside or name.startswith(("attention.", "gelu.")) else "Cast" not in read, name
    inferred = shape_inference.infer_shapes(graph, strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
    for node in graph.graph.node:
        if node.op_type in ("LayerNormalization", "ReduceMean", "Conv", "Sqrt"):
            assert types[node.output[0]] == TensorProto.FLOAT, node.name
    heads = [node for node in graph.graph.node if node.op_type == "Softmax" and "probab" not in node.output[0]]
    assert sum(types[node.output[0]] == TensorProto.FLOAT16 for node in heads) == len(
        model.network.backbone.model.blocks
    )


def test_half_precision_survives_large_values_along_the_depth(
    make_backbone: Callable[..., Backbone], compose: Compose
) -> None:
    """Some ViTs carry values beyond the range of fp16 (65,504) from block to block: those sums stay fp32."""
    model = compose(["ab", "cd"], backbone=make_backbone())
    with torch.no_grad():
        model.network.backbone.model.pos_embed[..., 0] += 3e5
    found = onnx_outputs(build_model(model, 17, 8, half=True), IMAGES)
    np.testing.assert_allclose(found["probabilities"], torch_outputs(model, IMAGES)["probabilities"], atol=1e-2)


VARIANTS: list[dict[str, Any]] = [
    {"reg_tokens": 4},
    {"reg_tokens": 2, "no_embed_class": True},
    {"class_token": False, "global_pool": "avg"},
    {"global_pool": "avg", "reg_tokens": 3},
    {"global_pool": "avg", "fc_norm": False},
    {"qk_norm": True},
    {"init_values": 0.5},
    {"qkv_bias": False},
    {"pre_norm": True, "act_layer": "quick_gelu", "norm_layer": partial(nn.LayerNorm, eps=1e-5)},
    {"dynamic_img_size": True},
    {"embed_layer": partial(PatchEmbed, norm_layer=nn.LayerNorm)},
    {"dynamic_img_size": True, "embed_layer": partial(PatchEmbed, norm_layer=nn.LayerNorm)},
    {"act_layer": "relu", "proj_bias": False, "norm_layer": partial(nn.LayerNorm, bias=False)},
    {"patch_size": 16, "pos_embed": "none", "mlp_ratio": 2.0, "num_heads": 4},
]


def variant_name(variant: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in variant.items() if not callable(value)) or "layers"


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_name)
def test_every_backbone_answers_as_pytorch(
    make_backbone: Callable[..., Backbone], compose: Compose, variant: dict[str, Any]
) -> None:
    assert_same_answers(compose(["ab", "bc", "def"], backbone=make_backbone(**variant)))


@pytest.mark.parametrize("opset", [16, 20])
def test_norms_without_a_class_token_at_other_opsets(
    make_backbone: Callable[..., Backbone], compose: Compose, opset: int
) -> None:
    variant = {"class_token": False, "global_pool": "avg", "qk_norm": True}
    assert_same_answers(compose(["ab", "cd"], backbone=make_backbone(**variant)), opset)


@pytest.mark.parametrize(
    ("tasks", "residuals", "method"),
    [
        (["ab"], ["isolated"], "dual_lora"),
        (["ab"], ["previous"], "dual_lora"),  # the first task has no earlier directions: no residual
        (["abc", "cd", "ae"], ["isolated"], "dual_lora"),
        (["abc", "cd", "ae"], ["previous"], "dual_lora"),
        (["a"], ["isolated"], "dual_lora"),
        (["ab", "c", "de"], ["isolated"], "dual_lora"),
        (["ab", "cd"], ["isolated"], "sequential"),
        (["ab", "bc"], ["isolated"], "frozen"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else value,
)
def test_every_stream_answers_as_pytorch(compose: Compose, tasks: list[str], residuals: list[str], method: str) -> None:
    model = compose(tasks, residuals, method=method)
    assert_same_answers(model)
    assert model.catalogue.classes == tuple(dict.fromkeys("".join(tasks)))


CLASSIFIED = [(method, "auto") for method in METHODS] + [("dual_lora", c) for c in CLASSIFIERS] + [("frozen", "ridge")]


@pytest.mark.usefixtures("few_random_features")
@pytest.mark.parametrize(("method", "classifier"), CLASSIFIED)
def test_every_method_and_classifier_answers_as_pytorch(compose: Compose, method: str, classifier: str) -> None:
    """With one temperature and with two."""
    tasks = ["abc"] if METHODS[method].single_task else ["ab", "bcd"]
    model = compose(tasks, method=method, classifier=classifier)
    with torch.no_grad():
        logits = model.classifier.evidence(model.network(torch.from_numpy(IMAGES)))
    # Logits of the size of 1 make answers that are neither certain nor all alike.
    for mixture in ((1.0, 0.0), (4.0, 0.3)):
        model.classifier.mixture = Mixture(max(float(logits.std(dim=1).mean()), 1e-6), *mixture)
        assert_same_answers(model, batches=(1, 5))
        answers = torch_outputs(model, IMAGES)["probabilities"]
        assert 1.05 / answers.shape[1] < np.median(answers.max(axis=1)) < 0.99


def assert_names_of_pytorch(model: ComposedModel, graph: onnx.ModelProto) -> None:
    """Each tensor of the state dict is an initializer of its name, shape and, unless adapted, value."""
    state = {name: value.numpy() for name, value in model.network.backbone.model.state_dict().items()}
    found = initializers(graph)
    depth = len(model.network.backbone.model.blocks)
    adapted = {f"blocks.{i}.attn.qkv.weight" for i in range(model.network.backbone.info.prefix_blocks, depth)}
    for name, value in state.items():
        if name in ("cls_token", "pos_embed", "reg_token"):
            assert name not in found  # one constant: token_embed
        else:
            assert found[name].shape == value.shape and found[name].dtype == value.dtype, name
            changed = name in adapted or name.startswith("patch_embed.proj.")
            assert changed != np.array_equal(found[name], value), name


def test_initializers_have_the_names_of_pytorch(three_tasks: ComposedModel) -> None:
    assert_names_of_pytorch(three_tasks, build_model(three_tasks, 17, 8))


def test_initializers_have_the_names_of_pytorch_in_the_embedded_backbone(compose: Compose) -> None:
    model = compose(["ab", "cd"], backbone=load_backbone(embedded.NAME, size=32))
    assert_names_of_pytorch(model, assert_same_answers(model, batches=(2,)))


@pytest.mark.parametrize(("opset", "half"), [(16, False), (17, True), (20, True)])
def test_names_of_initializers_carry_no_values(
    three_tasks: ComposedModel, compose: Compose, opset: int, half: bool
) -> None:
    """The only numbers in a name are those of blocks and layers, whatever is exported."""
    other = compose(["ab", "cd"], method="frozen", classifier="ridge")
    other.classifier.mixture = Mixture(2.0, 4.0, 0.1)
    for model in (three_tasks, other):
        for name in initializers(build_model(model, opset, 8, half=half)):
            assert not re.search(r"\d", re.sub(r"blocks\.\d+|norm\d|fc\d|ls\d", "", name)), name


def test_residuals_of_all_tasks_are_one_stack_and_the_rest_is_folded(three_tasks: ComposedModel) -> None:
    found = initializers(build_model(three_tasks, 17, 8))
    block, name = three_tasks.network.blocks[0], "blocks.2"
    assert block.adapter is not None and len(block.adapter.q_down) > 8  # two tasks of rank 4, one of a lower rank
    np.testing.assert_array_equal(found[f"{name}.attn.qkv.weight"], block.weight)
    np.testing.assert_array_equal(found[f"{name}.residual.down"], block.adapter.q_down)
    query, key, value = np.split(found[f"{name}.residual.up"], 3, axis=1)
    np.testing.assert_array_equal(query, block.adapter.q_up)
    np.testing.assert_array_equal(value, block.adapter.v_up)
    assert not key.any()
    assert not [key for key in found if "residual" in key and key.startswith(("blocks.0", "blocks.1"))]


def rows(graph: onnx.ModelProto, batch: int) -> dict[str, list[list[int]]]:
    """Shapes of what each linear layer makes for ``batch`` images, by its weight (whole or a slice of it)."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(graph)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    inferred = shape_inference.infer_shapes(fixed, strict_mode=True, data_prop=True).graph
    values = (*inferred.value_info, *inferred.output)
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}
    sources = {node.output[0]: node.input[0] for node in inferred.node if node.op_type == "Slice"}
    made: dict[str, list[list[int]]] = {}
    for node in inferred.node:
        if node.op_type == "Gemm":
            made.setdefault(sources.get(node.input[1], node.input[1]), []).append(shapes[node.output[0]])
    return made


def test_the_last_block_works_on_class_tokens_alone(three_tasks: ComposedModel) -> None:
    found = rows(build_model(three_tasks, 17, 8), batch=3)
    assert found["blocks.2.mlp.fc1.weight"] == [[3 * 17, 192]]
    assert found["blocks.3.mlp.fc1.weight"] == [[3, 192]]
    assert found["blocks.3.mlp.fc2.weight"] == found["blocks.3.attn.proj.weight"] == [[3, 48]]
    assert found["blocks.3.attn.qkv.weight"] == [[3, 48], [3 * 17, 96]]


def test_the_last_block_keeps_all_tokens_where_they_are_averaged(
    make_backbone: Callable[..., Backbone], compose: Compose
) -> None:
    model = compose(["ab", "cd"], backbone=make_backbone(global_pool="avg"), method="frozen")
    assert rows(build_model(model, 17, 8), batch=3)["blocks.3.mlp.fc1.weight"] == [[3 * 17, 192]]


@pytest.mark.parametrize("residual", ["isolated", "previous"])
def test_the_number_of_nodes_does_not_depend_on_the_number_of_tasks(compose: Compose, residual: str) -> None:
    counts = [
        len(build_model(compose(t, [residual]), 17, 8).graph.node) for t in (["ab", "cd"], ["ab", "cd", "e", "fg"])
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"act_layer": "gelu_tanh"}, r"The activation GELUTanh of blocks\.0\.mlp cannot be exported"),
        ({"act_layer": "silu"}, r"The activation SiLU of blocks\.0\.mlp cannot be exported"),
        ({"norm_layer": "rmsnorm"}, r"The normalisation RmsNorm of blocks\.0\.norm1 cannot be exported"),
        ({"mlp_layer": SwiGLU}, r"The MLP SwiGLU of blocks\.0\.mlp cannot be exported"),
        ({"scale_mlp_norm": True}, r"The MLP Mlp of blocks\.0\.mlp cannot be exported"),
    ],
    ids=["gelu_tanh", "silu", "rmsnorm", "swiglu", "mlp-norm"],
)
def test_parts_that_cannot_be_expressed_are_refused(
    make_backbone: Callable[..., Backbone], compose: Compose, variant: dict[str, Any], message: str
) -> None:
    model = compose(["ab"], backbone=make_backbone(**variant), method="frozen")
    with pytest.raises(ExportError, match=message):
        build_model(model, 17, 8)


def test_old_opsets_are_refused(three_tasks: ComposedModel) -> None:
    with pytest.raises(ExportError, match="Opset 13 is too old for this graph; targets need at least 14"):
        build_model(three_tasks, 13, 8)


@pytest.mark.parametrize(("opset", "ir_version"), [(16, 8), (17, 8), (20, 9)])
def test_form_of_the_file(three_tasks: ComposedModel, opset: int, ir_version: int) -> None:
    graph = onnx.load_model_from_string(build_model(three_tasks, opset, ir_version).SerializeToString())
    onnx.checker.check_model(graph, full_check=True)
    assert graph.ir_version == ir_version and graph.opset_import[0].version == opset
    tensors = graph.graph.initializer
    assert not any(t.external_data or t.data_location == TensorProto.EXTERNAL for t in tensors)
    (image,) = graph.graph.input
    assert (image.name, image.type.tensor_type.elem_type, dims(image)) == (INPUT, TensorProto.UINT8, ["N", 32, 32, 3])
    shapes = {value.name: dims(value) for value in graph.graph.output}
    assert list(shapes) == list(OUTPUTS)
    assert shapes == {
        "probabilities": ["N", 6],
        "task_probabilities": ["N", 3],
        "novelty": ["N"],
        "features": ["N", 7 * 48],  # f, and three parts of each of two summaries
    }
    assert all(value.type.tensor_type.elem_type == TensorProto.FLOAT for value in graph.graph.output)


def test_unsigned_bytes_are_cast_before_anything_else(three_tasks: ComposedModel) -> None:
    """TensorRT's parsers refuse to transpose them."""
    readers = [node.op_type for node in build_model(three_tasks, 17, 8).graph.node if INPUT in node.input]
    assert readers == ["Cast"]


def test_the_same_model_gives_the_same_bytes(three_tasks: ComposedModel) -> None:
    first, second = (build_model(three_tasks, 17, 8).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("opset", [14, 17, 20])
@pytest.mark.parametrize("half", [False, True])
def test_the_second_order_summary(
    compose: Compose, make_backbone: Callable[..., Backbone], opset: int, half: bool
) -> None:
    backbone = make_backbone()
    backbone.directions = torch.randn(6, 48, generator=torch.Generator().manual_seed(0)) / 48**0.5
    model = compose(["ab", "cd"], backbone=backbone)
    images = IMAGES[:5]
    expected = torch_outputs(model, images)["features"]
    found = onnx_outputs(build_model(model, opset, 8, half=half), images)["features"]
    assert found.shape == expected.shape == (5, 48 * 7 + 21)
    np.testing.assert_allclose(found[:, -21:], expected[:, -21:], atol=0.02 if half else 1e-5)
