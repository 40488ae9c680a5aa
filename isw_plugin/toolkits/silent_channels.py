"""Which masked channels of a model can be removed without a trace, by torch-pruning's dependency graph.

A masked channel is not always silent: batch norm still adds its shift. Such a channel carries one constant.
It can go if nobody notices: the constant is 0 where layers read it, or every reader takes its share of it
into its bias, which is exact where no zero padding surrounds the constant.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map_only

from isw_plugin.sites import LAYERS, Inputs, Patterns
from isw_plugin.sites.patterns import matches
from isw_plugin.static.dependencies import (
    MIXING,
    Columns,
    columns_of,
    dependency_graph,
    fits,
    groups_of,
    is_depthwise,
    is_output,
    outputs_of,
)

__all__ = ["Masks", "Removal", "find_removals", "masked_channels", "trials"]

Masks = Mapping[str, Mapping[str, Tensor]]

_EQUAL = 1e-6  # a mean over equal numbers is off by a rounding
_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)  # they use weight, bias and padding as these are


@dataclass(frozen=True)
class Removal:
    """Output channels of a layer, all that hangs on them, and what their readers' biases take over."""

    layer: str
    channels: tuple[int, ...]
    biases: dict[str, Tensor]


@dataclass(frozen=True)
class _Member:
    """A module of a group of coupled channels.

    Attributes:
        reads: It takes these channels in, otherwise it hands them on.
        columns: Channel of the group's root -> its own channels.
    """

    node: Any
    reads: bool
    columns: Columns

    @property
    def module(self) -> Any:
        return self.node.module

    def within(self, root: int, masked: dict[nn.Module, set[int]]) -> bool:
        """Whether its masks silence this channel."""
        return set(self.columns.get(root, ())) <= masked.get(self.module, set())


def find_removals(model: nn.Module, inputs: Inputs, masks: Masks, exclude: Patterns = ()) -> list[Removal]:
    """What can go from a masked model.

    Args:
        model: In eval mode, its masks applied, every parameter requiring a gradient; left as it is.
        inputs: What its forward takes.
        masks: Module name -> {"weight": 0 / 1}.
        exclude: Layers that keep their channels.
    """
    return list(_Search(model, inputs, masks, exclude).removals())


def masked_channels(model: nn.Module, masks: Masks) -> dict[nn.Module, set[int]]:
    """Output channels of every layer and norm whose whole weight is masked."""
    masked = {}
    for name, targets in masks.items():
        if "weight" in targets:
            module, mask = model.get_submodule(name), targets["weight"]
            rows = mask.transpose(0, 1) if getattr(module, "transposed", False) else mask
            masked[module] = set(rows.reshape(len(rows), -1).eq(0).all(1).nonzero()[:, 0].tolist())
    return masked


def trials(inputs: Inputs) -> list[Inputs]:
    """The inputs, and noise of their shapes, small and large."""
    generator = torch.Generator().manual_seed(0)

    def noise(scale: float) -> Inputs:
        def like(tensor: Tensor) -> Tensor:
            drawn = scale * torch.randn(tensor.shape, generator=generator)
            return drawn.to(tensor) if tensor.is_floating_point() else tensor

        noisy: Inputs = tree_map_only(Tensor, like, inputs)
        return noisy

    return [inputs, noise(1.0), noise(4.0)]


