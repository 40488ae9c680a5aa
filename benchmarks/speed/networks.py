"""The networks of the engine's benchmark: weights that gates have something to do on, thresholds for a keep ratio."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from benchmarks.lab import decisions
from benchmarks.lab.networks import WIDTHS, vgg16
from isw_plugin import InstanceWisePruner
from isw_plugin.heads import Head
from isw_plugin.sites import Site

__all__ = ["NETWORKS", "Stored", "force", "gate_at", "gate_by", "network", "noise", "trained_networks"]

_DECISIONS = Path(__file__).parents[1] / "paper" / "results" / "decisions"

# Widths that slimming at 67 % leaves, odd on purpose.
_SLIMMED = (37, 53, 101, 97, 129, 131, 117, 113, 67, 59, 61, 71, 139)


def _vgg16(widths: Sequence[int]) -> nn.Module:
    """In PyTorch's own layout: which one is faster is for the benchmark to say."""
    return vgg16(tuple(widths), 10).to(memory_format=torch.contiguous_format)


def _resnet18(side: int) -> nn.Module:
    model = timm.create_model("resnet18", num_classes=10)
    if side == 32:
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    return model


def _mobilenetv2(side: int) -> nn.Module:
    model = timm.create_model("mobilenetv2_100", num_classes=10)
    if side == 32:
        model.conv_stem.stride = (1, 1)
        model.blocks[1][0].conv_dw.stride = (1, 1)
    return model


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "vgg16": lambda side: _vgg16(WIDTHS),
    "slimmed vgg16": lambda side: _vgg16(_SLIMMED),
    "resnet18": _resnet18,
    "mobilenetv2": _mobilenetv2,
}


@cache
def trained_networks() -> dict[str, Path]:
    """Names of trained VGG16s, slimmed or not, and the files of their keep decisions."""
    return {path.stem: path for path in sorted(_DECISIONS.glob("*.npz")) if "vgg16" in path.stem}


def network(name: str, side: int) -> nn.Module:
    """A network by name, for square images of this side, in eval mode.

    One of NETWORKS, or of ``trained_networks()`` (its widths only), or timm's. Weights are random; batch norms are
    drawn so that channels differ, as those of trained networks do.
    """
    torch.manual_seed(0)
    if name in NETWORKS:
        model = NETWORKS[name](side)
    elif name in trained_networks():
        model = _vgg16([mask.shape[1] for mask in decisions.load(trained_networks()[name])[0].values()])
    else:
        model = timm.create_model(name, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def noise(batch: int, side: int) -> Tensor:
    """The images that everything is timed on, (N, 3, H, W)."""
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def gate_at(pruner: InstanceWisePruner, images: Tensor, keep_ratio: float, passes: int = 4) -> InstanceWisePruner:
    """A pruner with one threshold a site, at which these images keep about this share of every site's channels."""
    model = pruner.model
    betas: dict[str, float] = {site.name: 0.0 for site in pruner.sites}
    for _ in range(passes):  # a site's norms depend on what the sites before it dropped
        pruner.remove()
        pruner = InstanceWisePruner(model, images[:1], alpha=0.0, per_site={n: {"beta": b} for n, b in betas.items()})
        with torch.no_grad(), pruner.gating():
            model(images)
        for name, norms in pruner.norms.items():
            betas[name] = min(1.99, (_between(norms, keep_ratio) / norms.mean(1).clamp_min(1e-12)).mean().item())
    pruner.remove()
    return InstanceWisePruner(model, images[:1], alpha=0.0, per_site={n: {"beta": b} for n, b in betas.items()})


def _between(norms: Tensor, keep_ratio: float) -> Tensor:
    """For every instance, half-way between the norms that are to be dropped and kept: never on one, which is a tie."""
    ordered = norms.sort(1).values
    dropped = max(1, min(norms.shape[1] - 1, round((1 - keep_ratio) * norms.shape[1])))
    return ordered[:, dropped - 1 : dropped + 1].mean(1)


@dataclass(frozen=True, eq=False)
class Stored:
    """A gate that keeps what it is told to: bool (N, C)."""

    keep: Tensor

    def __call__(self, feature: Tensor, norms: Tensor) -> Tensor:
        return self.keep[: norms.shape[0]]


def gate_by(pruner: InstanceWisePruner, name: str, instances: int) -> InstanceWisePruner:
    """The pruner, switched on, with a trained network's decisions on so many images, spread over those stored."""
    pruner.enable()
    masks, _ = decisions.load(trained_networks()[name])
    for site, keep in zip(pruner.sites, masks.values(), strict=True):
        chosen = torch.linspace(0, len(keep) - 1, instances).round().long()
        pruner._memory.gates[site.name] = Stored(keep[chosen].repeat(4, 1))  # more rows than any batch that is traced
    return pruner


def force(pruner: InstanceWisePruner, keep_ratio: float, instances: int, outputs: bool) -> InstanceWisePruner:
    """The pruner, switched on, with masks of its own for every image, which keep this share of every site.

    Args:
        outputs: Sites that can be predicted are: they have heads, of random weights, and decide before their layers
            run. A depthwise layer's map is decided on as the map that it reads, and follows it where that is predicted.
    """
    torch.manual_seed(2)
    if outputs:
        can = {site.name: site for site in pruner.sites if not site.making.reason}
        followers = {name: site.making.follows for name, site in can.items() if site.making.follows in can}
        heads = {name: _head(site, pruner) for name, site in can.items() if name not in followers}
        pruner._settings.take_heads(heads, followers)
        pruner._configure()
    pruner.enable()
    for site in pruner.sites:
        scores = torch.rand(instances, site.channels)
        keep = scores.argsort(1).argsort(1) < round(keep_ratio * site.channels)
        if site.making.follows:
            keep = pruner._memory.gates[site.making.follows].keep
        pruner._memory.gates[site.name] = Stored(keep.repeat(1 if len(keep) > instances else 4, 1))
    return pruner


def _head(site: Site, pruner: InstanceWisePruner) -> Head:
    """Of random numbers of bfloat16, and of the rank that ``fit_predictors`` took on trained networks."""
    channels = {other.name: other.channels for other in pruner.sites}
    inputs, outputs = 2 * sum(channels[source] for source in site.making.sources), site.channels

    def factor(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns) / columns).bfloat16().float()

    rank = _rank(inputs, outputs)
    if 2 * rank * (inputs + outputs) > inputs * outputs:
        return Head(site.making.sources, factor(outputs, inputs), torch.ones(outputs))
    return Head(site.making.sources, factor(outputs, rank), torch.ones(outputs), factor(rank, inputs))


def _rank(inputs: int, outputs: int) -> int:
    """As heads of M-CifarNet and EfficientNet-Lite0 have it; projections, of more inputs, need all of theirs."""
    if inputs > 2 * outputs:
        return min(inputs, outputs)
    return max(16, 3 * inputs // 8 if inputs < outputs else outputs // 4)
