"""Bring back what ``save_pretrained`` wrote."""

import os
from pathlib import Path
from typing import Any

from torch import nn

from isw_plugin.errors import ProbeError, StateMismatchError
from isw_plugin.gates import Gate
from isw_plugin.pruner import InstanceWisePruner
from isw_plugin.saving import decoded_inputs, read, rebuilt, tensors_of
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
        FileNotFoundError: Nothing was saved there.
        StateMismatchError: Another version, a damaged file, another architecture, or no model where one is
            needed: nothing is changed then. Or other sites, a gate that is not known, or weights with which
            the model does not run: it has them then, and no pruner. Says what does not fit.
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
    try:
        facts = read(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(_what_is_there(Path(folder), Path(error.filename).name)) from error
    stored = facts["model"]
    if model is None:
        model = _remade(stored)
    model = attachable(model)
    _require_same(stored, model)
    tensors = tensors_of(folder, facts)
    resize(model, stored["modules"], tensors)
    model.load_state_dict(tensors)
    return _attached(model.eval(), facts["pruner"], gate)


def _what_is_there(folder: Path, file: str) -> str:
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
    return rebuilt(stored["architecture"], stored["options"])


def _require_same(stored: dict[str, Any], model: nn.Module) -> None:
    other = differences(stored["modules"], model)
    if other:
        more = f"; and {len(other) - 5} more" if len(other) > 5 else ""
        raise StateMismatchError(
            f"a {stored['name']} was saved, and {type(model).__name__} is another: {'; '.join(other[:5])}{more}"
        )


def _attached(model: nn.Module, stored: dict[str, Any], gate: Gate | None) -> InstanceWisePruner:
    state = stored["state"]
    inputs = decoded_inputs(stored["inputs"])
    chosen = {"layers": stored["layers"], "exclude": stored["exclude"], "scope": state.get("scope", "all")}
    try:
        pruner = InstanceWisePruner(model, inputs, gate=gate or "cv", **chosen)
    except ProbeError as error:
        raise StateMismatchError(f"the stored weights do not fit each other: {error}") from error
    try:
        pruner.load_state_dict(state)
    except Exception:
        pruner.remove()
        raise
    return pruner
