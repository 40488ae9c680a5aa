"""Channels that must go together, by torch-pruning's dependency graph, and who reads them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map_only

from isw_plugin.copies import copy_of
from isw_plugin.errors import UnsupportedError
from isw_plugin.hooks import detach_hooks
from isw_plugin.sites import Inputs
from isw_plugin.static.dependencies import (
    MIXING,
    Columns,
    close,
    columns_of,
    dependency_graph,
    fits,
    groups_of,
    is_depthwise,
    is_output,
    outputs_of,
    remove_channels,
)

__all__ = ["Group", "Removal", "bare_copy", "harmless", "prunable_groups", "reader_columns"]

_READS = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)


@dataclass(frozen=True)
class Group:
    """Coupled channels.

    Attributes:
        layer: Whose output channels number them.
        channels: How many.
        readers: Layers whose outputs each read all of them.
        passing: Depthwise convolutions, which hand each one on.
    """

    layer: str
    channels: int
    readers: dict[str, Columns]
    passing: dict[str, Columns]


@dataclass(frozen=True)
class Removal:
    """Channels of a group, and the input columns that go with them, by layer."""

    layer: str
    channels: tuple[int, ...]
    columns: dict[str, list[int]]

    @classmethod
    def of(cls, group: Group, channels: Sequence[int]) -> "Removal":
        layers = group.readers | group.passing
        columns = {name: [col for c in channels for col in columns.get(c, ())] for name, columns in layers.items()}
        return cls(group.layer, tuple(sorted(channels)), columns)


def reader_columns(group: Any, names: Mapping[nn.Module, str]) -> dict[str, Columns]:
    """For every layer that reads a group of torch-pruning by channels, which columns each channel fills.

    Args:
        group: A ``torch_pruning`` group.
        names: Names of the model's modules.

    Raises:
        UnsupportedError: A layer has fewer columns, so torch-pruning has lost where channels lie.
    """
    found: dict[str, Columns] = {}
    for item in (item for item in group if item.dep.handler in _READS):
        module, filled = item.dep.target.module, columns_of(item)
        if not fits(filled, module):
            raise UnsupportedError(
                f"torch-pruning takes {names[module]} to read column {max(map(max, filled.values()))}, which it lacks: "
                "where the channels before it lie is not known. Add the layer that makes them to ignored_layers"
            )
        columns = found.setdefault(names[module], {})
        for root, own in filled.items():
            columns.setdefault(root, []).extend(own)
    return found


def prunable_groups(model: nn.Module, inputs: Inputs) -> list[Group]:
    """Groups whose channels meet only in layers that read them, and that are not the model's output.

    Args:
        model: A bare copy in eval mode, every parameter requiring a gradient.
        inputs: What its forward takes, on its device.

    Raises:
        UnsupportedError: torch-pruning cannot trace the model.
    """
    names = {module: name for name, module in model.named_modules()}
    graph = dependency_graph(model, inputs)
    return [
        Group(names[root], graph.get_out_channels(root), reader_columns(group, names), _passing(group, names))
        for group in groups_of(graph, model)
        if _separable(group) and isinstance(root := group[0].dep.target.module, nn.Module)
    ]


def bare_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode without hooks of ours, all of it in the autograd graph."""
    bare = copy_of(model)
    detach_hooks(bare)
    return bare.eval().requires_grad_(True)


def harmless(bare: nn.Module, removals: Sequence[Removal], inputs: Inputs) -> list[Removal]:
    """Those removals after which a copy computes what it computes with their columns set to zero."""
    if _equal(bare, removals, inputs):
        return list(removals)
    # Rare: something that the graph does not show ties channels together, such as a fixed reshape.
    good: list[Removal] = []
    for removal in removals:
        if _equal(bare, [*good, removal], inputs):
            good.append(removal)
    return good


def _passing(group: Any, names: Mapping[nn.Module, str]) -> dict[str, Columns]:
    found: dict[str, Columns] = {}
    for item in group:
        module = item.dep.target.module
        if is_depthwise(module):
            found.setdefault(names[module], columns_of(item))  # it comes twice, taking channels and giving them
    return found


def _separable(group: Any) -> bool:
    """Whether channels meet only in readers, and none is the model's output."""
    for item in group:
        node, module = item.dep.target, item.dep.target.module
        grouped = isinstance(module, _ConvNd) and module.groups > 1 and not is_depthwise(module)
        if isinstance(module, MIXING) or grouped:
            return False
        reads = item.dep.handler in _READS
        if not fits(columns_of(item), module) if reads else is_output(node):
            return False
    return any(item.dep.handler in _READS for item in group)


class _Zero:
    """Sets input columns of a layer to zero."""

    def __init__(self, columns: Sequence[int], axis: int) -> None:
        self.columns, self.axis = columns, axis

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        index = torch.tensor(self.columns, dtype=torch.long, device=args[0].device)
        return (args[0].index_fill(self.axis, index, 0), *args[1:])


def _equal(bare: nn.Module, removals: Sequence[Removal], inputs: Inputs) -> bool:
    zeroed, smaller = copy_of(bare), copy_of(bare)
    for removal in removals:
        for name, columns in removal.columns.items():
            layer = zeroed.get_submodule(name)
            layer.register_forward_pre_hook(_Zero(columns, -1 if isinstance(layer, nn.Linear) else 1))
    noise = tree_map_only(Tensor, _noise, inputs)
    expected = outputs_of(zeroed, noise)
    try:
        remove_channels(smaller, removals, inputs)
        return close(outputs_of(smaller, noise), expected)
    except UnsupportedError:  # torch-pruning fails, or the model with the shapes that it left
        return False


def _noise(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor)
