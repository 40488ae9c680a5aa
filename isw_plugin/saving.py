"""A folder that holds a model, slimmed or not, and its pruner: safetensors and JSON (``folders``), never pickle."""

import json
import math
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from isw_plugin.errors import StateMismatchError, UnsupportedError
from isw_plugin.folders import path_of, replace, tensor_file
from isw_plugin.heads import heads_tensors
from isw_plugin.learned import learned_tensors
from isw_plugin.stored import FILE, VERSION
from isw_plugin.structure import describe, differences

__all__ = ["encoded_inputs", "origin", "rebuilt", "write"]

_OPTIONS = ("in_chans", "drop_rate", "global_pool")  # what timm models remember of how they were made
_LARGE = 1 << 20  # elements; buffers that a constructor computes have fewer
_MAKERS = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)


def write(
    folder: str | os.PathLike[str],
    model: nn.Module,
    pruner: Mapping[str, Any],
    per_site: Mapping[str, Mapping[str, Any]],
) -> None:
    """Save a model and facts about its pruner; what was saved in the folder before goes, and nothing else.

    Args:
        folder: Made if missing.
        pruner: ``layers``, ``exclude``, ``inputs`` and ``state``.
        per_site: What the state's patterns mean, by site name.

    Raises:
        SettingError: The folder is no path.
        UnsupportedError: The model's state_dict holds something else than tensors, or the pruner's something
            else than plain values. Nothing is written.
        OSError: It cannot be written; what was saved before is still there.
    """
    path = path_of(folder)
    state, heads = heads_tensors(pruner["state"])
    state, learned = learned_tensors(state)
    held = {"weights": ("model", model.state_dict()), "heads": ("heads", heads), "learned": ("gates", learned)}
    files = {part: tensor_file(*named) for part, named in held.items() if part == "weights" or named[1]}
    facts = {
        "version": VERSION,
        "model": {"name": type(model).__name__, **origin(model), "modules": describe(model)},
        **{part: {"file": file.name, "sha256": file.digest} for part, file in files.items()},
        "pruner": {**pruner, "state": _plain(_without_expressions(state, per_site))},
    }
    document = json.dumps(facts, indent=1, allow_nan=False).encode()
    replace(path, FILE, files.values(), document)


def origin(model: nn.Module) -> dict[str, Any]:
    """How timm makes a model that differs from this one in widths alone, or why it makes none.

    Returns:
        ``architecture`` (timm's name, or None), ``options`` of ``timm.create_model``, and ``edited``, the
        reason why the model must be passed when it is loaded, or None.
    """
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    unknown: dict[str, Any] = {"architecture": architecture, "options": {}}
    if not architecture:
        return unknown | {"edited": "it is no timm model"}
    options: dict[str, Any] = {"num_classes": getattr(model, "num_classes", None)}
    try:
        options |= _options(model, rebuilt(architecture, options))
        other = differences(describe(model), rebuilt(architecture, options))
    except Exception as error:  # whatever a model's constructor raises
        return unknown | {"edited": f"timm.create_model({architecture!r}) fails: {error}"}
    reason = f"it is not timm's {architecture}: {'; '.join(other[:3])}" if other else None
    return {"architecture": architecture, "options": {} if other else options, "edited": reason}


def rebuilt(architecture: str, options: Mapping[str, Any]) -> nn.Module:
    """A model of timm's, without pretrained weights; its large tensors are on ``meta``, so any name costs little.

    Raises:
        StateMismatchError: timm has no such model.
    """
    import timm

    if not timm.is_model(architecture):
        raise StateMismatchError(f"timm {timm.__version__} has no model {architecture!r}: pass the model")
    with warnings.catch_warnings(action="ignore"), torch.random.fork_rng(devices=[]), _Frugal():
        model: nn.Module = timm.create_model(architecture, pretrained=False, **options)
    return model


class _Frugal(TorchFunctionMode):
    """Makes large tensors without memory. On ``meta`` as a whole, constructors that compute with numbers fail."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in _MAKERS or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        made = func(*args, **kwargs | {"device": "meta"})
        return made if made.numel() > _LARGE else func(*args, **kwargs | {"device": "cpu"})


def encoded_inputs(inputs: Any) -> Any:
    """Example inputs as JSON values: shapes and types of tensors.

    Raises:
        UnsupportedError: They hold something else than tensors, numbers, words, tuples, lists and dicts.
    """
    if isinstance(inputs, Tensor):
        return {"shape": list(inputs.shape), "dtype": str(inputs.dtype).removeprefix("torch.")}
    if type(inputs) in (tuple, list):
        return {type(inputs).__name__: [encoded_inputs(value) for value in inputs]}
    if isinstance(inputs, dict) and all(isinstance(name, str) for name in inputs):
        return {"dict": {name: encoded_inputs(value) for name, value in inputs.items()}}
    if isinstance(inputs, float) and not math.isfinite(inputs):
        return {"number": str(inputs)}
    if inputs is None or isinstance(inputs, bool | int | float | str):
        return {"value": inputs}
    raise UnsupportedError(f"example_inputs hold a {type(inputs).__name__}, which JSON cannot")


def _options(model: nn.Module, default: nn.Module) -> dict[str, Any]:
    """Options of timm that this model was made with, as far as they show."""
    found = {
        name: getattr(model, name)
        for name in _OPTIONS
        if isinstance(getattr(model, name, None), int | float | str)
        and getattr(model, name) != getattr(default, name, None)
    }
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None and size != getattr(getattr(default, "patch_embed", None), "img_size", None):
        found["img_size"] = list(size)
    return found


def _without_expressions(state: Mapping[str, Any], per_site: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The state with site names for regular expressions, which are not evaluated when they come from a file."""
    regular = any(pattern.startswith("re:") for pattern in state["per_site"])
    return {**state, "per_site": per_site if regular else state["per_site"]}


def _plain(value: Any) -> Any:
    """A state as JSON has it: numbers of numpy and tensors become Python's, infinities words (see ``structure``)."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    try:
        number = value.item() if hasattr(value, "item") else value
    except (ValueError, RuntimeError):  # more than one
        number = value
    if isinstance(number, float) and not math.isfinite(number):
        return str(number)
    if not isinstance(number, bool | int | float | str | None) or number in ("inf", "-inf", "nan"):
        raise UnsupportedError(f"a setting of the pruner or its gate is {number!r}, which JSON cannot hold")
    return number
