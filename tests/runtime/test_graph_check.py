"""The check accepts every graph the exporter writes, and nothing else."""

from __future__ import annotations

import ast
import importlib.util
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from timm.layers import PatchEmbed
from torch import nn

from duallora_edge.device_profiles import jetpacks, list_profiles
from duallora_edge.errors import BundleError
from duallora_edge.export import graph as exporter
from duallora_edge.export.graph import Part, build_model
from duallora_edge.learner import methods
from duallora_edge.learner.data import PixelSet, PreparedTask
from duallora_edge.learner.network.answers import ComposedModel
from duallora_edge.learner.network.backbone import Backbone, load_backbone
from duallora_edge.learner.network.task_record import TaskRecord
from duallora_edge.learner.statistics.calibration import Mixture
from duallora_edge.runtime.bundle import BETWEEN, INPUT, MAX_BATCH, OUTPUTS
from duallora_edge.runtime.graph_check import IR_VERSIONS, OPSETS, check_graph, operators
from duallora_edge.runtime.graph_check import MAX_BATCH as CHECKED_BATCH
from duallora_edge.runtime.graph_weights import WEIGHTS, external_arrays, inlined
from duallora_edge.runtime.tensor_file import TensorFile, blocks

PARTS: dict[Part, tuple[Sequence[str], Sequence[str]]] = {
    "whole": ((INPUT,), OUTPUTS),
    "prefix": ((INPUT,), BETWEEN),
    "suffix": (BETWEEN, OUTPUTS),
}


def _attack_graphs() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "attack_graphs.py"
    spec = importlib.util.spec_from_file_location("attack_graphs", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


attack_graphs = _attack_graphs()


@pytest.fixture(scope="module")
def teach(make_task: Callable[..., PreparedTask], learn: Callable[..., list[TaskRecord]]) -> Callable[..., Any]:
    """``teach(backbone, ["ab", "bc"], method="frozen")``: records of as many tasks, one letter a class."""

    def make(backbone: Backbone, tasks: Sequence[str], **settings: Any) -> list[TaskRecord]:
        prepared = [
            make_task(f"task {index}", [*classes], range(len(classes)), train=6, validation=2)
            for index, classes in enumerate(tasks)
        ]
        return learn(prepared, backbone=backbone, **{"min_steps": 1, "residual": "isolated", **settings})

    return make


@pytest.fixture(scope="module")
def records(teach: Callable[..., Any], tiny_backbone: Backbone) -> list[TaskRecord]:
    """Two tasks with residual adapters; a class is in both."""
    return teach(tiny_backbone, ["ab", "bc"])  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def two_tasks(records: list[TaskRecord], tiny_backbone: Backbone) -> ComposedModel:
    return compose(tiny_backbone, records)


def compose(backbone: Backbone, records: list[TaskRecord]) -> ComposedModel:
    return methods.compose(backbone, records).eval()


def accept(model: ComposedModel, opset: int = 17, ir_version: int = 8, part: Part = "whole", **form: Any) -> None:
    check_graph(build_model(model, opset, ir_version, part=part, **form).SerializeToString(), *PARTS[part])


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset_is_accepted(two_tasks: ComposedModel, opset: int, half: bool) -> None:
    accept(two_tasks, opset, half=half, ir_version=10 if opset == 20 else 8)


@pytest.mark.parametrize("batch", [None, 1, MAX_BATCH])
@pytest.mark.parametrize("part", PARTS)
def test_every_part_and_batch_is_accepted(two_tasks: ComposedModel, part: Part, batch: int | None) -> None:
    for half, sums in ((False, False), (True, False), (True, True)):
        accept(two_tasks, part=part, batch=batch, half=half, sums=sums)


VARIANTS: list[dict[str, Any]] = [
    {"reg_tokens": 4, "qk_norm": True, "init_values": 0.5},
    {"reg_tokens": 2, "no_embed_class": True, "qkv_bias": False},
    {"global_pool": "avg", "reg_tokens": 3, "dynamic_img_size": True},
    {"global_pool": "avg", "fc_norm": False},
    {"pre_norm": True, "act_layer": "quick_gelu", "norm_layer": partial(nn.LayerNorm, eps=1e-5)},
    {"embed_layer": partial(PatchEmbed, norm_layer=nn.LayerNorm)},
    {"act_layer": "relu", "proj_bias": False, "norm_layer": partial(nn.LayerNorm, bias=False)},
    {"patch_size": 16, "pos_embed": "none", "mlp_ratio": 2.0, "num_heads": 4},
]


@pytest.mark.parametrize(("opset", "half"), [(16, True), (20, False)])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: ",".join(variant))
def test_every_backbone_is_accepted(
    make_backbone: Callable[..., Backbone], records: list[TaskRecord], variant: dict[str, Any], opset: int, half: bool
) -> None:
    accept(compose(make_backbone(**variant), records), opset, half=half)  # the shapes of what was learned fit all


