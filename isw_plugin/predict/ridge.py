"""Ridge regression in closed form, the penalty chosen on rows that were not fitted."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Fit", "r_squared", "ridge"]

_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # a row, for inputs of unit deviation


@dataclass(frozen=True)
class Fit:
    """``y = weight x + bias``, and the share of variance that it explains on the held-out rows."""

    weight: Tensor  # (targets, inputs)
    bias: Tensor  # (targets,)
    r_squared: float


def ridge(x: Tensor, y: Tensor, held_out: tuple[Tensor, Tensor], penalties: Sequence[float] = _PENALTIES) -> Fit:
    """Least squares with a penalty on weights; targets are not negative, and neither are predictions.

    Args:
        x: Inputs (rows, F). Those that never vary get weight 0.
        y: Targets (rows, C).
        held_out: Inputs and targets that choose the penalty.
        penalties: To choose from.

    Returns:
        Float32. Deterministic: sums and the solution are float64.
    """
    x, y = x.double(), y.double()
    mean, deviation = x.mean(0), x.std(0, correction=0)
    scale = torch.where(deviation > 1e-6 * deviation.max(), 1 / deviation, 0.0)
    scaled, centre = (x - mean) * scale, y.mean(0)
    gram, moments = scaled.T @ scaled, scaled.T @ (y - centre)
    diagonal = torch.eye(len(gram), dtype=gram.dtype)
    best: Fit | None = None
    for penalty in penalties:
        solved = torch.cholesky_solve(moments, torch.linalg.cholesky(gram + penalty * len(x) * diagonal))
        weight = (solved * scale[:, None]).T
        bias = centre - weight @ mean
        found = Fit(weight.float(), bias.float(), 0.0)
        score = r_squared((held_out[0].float() @ found.weight.T + found.bias).relu(), held_out[1])
        if best is None or score > best.r_squared:
            best = Fit(found.weight, found.bias, score)
    assert best is not None
    return best


def r_squared(predicted: Tensor, true: Tensor) -> float:
    """Share of the variance over rows, all columns together, that predictions (rows, C) explain; 0 where none is."""
    spread = (true - true.mean(0)).square().sum()
    return float(1 - (predicted - true).square().sum() / spread) if spread > 0 else 0.0
