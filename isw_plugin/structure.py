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
        model: Changed in place; its new tensors are not filled.
        stored: Its description, widths aside.
        tensors: By state_dict key.

    Raises:
        StateMismatchError: A tensor that the model has no place for, or with another number of axes. Nothing is
            changed.
    """
    places = dict(_places(model))
    state = model.state_dict()
    _require_fit(state, tensors)
    for key, tensor in tensors.items():
        module, name = places[key]
        old = getattr(module, name)
        if old.shape != tensor.shape or old.dtype != tensor.dtype:
            setattr(module, name, _like(old, tensor))
    for name, module in model.named_modules():
        for attribute, value in stored[name]["widths"].items():
            setattr(module, attribute, tuple(value) if isinstance(value, list) else value)


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
        f"{key} is {tuple(state[key].shape)} here and {tuple(tensor.shape)} there"
        for key, tensor in tensors.items()
        if key in state and state[key].dim() != tensor.dim()
    ]
    if wrong:
        raise StateMismatchError(f"the stored weights do not fit the model: {'; '.join(wrong[:5])}")


def _like(old: Tensor, tensor: Tensor) -> Tensor:
    channels_last = old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last) and not old.is_contiguous()
    form = torch.channels_last if channels_last else torch.contiguous_format
    new = torch.empty(tensor.shape, dtype=tensor.dtype, device=old.device, memory_format=form)
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