def test_a_backbone_without_a_class_token_is_accepted(
    make_backbone: Callable[..., Backbone], teach: Callable[..., Any]
) -> None:
    backbone = make_backbone(class_token=False, global_pool="avg", qk_norm=True)
    model = compose(backbone, teach(backbone, ["ab", "cd"], method="frozen"))
    for opset in (16, 20):
        accept(model, opset, half=True)


@pytest.mark.parametrize(
    ("tasks", "settings"),
    [
        (["a"], {"method": "frozen"}),
        (["ab"], {"method": "joint"}),
        (["ab", "c"], {"residual": "previous"}),
        (["ab"], {"method": "inflora"}),
    ],
    ids=["one class", "one task", "previous residual", "inflora"],
)
def test_every_method_is_accepted(
    tiny_backbone: Backbone, teach: Callable[..., Any], tasks: list[str], settings: dict[str, Any]
) -> None:
    model = compose(tiny_backbone, teach(tiny_backbone, tasks, **settings))
    model.classifier.mixture = Mixture(2.0, 4.0, 0.3)
    for half in (False, True):
        accept(model, half=half)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
def test_random_features_of_a_ridge_classifier_are_accepted(
    tiny_backbone: Backbone, records: list[TaskRecord], half: bool
) -> None:
    model = compose(tiny_backbone, records)
    classifier = model.classifier
    classifier.expansion = torch.randn(500, classifier.weight.shape[1])
    classifier.weight = torch.randn(len(classifier.weight), 500)
    accept(model, half=half)


@pytest.mark.assets
def test_a_real_backbone_is_accepted(assets: Path, learn: Callable[..., list[TaskRecord]]) -> None:
    size = 128
    weights = assets / "weights" / "vit_tiny_patch16_224.safetensors"
    backbone = load_backbone("vit_tiny_patch16_224", weights=weights, size=size)
    rng = np.random.default_rng(0)
    images = PixelSet(rng.integers(0, 256, (4, size, size, 3), np.uint8), ("a", "b", "a", "b"))
    task = PreparedTask("noise", images, images, images, digest="noise")
    model = compose(backbone, learn([task], backbone=backbone, method="frozen", min_steps=1))
    for half in (False, True):
        accept(model, half=half)


def test_what_targets_are_exported_with_is_in_range() -> None:
    exports = [*list_profiles(), *jetpacks().values()]
    assert {each.opset for each in exports} - {None} <= {*OPSETS}
    assert {each.ir_version for each in exports} - {None} <= {*IR_VERSIONS}
    assert OPSETS.start == exporter.MIN_OPSET and exporter.GELU_OPSET in OPSETS
    assert CHECKED_BATCH == MAX_BATCH


def test_the_table_has_the_operators_that_the_exporter_can_write() -> None:
    """By its source: a new operator or attribute there belongs into the table, and an unused one out of it."""
    written: dict[str, set[str]] = {}
    reduced: set[str] = set()
    for call in ast.walk(ast.parse(Path(exporter.__file__).read_text(encoding="utf-8"))):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute) or not call.args:
            continue
        if call.func.attr in ("node", "make_node") and isinstance(call.args[0], ast.Constant):
            names = {keyword.arg for keyword in call.keywords if keyword.arg is not None}
            written.setdefault(str(call.args[0].value), set()).update(names - {"name"})
        elif call.func.attr == "_reduced" and isinstance(call.args[0], ast.Constant):
            reduced.add(str(call.args[0].value))
    written |= {name: {"axes", "keepdims"} for name in reduced}
    known: dict[str, set[str]] = {}
    for opset in OPSETS:
        for name, operator in operators(opset).items():
            known.setdefault(name, set()).update(operator.attributes)
    assert known == written


def test_weights_are_not_copied(two_tasks: ComposedModel) -> None:
    built = build_model(two_tasks, 17, 8)
    large = np.zeros((2**12, 2**10), np.float32)
    built.graph.initializer.append(numpy_helper.from_array(large, "large"))
    content = built.SerializeToString()
    tracemalloc.start()
    try:
        check_graph(content, (INPUT,), OUTPUTS)
        assert tracemalloc.get_traced_memory()[1] < large.nbytes / 8
    finally:
        tracemalloc.stop()


def test_what_attacks_are_made_of_is_accepted() -> None:
    for content in (attack_graphs.PLAIN, attack_graphs.with_image(b"\x08\x03")):
        check_graph(content, attack_graphs.READS, attack_graphs.RETURNS)


WEIGHTS_OF_C = TensorFile(b"".join(blocks({"before": np.zeros(7, np.float32), "c": np.ones(48, np.float32)})))
PLACE = WEIGHTS_OF_C.entries["c"]
RIGHT = {"location": WEIGHTS, "offset": PLACE.start, "length": 192}


