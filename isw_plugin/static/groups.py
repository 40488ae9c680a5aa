"""Channels that must go together, by torch-pruning's dependency graph, and who reads them."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_leaves, tree_map_only

from isw_plugin.copies import copy_of
from isw_plugin.errors import UnsupportedError
from isw_plugin.hooks import detach_hooks
from isw_plugin.sites import Inputs

__all__ = ["Group", "Removal", "bare_copy", "harmless", "prunable_groups", "reader_columns", "remove"]

Columns = dict[int, list[int]]  # a group's channel -> input columns of a layer

_READS = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
_MIXING = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _InstanceNorm, nn.MultiheadAttention, nn.Embedding, nn.RNNBase)
_TOLERANCE = 1e-5  # of an output, relative where the largest is above 1


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
    """
    found: dict[str, Columns] = {}
    for item in group:
        if item.dep.handler in _READS:
            _collect(found.setdefault(names[item.dep.target.module], {}), item)
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
    graph = _graph(model, inputs)
    return [
        Group(names[root], graph.get_out_channels(root), reader_columns(group, names), _passing(group, names))
        for group in graph.get_all_groups(root_module_types=(_ConvNd, nn.Linear))
        if _separable(group) and isinstance(root := group[0].dep.target.module, nn.Module)
    ]


def remove(model: nn.Module, removals: Sequence[Removal], inputs: Inputs) -> None:
    """Prune the channels in place; training flags and requires_grad stay."""
    training = {module: module.training for module in model.modules()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(True)
    try:
        graph = _graph(model, inputs)
        for removal in removals:
            layer = model.get_submodule(removal.layer)
            prune = graph.get_pruner_of_module(layer).prune_out_channels
            graph.get_pruning_group(layer, prune, list(removal.channels)).prune()
    finally:
        for module, was in training.items():
            module.training = was
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])


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


def _graph(model: nn.Module, inputs: Inputs) -> Any:
    # Given a tensor, torch-pruning first tries the model on its rows, which some models take.
    with torch.enable_grad(), torch.inference_mode(False), warnings.catch_warnings(action="ignore"):
        try:
            return tp.DependencyGraph().build_dependency(model, inputs, forward_fn=_run, verbose=False)
        except Exception as error:  # whatever it meets
            raise UnsupportedError(
                f"torch-pruning cannot trace {type(model).__name__}, so channels that must go together are not known: "
                f"{error}"
            ) from error


def _run(model: nn.Module, inputs: Inputs) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _collect(columns: Columns, item: Any) -> None:
    for root, own in zip(item.root_idxs, item.idxs, strict=True):
        columns.setdefault(root, []).append(own)


def _passing(group: Any, names: Mapping[nn.Module, str]) -> dict[str, Columns]:
    found: dict[str, Columns] = {}
    for item in group:
        module = item.dep.target.module
        if _is_depthwise(module) and names[module] not in found:
            _collect(found.setdefault(names[module], {}), item)
    return found


def _is_depthwise(module: Any) -> bool:
    return isinstance(module, _ConvNd) and module.groups == module.in_channels == module.out_channels > 1


def _separable(group: Any) -> bool:
    """Whether channels meet only in readers, and none is the model's output."""
    for item in group:
        node, module = item.dep.target, item.dep.target.module
        grouped = isinstance(module, _ConvNd) and module.groups > 1 and not _is_depthwise(module)
        if isinstance(module, _MIXING) or grouped:
            return False
        ends = not node.outputs or any(user.type == tp.ops.OPTYPE.OUTPUT for user in node.outputs)
        if ends and item.dep.handler not in _READS:
            return False
    return any(item.dep.handler in _READS for item in group)


class _Zero:
    """Sets input columns of a layer to zero."""

    def __init__(self, columns: Sequence[int], axis: int) -> None:
        self.columns, self.axis = columns, axis

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        index = torch.tensor(self.columns, device=args[0].device)
        return (args[0].index_fill(self.axis, index, 0), *args[1:])


def _equal(bare: nn.Module, removals: Sequence[Removal], inputs: Inputs) -> bool:
    zeroed, smaller = copy_of(bare), copy_of(bare)
    for removal in removals:
        for name, columns in removal.columns.items():
            layer = zeroed.get_submodule(name)
            layer.register_forward_pre_hook(_Zero(columns, -1 if isinstance(layer, nn.Linear) else 1))
    noise = tree_map_only(Tensor, _noise, inputs)
    try:
        remove(smaller, removals, inputs)
        with torch.no_grad():
            found = _tensors(_run(smaller, noise))
    except (RuntimeError, ValueError, AssertionError, IndexError):  # all that a model with broken shapes raises
        return False
    with torch.no_grad():
        expected = _tensors(_run(zeroed, noise))
    return all(_close(mine, yours) for mine, yours in zip(found, expected, strict=True))


def _noise(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor)


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _close(found: Tensor, expected: Tensor) -> bool:
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    return found.shape == expected.shape and bool((found - expected).abs().le(_TOLERANCE * scale).all())
