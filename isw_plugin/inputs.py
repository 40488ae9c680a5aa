"""A model's inputs, in any form: how it is called on them, where they belong, how many instances they hold."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from isw_plugin.errors import SettingError

__all__ = ["arguments", "call", "device_of", "instances_in", "is_list_of_images", "measuring", "on_device"]


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call: a mapping's by name, a tuple's by position, all else is the one argument."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def call(model: nn.Module, inputs: Any) -> Any:
    """What the model gives for its inputs."""
    args, kwargs = arguments(inputs)
    return model(*args, **kwargs)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is; the CPU, if it has none."""
    return next(model.parameters(), torch.empty(0)).device


def on_device(values: Any, device: torch.device) -> Any:
    """The same with every tensor on a device."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), values)


def instances_in(inputs: Any) -> int:
    """How many instances there are: axis 0 of the first tensor that has axes, or the images (C, H, W) in a list.

    Raises:
        SettingError: There is none.
    """
    args, kwargs = arguments(inputs)
    listed = next((value for value in (*args, *kwargs.values()) if is_list_of_images(value)), None)
    if listed is not None:
        return len(listed)
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
    if not leaves or not len(leaves[0]) or (leaves[0].dim() == 1 and leaves[0].is_floating_point()):
        found = f"a first tensor of shape {tuple(leaves[0].shape)}" if leaves else "no tensor with axes"
        raise SettingError(f"the inputs hold {found}, and no batch: shape (N, ...), N >= 1, is needed, such as x[None]")
    return len(leaves[0])


def is_list_of_images(inputs: Any) -> bool:
    """Whether this is one argument that holds images (C, H, W), as torchvision's detection takes them."""
    return isinstance(inputs, list) and bool(inputs) and all(isinstance(i, Tensor) and i.dim() == 3 for i in inputs)


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside; every module's training flag as before after it."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training
