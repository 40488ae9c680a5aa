"""A folder that holds a model, slimmed or not, and its pruner: safetensors and JSON, never pickle.

``pruner.json`` names the file of the weights by its content and is replaced last and at once, so a reader
finds the old pair or the new one, whenever writing stops.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isw_plugin.errors import StateMismatchError, UnsupportedError
from isw_plugin.structure import describe, differences

__all__ = ["decoded_inputs", "encoded_inputs", "origin", "read", "rebuilt", "tensors_of", "write"]

_VERSION = 1
_PARTS = {
    "model": ("name", "architecture", "options", "edited", "modules"),
    "weights": ("file", "sha256"),
    "pruner": ("layers", "exclude", "inputs", "state"),
}
_FILE = "pruner.json"
_OPTIONS = ("in_chans", "drop_rate", "global_pool")  # what timm models remember of how they were made


def write(folder: str | os.PathLike[str], model: nn.Module, pruner: Mapping[str, Any]) -> None:
    """Save a model and JSON facts about its pruner; what was saved in the folder before goes.

    Raises:
        UnsupportedError: The model's state_dict holds something else than tensors. Nothing is written.
    """
    from safetensors.torch import save

    weights = save(_plain_tensors(model))
    digest = hashlib.sha256(weights).hexdigest()
    name = f"model-{digest[:16]}.safetensors"
    facts = {
        "version": _VERSION,
        "model": {"name": type(model).__name__, **origin(model), "modules": describe(model)},
        "weights": {"file": name, "sha256": digest},
        "pruner": dict(pruner),
    }
    document = json.dumps(facts, indent=1, allow_nan=False)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    _replace(path / name, weights)
    _replace(path / _FILE, document.encode())
    for old in path.glob("model-*.safetensors"):
        if old.name != name:
            old.unlink()


def read(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The facts of a folder.

    Raises:
        FileNotFoundError: Nothing was saved there.
        StateMismatchError: The file is of another version, or damaged.
    """
    path = Path(folder) / _FILE
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
        version = facts["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise StateMismatchError(f"{path} was not written by save_pretrained, or is damaged: {error!r}") from error
    if version != _VERSION:
        raise StateMismatchError(f"{path} is of version {version}, and this isw_plugin reads version {_VERSION}")
    lacking = [f"{part}.{key}" for part, keys in _PARTS.items() for key in keys if key not in facts.get(part, ())]
    if lacking:
        raise StateMismatchError(f"{path} is damaged: it has no {', '.join(lacking)}")
    return facts


def tensors_of(folder: str | os.PathLike[str], facts: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights that belong to the facts.

    Raises:
        StateMismatchError: Their file is missing or has other content.
    """
    from safetensors.torch import load

    path = Path(folder) / Path(facts["weights"]["file"]).name
    content = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(content).hexdigest() != facts["weights"]["sha256"]:
        raise StateMismatchError(f"{path} is missing or was changed: its checksum is not the one in {_FILE}")
    return dict(load(content))


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
        options |= _options(model, _sketch(architecture, options))
        other = differences(describe(model), _sketch(architecture, options))
    except Exception as error:  # whatever a model's constructor raises
        return unknown | {"edited": f"timm.create_model({architecture!r}) fails: {error}"}
    reason = f"it is not timm's {architecture}: {'; '.join(other[:3])}" if other else None
    return {"architecture": architecture, "options": {} if other else options, "edited": reason}


def rebuilt(architecture: str, options: Mapping[str, Any], device: str = "cpu") -> nn.Module:
    """A model of timm's, without pretrained weights.

    Raises:
        StateMismatchError: timm has no such model.
    """
    import timm

    if not timm.is_model(architecture):
        raise StateMismatchError(f"timm {timm.__version__} has no model {architecture!r}: pass the model")
    with warnings.catch_warnings(action="ignore"), torch.device(device):
        model: nn.Module = timm.create_model(architecture, pretrained=False, **options)
    return model


def encoded_inputs(inputs: Any) -> Any:
    """Example inputs as JSON values: shapes and types of tensors.

    Raises:
        UnsupportedError: They hold something else than tensors, numbers, words, tuples, lists and dicts.
    """
    if isinstance(inputs, Tensor):
        return {"shape": list(inputs.shape), "dtype": str(inputs.dtype).removeprefix("torch.")}
    if isinstance(inputs, tuple | list):
        return {type(inputs).__name__: [encoded_inputs(value) for value in inputs]}
    if isinstance(inputs, dict):
        return {"dict": {name: encoded_inputs(value) for name, value in inputs.items()}}
    if inputs is None or isinstance(inputs, bool | int | float | str):
        return {"value": inputs}
    raise UnsupportedError(f"example_inputs hold a {type(inputs).__name__}, which JSON cannot")


def decoded_inputs(encoded: Mapping[str, Any]) -> Any:
    """What ``encoded_inputs`` was given, its tensors on ``meta``."""
    if "shape" in encoded:
        return torch.empty(encoded["shape"], dtype=getattr(torch, encoded["dtype"]), device="meta")
    if "dict" in encoded:
        return {name: decoded_inputs(value) for name, value in encoded["dict"].items()}
    if "value" in encoded:
        return encoded["value"]
    kind, values = next(iter(encoded.items()))
    return {"tuple": tuple, "list": list}[kind](decoded_inputs(value) for value in values)


def _sketch(architecture: str, options: Mapping[str, Any]) -> nn.Module:
    """A model of timm's to compare with, without weights if it can be."""
    try:
        return rebuilt(architecture, options, "meta")
    except RuntimeError:  # constructors of older timm compute with weights
        with torch.random.fork_rng(devices=[]):
            return rebuilt(architecture, options)


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


def _plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    other = [f"{key} ({type(value).__name__})" for key, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise UnsupportedError(f"only tensors can be saved without pickle, and the state_dict holds {', '.join(other)}")
    # Copies, since tied weights share memory and a file has none to share.
    form = torch.contiguous_format
    return {key: value.detach().to("cpu", copy=True, memory_format=form) for key, value in state.items()}


def _replace(target: Path, content: bytes) -> None:
    draft = target.with_name(f".{target.name}.{os.getpid()}.draft")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(target)
