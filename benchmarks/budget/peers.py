"""Networks of other people for CIFAR-10, and those of benchmarks.paper: FILE:FUNCTION of fast_within_budget.py.

Each makes the architecture of weights in safetensors that are given beside it. ResNets of He et al. (2016), 4.2.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.lab.networks import build, stored_vgg16

__all__ = ["mobilenetv2", "pruned_resnet56", "resnet18_pooled", "resnet20", "resnet56", "slimmed_vgg16", "vgg16"]

SLIMMED = Path(__file__).parents[1] / "paper" / "results" / "slimmed-vgg16-1e-07.safetensors"

# What torch-pruning left of ResNet-56: a stage's channels, and those within each of its blocks.
PRUNED = (
    (12, (9, 5, 7, 9, 6, 12, 4, 11, 7)),
    (30, (27, 10, 24, 27, 25, 8, 11, 7, 7)),
    (25, (61, 55, 51, 47, 57, 37, 36, 42, 53)),
)


class _PadShortcut(nn.Module):
    """Every second pixel, and zeros on both sides of the channels."""

    def __init__(self, more: int) -> None:
        super().__init__()
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more // 2))


class _Block(nn.Module):
    def __init__(self, before: int, hidden: int, after: int, stride: int, shortcut: nn.Module, name: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, hidden, 3, stride, 1, bias=False)
        self.bn1, self.act1 = nn.BatchNorm2d(hidden), nn.ReLU()
        self.conv2 = nn.Conv2d(hidden, after, 3, 1, 1, bias=False)
        self.bn2, self.act2 = nn.BatchNorm2d(after), nn.ReLU()
        self.name = name
        setattr(self, name, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        added: Tensor = self.act2(out + getattr(self, self.name)(x))
        return added


class _ResNet(nn.Module):
    """Three stages.

    Args:
        stem: Channels of the first convolution.
        stages: For each, its channels and those that each of its blocks has within.
        padded: Shortcuts without parameters; else 1x1 convolutions with batch norm.
    """

    def __init__(self, stem: int, stages: Sequence[tuple[int, Sequence[int]]], head: str, padded: bool) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(3, stem, 3, 1, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU()
        before = stem
        for number, (after, within) in enumerate(stages, 1):
            blocks = []
            for index, hidden in enumerate(within):
                stride = 2 if number > 1 and index == 0 else 1
                shortcut = _shortcut(before, after, padded) if stride == 2 else nn.Identity()
                blocks.append(_Block(before, hidden, after, stride, shortcut, "shortcut" if padded else "downsample"))
                before = after
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), head
        self.add_module(head, nn.Linear(before, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        out: Tensor = getattr(self, self.head)(self.pool(x).flatten(1))
        return out


def _shortcut(before: int, after: int, padded: bool) -> nn.Module:
    if padded:
        return _PadShortcut(after - before)
    return nn.Sequential(nn.Conv2d(before, after, 1, 2, bias=False), nn.BatchNorm2d(after))


def _akamaster(blocks: int) -> nn.Module:
    return _ResNet(16, [(width, [width] * blocks) for width in (16, 32, 64)], "linear", padded=True)


def resnet20() -> nn.Module:
    """For akamaster-resnet20.safetensors."""
    return _akamaster(3)


def resnet56() -> nn.Module:
    """For akamaster-resnet56.safetensors."""
    return _akamaster(9)


def vgg16() -> nn.Module:
    """For trained weights of benchmarks.paper, as the two below."""
    return build("vgg16", 10, 1.0, 0)


def mobilenetv2() -> nn.Module:
    return build("mobilenetv2", 10, 1.0, 0)


def resnet18_pooled() -> nn.Module:
    return build("resnet18-pooled", 10, 1.0, 0)


def slimmed_vgg16() -> nn.Module:
    """With the widths that are stored, for benchmarks/paper/results/slimmed-vgg16-1e-07.safetensors."""
    return stored_vgg16(SLIMMED)


def pruned_resnet56() -> nn.Module:
    """For torch-pruning-resnet56-pruned.safetensors."""
    return _ResNet(12, PRUNED, "fc", padded=False)
