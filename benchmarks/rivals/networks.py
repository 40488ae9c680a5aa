"""The networks of the rivals' papers that ``benchmarks.lab.networks`` has not: M-CifarNet and ResNet-20."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.lab.networks import build

__all__ = ["NETWORKS", "network"]

_CIFARNET = ((64, 1, 0), (64, 1, 1), (128, 2, 1), (128, 1, 1), (128, 1, 1), (192, 2, 1), (192, 1, 1), (192, 1, 1))


def _layer(inputs: int, outputs: int, stride: int, padding: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, padding, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def _m_cifarnet(classes: int, width: float) -> nn.Module:
    """FBS's: eight convolutions of 3x3, 174 million MACs at full width; without its dropout."""
    layers: list[nn.Module] = []
    inputs = 3
    for channels, stride, padding in _CIFARNET:
        outputs = int(channels * width)
        layers += _layer(inputs, outputs, stride, padding)
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(*_layer(inputs, outputs, stride, 1))
        self.second = nn.Sequential(*_layer(outputs, outputs, 1, 1)[:2])
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


def _resnet20(classes: int, width: float) -> nn.Module:
    """Three stages of three blocks; shortcuts that change the size are 1x1 convolutions."""
    widths = [int(channels * width) for channels in (16, 32, 64)]
    layers, inputs = _layer(3, widths[0], 1, 1), widths[0]
    for stage, outputs in enumerate(widths):
        for number in range(3):
            layers.append(_Block(inputs, outputs, 2 if stage and not number else 1))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


_OWN = {"m-cifarnet": _m_cifarnet, "resnet20": _resnet20}
NETWORKS = (*_OWN, "vgg16", "resnet18")


def network(name: str, classes: int, width: float, seed: int) -> nn.Module:
    """One of ``NETWORKS`` with random weights, channels_last."""
    if name not in _OWN:
        return build(name, classes, width, seed)
    torch.manual_seed(seed)
    return _OWN[name](classes, width).to(memory_format=torch.channels_last)
