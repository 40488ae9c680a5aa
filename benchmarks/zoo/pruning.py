"""Part (c) of the zoo: torch-pruning takes half of the channels first."""

import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.zoo.models import randomise
from benchmarks.zoo.subject import described, flat
from isw_plugin.copies import copy_of
from isw_plugin.sites import LAYERS, find_sites

__all__ = ["pruned"]

SECONDS = 15.0  # of processor time; most take one, and where maps are folded its indices grow without end


def pruned(model: nn.Module, images: Tensor, ratio: float = 0.5) -> tuple[nn.Module, str]:
    """A copy without this share of channels, with its output as wide as before, and which layers lost them.

    All layers, or, where torch-pruning does not manage that (it knows neither how attention splits its channels
    into heads nor every view), those whose channels no other layer shares: the hidden ones of MLPs, of bottlenecks.

    Raises:
        RuntimeError: torch-pruning manages neither.
    """
    names = model.pretrained_cfg.get("classifier") or ()
    classifiers = [model.get_submodule(name) for name in ([names] if isinstance(names, str) else names)]
    alone = {site.layers[0] for site in find_sites(model, images).sites if len(site.layers) == 1}
    sharing = [module for name, module in model.named_modules() if isinstance(module, LAYERS) and name not in alone]
    why = ""
    for which, ignored in (("all layers", classifiers), ("layers that share no channels", sharing)):
        try:
            return _pruned(model, images, ratio, ignored), f"{which}{why and f', since all layers: {why}'}"
        except Exception as error:  # whatever torch-pruning or the pruned model raises
            why = described(error)
    raise RuntimeError(why)


def _pruned(model: nn.Module, images: Tensor, ratio: float, ignored: Sequence[nn.Module]) -> nn.Module:
    names = {module: name for name, module in model.named_modules()}
    width = flat(model(images), len(images)).shape
    small = copy_of(model)
    with warnings.catch_warnings(action="ignore"), _within(SECONDS):
        pruner = tp.pruner.BasePruner(
            small,
            images,
            tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=[small.get_submodule(names[module]) for module in ignored],
            out_channel_groups={},  # the default is one dict for all pruners
            in_channel_groups={},
            num_heads={},
        )
        pruner.step()
    if flat(small(images), len(images)).shape != width:
        raise RuntimeError("torch-pruning changed the shape of the output")
    if _parameters(small) == _parameters(model):
        raise RuntimeError("torch-pruning pruned nothing")
    small.zero_grad()
    with torch.no_grad():
        randomise(small, images)
    return small.eval()


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raise RuntimeError in a block that takes more processor time than this; in the main thread of a Unix process."""

    def stop(*_: object) -> None:
        raise RuntimeError(f"it takes more than {seconds:g} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
