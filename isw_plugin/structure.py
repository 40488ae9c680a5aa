"""What a model is besides its weights: its modules, their settings and their widths, as plain JSON values."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from isw_plugin.errors import StateMismatchError

__all__ = ["WIDTHS", "describe", "differences", "resize"]

# What static pruning changes: sizes that follow from the shapes of weights, and what attention derives from them.
WIDTHS = frozenset(
    (
        "in_channels",
        "out_channels",
        "groups",
        "in_features",
        "out_features",
        "num_features",
        "head_hidden_size",
        "normalized_shape",
        "num_channels",
        "num_groups",
        "num_heads",
        "head_dim",
        "attn_dim",
        "embed_dim",
        "num_parameters",
    )
)
_SHAPED = ("weight", "running_mean")  # what widths follow from
_IGNORED = frozenset(["training", "grad_checkpointing", "fused_attn"])  # ways to run, not what is computed

Description = dict[str, dict[str, Any]]


def describe(model: nn.Module) -> Description:
    """By module name: its class, its widths, and its other settings that are numbers, words or lists of these."""
    return {name: _described(module) for name, module in model.named_modules()}


def differences(stored: Mapping[str, Mapping[str, Any]], model: nn.Module) -> list[str]:
    """What sets a model apart from a stored description, widths aside; "there" is the description."""
    here = describe(model)
    found = [f"there is no module {name} here" for name in stored if name not in here]
    found += [f"there is no module {name} there" for name in here if name not in stored]
    for name in (name for name in here if name in stored):
        found += _module_differences(name or "the model", stored[name], here[name])
    return found


def resize(model: nn.Module, stored: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> None:
    """Give a model the stored widths, and its parameters and buffers the shapes and types of these tensors.

    Args:
        model: Changed in place; its new tensors are not filled. What is on ``meta`` comes to the tensors' device.
        stored: Its description, widths aside.
        tensors: By state_dict key.

    Raises:
        StateMismatchError: A tensor that the model has no place for, of another kind or with another number of
            axes, or widths that are not those of the tensors. Nothing is changed.
    """
    places = dict(_places(model))
    _require_fit(model.state_dict(), tensors)
    changes = [change for name, module in model.named_modules() for change in _changes(module, stored[name]["widths"])]
    _require_widths(stored, tensors)
    made: dict[int, tuple[Tensor, Tensor]] = {}  # by id of the old one, which lives here as well: tied ones stay tied
    for key, tensor in tensors.items():
        module, name = places[key]
        old = getattr(module, name)
        if old.shape != tensor.shape or old.dtype != tensor.dtype or old.is_meta != tensor.is_meta:
            _, new = made.get(id(old), (old, old))
            if new.shape != tensor.shape or new.dtype != tensor.dtype or new is old:
                new = _like(old, tensor)
                made[id(old)] = old, new
            setattr(module, name, new)
    for module, name, value in changes:
        setattr(module, name, value)


def _described(module: nn.Module) -> dict[str, Any]:
    plain = {name: _plain(value) for name, value in vars(module).items() if not name.startswith("_")}
    settings = {name: value[0] for name, value in plain.items() if value is not None and name not in _IGNORED}
    return {
        "type": f"{type(module).__module__}.{type(module).__qualname__}",
        "widths": {name: value for name, value in settings.items() if name in WIDTHS},
        "settings": {name: value for name, value in settings.items() if name not in WIDTHS},
    }


def _plain(value: Any) -> tuple[Any] | None:
    """The value as JSON has it, in a tuple, or None where it has none; infinities are words."""
    if isinstance(value, float):
        return (value,) if abs(value) < float("inf") else (str(value),)
    if value is None or isinstance(value, bool | int | str):
        return (value,)
    if isinstance(value, tuple | list):
        items = [_plain(item) for item in value]
        return None if any(item is None for item in items) else ([item[0] for item in items if item],)
    return None


def _module_differences(name: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    if there["type"] != here["type"]:
        yield f"{name} is {here['type']} here and {there['type']} there"
        return
    for setting in dict.fromkeys([*here["settings"], *there["settings"]]):
        values = [side["settings"].get(setting) for side in (here, there)]
        if values[0] != values[1]:
            yield f"{name}.{setting} is {values[0]!r} here and {values[1]!r} there"


def _places(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        buffers = (name for name in module._buffers if name not in module._non_persistent_buffers_set)
        owned = [*module._parameters, *buffers]
        yield from ((f"{prefix}.{name}" if prefix else name, (module, name)) for name in owned)


def _require_fit(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    wrong = [f"no {key} there" for key in state if key not in tensors]
    wrong += [f"no {key} here" for key in tensors if key not in state]
    wrong += [
        f"{key} is {state[key].dtype} here and {tensor.dtype} there"
        for key, tensor in tensors.items()
        if key in state and _kind(state[key].dtype) != _kind(tensor.dtype)
    ]
    wrong += [
        f"{key} is {tuple(state[key].shape)} here and {tuple(tensor.shape)} there"
        for key, tensor in tensors.items()
        if key in state and state[key].dim() != tensor.dim()
    ]
    if wrong:
        raise StateMismatchError(f"the stored weights do not fit the model: {'; '.join(wrong[:5])}")


def _changes(module: nn.Module, widths: Mapping[str, Any]) -> Iterator[tuple[nn.Module, str, Any]]:
    for name, value in widths.items():
        here = vars(module).get(name)
        if _plain(here) == (value,):
            continue
        several = value if isinstance(value, list) else [value]
        counts = all(type(width) is int and 0 <= width < 1 << 31 for width in several)
        alike = here is None or (isinstance(value, list) == isinstance(here, list | tuple))
        if not counts or not alike or isinstance(here, bool | str) or hasattr(type(module), name):
            raise StateMismatchError(f"{name} of a {type(module).__name__} cannot become {str(value)[:100]}")
        yield module, name, tuple(value) if isinstance(value, list) and not isinstance(here, list) else value


def _require_widths(stored: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> None:
    for module, there in stored.items():
        prefix, kind = f"{module}." if module else "", there["type"].rpartition(".")[2]
        shapes = {name: tensors[prefix + name].shape for name in _SHAPED if prefix + name in tensors}
        for name, width in _widths_of(kind, there["widths"], shapes).items():
            if there["widths"].get(name, width) != width:
                raise StateMismatchError(
                    f"the stored weights do not fit each other: {prefix}{name} is {str(there['widths'][name])[:100]}, "
                    f"and by its weights it is {width}"
                )


def _widths_of(kind: str, widths: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """The widths of one of torch's own layers and norms that follow from its tensors."""
    first, *others = shapes.get("weight") or shapes.get("running_mean") or (None,)
    if first is None:
        return {}
    if kind == "Linear":
        return {"out_features": first, "in_features": others[0]}
    if kind in ("Conv1d", "Conv2d", "Conv3d"):
        groups = widths.get("groups", 1)
        return {"out_channels": first, "in_channels": others[0] * groups if isinstance(groups, int) else None}
    if kind in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"):
        return {"num_features": first}
    if kind == "LayerNorm":
        return {"normalized_shape": [first, *others]}
    return {"num_channels": first} if kind == "GroupNorm" else {}


def _kind(dtype: torch.dtype) -> tuple[bool, bool, bool]:
    return dtype.is_floating_point, dtype.is_complex, dtype is torch.bool


def _like(old: Tensor, tensor: Tensor) -> Tensor:
    channels_last = old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last) and not old.is_contiguous()
    form = torch.channels_last if channels_last else torch.contiguous_format
    device = tensor.device if old.is_meta or tensor.is_meta else old.device
    new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device, memory_format=form)
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
