"""Bring back what ``save_pretrained`` wrote."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isw_plugin.copies import copy_of
from isw_plugin.errors import AttachError, NothingSavedError, ProbeError, StateMismatchError, UnsupportedError
from isw_plugin.folders import DOCUMENTS, path_of
from isw_plugin.gates import Gate, with_parameters
from isw_plugin.inputs import device_of
from isw_plugin.pruner import InstanceWisePruner
from isw_plugin.saving import rebuilt
from isw_plugin.sites.inputs import resizes
from isw_plugin.stored import decoded_inputs, stored
from isw_plugin.structure import differences, resize
from isw_plugin.wrappers import attachable

__all__ = ["load_pretrained"]


def load_pretrained(
    folder: str | os.PathLike[str], model: nn.Module | None = None, *, gate: Gate | None = None
) -> InstanceWisePruner:
    """Restore a model and its pruner: weights, widths, sites, gate, thresholds, on or off.

    Nothing is unpickled and nothing is downloaded.

    Args:
        folder: What ``InstanceWisePruner.save_pretrained`` wrote.
        model: The architecture before static pruning, edited as the saved one was; it takes over the saved
            widths and weights, in place. None: timm makes it, if the saved model was not edited.
        gate: A gate of the saved type, for one that is neither ours nor an installed package's; its
            parameters become the saved ones.

    Returns:
        The pruner; its ``model`` is in eval mode.

    Raises:
        SettingError: The folder is no path.
        NothingSavedError: Nothing was saved there. A FileNotFoundError, too.
        StateMismatchError: Another version, a damaged file, another architecture, no model where one is needed,
            other sites, a gate that is not known, or weights with which the model does not run. Nothing is
            changed then. Says what does not fit.
        AttachError, UnsupportedError: No pruner can be attached to the model.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from torch import nn
        >>> from isw_plugin import InstanceWisePruner, load_pretrained
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> like_it = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     InstanceWisePruner(model, torch.rand(2, 3, 8, 8), alpha=0.25).save_pretrained(folder)
        ...     pruner = load_pretrained(folder, like_it)  # a timm model that was not edited needs none
        >>> pruner.gate
        CVGate(alpha=0.25, beta=1.0)
    """
    if model is not None and not isinstance(model, nn.Module):
        raise StateMismatchError(
            f"model={model!r} is no module: pass the architecture, or None for an unedited timm model"
        )
    path = path_of(folder)
    try:
        facts, tensors = stored(path)
    except FileNotFoundError as error:
        raise NothingSavedError(_what_is_there(path, Path(error.filename).name)) from error
    if model is None:
        model = _remade(facts["model"])
    model = attachable(model)
    _require_same(facts, model)
    _rehearse(model, facts, tensors, gate)
    return _attached(_filled(model, facts, tensors), facts["pruner"], gate)


def _what_is_there(folder: Path, file: str) -> str:
    if (folder / DOCUMENTS[1]).is_file():
        return f"{folder} holds an accelerated model, no gated one: load_accelerated(folder) loads it"
    found = f"has no {file}" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
    below = sorted(path.parent.name for path in folder.glob(f"*/{file}")) if folder.is_dir() else []
    nearest = f"; one was saved in its {', '.join(below[:5])}" if below else ""
    return f"nothing was saved by save_pretrained in {folder}, which {found}{nearest}"


def _remade(stored: dict[str, Any]) -> nn.Module:
    if stored["edited"]:
        raise StateMismatchError(
            f"this {stored['name']} cannot be made again from its name, since {stored['edited']}. Pass the "
            "architecture as it was before static pruning: load_pretrained(folder, model)"
        )
    try:
        return rebuilt(stored["architecture"] or "", stored["options"])
    except StateMismatchError:
        raise
    except Exception as error:  # whatever a model's constructor raises
        raise StateMismatchError(f"timm cannot make {stored['architecture']!r} as it was saved: {error}") from error


def _require_same(facts: Mapping[str, Any], model: nn.Module) -> None:
    stored = facts["model"]
    other = differences(stored["modules"], model)
    if other and (ran := _that_ran(model, facts["pruner"]["inputs"])) is not None:
        other = differences(stored["modules"], ran)  # without what a first forward sets (scales of RoIAlign)
    if other:
        more = f"; and {len(other) - 5} more" if len(other) > 5 else ""
        raise StateMismatchError(
            f"a {stored['name']} was saved, and {type(model).__name__} is another: {'; '.join(other[:5])}{more}"
        )


def _that_ran(model: nn.Module, inputs: Any) -> nn.Module | None:
    """A copy after a forward on inputs of the stored form; None where it does not take them."""
    for way in resizes(decoded_inputs(inputs)):
        copied = copy_of(model).eval()
        with torch.no_grad(), suppress(Exception):  # whatever a forward raises
            args, kwargs = way(2, device_of(model))
            copied(*args, **kwargs)
            return copied
    return None


def _rehearse(model: nn.Module, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], gate: Gate | None) -> None:
    """Do all of it on a copy: what fails there has changed nothing."""
    try:
        try:
            shapes = {key: tensor.to("meta") for key, tensor in tensors.items()}
            pruner = _attached(_filled(_on_meta(model), facts, shapes), facts["pruner"], gate)
        except ProbeError:  # models that read values do not run on meta
            pruner = _attached(_filled(copy_of(model), facts, tensors), facts["pruner"], gate)
        for override in ({}, *pruner.per_site.values()):
            _require_types(with_parameters(pruner.gate, **{k: v for k, v in override.items() if k != "lambda_"}))
    except (StateMismatchError, AttachError, UnsupportedError):
        raise
    except ProbeError as error:
        raise StateMismatchError(f"the stored weights do not fit each other: {error}") from error
    except Exception as error:  # whatever a pattern, a gate or a model makes of what is stored
        raise StateMismatchError(f"what is stored does not fit the model: {error}") from error


def _require_types(gate: Gate) -> None:
    if not is_dataclass(gate) or isinstance(gate, type):
        return
    for field in fields(gate):
        value = getattr(gate, field.name)
        allowed = {float: (int, float), int: (int,), str: (str,), bool: (bool,)}.get(field.type)
        if allowed and type(value) not in allowed:
            raise StateMismatchError(f"{field.name}={value!r} of the stored {type(gate).__name__} is no {field.type}")


def _on_meta(model: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
    memo |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy_of(model, memo)


def _filled(model: nn.Module, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    resize(model, facts["model"]["modules"], tensors)
    if any(tensor.is_meta for tensor in tensors.values()):
        return model.eval()
    empty = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if empty:
        raise UnsupportedError(f"the file does not hold the values of {', '.join(empty[:3])}: pass the model")
    model.load_state_dict(dict(tensors))
    return model.eval()


def _attached(model: nn.Module, stored: Mapping[str, Any], gate: Gate | None) -> InstanceWisePruner:
    state, layers, exclude = stored["state"], stored["layers"], stored["exclude"]
    if any(pattern.startswith("re:") for patterns in (layers, exclude) for pattern in _listed(patterns)):
        layers, exclude = list(state["sites"]), ()  # a regular expression of somebody else's can take for ever
    inputs = decoded_inputs(stored["inputs"])
    pruner = InstanceWisePruner(
        model, inputs, gate=gate or "cv", layers=layers, exclude=exclude, scope=state.get("scope", "all")
    )
    pruner.load_state_dict(state)
    return pruner


def _listed(patterns: str | list[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else patterns
