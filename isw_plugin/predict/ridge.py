"""Ridge regression in closed form, from sums of products; penalty and rank are chosen on rows that were not fitted."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Solution", "moments", "r_squared", "ridge", "solved"]

_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # a row, for inputs of unit deviation
_RANKS = 16  # a multiple of these, a vector of the engine
_EXPLAINED = 0.975  # of what all of the weight explains: a smaller rank that loses no more is taken
_VARIES = 1e-6  # deviations below this share of the largest, or of their own mean, are rounding


class Solution(NamedTuple):
    """``y = weight basis x + bias``; without a basis it is the identity. Factors hold numbers of bfloat16."""

    weight: Tensor  # (targets, rank)
    bias: Tensor  # (targets,)
    basis: Tensor | None  # (rank, inputs)

    def __call__(self, x: Tensor) -> Tensor:
        known = x if self.basis is None else x @ self.basis.T
        return torch.addmm(self.bias, known, self.weight.T)


def moments(x: Tensor, y: Tensor) -> Tensor:
    """All that least squares need of inputs (rows, F) and targets (rows, C): sums over rows of products.

    Returns:
        Of (1, x) with (1, x, y), float64, (1 + F, 1 + F + C). Those of more rows are their sum.
    """
    known = torch.cat([x.new_ones(len(x), 1), x], 1).double()
    return known.T @ torch.cat([known, y.double()], 1)


class _Centred(NamedTuple):
    """Means of inputs and targets, and mean products of what deviates from them."""

    mean: Tensor  # (inputs,)
    centre: Tensor  # (targets,)
    gram: Tensor  # (inputs, inputs)
    cross: Tensor  # (inputs, targets)


def _centred(of_rows: Tensor) -> _Centred:
    size = len(of_rows)
    means = of_rows[0] / of_rows[0, 0]
    products = of_rows[1:, 1:] / of_rows[0, 0] - torch.outer(means[1:size], means[1:])
    return _Centred(means[1:size], means[size:], products[:, : size - 1], products[:, size - 1 :])


def _weight(known: _Centred, penalty: float) -> Tensor:
    """(targets, inputs), float64; inputs that never vary get 0."""
    deviation = known.gram.diagonal().clamp_min(0).sqrt()
    varies = (deviation > _VARIES * deviation.max()) & (deviation > _VARIES * known.mean.abs())
    scale = torch.where(varies, 1 / deviation, 0.0)
    gram = known.gram * torch.outer(scale, scale)
    gram.diagonal().add_(penalty)
    solution = torch.cholesky_solve(known.cross * scale[:, None], torch.linalg.cholesky(gram))
    return (solution * scale[:, None]).T


def _directions(known: _Centred, weight: Tensor) -> Tensor:
    """Orthonormal columns of targets, the last of which explain most of what the weight does."""
    directions: Tensor = torch.linalg.eigh(weight @ known.gram @ weight.T).eigenvectors
    return directions


def _rounded(known: _Centred, weight: Tensor, directions: Tensor | None = None) -> Solution:
    """Of numbers of bfloat16, so that the engine reads half of the memory and computes the same."""
    if directions is None:
        weight = weight.bfloat16().to(weight)
        return Solution(weight.float(), (known.centre - weight @ known.mean).float(), None)
    basis = (directions.T @ weight).bfloat16().to(weight)
    weight = directions.bfloat16().to(weight)
    return Solution(weight.float(), (known.centre - weight @ (basis @ known.mean)).float(), basis.float())


def solved(of_rows: Tensor, penalty: float, rank: int | None = None) -> Solution:
    """Weight and bias, float32, from moments.

    Args:
        rank: Of two factors that explain most of what the weight does (reduced-rank regression, Izenman 1975); None:
            one weight.
    """
    known = _centred(of_rows)
    weight = _weight(known, penalty)
    return _rounded(known, weight, None if rank is None else _directions(known, weight)[:, -rank:])


def ridge(
    x: Tensor, y: Tensor, held_out: tuple[Tensor, Tensor], penalties: Sequence[float] = _PENALTIES
) -> tuple[Solution, float]:
    """Least squares with a penalty on weights; targets are not negative, and neither are predictions.

    Of the smallest rank at which two factors explain about as much as the weight, if they are half as large, or less.

    Args:
        x: Inputs (rows, F).
        y: Targets (rows, C).
        held_out: Inputs and targets that choose the penalty, and then the rank.
        penalties: To choose from.

    Returns:
        The solution, and the share of variance that it explains on the held-out rows. Deterministic: sums are float64.
    """
    known = _centred(moments(x, y))

    def judged(found: Solution) -> float:
        return r_squared(found(held_out[0].float()).relu(), held_out[1])

    weights = [_weight(known, penalty) for penalty in penalties]
    solutions = [_rounded(known, weight) for weight in weights]
    explained = [judged(found) for found in solutions]
    best = max(range(len(penalties)), key=explained.__getitem__)
    most = weights[best].numel() // (2 * sum(weights[best].shape))
    if most < _RANKS:
        return solutions[best], explained[best]
    directions = _directions(known, weights[best])
    for rank in range(_RANKS, most + 1, _RANKS):
        found = _rounded(known, weights[best], directions[:, -rank:])
        if (reduced := judged(found)) >= _EXPLAINED * explained[best]:
            return found, reduced
    return solutions[best], explained[best]


def r_squared(predicted: Tensor, true: Tensor) -> float:
    """Share of the variance over rows, all columns together, that predictions (rows, C) explain; 0 where none is."""
    spread = (true - true.mean(0)).square().sum()
    return float(1 - (predicted - true).square().sum() / spread) if spread > 0 else 0.0
