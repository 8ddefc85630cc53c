"""Laws of the subspaces, and the bases of a stream against a slow singular value decomposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from duallora_edge.learner.statistics.subspace import (
    constrained_directions,
    empty_basis,
    inside_directions,
    new_directions,
    project_out,
    second_moment,
    top_directions,
    union,
)

DIM = 12
seeds = st.integers(0, 2**32 - 1)


def random_basis(seed: int, rank: int) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.linalg.qr(rng.normal(size=(DIM, DIM)))[0][:, :rank].T.copy())


def random_moment(seed: int, rows: int) -> Tensor:
    """The second moment of ``rows`` vectors whose scale differs by direction."""
    rng = np.random.default_rng((seed, 1))
    return second_moment(torch.from_numpy(rng.normal(size=(rows, DIM)) * np.geomspace(1, 1e-2, DIM)))


def kept(moment: Tensor, basis: Tensor) -> float:
    """Share of the energy of ``moment`` inside the span of ``basis``."""
    return float((basis @ moment @ basis.T).trace() / moment.trace())


def gram_error(rows: Tensor) -> float:
    return float((rows @ rows.T - torch.eye(len(rows))).abs().max()) if len(rows) else 0.0


@given(seed=seeds, rank=st.integers(0, DIM))
def test_projection_is_idempotent_and_symmetric(seed: int, rank: int) -> None:
    moment, basis = random_moment(seed, 40), random_basis(seed, rank)
    once = project_out(moment, basis)
    torch.testing.assert_close(project_out(once, basis), once, rtol=0, atol=1e-10)
    assert torch.equal(once, once.T)
    assert float((basis @ once).abs().max() if rank else 0) < 1e-10


@given(seed=seeds, known=st.integers(0, DIM), rank=st.integers(0, DIM), rows=st.integers(1, 40))
def test_constrained_directions_stay_outside(seed: int, known: int, rank: int, rows: int) -> None:
    basis = random_basis(seed, known)
    found = constrained_directions(random_moment(seed, rows), basis, rank)
    assert len(found) <= min(rank, DIM - known)
    assert gram_error(found) < 1e-8
    assert float((found @ basis.T).abs().max() if len(found) and known else 0) < 1e-10


@pytest.mark.parametrize("known", [3, DIM])
def test_no_direction_is_left_when_the_basis_holds_everything(known: int) -> None:
    basis = random_basis(5, known)
    inside = basis.T @ torch.diag(torch.logspace(0, -3, known, dtype=torch.float64)) @ basis
    assert len(constrained_directions(inside, basis, 4)) == 0
    assert len(new_directions(inside, basis, 1.0)) == 0


@given(seed=seeds, known=st.integers(0, DIM), energy=st.floats(0, 1), rows=st.integers(1, 40))
def test_new_directions_keep_the_energy(seed: int, known: int, energy: float, rows: int) -> None:
    moment, basis = random_moment(seed, rows), random_basis(seed, known)
    extended = torch.cat([basis, new_directions(moment, basis, energy)])
    assert gram_error(extended) < 1e-8
    assert kept(moment, extended) >= energy - 1e-9
    if len(extended) > known:  # and not one direction more than needed
        assert kept(moment, extended[:-1]) < energy


def slow_bases(tasks: list[np.ndarray], energy: float) -> list[np.ndarray]:
    """The projectors after each task, by singular value decompositions of the rows themselves."""
    basis, projectors = np.zeros((0, DIM)), []
    for rows in tasks:
        residual = rows - rows @ basis.T @ basis
        _, values, vectors = np.linalg.svd(residual, full_matrices=False)
        held, total = np.sum((rows @ basis.T) ** 2), np.sum(rows**2)
        count = 0
        while held + np.sum(values[:count] ** 2) < energy * total:
            count += 1
        basis = np.concatenate([basis, vectors[:count]])
        projectors.append(basis.T @ basis)
    return projectors


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("seed", range(4))
def test_bases_of_a_stream_equal_a_slow_decomposition(seed: int, energy: float) -> None:
    rng = np.random.default_rng(seed)
    tasks = [rng.normal(size=(30, DIM)) @ (rng.normal(size=(DIM, DIM)) * np.geomspace(3, 0.1, DIM)) for _ in range(4)]
    basis = empty_basis(DIM)
    for rows, expected in zip(tasks, slow_bases(tasks, energy), strict=True):
        basis = torch.cat([basis, new_directions(second_moment(torch.from_numpy(rows)), basis, energy)])
        np.testing.assert_allclose((basis.T @ basis).numpy(), expected, atol=1e-9)


def test_top_directions_are_leading_eigenvectors_of_fixed_sign() -> None:
    rotation = random_basis(0, DIM)
    values = torch.arange(DIM, 0, -1, dtype=torch.float64)
    found = top_directions(rotation.T @ torch.diag(values) @ rotation, 5)
    torch.testing.assert_close((found @ rotation[:5].T).abs(), torch.eye(5, dtype=torch.float64), atol=1e-10, rtol=0)
    assert bool((found.gather(1, found.abs().argmax(dim=1, keepdim=True)) > 0).all())


@pytest.mark.parametrize(("rank", "rows", "expected"), [(0, 5, 0), (4, 2, 2), (4, 40, 4), (99, 40, DIM)])
def test_top_directions_leave_out_null_directions(rank: int, rows: int, expected: int) -> None:
    assert top_directions(random_moment(0, rows), rank).shape == (expected, DIM)


def test_nothing_comes_from_a_moment_of_zero() -> None:
    zero = torch.zeros(DIM, DIM, dtype=torch.float64)
    assert len(top_directions(zero, 4)) == len(new_directions(zero, empty_basis(DIM), 0.95)) == 0


@given(seed=seeds, known=st.integers(0, DIM), rank=st.integers(0, DIM))
def test_inside_directions_lie_inside(seed: int, known: int, rank: int) -> None:
    basis = random_basis(seed, known)
    found = inside_directions(random_moment(seed, 40), basis, rank)
    assert found.shape == (min(rank, known), DIM)
    assert gram_error(found) < 1e-8
    torch.testing.assert_close(found @ basis.T @ basis, found, rtol=0, atol=1e-9)


@given(seed=seeds, first=st.integers(0, DIM), second=st.integers(0, DIM))
def test_union_spans_both(seed: int, first: int, second: int) -> None:
    a, b = random_basis(seed, first), random_basis(seed + 1, second)
    both = union(a, b)
    assert len(both) == min(first + second, DIM)
    assert gram_error(both) < 1e-8
    for part in (a, b):
        torch.testing.assert_close(part @ both.T @ both, part, rtol=0, atol=1e-6)


def test_union_with_itself_adds_nothing() -> None:
    basis = random_basis(0, 4)
    assert torch.equal(union(basis, basis), basis)


def test_moments_of_batches_add_up() -> None:
    rows = torch.randn(20, DIM)
    torch.testing.assert_close(second_moment(rows[:7]) + second_moment(rows[7:]), second_moment(rows))
    assert second_moment(rows).dtype == torch.float64
