"""The methods of benchmarks/peer_methods.py: they learn and answer, and their formulas are what they say."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from duallora_edge.errors import RunError
from duallora_edge.learner.data import PreparedTask
from duallora_edge.learner.methods import BUILT_IN, METHODS, VARIABLE
from duallora_edge.learner.network.task_record import TaskRecord
from duallora_edge.learner.statistics.gaussian import ClassStatistics

NAMES = ("drift_map", "ssiat", "fecam")
FILE = Path(__file__).parents[3] / "benchmarks" / "peer_methods.py"


@pytest.fixture(autouse=True)
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The names of the file, which the registry runs; no method stays behind."""
    monkeypatch.setenv(VARIABLE, str(FILE))
    monkeypatch.setattr(METHODS, "_files", set())
    yield vars(sys.modules[type(METHODS["drift_map"]).__module__])
    for name in set(METHODS) - set(BUILT_IN):
        del METHODS[name]


@pytest.mark.parametrize("method", NAMES)
def test_peers_learn_and_answer(
    make_task: Callable[..., PreparedTask],
    learn: Callable[..., list[TaskRecord]],
    accuracy: Callable[..., float],
    peers: dict[str, Any],
    method: str,
) -> None:
    """Three tasks, one of them of a single class, and a class that comes back."""
    names = [(["a", "b"], [0, 1]), (["alone"], [5]), (["c", "d", "a"], [2, 3, 0])]
    tasks = [make_task(str(number), *of) for number, of in enumerate(names)]
    records = learn(tasks, method=method, learning_rate=0.003)
    assert all(record.is_finite and record.info.validation["accuracy"] is not None for record in records)
    assert sum(accuracy(records, task) for task in tasks) / 3 > 0.6
    peers["_kept"].clear()
    with pytest.raises(RunError, match=f"{method} can be measured only in the process that learned it"):
        accuracy(records, tasks[0])


def statistics(features: torch.Tensor, rank: int = 99) -> ClassStatistics:
    return ClassStatistics.of(features, torch.arange(len(features)) % 3, 3).compressed(rank)


def test_a_linear_drift_is_undone(peers: dict[str, Any]) -> None:
    """The move that new images show takes statistics of [f ; phi] to those of the same images after the drift."""
    peers["DRIFT_RIDGE"] = 0.01
    old, seen, phi = torch.randn(3, 400, 6, generator=torch.manual_seed(0)).double()
    drift = torch.eye(6) + 0.3 * torch.randn(6, 6, generator=torch.manual_seed(1))
    move = METHODS["drift_map"].fit_move(seen, seen @ drift.double(), [])  # type: ignore[attr-defined]
    (found,) = move([statistics(torch.cat([old, phi], dim=1))])
    expected = statistics(torch.cat([old @ drift.double(), phi], dim=1))
    torch.testing.assert_close(found.means, expected.means, rtol=0.02, atol=0.01)
    torch.testing.assert_close(found.scatter, expected.scatter, rtol=0.02, atol=2)


def test_without_drift_nothing_moves() -> None:
    old, before = torch.randn(40, 6).double(), statistics(torch.randn(30, 9), rank=2)
    for method in ("drift_map", "ssiat"):
        (after,) = METHODS[method].fit_move(old, old, [before])([before])  # type: ignore[attr-defined]
        torch.testing.assert_close(after.means, before.means)
        torch.testing.assert_close(after.scatter, before.scatter)


def test_means_move_as_the_images_near_them() -> None:
    """Images around the mean of one class move one way, those around another class stay."""
    before = replace(statistics(torch.zeros(3, 5)), means=10 * torch.eye(3, 5).double())
    old = before.means[:, :4].repeat(20, 1) + 0.1 * torch.randn(60, 4, generator=torch.manual_seed(0))
    shift = torch.zeros(3, 4).double()
    shift[0, 3] = 5
    (after,) = METHODS["ssiat"].fit_move(old, old + shift.repeat(20, 1), [before])([before])  # type: ignore[attr-defined]
    torch.testing.assert_close(after.means[:, :4], before.means[:, :4] + shift, rtol=0, atol=0.05)
    assert torch.equal(after.means[:, 4:], before.means[:, 4:])


def test_distances_are_those_of_the_correlations(peers: dict[str, Any]) -> None:
    f, labels = torch.randn(50, 4, generator=torch.manual_seed(0)), torch.arange(50) % 2
    found = peers["_distances"](f, peers["_gaussians"](f, labels)) / -peers["FECAM_SCALE"]
    for k in range(2):
        own = f[labels == k].double()
        S = torch.cov((own.sign() * own.abs() ** 0.5).T)
        off = ~torch.eye(4, dtype=torch.bool)
        S = S + torch.where(off, S[off].mean(), S.diagonal().mean())
        R = S / (S.diagonal()[:, None] * S.diagonal()).sqrt() + peers["FLOOR"] * torch.eye(4)
        mean = own.mean(dim=0)
        x, m = (v.sign() * v.abs() ** 0.5 for v in (f[7].double(), mean))
        gap = x / x.norm() - m / m.norm()
        torch.testing.assert_close(float(found[7, k]), float(gap @ R.inverse() @ gap), rtol=1e-4, atol=1e-6)
