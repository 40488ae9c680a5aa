"""LCCL: a low-cost branch on the same input says where the layer's map is zero (Dong et al., CVPR 2017).

    V = relu(norm(conv(x))) * relu(norm(branch(x)))

The branch is a convolution of 1x1 with as many outputs ("1x1"), or one filter of the layer's own size whose map all
outputs share ("shared"). Where the second factor is 0, the first need not be computed. Both are trained with the task's
loss alone.

The paper's full text was not at hand: this follows its abstract, its Figure 1 and later descriptions. The branch's
norm starts with scale 1 and shift 0, so about half of a trained network's map is zero at first: train it with gates on,
best from random weights, as its authors do. Leave out (``exclude``) maps that are added to on and on, as a ResNet's
shortcuts: multiplied at every block, they overflow within a few steps. ``margin`` is not the paper's: it is subtracted
from the branch where that decides, so that a trained network can be calibrated; what is left is not shrunk by it.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isw_plugin.errors import SettingError, UnsupportedError
from isw_plugin.gates.learned import Decision, LearnedGate
from isw_plugin.values import as_number

__all__ = ["LCCL"]


@dataclass(frozen=True)
class LCCL(LearnedGate):
    """Multiply the map by that of a cheap branch, whose zeros need not be computed (see ``isw_plugin.gates.lccl``).

    What is dropped is single elements: ``keep`` is True for channels of which some element is not dropped.

    Args:
        branch: "1x1" or "shared".
        margin: What the branch must exceed; 0 as published, >= 0.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from isw_plugin import LCCL, InstanceWisePruner, count_macs
        >>> model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)).eval()
        >>> images = torch.rand(2, 4, 8, 8)
        >>> pruner = InstanceWisePruner(model, images, gate=LCCL("1x1"))
        >>> pruner.enable(margin=1e6)  # no branch is that large: a ninth of the convolution is left, the branch
        >>> macs = count_macs(model, images)
        >>> macs.per_layer["0"], macs.per_site["0"].tolist()
        (10368, [9216.0, 9216.0])
    """

    branch: str = "1x1"
    margin: float = 0.0
    fixed: ClassVar = ("branch",)
    whole_channels: ClassVar = False
    same_size: ClassVar = True
    reference: ClassVar = {"margin": 0.0}

    def __post_init__(self) -> None:
        if self.branch not in ("1x1", "shared"):
            raise SettingError(f"branch={self.branch!r}: one of '1x1', 'shared'")
        margin = as_number("margin", self.margin, "what the branch must exceed is a finite number, 0 or more")
        if not (margin >= 0 and math.isfinite(margin)):
            raise SettingError(f"margin={margin}: what the branch must exceed is a finite number, 0 or more")
        object.__setattr__(self, "margin", margin)  # frozen

    def learn(self, layers: Sequence[nn.Module]) -> nn.Module:
        if not all(isinstance(layer, nn.Conv2d) and layer.groups == 1 for layer in layers):
            raise SettingError("LCCL has branches beside ungrouped nn.Conv2d layers")
        return nn.ModuleList(
            _Branch(layer, shared=self.branch == "shared") for layer in layers if isinstance(layer, nn.Conv2d)
        )

    def at_layer(
        self, learned: nn.Module, number: int, layer: nn.Module, x: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(layer, nn.Conv2d)
        assert isinstance(learned, nn.ModuleList)
        return y, learned[number](layer, x, y)

    def decide(self, learned: nn.Module, notes: Sequence[Tensor], feature: Tensor, axis: int) -> Decision:
        if feature.shape[-2:] != notes[0].shape[-2:]:
            raise UnsupportedError(
                f"a branch makes {tuple(notes[0].shape)} and the map is {tuple(feature.shape)}: LCCL needs a map of "
                "the size that its layer makes; exclude the site"
            )
        branch = functools.reduce(torch.add, notes).relu()
        passes = branch > self.margin
        scores = passes.float().mean((2, 3)).expand(feature.shape[:2])
        return Decision(scores > 0, scores, feature * (branch * passes).to(feature.dtype))

    def macs(self, learned: nn.Module, layers: Sequence[nn.Module], macs: Sequence[float]) -> float:
        assert isinstance(learned, nn.ModuleList)
        return sum(mac * _size(own) / _size(layer) for mac, own, layer in zip(macs, learned, layers, strict=True))

    def saved(self, layers: Sequence[nn.Module], macs: Sequence[float], scores: Tensor) -> Tensor:
        return (1 - scores.double().mean(1)) * sum(macs)


class _Branch(nn.Module):
    """norm(branch(x)) beside one convolution."""

    def __init__(self, layer: nn.Conv2d, *, shared: bool) -> None:
        super().__init__()
        outputs, window = (1, layer.kernel_size) if shared else (layer.out_channels, (1, 1))
        self.weight = nn.Parameter(torch.empty(outputs, layer.in_channels, *window))
        nn.init.kaiming_normal_(self.weight)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, layer: nn.Conv2d, x: Tensor, y: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if weight.shape[2:] == layer.weight.shape[2:]:
            made = layer._conv_forward(x, weight, None)
        else:
            made = F.conv2d(F.pad(x, _centred(layer, x, y)), weight, None, layer.stride)
        normed: Tensor = self.norm(made.float())
        return normed


def _centred(layer: nn.Conv2d, x: Tensor, y: Tensor) -> list[int]:
    """Padding (below 0: cropping) with which a 1x1 filter lies under the centre of the layer's at every position."""
    pads: list[int] = []
    for axis in (1, 0):  # the last axis first, as F.pad has them
        start = layer.dilation[axis] * (layer.kernel_size[axis] // 2) - _padding(layer, axis)
        last = start + (y.shape[2 + axis] - 1) * layer.stride[axis] + 1
        pads += [-start, last - x.shape[2 + axis]]
    return pads


def _padding(layer: nn.Conv2d, axis: int) -> int:
    """Of the layer's input, before its first row or column."""
    if layer.padding == "same":
        return layer.dilation[axis] * (layer.kernel_size[axis] - 1) // 2
    return 0 if isinstance(layer.padding, str) else layer.padding[axis]


def _size(module: nn.Module) -> int:
    weight: Tensor = module.weight  # type: ignore[assignment]  # of a branch or a convolution
    return weight.numel()