def test_weights_beside_the_graph() -> None:
    graph = attack_graphs.external(**RIGHT).SerializeToString()
    check_graph(graph, attack_graphs.READS, attack_graphs.RETURNS, WEIGHTS_OF_C)
    whole = b"".join(inlined(graph, WEIGHTS_OF_C))
    check_graph(whole, attack_graphs.READS, attack_graphs.RETURNS)
    expected = attack_graphs.with_tensor(numpy_helper.from_array(np.ones(48, np.float32), "c"))
    assert onnx.load_model_from_string(whole) == expected
    assert external_arrays(graph, WEIGHTS_OF_C)["c"].tolist() == [1.0] * 48
    assert list(inlined(whole, WEIGHTS_OF_C)) and b"".join(inlined(whole, WEIGHTS_OF_C)) == whole
    with pytest.raises(ValueError, match="no weights of 'c'"):
        list(inlined(graph, TensorFile(b"".join(blocks({"d": np.ones(48, np.float32)})))))


@pytest.mark.parametrize(
    ("changed", "sizes", "reason"),
    [
        ({"offset": PLACE.start - 4}, (48,), "the place of 'c'"),
        ({"length": 196}, (48,), "the place of 'c'"),
        ({"length": "0192"}, (48,), "the place of 'c'"),
        ({"location": f"./{WEIGHTS}"}, (48,), "the place of 'c'"),
        ({"location": "model.onnx"}, (48,), "the place of 'c'"),
        ({"checksum": 0}, (48,), "more than 3 external"),
        ({}, (24,), "the shape of 'c'"),
        ({}, (48, 1), "the shape of 'c'"),
    ],
)
def test_only_the_whole_tensor_of_the_same_name_is_read(
    changed: dict[str, Any], sizes: tuple[int, ...], reason: str
) -> None:
    graph = attack_graphs.external(sizes=sizes, **{**RIGHT, **changed}).SerializeToString()
    with pytest.raises(BundleError, match=reason):
        check_graph(graph, attack_graphs.READS, attack_graphs.RETURNS, WEIGHTS_OF_C)


@pytest.mark.parametrize("name", attack_graphs.PLACES)
def test_no_other_place_is_read(name: str) -> None:
    content = attack_graphs.built(name, Path("outside", "bundle"))
    with pytest.raises(BundleError):
        check_graph(content, attack_graphs.READS, attack_graphs.RETURNS, WEIGHTS_OF_C)


def test_halves_are_no_weights() -> None:
    halves = TensorFile(b"".join(blocks({"c": np.ones(48, np.float16)})))
    entry = halves.entries["c"]
    graph = attack_graphs.external(WEIGHTS, offset=entry.start, length=96).SerializeToString()
    with pytest.raises(BundleError, match="the shape of 'c'"):
        check_graph(graph, attack_graphs.READS, attack_graphs.RETURNS, halves)


@pytest.mark.parametrize("name", attack_graphs.ATTACKS)
def test_an_attack_is_refused_for_its_reason(name: str) -> None:
    content = attack_graphs.built(name, Path("outside", "bundle"))
    with pytest.raises(BundleError) as refused:
        check_graph(content, attack_graphs.READS, attack_graphs.RETURNS)
    message = str(refused.value)
    assert attack_graphs.ATTACKS[name][0] in message
    assert message.endswith("; export the run again.") and message.isprintable() and len(message) < 500


@pytest.mark.parametrize(("reads", "returns"), [((INPUT,), BETWEEN), ((), OUTPUTS), ((INPUT, "more"), OUTPUTS)])
def test_other_inputs_or_outputs_are_refused(
    two_tasks: ComposedModel, reads: Sequence[str], returns: Sequence[str]
) -> None:
    content = build_model(two_tasks, 17, 8).SerializeToString()
    with pytest.raises(BundleError, match="inputs or outputs"):
        check_graph(content, reads, returns)


def test_mutations_are_accepted_or_refused(two_tasks: ComposedModel) -> None:
    forms: list[dict[str, Any]] = [{}, {"half": True, "batch": 1}]
    graphs = [build_model(two_tasks, opset, 8, **form).SerializeToString() for opset in (16, 20) for form in forms]
    said = [attack_graphs.judge(content, (INPUT,), OUTPUTS) for _, content in attack_graphs.mutate(graphs, 300, seed=1)]
    accepted = said.count(None)
    assert 10 < accepted < 100 and len({*said}) > 50


def test_every_truncation_is_refused() -> None:
    for length in range(len(attack_graphs.PLAIN)):
        with pytest.raises(BundleError):
            check_graph(attack_graphs.PLAIN[:length], attack_graphs.READS, attack_graphs.RETURNS)
