"""Of a model that cannot be exported whole (a detector, whose boxes hang on values): the part that can, and the rest.

It runs as a graph in its place, the rest masked. Its gates decide there, and what they decide is told to the whole.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from isw_plugin.accelerate.calls import Call
from isw_plugin.accelerate.masked import Masked
from isw_plugin.accelerate.record import Recording
from isw_plugin.copies import copy_of
from isw_plugin.hooks import Memory, _Begin, _End, memory_of
from isw_plugin.places import hooks_in
from isw_plugin.sites import Site

__all__ = ["Part", "joined", "largest_part"]


@dataclass(frozen=True)
class Part:
    """A child of a masked model.

    Attributes:
        masked: A copy, with the hooks of its sites and a memory of its own.
        sites: All whose maps lie within.
        call: What it gets where the whole gets the example inputs.
    """

    name: str
    masked: Masked
    sites: tuple[Site, ...]
    call: Call


def largest_part(masked: Masked, sites: tuple[Site, ...], call: Call) -> Part | None:
    """The child with the most layers that could skip, None where there is none or where it does not run just once."""
    memory = masked.memory
    if memory.heads or memory.learned:  # which look into other parts
        return None
    readers = {name: _readers(name, sites) for name, _ in masked.model.named_children()}
    name = max(readers, key=lambda child: readers[child], default="")
    calls = _calls_of(masked, name, call) if name and readers[name] else []
    if len(calls) != 1:
        return None
    held = tuple(site for site in sites if _holds(name, site))
    return Part(name, Masked(_attached(masked.model.get_submodule(name))), held, calls[0])


def joined(masked: Masked, name: str, fast: Recording) -> Masked:
    """The whole, with what is fast in the place of a part; weights are those of ``masked``."""
    model = copy_of(masked.model, _shared(masked.model))
    memory, part = memory_of(model), model.get_submodule(name)
    assert memory is not None  # a copy of one that has it
    _unhook(part)
    for begin in model._forward_pre_hooks.values():
        if isinstance(begin, _Begin):
            begin.places = tuple(place for place in begin.places if place != name)
    part.forward = _InPlace(fast, memory)
    return Masked(model)


class _InPlace:
    """The forward of a part that runs elsewhere."""

    def __init__(self, fast: Any, memory: Memory) -> None:
        self.fast, self.memory = fast, memory

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.fast.recording() as record:
            output = self.fast(*args, **kwargs)
        call = self.memory.running or self.memory.outside()
        for site, keep in record.keep.items():
            call.decide(site, record.norms[site], keep)
        return output


def _readers(name: str, sites: tuple[Site, ...]) -> int:
    """Layers in a child that read sites of its own."""
    read = {consumer.layer for site in sites if _holds(name, site) for consumer in site.consumers}
    return sum(layer.startswith(f"{name}.") for layer in read)


def _holds(name: str, site: Site) -> bool:
    return all(f"{tap.module}.".startswith(f"{name}.") for tap in site.taps)


def _calls_of(masked: Masked, name: str, call: Call) -> list[Call]:
    """Of a child, in a forward of the whole."""
    found: list[Call] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(Call(args, kwargs).copied())

    handle = masked.model.get_submodule(name).register_forward_pre_hook(note, prepend=True, with_kwargs=True)
    try:
        masked.wanted(call)
    finally:
        handle.remove()
    return found


def _attached(child: nn.Module) -> nn.Module:
    """A copy of a child as a model of its own; weights are the child's."""
    model = copy_of(child, _shared(child))
    memory: Memory = next(hooks[number].memory for _, hooks, number in hooks_in(model.modules()))
    model.register_forward_hook(_End(memory), always_call=True)
    model.register_forward_pre_hook(_Begin(memory, ()), prepend=True)
    return model


def _shared(model: nn.Module) -> dict[int, Any]:
    return {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}


def _unhook(module: nn.Module) -> None:
    for _, hooks, number in list(hooks_in([module])):
        del hooks[number]
