"""What ties settings to a model: its hooks, placed now or at the first forward, and what they are told."""

from torch import nn

from isw_plugin.errors import AttachError
from isw_plugin.hooks import Memory, attach_at_first_forward, attach_hooks, detach_hooks
from isw_plugin.inputs import device_of
from isw_plugin.settings import Settings
from isw_plugin.sites import Inputs

__all__ = ["attach", "configure", "settings_of"]


def attach(model: nn.Module, memory: Memory) -> None:
    """Place the hooks, in the first forward if sites are not known before; others of ours go."""
    detach_hooks(model)
    if settings_of(memory).found is None:
        attach_at_first_forward(model, memory, _resolve_and_attach)
    else:
        _place_hooks(model, memory)


def configure(model: nn.Module, memory: Memory) -> None:
    """Tell the hooks what holds at each site."""
    settings = settings_of(memory)
    memory.weighed = {name: lambda_ > 0 for name, lambda_ in settings.lambdas().items()}
    memory.gates = settings.gates()
    device = device_of(model)
    memory.heads = {name: head.to(device) for name, head in settings.heads.items()}
    memory.followers = settings.followers
    memory.learned = settings.learned
    memory.watched = frozenset(source for head in settings.heads.values() for source in head.sources)


def settings_of(memory: Memory) -> Settings:
    """One for all pruners of a model that ``InstanceWisePruner.of`` made."""
    if memory.settings is None:
        raise AttachError("this memory belongs to no pruner")
    return memory.settings


def _resolve_and_attach(model: nn.Module, memory: Memory, inputs: Inputs) -> None:
    if settings_of(memory).found is None:  # else another thread's forward was the first
        settings_of(memory).resolve(model, inputs)
        _place_hooks(model, memory)


def _place_hooks(model: nn.Module, memory: Memory) -> None:
    memory.clear()
    configure(model, memory)
    settings = settings_of(memory)
    attach_hooks(model, memory, settings.known().sites, settings.scope)