class _Search:
    def __init__(self, model: nn.Module, inputs: Inputs, masks: Masks, exclude: Patterns) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.masked = masked_channels(model, masks)
        self.constants = _constants(model, inputs)
        self.graph = dependency_graph(model, inputs)
        self.groups = groups_of(self.graph, model)
        self.kept = {module for module, name in self.names.items() if matches(exclude, name, module)}

    def removals(self) -> Iterator[Removal]:
        for group in self.groups:
            root, members = group[0].dep.target.module, self._members(group)
            channels = self._channels(members) if self._separable(members) else []
            if len(channels) == self.graph.get_out_channels(root):
                channels = channels[1:]  # a layer needs one
            if channels:
                yield Removal(self.names[root], tuple(channels), self._biases(members, channels))

    def _members(self, group: Any) -> list[_Member]:
        members = []
        for item in group:
            node, reads = item.dep.target, self.graph.is_in_channel_pruning_fn(item.dep.handler)
            members.append(_Member(node, reads and _is_layer(node.module), columns_of(item)))
        return members

    def _separable(self, members: Sequence[_Member]) -> bool:
        """Whether channels meet only in readers, and none is the model's output."""
        for member in members:
            module = member.module
            grouped = isinstance(module, _ConvNd) and not _is_layer(module) and not is_depthwise(module)
            if isinstance(module, MIXING) or grouped:
                return False
            if member.reads and not fits(member.columns, module):
                return False
            if not member.reads and (is_output(member.node) or module in self.kept):
                return False
        return True

    def _channels(self, members: Sequence[_Member]) -> list[int]:
        makers = [member for member in members if not member.reads and _is_layer(member.module)]
        readers = [member for member in members if member.reads]
        passing = {m.node: m for m in members if not m.reads and not _is_layer(m.module)}
        roots = sorted(set().union(*(maker.columns for maker in makers)))
        silenced = (root for root in roots if self._silenced(makers, root, passing))
        return [root for root in silenced if all(self._unnoticed(reader, root) for reader in readers)]

    def _silenced(self, makers: Sequence[_Member], root: int, passing: dict[Any, _Member]) -> bool:
        """Whether masks cut this channel off on every way from the layers that make it to a reader."""
        ways = [maker.node for maker in makers if not maker.within(root, self.masked)]
        seen = set(ways)
        while ways:
            for node in ways.pop().outputs:
                member = passing.get(node)
                if member is None:
                    return False
                if node not in seen and not member.within(root, self.masked):
                    seen.add(node)
                    ways.append(node)
        return True

    def _unnoticed(self, reader: _Member, root: int) -> bool:
        seen = self.constants[self.names[reader.module]][reader.columns.get(root, [])]
        return bool((seen == 0).all() or (seen.isfinite().all() and _takes_constants(reader.module)))

    def _biases(self, members: Sequence[_Member], channels: Sequence[int]) -> dict[str, Tensor]:
        biases: dict[str, Tensor] = {}
        for reader in (member for member in members if member.reads):
            name = self.names[reader.module]
            columns = [column for root in channels for column in reader.columns.get(root, ())]
            values = self.constants[name][columns]
            if values.any():
                weight = reader.module.weight.detach()[:, columns].double()
                share = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
                biases[name] = biases.get(name, 0) + share @ values
        return biases


def _is_layer(module: nn.Module) -> bool:
    """Whether every output of the module reads all its inputs."""
    return isinstance(module, LAYERS) and not (isinstance(module, _ConvNd) and module.groups > 1)


def _takes_constants(module: nn.Module) -> bool:
    """Whether a constant channel adds the same number to an output everywhere, so that a bias can stand for it."""
    if type(module) not in _PLAIN:
        return False
    return isinstance(module, nn.Linear) or module.padding_mode != "zeros" or not any(_padding(module))


def _padding(module: Any) -> tuple[int, ...]:
    if isinstance(module.padding, str):
        return tuple(size - 1 for size in module.kernel_size) if module.padding == "same" else (0,)
    return tuple(module.padding)


@torch.no_grad()
def _constants(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """For every layer, the number that each of its input columns holds throughout, NaN where it varies; float64."""
    low: dict[str, Tensor] = {}
    high: dict[str, Tensor] = {}

    def watch(name: str, axis: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            columns = args[0].detach().double().movedim(axis, -1).flatten(0, -2)
            low[name] = torch.minimum(low.get(name, columns.amin(0)), columns.amin(0))
            high[name] = torch.maximum(high.get(name, columns.amax(0)), columns.amax(0))

        return hook

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LAYERS)]
    handles = [
        module.register_forward_pre_hook(watch(name, -1 if isinstance(module, nn.Linear) else 1))
        for name, module in layers
    ]
    try:
        for trial in trials(inputs):
            outputs_of(model, trial)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: torch.where(high[name] - low[name] <= _EQUAL * high[name].abs(), low[name], torch.nan) for name in low
    }
