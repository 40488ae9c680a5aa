"""The paper's networks for 32x32 images, at any share of their width."""

from collections.abc import Callable
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vgg import VGG
from torch import nn

__all__ = ["MIN_CHANNELS", "WIDTHS", "build", "stored_vgg16", "vgg16", "vgg_widths"]

WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
POOLED = (1, 3, 6, 9, 12)
MIN_CHANNELS = 8  # of every slimmed layer; with fewer, a layer is a bottleneck that fine-tuning cannot heal


def vgg16(widths: tuple[int, ...], classes: int) -> nn.Module:
    """VGG16-BN with global average pooling and one linear layer, as in the paper's section 4.1; channels_last."""
    layout: list[int | str] = []
    for index, width in enumerate(widths):
        layout += [width, "M"] if index in POOLED else [width]
    # timm's two hidden layers of 4096 go: mlp_ratio keeps them from being made at full size first.
    model = VGG(cfg=layout, num_classes=classes, mlp_ratio=1 / 4096, norm_layer=nn.BatchNorm2d)
    model.pre_logits = nn.Identity()
    model.head.fc = nn.Linear(widths[-1], classes)
    return model.to(memory_format=torch.channels_last)


def stored_vgg16(path: Path) -> nn.Module:
    """A trained ``vgg16`` of any widths, from the file of its weights."""
    state = load_file(path)
    layers = {int(name.split(".")[1]): weight for name, weight in state.items() if weight.dim() == 4}
    widths = tuple(len(layers[index]) for index in sorted(layers))  # the file sorts names as text
    model = vgg16(widths, len(state["head.fc.weight"]))
    model.load_state_dict(state)
    return model.eval()


def vgg_widths(width: float) -> tuple[int, ...]:
    """Of a VGG16 with this share of the channels."""
    return tuple(max(MIN_CHANNELS, int(channels * width)) for channels in WIDTHS)


def _resnet18(classes: int, width: float, *, pooled: bool) -> nn.Module:
    channels = tuple(int(count * width) for count in (64, 128, 256, 512))
    model = ResNet(BasicBlock, (2, 2, 2, 2), num_classes=classes, channels=channels)
    # timm's stem has 64 channels at any width.
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    if not pooled:
        model.maxpool = nn.Identity()
    return model


def _imagenet(classes: int, width: float) -> nn.Module:
    return timm.create_model("mobilenetv2_100" if width == 1 else "mobilenetv2_035", num_classes=classes)


def _mobilenetv2(classes: int, width: float) -> nn.Module:
    model = _imagenet(classes, width)
    model.conv_stem.stride = (1, 1)
    model.blocks[1][0].conv_dw.stride = (1, 1)
    return model


_BUILD: dict[str, Callable[[int, float], nn.Module]] = {
    "vgg16": lambda classes, width: vgg16(vgg_widths(width), classes),
    "resnet18": lambda classes, width: _resnet18(classes, width, pooled=False),
    "resnet18-pooled": lambda classes, width: _resnet18(classes, width, pooled=True),
    "mobilenetv2": _mobilenetv2,
    "mobilenetv2-imagenet": _imagenet,
}


def build(name: str, classes: int, width: float, seed: int) -> nn.Module:
    """A network by name with random weights, channels_last.

    vgg16: global average pooling and one linear layer. resnet18: 3x3 stem of stride 1 without max-pool;
    resnet18-pooled: with it. mobilenetv2: stem and second stage at stride 1; narrower than 1, width 0.35.
    mobilenetv2-imagenet: all strides as published.
    """
    torch.manual_seed(seed)
    return _BUILD[name](classes, width).to(memory_format=torch.channels_last)
