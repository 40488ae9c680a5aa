"""The VGG16 of the main job."""

import torch
from timm.models.vgg import VGG
from torch import nn

__all__ = ["MIN_CHANNELS", "WIDTHS", "vgg16"]

WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
POOLED = (1, 3, 6, 9, 12)
MIN_CHANNELS = 8  # of every slimmed layer; with fewer, a layer is a bottleneck that fine-tuning cannot heal


def vgg16(widths: tuple[int, ...], classes: int) -> nn.Module:
    """VGG16-BN with global average pooling and one linear layer, as in the paper's section 4.1."""
    layout: list[int | str] = []
    for index, width in enumerate(widths):
        layout += [width, "M"] if index in POOLED else [width]
    # timm's two hidden layers of 4096 go: mlp_ratio keeps them from being made at full size first.
    model = VGG(cfg=layout, num_classes=classes, mlp_ratio=1 / 4096, norm_layer=nn.BatchNorm2d)
    model.pre_logits = nn.Identity()
    model.head.fc = nn.Linear(widths[-1], classes)
    return model.to(memory_format=torch.channels_last)
