"""Ridge regression in closed form, from sums of products; the penalty is chosen on rows that were not fitted."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Fit", "moments", "r_squared", "ridge", "solved"]

_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # a row, for inputs of unit deviation
_VARIES = 1e-6  # deviations below this share of the largest, or of their own mean, are rounding


@dataclass(frozen=True)
class Fit:
    """``y = weight x + bias``, and the share of variance that it explains on the held-out rows."""

    weight: Tensor  # (targets, inputs)
    bias: Tensor  # (targets,)
    r_squared: float


def moments(x: Tensor, y: Tensor) -> Tensor:
    """All that least squares need of inputs (rows, F) and targets (rows, C): sums over rows of products.

    Returns:
        Of (1, x) with (1, x, y), float64, (1 + F, 1 + F + C). Those of more rows are their sum.
    """
    known = torch.cat([x.new_ones(len(x), 1), x], 1).double()
    return known.T @ torch.cat([known, y.double()], 1)


def solved(of_rows: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weight (C, F) and bias (C,), float32, from moments; inputs that never vary get weight 0.

    A weight is a number of bfloat16, so that the engine reads half of the memory and computes the same.
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
    weight = (solution * scale[:, None]).T.bfloat16().to(solution)
    return weight.float(), (centre - weight @ mean).float()


def ridge(x: Tensor, y: Tensor, held_out: tuple[Tensor, Tensor], penalties: Sequence[float] = _PENALTIES) -> Fit:
    """Least squares with a penalty on weights; targets are not negative, and neither are predictions.

    Args:
        x: Inputs (rows, F).
        y: Targets (rows, C).
        held_out: Inputs and targets that choose the penalty.
        penalties: To choose from.

    Returns:
        Float32. Deterministic: sums and the solution are float64.
    """
    of_rows = moments(x, y)
    best: Fit | None = None
    for penalty in penalties:
        weight, bias = solved(of_rows, penalty)
        score = r_squared((held_out[0].float() @ weight.T + bias).relu(), held_out[1])
        if best is None or score > best.r_squared:
            best = Fit(weight, bias, score)
    assert best is not None
    return best


def r_squared(predicted: Tensor, true: Tensor) -> float:
    """Share of the variance over rows, all columns together, that predictions (rows, C) explain; 0 where none is."""
    spread = (true - true.mean(0)).square().sum()
    return float(1 - (predicted - true).square().sum() / spread) if spread > 0 else 0.0
