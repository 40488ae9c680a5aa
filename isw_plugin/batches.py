"""Batches as loaders give them, taken apart into a model's inputs and labels."""

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from isw_plugin.errors import SettingError
from isw_plugin.inputs import is_list_of_images

__all__ = ["Batch", "Batches", "batches_in", "fitting", "taken_apart"]

Batches = Iterable[Any]

_LABELS = ("labels", "label", "targets", "target", "y")


@dataclass(frozen=True)
class Batch:
    """Inputs and labels of some instances.

    Attributes:
        inputs: What the model takes: a tensor, a tuple of arguments, a dict of them by name, or a list of images.
        labels: A tensor, instances on axis 0, or what else stands for labels: a list or dict of such.
        instances: How many.
    """

    inputs: Any
    labels: Any
    instances: int

    @classmethod
    def of(cls, batch: Any) -> "Batch":
        """From what a loader gave.

        Raises:
            SettingError: There are no labels, or they are not those of a batch.
        """
        if isinstance(batch, Batch):
            return batch
        inputs, labels = taken_apart(batch)
        if labels is None:
            raise SettingError(
                f"the loader gave {_described(batch)}, without labels: a batch is (inputs, labels), or has a field "
                f"{' or '.join(map(repr, _LABELS))}"
            )
        labels = _as_tensor(labels)
        instances = _labelled(labels)
        return cls(_as_arguments(inputs, instances), labels, instances)

    def first(self, instances: int) -> "Batch":
        """The first of them."""
        if instances >= self.instances:
            return self
        inputs = self.inputs[:instances] if is_list_of_images(self.inputs) else _rows(self.inputs, instances)
        labels = self.labels[:instances] if isinstance(self.labels, list) else _rows(self.labels, instances)
        return Batch(inputs, labels, instances)


def batches_in(loader: Batches) -> Iterator[Any]:
    """The batches of a loader.

    Raises:
        SettingError: This is no loader, but one batch.
    """
    if isinstance(loader, Tensor | Mapping | str) or _is_pair(loader):
        raise SettingError(
            f"this is {_described(loader)}, one batch and not batches: pass a loader, or a list such as [images] or "
            "[(images, labels)]"
        )
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise SettingError(f"loader={loader!r}: a DataLoader, or a list of batches")
    return iter(loader)


def taken_apart(batch: Any) -> tuple[Any, Any]:
    """Inputs and labels of what a loader gave; labels None where it has none.

    Mappings, dataclasses and named tuples are read by name, other tuples and lists by position: what stands behind
    the labels (weights, indexes) is not looked at.
    """
    named = _named(batch)
    if named is not None:
        key = next((name for name in _LABELS if name in named), None)
        return {name: value for name, value in named.items() if name != key}, named[key] if key else None
    if isinstance(batch, Tensor):
        return batch, None
    if not isinstance(batch, tuple | list) or not batch:
        raise SettingError(f"the loader gave {_described(batch)}: a batch is inputs, (inputs, labels), or a dict")
    if all(isinstance(sample, Mapping) and sample.keys() & set(_LABELS) for sample in batch):
        raise SettingError(
            f"the loader gave a list of {len(batch)} samples: join them, as torch.utils.data.default_collate does"
        )
    inputs, labels = batch[0], batch[1] if len(batch) > 1 else None
    named = _named(inputs)
    if isinstance(labels, list | tuple) and labels and all(isinstance(target, Mapping) for target in labels):
        inputs = list(inputs) if isinstance(inputs, tuple) else inputs  # as many images: one argument
    return inputs if named is None else named, labels


def fitting(inputs: Any, model: nn.Module) -> Any:
    """What of a batch's named inputs the model's forward takes, or the one tensor among them.

    Raises:
        SettingError: It takes none of these names, and they are several.
    """
    if not isinstance(inputs, dict):
        return inputs
    parameters = inspect.signature(model.forward).parameters
    taken = {name: value for name, value in inputs.items() if name in parameters}
    if taken:
        rest = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        return inputs if rest else taken
    tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.dim() > 1]
    if len(tensors) == 1:
        return tensors[0]
    raise SettingError(
        f"{type(model).__name__}.forward takes {', '.join(parameters) or 'nothing'}, and the batch holds "
        f"{', '.join(inputs) or 'no inputs'}: pass batches of (inputs, labels), or forward="
    )


def _named(batch: Any) -> dict[str, Any] | None:
    """The fields of a mapping, a dataclass, or a tuple with a name for its labels."""
    if isinstance(batch, Mapping):
        return dict(batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    names = getattr(batch, "_fields", ())
    return dict(zip(names, batch, strict=True)) if set(names) & set(_LABELS) else None


def _as_arguments(inputs: Any, instances: int) -> Any:
    """default_collate makes lists of tuples: tensors of the whole batch, side by side, are a forward's arguments."""
    if not isinstance(inputs, list) or len(inputs) == instances:
        return inputs
    whole = all(isinstance(part, Tensor) and part.dim() and len(part) == instances for part in inputs)
    return tuple(inputs) if whole else inputs


def _as_tensor(labels: Any) -> Any:
    if isinstance(labels, Mapping):
        return dict(labels)
    try:
        return torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):  # no numbers, or rows of several lengths
        return labels if isinstance(labels, str) or not isinstance(labels, Iterable) else list(labels)


def _labelled(labels: Any) -> int:
    if isinstance(labels, list):
        return len(labels)
    leaves = [leaf for leaf in tree_leaves(labels) if isinstance(leaf, Tensor)]
    if not leaves or not leaves[0].dim():
        raise SettingError(
            f"the labels are {_described(labels)}, not those of a batch: a data set gives single images, so pass "
            "DataLoader(data_set, batch_size=...)"
        )
    return len(leaves[0])


def _rows(values: Any, instances: int) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor[:instances] if tensor.dim() else tensor, values)


def _is_pair(loader: Any) -> bool:
    """Whether this is images and their labels."""
    if not isinstance(loader, tuple | list) or len(loader) != 2 or not all(isinstance(part, Tensor) for part in loader):
        return False
    return bool(loader[1].dim() <= 1 < loader[0].dim())


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict of {', '.join(map(str, value)) or 'nothing'}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{value!r}, a {type(value).__name__}"
