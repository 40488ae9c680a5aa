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


def solved(of_rows: Tensor, penalty: float, rank: int | None = None) -> Solution:
    """Weight and bias, float32, from moments; inputs that never vary get weight 0.

    Factors are numbers of bfloat16, so that the engine reads half of the memory and computes the same.

    Args:
        rank: Of the product of two factors that explains most of what the weight does (reduced-rank regression,
            Izenman 1975); None: one weight.
    """
    size = len(of_rows)
    means = of_rows[0] / of_rows[0, 0]
    mean, centre = means[1:size], means[size:]
    products = of_rows[1:, 1:] / of_rows[0, 0] - torch.outer(mean, means[1:])
    deviation = products.diagonal().clamp_min(0).sqrt()
    varies = (deviation > _VARIES * deviation.max()) & (deviation > _VARIES * mean.abs())
    scale = torch.where(varies, 1 / deviation, 0.0)
    gram = products[:, : size - 1] * torch.outer(scale, scale)
    gram.diagonal().add_(penalty)
    solution = torch.cholesky_solve(products[:, size - 1 :] * scale[:, None], torch.linalg.cholesky(gram))
    weight = (solution * scale[:, None]).T
    if rank is None:
        weight = weight.bfloat16().to(weight)
        return Solution(weight.float(), (centre - weight @ mean).float(), None)
    explained = weight @ products[:, : size - 1] @ weight.T
    directions = torch.linalg.eigh(explained).eigenvectors[:, -rank:]
    basis, weight = ((directions.T @ weight).bfloat16().to(weight), directions.bfloat16().to(weight))
    return Solution(weight.float(), (centre - weight @ (basis @ mean)).float(), basis.float())


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
    of_rows = moments(x, y)

    def judged(penalty: float, rank: int | None = None) -> tuple[float, float, Solution]:
        found = solved(of_rows, penalty, rank)
        return r_squared(found(held_out[0].float()).relu(), held_out[1]), penalty, found

    score, penalty, whole = max(map(judged, penalties), key=lambda found: found[0])
    for rank in range(_RANKS, whole.weight.numel() // (2 * sum(whole.weight.shape)) + 1, _RANKS):
        reduced, _, found = judged(penalty, rank)
        if reduced >= _EXPLAINED * score:
            return found, reduced
    return whole, score


def r_squared(predicted: Tensor, true: Tensor) -> float:
    """Share of the variance over rows, all columns together, that predictions (rows, C) explain; 0 where none is."""
    spread = (true - true.mean(0)).square().sum()
    return float(1 - (predicted - true).square().sum() / spread) if spread > 0 else 0.0
