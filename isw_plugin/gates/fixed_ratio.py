"""The paper's baselines (section 4.2, Table 3): the same share of channels dropped for every instance."""

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from isw_plugin.errors import SettingError
from isw_plugin.values import as_count, as_number

__all__ = ["MinNorm", "RandomGate"]

Integer = TypeVar("Integer", Tensor, int)


@dataclass(frozen=True)
class MinNorm:
    """Drop the floor(ratio * C) channels of smallest norm.

    Args:
        ratio: Share of channels to drop, in [0, 1).

    Example:
        >>> import torch
        >>> from isw_plugin import MinNorm
        >>> norms = torch.tensor([[0.1, 0.2, 3.0, 4.7]])
        >>> feature = norms.view(1, 4, 1, 1)
        >>> MinNorm(ratio=0.5)(feature, norms)
        tensor([[False, False,  True,  True]])
    """

    ratio: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", _checked_ratio(self.ratio))  # frozen

    @property
    def keeps_all(self) -> bool:
        return self.ratio == 0

    def __call__(self, feature: Tensor, norms: Tensor) -> Tensor:
        return _drop_smallest(norms, self.ratio)


@dataclass(frozen=True)
class RandomGate:
    """Drop floor(ratio * C) channels drawn uniformly for every instance.

    The draw is a hash of the seed and the instance's mean norm: an instance loses the same channels
    alone and in any batch, on any device, without a generator's state. Where two orders of summation
    round the mean norm to different 15-bit values (about 1 in 100), so does the draw differ.

    Args:
        ratio: Share of channels to drop, in [0, 1).
        seed: Chooses another draw.

    Example:
        >>> import torch
        >>> from isw_plugin import RandomGate
        >>> norms = torch.rand(2, 8)
        >>> RandomGate(ratio=0.25, seed=1)(norms.view(2, 8, 1, 1), norms).sum(1)
        tensor([6, 6])
    """

    ratio: float
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", _checked_ratio(self.ratio))  # frozen
        object.__setattr__(self, "seed", as_count("seed", self.seed, "the number of a draw", least=None))

    @property
    def keeps_all(self) -> bool:
        return self.ratio == 0

    def __call__(self, feature: Tensor, norms: Tensor) -> Tensor:
        # Coarser than float rounding, so that the order of a sum does not change the draw.
        instance = norms.mean(1, keepdim=True).float().view(torch.int32).to(torch.int64) >> 9
        channel = torch.arange(norms.shape[1], device=norms.device)
        return _drop_smallest(_hash(_hash(instance + _hash(channel + _hash(self.seed)))), self.ratio)


def _checked_ratio(ratio: float) -> float:
    ratio = as_number("ratio", ratio, "the share of channels to drop is a number in [0, 1)")
    if not 0 <= ratio < 1:
        raise SettingError(f"ratio={ratio}: the share of channels to drop lies in [0, 1)")
    return ratio


def _drop_smallest(scores: Tensor, ratio: float) -> Tensor:
    """Keep mask without the floor(ratio * C) smallest scores of each row; ties keep the later channel."""
    channels = scores.shape[1]
    dropped = math.floor(ratio * channels)
    order = scores.argsort(dim=1, stable=True)
    return torch.ones_like(scores, dtype=torch.bool).scatter(1, order[:, :dropped], False)


def _hash(value: Integer) -> Integer:
    """A 32-bit integer mixer (Wellons' lowbias32) on int or int64; only the low 32 bits count."""
    value = value & 0xFFFFFFFF
    value = (value ^ (value >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    value = (value ^ (value >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return value ^ (value >> 16)
