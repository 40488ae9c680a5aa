"""How often images use a channel: it is used where a layer reads anything but zeros from it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from isw_plugin.batches import Batches, batches_in, fitting, taken_apart
from isw_plugin.errors import SettingError
from isw_plugin.functional import channel_norm
from isw_plugin.hooks import Memory
from isw_plugin.inputs import call, device_of, measuring, on_device
from isw_plugin.sites import LAYERS

__all__ = ["Batches", "ColumnUse", "Observation", "observe", "used_columns"]


@dataclass
class ColumnUse:
    """How images use the input columns of a layer.

    Attributes:
        rows: Instances seen (windows, where a model folds them into the batch).
        used: Instances in which the column held anything but zeros, (columns,).
        norm: Sum over instances of the column's norm over the mean norm of all columns, (columns,).
    """

    rows: int
    used: Tensor
    norm: Tensor

    @property
    def frequency(self) -> Tensor:
        """Share of instances that use the column, (columns,)."""
        return self.used / self.rows

    @property
    def relative_norm(self) -> Tensor:
        """Mean norm over the mean of all columns, (columns,)."""
        return self.norm / self.rows

    def add(self, feature: Tensor, axis: int) -> None:
        norms = channel_norm(feature, axis).double()
        self.rows += len(norms)
        self.used += _moved(feature, axis).ne(0).any(1).sum(0).cpu()
        mean = norms.mean(1, keepdim=True)
        self.norm += torch.where(mean == 0, 0.0, norms / mean).sum(0).cpu()


@dataclass
class Observation:
    """What was seen of all images: columns by layer name; by site name, norms (N, C) of every batch."""

    columns: dict[str, ColumnUse] = field(default_factory=dict)
    norms: dict[str, list[Tensor]] = field(default_factory=dict)


def observe(model: nn.Module, memory: Memory | None, batches: Batches) -> Observation:
    """Run the images once, in eval mode, with gates as they are.

    Args:
        model: A bare or an attached model; training flags are restored.
        memory: Of its hooks; the norms that gates decide on are collected, if there is one and gates are on.
        batches: Inputs, (inputs, labels, ...) as a loader gives them, or a dict of what forward takes.

    Raises:
        SettingError: There are no images, or one batch is passed instead of a list of batches.
    """
    observation = Observation()
    device = device_of(model)
    with measuring(model), _watched(model, observation.columns):
        for batch in batches_in(batches):
            inputs = dict(batch) if isinstance(batch, Mapping) else taken_apart(batch)[0]
            call(model, on_device(fitting(inputs, model), device))
            if memory is not None and memory.enabled:
                for name, norms in memory.norms.items():
                    observation.norms.setdefault(name, []).append(norms.cpu())
    if not observation.columns:
        raise SettingError(
            "there were no images: which channels they use is not known. A generator gives its batches once"
        )
    return observation


def used_columns(model: nn.Module, batches: Batches) -> dict[str, ColumnUse]:
    """By layer name, how images use its input columns; see ``observe``."""
    return observe(model, None, batches).columns


def _moved(feature: Tensor, axis: int) -> Tensor:
    """(N, positions, C)."""
    columns = feature.movedim(axis, -1)
    return columns.reshape(len(columns), -1, columns.shape[-1])


class _Watch:
    def __init__(self, seen: dict[str, ColumnUse], name: str) -> None:
        self.seen, self.name = seen, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not args or args[0].dim() < 2:
            return  # called by keyword, or on one instance: nothing is known of this layer's columns
        axis = -1 if isinstance(module, nn.Linear) else 1
        columns = args[0].shape[axis]
        empty = torch.zeros(columns, dtype=torch.float64)
        self.seen.setdefault(self.name, ColumnUse(0, empty, empty.clone())).add(args[0], axis)


@contextmanager
def _watched(model: nn.Module, seen: dict[str, ColumnUse]) -> Iterator[None]:
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LAYERS)]
    # Registered last, so they see what gates before the layer leave.
    handles = [module.register_forward_pre_hook(_Watch(seen, name)) for name, module in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
