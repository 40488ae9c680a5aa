"""Example inputs, as they would be for another number of instances."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

__all__ = ["Arguments", "Inputs", "Resize", "as_they_are", "one_instance", "resizes"]

Inputs: TypeAlias = Tensor | list[Any] | tuple[Any, ...] | dict[str, Any]
Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
Resize: TypeAlias = Callable[[int, torch.device], Arguments]  # how many instances, on which device


def _arguments(inputs: Inputs) -> Arguments:
    """Example inputs as the arguments of a call."""
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def resizes(inputs: Inputs) -> list[Resize]:
    """Ways to make inputs of any number of instances, the likeliest first.

    Tensors as long as one of the highest rank have instances on axis 0, all of them or that one alone, and others
    (tables, masks, anchors) have none; else all of another length, or all. In a list of images they are its items;
    targets, a list of dicts beside it, tell that for sure; they are for training, so a way without them is the first.
    """
    call = _arguments(inputs)
    leaves, spec = tree_flatten(call)
    long = [at for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim()]
    long.sort(key=lambda at: -leaves[at].dim())
    lengths = dict.fromkeys(len(leaves[at]) for at in long)
    groups = [[at for at in long if len(leaves[at]) == length] for length in lengths]
    alone = [[at] for group in groups for at in group]
    distinct = dict.fromkeys(frozenset(group) for group in [*groups, *alone, long])
    ways: list[Resize] = [partial(_along_axis_0, leaves, spec, group) for group in distinct]
    if not any(map(_is_list, _values(call))):
        return ways
    if any(map(_is_targets, _values(call))):
        return [partial(_in_lists, _without_targets(call)), partial(_in_lists, call), *ways]
    return [*ways, partial(_in_lists, call)]


def as_they_are(inputs: Inputs, device: torch.device) -> Arguments:
    """The inputs as arguments of a call, copied."""
    made: Arguments = tree_map_only(Tensor, lambda tensor: _as_it_is(tensor, device), _arguments(inputs))
    return made


def one_instance(inputs: Inputs) -> Inputs:
    """Every tensor with an axis of instances before its own."""
    made: Inputs = tree_map_only(Tensor, lambda tensor: tensor[None], inputs)
    return made


def _along_axis_0(
    leaves: list[Any], spec: TreeSpec, group: Collection[int], instances: int, device: torch.device
) -> Arguments:
    made: Arguments = tree_unflatten(
        [
            _zeros(leaf, (instances, *leaf.shape[1:]), device) if at in group else _as_it_is(leaf, device)
            for at, leaf in enumerate(leaves)
        ],
        spec,
    )
    return made


def _in_lists(call: Arguments, instances: int, device: torch.device) -> Arguments:
    def resize(value: Any) -> Any:
        listed = _is_list(value) or _is_targets(value)
        items = [value[at % len(value)] for at in range(instances)] if listed else value
        return tree_map_only(Tensor, lambda tensor: _as_it_is(tensor, device), items)

    return tuple(resize(value) for value in call[0]), {name: resize(value) for name, value in call[1].items()}


def _without_targets(call: Arguments) -> Arguments:
    def left(value: Any) -> Any:
        return None if _is_targets(value) else value

    return tuple(map(left, call[0])), {name: left(value) for name, value in call[1].items()}


def _values(call: Arguments) -> list[Any]:
    return [*call[0], *call[1].values()]


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Tensor) for item in value)


def _is_targets(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _as_it_is(leaf: Any, device: torch.device) -> Any:
    """A forward may write to its arguments, and those of a saved pruner are on meta."""
    if not isinstance(leaf, Tensor):
        return leaf
    on_meta = leaf.is_meta and device.type != "meta"
    return _zeros(leaf, leaf.shape, device) if on_meta else leaf.detach().to(device, copy=True)


def _zeros(leaf: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=leaf.dtype, device=device)
