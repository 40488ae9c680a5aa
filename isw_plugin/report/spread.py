"""How a number spreads over images."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Spread", "keep_ratio", "spread"]

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Spread:
    """Mean, quartiles, and the range without the lowest and the highest 5 % of the images."""

    count: int
    mean: float
    low: float
    first: float
    median: float
    third: float
    high: float


def spread(values: Tensor) -> Spread:
    """Of one number an image, (N,) with N >= 1."""
    values = values.double()
    marks = torch.quantile(values, torch.tensor(_QUANTILES, dtype=torch.float64)).tolist()
    return Spread(len(values), values.mean().item(), *marks)


def keep_ratio(keep: Tensor) -> Tensor:
    """Share of channels that each image keeps: bool (N, C) -> (N,) float64."""
    return keep.double().mean(1)
