"""The wrappers that models come in: which are looked through, which are refused."""

from typing import cast

from torch import nn

from isw_plugin.errors import AttachError, NoSitesError, UnsupportedError
from isw_plugin.hooks import has_hooks, memory_of
from isw_plugin.sites import LAYERS

__all__ = ["attachable", "unwrapped"]


def attachable(model: nn.Module) -> nn.Module:
    """The module to attach to.

    Raises:
        UnsupportedError, AttachError, NoSitesError: It cannot be attached to; says what to do.
    """
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules()):
        raise UnsupportedError(
            "the model or a part is compiled and would ignore hooks added now: attach first, then compile"
        )
    if "DataParallel" in kinds:
        raise UnsupportedError("nn.DataParallel runs gates in several threads: use DistributedDataParallel")
    if kinds & {"FullyShardedDataParallel", "FSDPModule"}:
        raise UnsupportedError("FSDP shards the parameters that the probe reads: attach before sharding")
    if "ScriptModule" in kinds:
        raise UnsupportedError("a scripted model takes no hooks: attach to the model it was made from")
    model = unwrapped(model)
    if memory_of(model) is not None:
        raise AttachError(
            f"{type(model).__name__} already has a pruner: InstanceWisePruner.of(model) gives it; remove() it first"
        )
    if has_hooks(model):
        raise AttachError(f"{type(model).__name__} has a part, or is part of a model, that already has a pruner")
    if not any(isinstance(module, LAYERS) for module in model.modules()):
        raise NoSitesError(f"{type(model).__name__} has no convolution or linear layer")
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model
