"""Memory budgets: sizes, costs that are measured, the choice of a plan, and training in parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from duallora_edge.errors import ConfigError
from duallora_edge.learner import memory_budget
from duallora_edge.learner.config import TrainConfig
from duallora_edge.learner.data import HealthReport, PreparedStream, PreparedTask
from duallora_edge.learner.memory_budget import Cost, live_peak, make_plan, parse_bytes, training_cost
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.run_directory import RunDirectory

MB = 1 << 20
BASE = 100 * MB


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 << 30), ("2048MB", 2 << 30), ("1.5 gb", 3 << 29), (" 10kb ", 10240)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "2", "GB", "-1GB", "2 TB", "2GiB", "1e3MB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="must be a size such as 2GB or 2048MB"):
        parse_bytes(text)


def test_live_peak_counts_what_is_held_at_once() -> None:
    def run() -> None:
        a = torch.zeros(MB)  # 4 MB
        b = a + 1  # 8 MB
        del a
        c = b.view(-1, 2) * 2  # 8 MB: the view is no memory
        del b, c
        torch.zeros(MB // 2)

    assert live_peak(run) == 8 * MB


def test_the_cost_of_training_is_less_when_computed_again(make_backbone: Callable[..., Backbone]) -> None:
    backbone, config = make_backbone(depth=8), TrainConfig(precision="fp32")
    plain, again = (training_cost(backbone, replace(config, recompute=value)) for value in (False, True))
    # Six blocks of 17 tokens of width 48, the last for one token: at least both sides of GELU are kept.
    assert plain.image > 5 * 2 * 17 * 4 * 48 * 4
    assert again.image < plain.image / 2


def test_cost() -> None:
    assert Cost.measure(lambda batch: torch.zeros(5 + batch)) == Cost(20, 4)
    assert Cost(20, 4).of(10) == 60


@pytest.fixture
def stream(make_task: Callable[..., PreparedTask]) -> PreparedStream:
    return PreparedStream((make_task("a", ["x", "y"], [0, 1], train=50),), HealthReport(()))


@pytest.fixture
def known_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """At first 100 MB; 12.5 MB of tokens, 12 for a batch; 1 MB an image, a quarter computed again, half in bf16."""

    def training(_: Backbone, config: TrainConfig) -> Cost:
        return Cost(0, MB // (4 if config.recompute else 1) // (2 if config.precision == "bf16" else 1))

    monkeypatch.setattr(memory_budget, "MARGIN", 1.0)
    monkeypatch.setattr(memory_budget, "LATER", 0)
    monkeypatch.setattr(memory_budget, "token_bytes", lambda _: MB // 8)
    monkeypatch.setattr(memory_budget, "resident_bytes", lambda: BASE)
    monkeypatch.setattr(memory_budget, "held_bytes", lambda *_: 0)
    monkeypatch.setattr(memory_budget, "statistics_bytes", lambda *_: 0)
    monkeypatch.setattr(memory_budget, "training_cost", training)
    monkeypatch.setattr(memory_budget, "forward_cost", lambda _, config: Cost(0, training(_, config).image // 2))


@pytest.mark.usefixtures("known_costs")
@pytest.mark.parametrize(
    ("budget", "micro", "passes", "recompute", "cached"),
    [
        (160, 32, 64, False, 12.5),
        (150, 32, 64, False, 6),  # the cache is the first to go
        (144, 32, 64, False, 0),
        (141, 16, 64, False, 9),
        (130, 16, 32, False, 2),
        (118, 4, 32, False, 2),
        (115, 8, 64, True, 1),  # computing blocks again, before parts become very small
        (112.25, 1, 64, True, 0),
    ],
)
def test_the_fastest_plan_that_fits(
    tiny_backbone: Backbone, stream: PreparedStream, budget: float, micro: int, passes: int, recompute: bool,
    cached: float,
) -> None:  # fmt: skip
    config = TrainConfig(precision="fp32", memory_budget=f"{budget}MB", views=0)
    plan = make_plan(tiny_backbone, config, stream, 0)
    assert (plan.micro_batch, plan.forward_batch, plan.recompute) == (micro, passes, recompute)
    assert plan.cache_bytes == cached * MB and plan.expected <= budget * MB
    applied = plan.apply(config)
    assert (applied.micro_batch, applied.cache_bytes, applied.precision) == (micro, plan.cache_bytes, "fp32")


@pytest.mark.usefixtures("known_costs")
def test_precision_is_the_last_resort_and_then_there_is_none(tiny_backbone: Backbone, stream: PreparedStream) -> None:
    config = TrainConfig(precision="fp32", memory_budget="112.2MB")
    assert make_plan(tiny_backbone, config, stream, 0, free_precision=True).precision == "bf16"
    with pytest.raises(ConfigError, match=r"112.2MB cannot be met: .* needs at least 113 MB; give that, or"):
        make_plan(tiny_backbone, config, stream, 0)


@pytest.mark.usefixtures("known_costs")
def test_an_earlier_plan_is_kept_while_it_fits(tiny_backbone: Backbone, stream: PreparedStream) -> None:
    before = {"micro_batch": 8, "forward_batch": 16, "recompute": True, "precision": "fp32"}
    for budget, micro in ((150, 8), (113, 4)):
        config = TrainConfig(precision="fp32", memory_budget=f"{budget}MB")
        assert make_plan(tiny_backbone, config, stream, 0, before=before).micro_batch == micro


def test_training_within_a_budget(
    tmp_path: Path, image_stream: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    """Say what was chosen, keep it, and learn the same as without a budget where it asks for nothing."""
    quick = ("--rank-orthogonal", 2, "--rank-residual", 2, "--epochs", 1, "--min-steps", 4, "--precision", "fp32")
    arguments = ("train", "--data", image_stream, "--device", "cpu", *quick, "--run")
    assert call(*arguments, tmp_path / "free")[0] == 0
    code, _, err = call(*arguments, tmp_path / "run", "--memory-budget", "64GB")
    assert code == 0 and "Memory budget 64GB: batches of 32 images, 64 in a pass" in err and "expected peak" in err
    assert RunDirectory.open(tmp_path / "run").digest() == RunDirectory.open(tmp_path / "free").digest()
    assert call(*arguments, tmp_path / "run", "--memory-budget", "63GB")[0] == 0  # it may change
    code, _, err = call(*arguments, tmp_path / "small", "--memory-budget", "50MB")
    assert code == 1 and "memory budget of 50MB cannot be met" in err
    assert not (tmp_path / "small").exists()
