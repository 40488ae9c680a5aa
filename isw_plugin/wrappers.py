"""The wrappers that models come in: which are looked through, which are refused."""

from typing import cast

from torch import nn

from isw_plugin.errors import AttachError, UnsupportedError
from isw_plugin.hooks import memory_of

__all__ = ["attachable", "unwrapped"]


def attachable(model: nn.Module) -> nn.Module:
    """The module to attach to.

    Raises:
        UnsupportedError, AttachError: It cannot be attached to; says what to do.
    """
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if "OptimizedModule" in kinds or model._compiled_call_impl is not None:
        raise UnsupportedError("the model is compiled and would ignore hooks added now: attach first, then compile")
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
