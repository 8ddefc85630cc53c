"""The workload of a graph against PyTorch's own counter and against counts by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from duallora_edge.export.graph import build_model
from duallora_edge.export.workload import full_precision_nodes, node_counts, optimized_nodes, workload
from duallora_edge.learner.network.answers import ComposedModel
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.statistics.calibration import LEVELS

Compose = Callable[..., ComposedModel]
D, L, DEPTH = 48, 17, 4  # width, tokens and blocks of the tiny backbone
PHI = 2 * 3 * D  # class token, mean and deviation of two blocks of the prefix


def linear(rows: int, width_in: int, width_out: int) -> int:
    return 2 * rows * width_in * width_out


@pytest.mark.parametrize(
    "variant", [{}, {"global_pool": "avg"}, {"reg_tokens": 4, "patch_size": 4}, {"mlp_ratio": 2.0}], ids=str
)
def test_flops_equal_those_that_pytorch_counts(
    make_backbone: Callable[..., Backbone], compose: Compose, variant: dict[str, Any]
) -> None:
    """The forward pass in PyTorch computes the last block for the class token alone too."""
    model = compose(["ab", "cd"], backbone=make_backbone(**variant), method="frozen")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
    assert workload(build_model(model, 17, 8)).flops == pytest.approx(counter.get_total_flops(), rel=0.002)


def test_flops_of_the_backbone_equal_the_count_by_hand(compose: Compose) -> None:
    features, components, tasks = D + PHI, 4, 2
    embed = linear(L - 1, 8 * 8 * 3, D)
    block = linear(L, D, 3 * D) + 2 * linear(L, D, L) + linear(L, D, D) + 2 * linear(L, D, 4 * D)
    last = linear(1, D, D) + linear(L, D, 2 * D) + 2 * linear(1, D, L) + linear(1, D, D) + 2 * linear(1, D, 4 * D)
    memory = linear(1, PHI, components) + linear(1, components, tasks)
    within = linear(1, features, components) + linear(1, tasks, components)
    answer = linear(1, features, components) + within + linear(1, components, 4) + linear(1, components, tasks)
    novelty = linear(1, components, components) + linear(1, len(LEVELS), 1)
    remoteness = linear(1, features, 1)
    work = workload(build_model(compose(["ab", "cd"], method="frozen"), 17, 8))
    assert work.flops == embed + (DEPTH - 1) * block + last + memory + answer + novelty + remoteness


def test_residuals_add_two_thin_products_a_block(compose: Compose) -> None:
    tasks, rank = 3, 12
    frozen, adapted = (
        workload(build_model(compose(["ab", "cd", "ef"], ["isolated"], method=method), 17, 8))
        for method in ("frozen", "dual_lora")
    )
    gates = 2 * linear(1, tasks, rank)
    middle = linear(L, D, rank) + linear(L, rank, 3 * D)
    last = linear(L, D, rank) + linear(1, rank, D) + linear(L, rank, 2 * D)
    assert adapted.flops - frozen.flops == gates + middle + last
    parameters = 2 * tasks * rank + 2 * rank * D + rank * 3 * D + rank * (D + 2 * D)
    assert (adapted.weight_bytes - frozen.weight_bytes) / 2 == pytest.approx(parameters, abs=16)


def test_bytes_are_those_of_fp16(compose: Compose) -> None:
    model = compose(["ab", "cd"], method="frozen")
    features, components, tasks = D + PHI, 4, 2
    vit = sum(value.numel() for value in model.network.backbone.model.state_dict().values())
    memory = components * (PHI + 1 + tasks)
    within = components * (features + 1 + tasks)
    answer = components * (features + 1) + within + components * (4 + tasks)
    novelty = components * (components + 1) + 3 * len(LEVELS) + 2 * features
    work = workload(build_model(model, 17, 8))
    assert work.weight_bytes / 2 == pytest.approx(vit + memory + answer + novelty, abs=200)  # shapes, scalars and ones
    # Most is alive where the MLP multiplies two hidden layers into a third, or where Gelu is one operator.
    assert work.activation_bytes == 2 * 3 * (L * 4 * D)
    assert workload(build_model(model, 20, 9)).activation_bytes == 2 * 2 * (L * 4 * D)
    assert work.batch == 1


def test_counting_leaves_the_graph_as_it_is(compose: Compose) -> None:
    graph = build_model(compose(["ab"], method="frozen"), 17, 8)
    before = graph.SerializeToString(deterministic=True)
    workload(graph)
    assert graph.SerializeToString(deterministic=True) == before
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"


def test_node_counts(compose: Compose) -> None:
    graph = build_model(compose(["ab"], method="frozen"), 17, 8)
    counts = node_counts(graph)
    assert next(iter(counts)) == "total" and counts["total"] == len(graph.graph.node)
    parts = {name: count for name, count in counts.items() if name != "total"}
    assert sum(parts.values()) == counts["total"] and list(parts.values()) == sorted(parts.values(), reverse=True)
    assert parts["Conv"] == 1 and parts["Cast"] == 1
    assert parts["Softmax"] == DEPTH + 2 and parts["LayerNormalization"] == 2 * DEPTH + 2


def test_what_onnx_runtime_fuses(compose: Compose) -> None:
    graph = build_model(compose(["ab"], method="frozen"), 17, 8)
    assert 0 < optimized_nodes(graph) < len(graph.graph.node)


def test_full_precision_nodes(compose: Compose) -> None:
    model = compose(["ab"], method="frozen")
    graph, half = (build_model(model, 17, 8, half=half) for half in (False, True))
    names = {node.name for node in half.graph.node}
    kept = full_precision_nodes(half)
    assert set(kept) < names and len(kept) < 0.6 * len(names)
    named = [node.name for node in graph.graph.node if node.op_type != "Cast"]  # the image is one of uint8
    assert named == full_precision_nodes(graph)
    assert not {node.name for node in half.graph.node if node.op_type == "Cast"} & set(kept)
