"""VGG16 and ResNet-18 as convolutions with folded batch norm and random weights, run densely, masked or gated."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isw_plugin.engine import Statistics, conv2d, keep_mask, max_pool2d, pack_weight, sum_squares
from isw_plugin.engine.reference import ACTS

VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0 pools
RESNET18 = (64, 128, 256, 512)


class Feature(NamedTuple):
    """A map and what decides its channels; None keeps all."""

    x: Tensor
    gating: Statistics | None


class Layer(nn.Module):
    """A convolution whose output drops channels with a norm under beta times the mean."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, act: str = "relu") -> None:
        super().__init__()
        weight = torch.randn(c_out, c_in, kernel, kernel) * (2 / (c_in * kernel * kernel)) ** 0.5
        self.register_buffer("weight", weight * (0.3 + 1.4 * torch.rand(c_out, 1, 1, 1)))  # as folded norms spread it
        self.register_buffer("bias", 0.1 * torch.randn(c_out))
        self.stride, self.padding, self.act, self.beta = stride, kernel // 2, act, 0.0
        self.dense = False  # what Chosen runs

    def pack(self) -> None:
        """To be called where the weights have come to lie."""
        self.register_buffer("packed", pack_weight(self.weight))


def convolved(x: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
    """The layer in PyTorch."""
    y = F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)
    return ACTS[layer.act](y if residual is None else y + residual)


def masked(feature: Feature) -> Tensor:
    if feature.gating is None:
        return feature.x
    keep = keep_mask(feature.gating.squares, feature.gating.alpha, feature.gating.beta)
    return torch.where(keep[:, :, None, None], feature.x, 0.0)


class Dense:
    """Every channel, in PyTorch."""

    def conv(self, feature: Feature, layer: Layer, residual: Feature | None = None) -> Feature:
        return Feature(convolved(feature.x, layer, None if residual is None else residual.x), None)

    def pool(self, feature: Feature, kernel: int = 2, padding: int = 0) -> Feature:
        return Feature(F.max_pool2d(feature.x, kernel, 2, padding), None)


class Masked:
    """Decisions as in the engine, zeros instead of savings: what a gated network computes, and its dense path."""

    def conv(self, feature: Feature, layer: Layer, residual: Feature | None = None) -> Feature:
        y = convolved(masked(feature), layer, None if residual is None else masked(residual))
        return Feature(y, Statistics(sum_squares(y), 0.0, layer.beta) if layer.act != "none" else None)

    def pool(self, feature: Feature, kernel: int = 2, padding: int = 0) -> Feature:
        return Feature(max_pool2d(feature.x, kernel, stride=2, padding=padding), feature.gating)


class Gated(Masked):
    """The engine's operators."""

    def conv(self, feature: Feature, layer: Layer, residual: Feature | None = None) -> Feature:
        x, gating = feature
        options = {} if residual is None else {"residual": residual.x, "residual_gating": residual.gating}
        y, squares = conv2d(
            x,
            layer.packed,
            layer.bias,
            stride=layer.stride,
            padding=layer.padding,
            act=layer.act,
            gating=gating,
            **options,
        )
        return Feature(y, Statistics(squares, 0.0, layer.beta) if layer.act != "none" else None)


class Chosen(Masked):
    """The engine's operators but for layers that are faster masked."""

    def conv(self, feature: Feature, layer: Layer, residual: Feature | None = None) -> Feature:
        return (Masked if layer.dense else Gated).conv(self, feature, layer, residual)


class Calibrated(Masked):
    """Sets every layer's beta so that about this share of its channels survives, and adds the MACs up."""

    def __init__(self, keep: float) -> None:
        self.keep, self.macs, self.kept_macs = keep, 0.0, 0.0

    def conv(self, feature: Feature, layer: Layer, residual: Feature | None = None) -> Feature:
        y = convolved(masked(feature), layer, None if residual is None else masked(residual))
        macs = y[0].numel() * layer.weight[0].numel()
        share = (
            1.0
            if feature.gating is None
            else keep_mask(feature.gating.squares, 0.0, feature.gating.beta).float().mean()
        )
        self.macs, self.kept_macs = self.macs + macs, self.kept_macs + macs * float(share)
        squares = sum_squares(y)
        norms = squares.sum(1).sqrt()
        layer.beta = (
            float((norms / norms.mean(1, keepdim=True)).flatten().quantile(1 - self.keep)) if self.keep < 1 else 0.0
        )
        return Feature(y, Statistics(squares, 0.0, layer.beta) if layer.act != "none" else None)


class Network(nn.Module):
    """Layers in the order in which `run` takes them, then the mean over pixels and a classifier.

    Args:
        layers: Its convolutions.
        width: Channels of the last map.
        run: (way, image, layers) -> the last map.
    """

    def __init__(self, layers: Sequence[Layer], width: int, run: Callable[..., Feature]) -> None:
        super().__init__()
        self.layers, self.classifier, self.run = nn.ModuleList(layers), nn.Linear(width, 10), run

    def forward(self, x: Tensor, way: Dense | Masked) -> Tensor:
        """Logits (N, 10) of images (N, 3, H, W)."""
        last = self.run(way, Feature(x, None), list(self.layers))
        return self.classifier(masked(last).mean((2, 3)))

    def placed(self, device: torch.device, dtype: torch.dtype) -> "Network":
        """This network on a device, in channels_last, its weights packed."""
        self.to(device=device, dtype=dtype, memory_format=torch.channels_last).requires_grad_(False)
        for layer in self.layers:
            layer.pack()
        return self


def vgg16(scale: float = 1.0) -> Network:
    """VGG16's convolutions; scale is that of its widths."""
    widths = [int(width * scale) for width in VGG16]
    convolutions = [width for width in widths if width]
    layers = [Layer(c_in, c_out, 3) for c_in, c_out in zip([3, *convolutions], convolutions, strict=False)]

    def run(way: Dense | Masked, feature: Feature, layers: list[Layer]) -> Feature:
        following = iter(layers)
        for width in widths:
            feature = way.conv(feature, next(following)) if width else way.pool(feature)
        return feature

    return Network(layers, convolutions[-1], run)


def resnet18(side: int, scale: float = 1.0) -> Network:
    """ResNet-18 for images of this side: up to 64 px with the small stem and without its pooling."""
    widths, small = [int(width * scale) for width in RESNET18], side <= 64
    layers, c_in = [Layer(3, widths[0], 3 if small else 7, 1 if small else 2)], widths[0]
    for stage, width in enumerate(widths):
        for stride in (1 if stage == 0 else 2, 1):
            layers += [Layer(c_in, width, 3, stride), Layer(width, width, 3)]
            layers += [Layer(c_in, width, 1, stride, "none")] if stride == 2 else []
            c_in = width

    def run(way: Dense | Masked, feature: Feature, layers: list[Layer]) -> Feature:
        following = iter(layers)
        feature = way.conv(feature, next(following))
        feature = feature if small else way.pool(feature, 3, 1)
        for stage in range(len(widths)):
            for stride in (1 if stage == 0 else 2, 1):
                first, second = next(following), next(following)
                shortcut = way.conv(feature, next(following)) if stride == 2 else feature
                feature = way.conv(way.conv(feature, first), second, shortcut)
        return feature

    return Network(layers, widths[-1], run)
