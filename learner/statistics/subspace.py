"""Feature subspaces: second moments, orthonormal bases, and the directions adapters may use.

A basis is a matrix [k, d] with orthonormal rows, where k may be 0. Everything is computed from the d x d matrix of
second moments by a symmetric eigendecomposition in float64, never from the features themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor


def second_moment(rows: Tensor) -> Tensor:
    """Uncentred second moment sum_i x_i x_i^T, float64 [d, d], of rows [n, d]; add up over batches."""
    x = rows.double()
    return x.T @ x


def empty_basis(dim: int) -> Tensor:
    """The basis of the zero subspace, float64 [0, d]."""
    return torch.zeros(0, dim, dtype=torch.float64)


def project_out(moment: Tensor, basis: Tensor) -> Tensor:
    """P C P with P = I - basis^T basis, symmetric float64 [d, d]: the moment outside a subspace."""
    projector = torch.eye(moment.shape[0], dtype=torch.float64) - basis.T @ basis
    outside = projector @ moment @ projector
    return (outside + outside.T) / 2


def top_directions(moment: Tensor, rank: int, total: Tensor | None = None) -> Tensor:
    """The (at most) ``rank`` leading eigenvectors of a moment as rows, float64 [r, d].

    Directions with less than 1e-10 of the energy ``total`` (by default that of the moment itself) are rounding and are
    left out.
    """
    values, vectors = torch.linalg.eigh(moment)
    significant = int((values > 1e-10 * (moment.trace() if total is None else total)).sum())
    rows = vectors.flip(1).T[: min(rank, significant)]
    # The sign of an eigenvector is arbitrary; fixing it makes results comparable between libraries.
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return rows * largest.sign()


def constrained_directions(moment: Tensor, basis: Tensor, rank: int) -> Tensor:
    """Leading directions of a moment orthogonal to ``basis``, float64 [r, d], r <= rank.

    Rounding leaves eigenvectors of the projected moment about 1e-15 outside of the complement. They are projected once
    more, so that the constraint of the orthogonal adapter holds to machine precision.
    """
    rows = top_directions(project_out(moment, basis), rank, moment.trace())
    rows = rows - (rows @ basis.T) @ basis
    return rows / rows.norm(dim=1, keepdim=True)


def inside_directions(moment: Tensor, basis: Tensor, rank: int) -> Tensor:
    """Leading directions of a moment inside the span of ``basis`` [k, d], float64 [min(rank, k), d]."""
    if basis.shape[0] == 0:
        return basis
    return top_directions(basis @ moment @ basis.T, rank) @ basis


def union(first: Tensor, second: Tensor) -> Tensor:
    """Orthonormal basis of the sum of two subspaces, float64 [k, d]."""
    rest = second - (second @ first.T) @ first
    if rest.shape[0] == 0:
        return first
    _, values, rows = torch.linalg.svd(rest, full_matrices=False)
    return torch.cat([first, rows[values > 1e-6]])


def new_directions(moment: Tensor, basis: Tensor, energy: float) -> Tensor:
    """The block Psi that extends ``basis`` until it keeps the share ``energy`` of the trace of ``moment``.

    Energy is the sum of eigenvalues of the second moment (sigma^2 of the features, not squared again). Returns
    float64 [k, d], orthogonal to ``basis``; k = 0 when the basis already keeps enough.
    """
    outside = project_out(moment, basis)
    total = float(moment.trace())
    missing = float(outside.trace()) - (1 - energy) * total
    if total <= 0 or missing <= 0:
        return empty_basis(moment.shape[0])
    values = torch.linalg.eigvalsh(outside).flip(0).clamp(min=0)
    count = int((values.cumsum(0) < missing * (1 - 1e-12)).sum()) + 1
    return constrained_directions(moment, basis, count)
