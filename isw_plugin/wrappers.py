"""The wrappers that models come in: which are looked through, which are refused."""

from typing import cast

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from isw_plugin.errors import AttachError, NoSitesError, UnsupportedError
from isw_plugin.hooks import has_hooks, memory_of
from isw_plugin.sites import LAYERS

__all__ = ["attachable", "inner_name", "unwrapped"]

_INNER = ("module", "_module", "_forward_module", "_original_module")


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
    name, inner = type(model).__name__, inner_name(model)
    if memory_of(model) is not None:
        raise AttachError(f"{name} already has a pruner: InstanceWisePruner.of(model) gives it; remove() it first")
    if has_hooks(model):
        there = f": InstanceWisePruner.of(model.{inner}) gives it" if inner else ""
        raise AttachError(f"{name} has a part, or is part of a model, that already has a pruner{there}")
    if inner and _delegates(model):
        raise UnsupportedError(f"{name} wraps the model that computes: pass that, model.{inner}")
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise UnsupportedError(f"{name} has lazy layers without shapes yet: run it once on real inputs, then attach")
    if not any(isinstance(module, LAYERS) for module in model.modules()):
        raise NoSitesError(f"{name} has no convolution or linear layer{_quantized(model)}")
    return model


def inner_name(model: nn.Module) -> str:
    """The attribute in which a wrapper (Fabric, Opacus, DeepSpeed, AveragedModel) keeps the model; "" for others."""
    if not model._modules or not {*model._modules} <= {*_INNER}:
        return ""
    owned = {id(parameter) for parameter in model.parameters()}
    if any({id(parameter) for parameter in child.parameters()} != owned for child in model.children()):
        return ""
    return next((name for name in _INNER if isinstance(getattr(model, name, None), nn.Module)), "")


def _delegates(model: nn.Module) -> bool:
    """Whether a wrapper answers for the model: it hands on what it is asked for."""
    return type(model).__getattr__ is not nn.Module.__getattr__ or isinstance(model, AveragedModel)


def _quantized(model: nn.Module) -> str:
    kinds = (type(module).__module__ for module in model.modules())
    quantized = any(kind.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")) for kind in kinds)
    return ", only quantized ones, which keep no weights to gate: attach before quantizing" if quantized else ""


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model
