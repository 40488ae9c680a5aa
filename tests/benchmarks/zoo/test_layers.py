"""Every kind of layer and block that timm's models are built of passes the zoo's steps in a small network."""

from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import torchvision
from timm import layers
from timm.models.byobnet import MobileOneBlock, RepVggBlock
from timm.models.convnext import ConvNeXt
from timm.models.densenet import DenseNet
from timm.models.inception_v3 import InceptionA
from timm.models.metaformer import MetaFormer
from timm.models.mlp_mixer import MlpMixer
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.zoo.checks import check
from benchmarks.zoo.graphs import check_engine
from benchmarks.zoo.models import randomise
from benchmarks.zoo.sites import unaccounted
from isw_plugin.sites import find_sites

Make = Callable[[], nn.Module]


def around(*middle: nn.Module, channels: int = 16) -> nn.Sequential:
    """Between "0", of 8 channels, and "3", which reads what the middle gives."""
    before = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
    after = nn.Conv2d(channels, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    return nn.Sequential(*before, nn.Sequential(*middle) if len(middle) > 1 else middle[0], *after)


def normed(norm: nn.Module) -> nn.Module:
    return around(nn.Conv2d(8, 16, 3, padding=1), norm)


class Routed(nn.Module):
    """Every image has a kernel of its own, mixed from four, as in CondConv's EfficientNets."""

    def __init__(self) -> None:
        super().__init__()
        self.route, self.conv = nn.Linear(8, 4), layers.CondConv2d(8, 16, 3, num_experts=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.route(x.mean((2, 3))).sigmoid())


vit = partial(VisionTransformer, img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=5)
mixer = partial(MlpMixer, img_size=16, patch_size=4, embed_dim=16, num_blocks=1, num_classes=5)
swin = partial(SwinTransformer, img_size=16, patch_size=2, window_size=4, embed_dim=16, num_heads=(1, 2), num_classes=5)
convnext = partial(ConvNeXt, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), patch_size=2, ls_init_value=0.5, num_classes=5)
poolformer = partial(MetaFormer, depths=(1, 1), dims=(8, 16), norm_layers=layers.GroupNorm1, num_classes=5)
densenet = partial(DenseNet, growth_rate=4, block_config=(2, 2), bn_size=2, num_classes=5)

DENSE = [
    f"denseblock{block}.denselayer{layer}.{part}" for block in (1, 2) for layer in (1, 2) for part in ("norm1", "conv1")
]
INCEPTION = ("1x1", "5x5_1", "5x5_2", "3x3dbl_1", "3x3dbl_2", "3x3dbl_3", "_pool")

