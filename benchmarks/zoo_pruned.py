"""Part (c) of the zoo: torch-pruning takes half of the channels first."""

import warnings

import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.zoo_models import randomise
from benchmarks.zoo_subject import flat

__all__ = ["pruned"]


def pruned(model: nn.Module, images: Tensor, ratio: float = 0.5) -> nn.Module:
    """The model without this share of every layer's channels, with its output as wide as before.

    Raises:
        Exception: Whatever torch-pruning or the pruned model raises where torch-pruning does not manage it.
    """
    names = model.pretrained_cfg.get("classifier") or ()
    classifiers = [model.get_submodule(name) for name in ([names] if isinstance(names, str) else names)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    width = flat(model(images), len(images)).shape
    with warnings.catch_warnings(action="ignore"):
        pruner = tp.pruner.BasePruner(
            model,
            images,
            tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=classifiers,
            round_to=8,
            out_channel_groups={},  # the default is one dict for all pruners
            in_channel_groups={},
            num_heads={},
        )
        pruner.step()
    if flat(model(images), len(images)).shape != width:
        raise RuntimeError("torch-pruning changed the shape of the output")
    if sum(parameter.numel() for parameter in model.parameters()) == parameters:
        raise RuntimeError("torch-pruning pruned nothing")
    model.zero_grad()
    with torch.no_grad():
        randomise(model, images)
    return model.eval()
