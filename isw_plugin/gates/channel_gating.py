"""Channel gating: a sum over some input channels decides where the others are summed, too (Hua et al., NeurIPS 2019).

After the authors' code (dnn-gating, ``utils/cg_utils.py``):

    Y_p = conv(x_p, W_p)                                x_p: the first 1/p of the input channels
    d   = 1[sigmoid(a (norm(Y_p) - Delta)) > 1/2]       a = 2; norm: batch norm without scale and shift
    Y   = d * conv(x, W) + (1 - d) * Y_p                for every pixel and output channel
    loss = task + 1e-4 * sum (Delta - T)^2              Delta: one an output channel, starts at 0; a larger T drops more

The gradient of the step is that of the sigmoid (straight through). The layer's own batch norm and activation follow.

Left out: block-diagonal partial sums with shuffled channels, the gradient that is zero for negative inputs, and
distillation. ``margin`` is not the authors': it is added to Delta, so that a trained network can be calibrated.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from isw_plugin.errors import SettingError
from isw_plugin.gates.learned import Decision, LearnedGate
from isw_plugin.values import as_count, as_number

__all__ = ["ChannelGating"]

_SHARPNESS = 2.0  # a


@dataclass(frozen=True)
class ChannelGating(LearnedGate):
    """Sum the rest of the input channels only where the first part's sum is large (see ``isw_plugin.gates``).

    Nothing becomes zero, so only the layer itself saves: ``keep`` is True for channels of which some element is summed
    in full.

    Args:
        parts: p: 1/p of the input channels are always summed, >= 2.
        target: T, what the thresholds are drawn to.
        weight: Of the loss on thresholds, >= 0.
        margin: Added to all thresholds; 0 as published.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from isw_plugin import ChannelGating, InstanceWisePruner, count_macs
        >>> model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)).eval()
        >>> images = torch.rand(2, 4, 8, 8)
        >>> pruner = InstanceWisePruner(model, images, gate=ChannelGating(parts=4))
        >>> pruner.enable(margin=1e6)  # no sum is that large: a quarter of the convolution is left
        >>> macs = count_macs(model, images)
        >>> macs.per_layer["0"], macs.per_site["0"].tolist()
        (10368, [7776.0, 7776.0])
    """

    parts: int = 4
    target: float = 1.0
    weight: float = 1e-4
    margin: float = 0.0
    whole_channels: ClassVar = False
    reference: ClassVar = {"margin": 0.0}

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", as_count("parts", self.parts, "a number of parts", least=2))  # frozen
        for name in ("target", "weight", "margin"):
            value = as_number(name, getattr(self, name), "a finite number")
            if not math.isfinite(value) or (name == "weight" and value < 0):
                raise SettingError(f"{name}={value}: a finite number{', 0 or more' if name == 'weight' else ''}")
            object.__setattr__(self, name, value)

    def learn(self, layers: Sequence[nn.Module]) -> nn.Module:
        for layer in layers:
            if not isinstance(layer, nn.Conv2d) or layer.groups > 1 or layer.in_channels < 2:
                raise SettingError("channel gating splits the input channels of ungrouped nn.Conv2d layers")
        return nn.ModuleList(_Thresholds(layer.out_channels) for layer in layers if isinstance(layer, nn.Conv2d))

    def at_layer(
        self, learned: nn.Module, number: int, layer: nn.Module, x: Tensor, y: Tensor
    ) -> tuple[Tensor, tuple[Tensor, int]]:
        assert isinstance(layer, nn.Conv2d)
        assert isinstance(learned, nn.ModuleList)
        first = self._first(layer)
        part = x[:, :first]
        if x.stride(1) == 1:  # channels last: of this slice the gradient is, too
            part = x.movedim(1, -1)[..., :first].movedim(-1, 1)
        partial = layer._conv_forward(part, layer.weight[:, :first], layer.bias)
        passes = _step(learned[number](partial.float()) - self.margin)
        gate = passes.to(y.dtype)
        rest = (layer.in_channels - first) * layer.weight[0, 0].numel()
        return partial + gate * (y - partial), (passes.detach().mean((2, 3)), rest)

    def decide(self, learned: nn.Module, notes: Sequence[tuple[Tensor, int]], feature: Tensor, axis: int) -> Decision:
        assert isinstance(learned, nn.ModuleList)
        rest = sum(weight for _, weight in notes)
        scores = torch.stack([share * (weight / rest) for share, weight in notes]).sum(0)
        loss = torch.stack([(delta - self.target).square().sum() for delta in learned.parameters()]).sum()
        return Decision(scores > 0, scores, feature, self.weight * loss)

    def macs(self, learned: nn.Module, layers: Sequence[nn.Module], macs: Sequence[float]) -> float:
        return 0.0  # the first part is one of the layer's own

    def saved(self, layers: Sequence[nn.Module], macs: Sequence[float], scores: Tensor) -> Tensor:
        convs = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
        rest = sum(mac * (1 - self._first(conv) / conv.in_channels) for conv, mac in zip(convs, macs, strict=True))
        return (1 - scores.double().mean(1)) * rest

    def _first(self, layer: nn.Conv2d) -> int:
        return -(-layer.in_channels // self.parts)


class _Thresholds(nn.Module):
    """a (norm(Y_p) - Delta) / a of one layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.delta = nn.Parameter(torch.zeros(channels))

    def forward(self, partial: Tensor) -> Tensor:
        above: Tensor = self.norm(partial) - self.delta.view(-1, 1, 1)
        return above


def _step(above: Tensor) -> Tensor:
    """1 where above 0, else 0; the gradient is that of sigmoid(a * above)."""
    smooth = (_SHARPNESS * above).sigmoid()
    return (above > 0).to(above.dtype) + (smooth - smooth.detach())