KINDS: dict[str, tuple[Make, int, tuple[str, ...]]] = {
    # what: (network, side of an image, names of the sites)
    "Conv2dSame": (lambda: around(layers.Conv2dSame(8, 16, 3, stride=2)), 9, ("0", "2", "3")),
    "StdConv2d": (lambda: around(layers.StdConv2d(8, 16, 3)), 8, ("0", "2", "3")),
    "StdConv2dSame": (lambda: around(layers.StdConv2dSame(8, 16, 3, stride=2)), 9, ("0", "2", "3")),
    "ScaledStdConv2d": (lambda: around(layers.ScaledStdConv2d(8, 16, 3)), 8, ("0", "2", "3")),
    "ScaledStdConv2dSame": (lambda: around(layers.ScaledStdConv2dSame(8, 16, 3, stride=2)), 9, ("0", "2", "3")),
    "grouped": (lambda: around(nn.Conv2d(8, 16, 3, groups=4)), 8, ("0", "2", "3")),
    "depthwise": (lambda: around(nn.Conv2d(8, 8, 3, groups=8), channels=8), 8, ("0", "2", "3")),
    "MixedConv2d": (lambda: around(layers.MixedConv2d(8, 16, [3, 5])), 8, ("0", "2.0", "2.1", "3")),
    "CondConv2d": (lambda: around(Routed()), 8, ("0", "3")),
    "BatchNormAct2d": (lambda: normed(layers.BatchNormAct2d(16)), 8, ("0", "2.0", "3")),
    "GroupNormAct": (lambda: normed(layers.GroupNormAct(16, 4)), 8, ("0", "2.0", "3")),
    "LayerNormAct2d": (lambda: normed(layers.LayerNormAct2d(16)), 8, ("0", "2.0", "3")),
    "LayerNorm2d": (lambda: normed(layers.LayerNorm2d(16)), 8, ("0", "3")),
    "EvoNorm2dB0": (lambda: normed(layers.EvoNorm2dB0(16)), 8, ("0", "2.0", "3")),
    "EvoNorm2dS0": (lambda: normed(layers.EvoNorm2dS0(16, groups=4)), 8, ("0", "2.0", "3")),
    "FilterResponseNormTlu2d": (lambda: normed(layers.FilterResponseNormTlu2d(16)), 8, ("0", "2.0", "3")),
    "FilterResponseNormAct2d": (lambda: normed(layers.FilterResponseNormAct2d(16)), 8, ("0", "2.0", "3")),
    "squeeze-excite": (lambda: normed(layers.SEModule(16, rd_channels=8)), 8, ("0", "2.0", "2.1.fc1", "3")),
    "RepVGG": (lambda: around(RepVggBlock(8, 8), channels=8), 8, ("0", "2.conv_kxk.conv", "3")),
    "RepVGG, merged": (
        lambda: timm.utils.reparameterize_model(around(RepVggBlock(8, 8), channels=8).eval()),
        8,
        ("0", "2.reparam_conv", "3"),
    ),
    "MobileOne": (lambda: around(MobileOneBlock(8, 8), channels=8), 8, ("0", "2.conv_kxk.0.conv", "3")),
    "Inception": (
        lambda: around(InceptionA(8, 8), channels=232),
        8,
        ("0", *(f"2.branch{branch}.conv" for branch in INCEPTION), "3"),
    ),
    "DenseNet": (
        densenet,
        32,
        tuple(f"features.{name}" for name in (*DENSE[:4], "transition1.norm", *DENSE[4:], "norm5")),
    ),
    "ConvNeXt, channels last": (
        convnext,
        32,
        tuple(f"stages.{n}.{name}" for n in range(4) for name in ("downsample.1", "blocks.0.mlp.fc1")),
    ),
    "PoolFormer": (
        poolformer,
        32,
        (*(f"stages.{n}.blocks.0.{name}" for n in range(2) for name in ("norm2", "mlp.fc1")), "head.fc.fc1"),
    ),
    "ViT, LayerScale": (partial(vit, init_values=0.5), 16, ("blocks.0.mlp.fc1",)),
    "ViT, SwiGLU": (partial(vit, mlp_layer=layers.SwiGLU), 16, ("blocks.0.mlp.fc1_g",)),
    "Mixer": (mixer, 16, ("blocks.0.mlp_tokens.fc1", "blocks.0.mlp_channels.fc1")),
    "Swin": (
        partial(swin, depths=(2, 1)),
        16,
        tuple(f"layers.{block}.mlp.fc1" for block in ("0.blocks.0", "0.blocks.1", "1.blocks.0")),
    ),
}


def randomised(make: Make, side: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, images = make(), torch.randn(2, 3, side, side)
    randomise(model, images)
    return model.eval(), images


@pytest.mark.parametrize(("make", "side", "sites"), KINDS.values(), ids=KINDS)
def test_its_maps_are_sites(make: Make, side: int, sites: tuple[str, ...]) -> None:
    model, images = randomised(make, side)
    found = find_sites(model, images)
    assert tuple(site.name for site in found.sites) == sites
    assert unaccounted(model, found) == []


@pytest.mark.parametrize(("make", "side"), [row[:2] for row in KINDS.values()], ids=KINDS)
def test_it_passes_every_step(make: Make, side: int) -> None:
    assert set(check(*randomised(make, side)).values()) == {"ok"}


FEW = ("Conv2dSame", "StdConv2dSame", "MixedConv2d", "CondConv2d", "FilterResponseNormTlu2d", "RepVGG")
ENGINE = [
    pytest.param(*row[:2], id=kind, marks=() if kind in FEW else pytest.mark.slow)  # an export takes a second
    for kind, row in KINDS.items()
]


@pytest.mark.parametrize(("make", "side"), ENGINE)
def test_it_is_accelerated(make: Make, side: int) -> None:
    found = check_engine(*randomised(make, side))
    assert float(found.pop("apart")) < 1e-6
    assert found == {"execution": "accelerated", "accelerate": "ok"}


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_torchvisions_models_pass_every_step(name: str) -> None:
    assert set(check(*randomised(partial(torchvision.models.get_model, name, num_classes=5), 64)).values()) == {"ok"}
