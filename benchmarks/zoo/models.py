"""Real, small members of the zoo whose maps have strong and weak channels."""

from collections.abc import Iterable, Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from isw_plugin.sites import LAYERS

__all__ = ["build", "randomise", "smallest"]

BATCH = 2
_SIZES = (64, 96, 128, 192, 224, 256)  # the tiny test models start at 64, the others at 96


def smallest(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every tiny test model, and the member with the fewest parameters of every timm module, small ones first."""
    by_module: dict[str, Mapping[str, Any]] = {}
    tests = []
    for record in records:
        if record["model"].startswith("test_"):
            tests.append(record["model"])
        elif "parameters" in record:
            best = by_module.setdefault(record["module"], record)
            if record["parameters"] < best["parameters"]:
                by_module[record["module"]] = record
    return tests + [record["model"] for record in sorted(by_module.values(), key=lambda record: record["parameters"])]


def build(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A randomised model in eval mode and images, (2, C, H, W), of the smallest size that it takes from 96 up."""
    options, size = _options(name)
    torch.manual_seed(seed)
    model = timm.create_model(name, **options)
    channels = model.pretrained_cfg["input_size"][0]
    images = torch.randn(BATCH, channels, size, size)
    randomise(model, images)
    return model.eval(), images


def _options(name: str) -> tuple[dict[str, Any], int]:
    """Arguments of create_model and the side of an image: 96, where the model takes it, or what it declares."""
    with torch.device("meta"):
        declared = timm.create_model(name)
    channels, native, _ = declared.pretrained_cfg["input_size"]
    for size in _SIZES[not name.startswith("test_") :]:
        if size >= native:
            break
        for options in ({}, {"img_size": size}):
            if _runs(name, options, channels, size):
                return options, size
    return {}, native


def _runs(name: str, options: dict[str, Any], channels: int, size: int) -> bool:
    try:
        with torch.device("meta"), torch.no_grad():
            timm.create_model(name, **options).eval()(torch.zeros(2, channels, size, size))
    except Exception:  # whatever the model raises: it does not take this size
        return False
    return True


@torch.no_grad()
def randomise(model: nn.Module, images: Tensor) -> None:
    """Give every map strong and weak channels, and every batch norm the statistics of what it gets.

    Weights and biases of one dimension are drawn anew (norms, layer scales; many start at zero or one), and
    each output row of a layer is scaled by uniform(0.1, 2).
    """
    for name, parameter in model.named_parameters():
        if parameter.numel() == max(parameter.shape, default=1):
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            else:
                parameter.uniform_(0.1, 2)
    for module in model.modules():
        if isinstance(module, LAYERS):
            if module.weight.abs().max() < 1e-3:  # a head that starts at zero gives the same for every image
                module.weight.normal_(0, module.weight[0].numel() ** -0.5)
            rows = torch.empty(len(module.weight), *[1] * (module.weight.dim() - 1)).uniform_(0.1, 2)
            module.weight.mul_(rows)
    _settle(model, images)


def _settle(model: nn.Module, images: Tensor) -> None:
    """Set running statistics to those of the images, so that activations keep their size through deep models.

    A channel that hardly varies gets a tenth of the mean variance: its own would multiply rounding by hundreds.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        if norm.running_var is not None:
            norm.running_var.clamp_(min=0.1 * norm.running_var.mean().item())
    model.eval()
