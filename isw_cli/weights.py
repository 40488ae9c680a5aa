"""--weights on the command line and in examples: a file of anybody's, into a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from isw_cli.errors import InputError, line

__all__ = ["fill", "read"]

_AGAIN = "copy or download it again"
_SAVE = "torch.save(model.state_dict(), FILE)"


def fill(model: nn.Module, file: Path) -> None:
    """Give a model the weights in a file.

    Raises:
        InputError: There are none, or they are of another model.
    """
    state = read(file)
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise InputError(
            f"--weights {file} does not fit the model: {_difference(model.state_dict(), state) or line(error)}: "
            "name the model that it was saved from, and images of its classes"
        ) from error


def read(file: Path) -> dict[str, Any]:
    """A state_dict from a safetensors file, or from a torch file without code.

    Raises:
        InputError: There is none that can be read.
    """
    if not file.is_file():
        raise InputError(f"--weights {file} {'is a folder: name a file in it' if file.is_dir() else 'does not exist'}")
    try:
        state: Any = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except Exception as error:  # whatever is said of a damaged file, such as PyTorch's page that advises to run it
        raise InputError(f"--weights {file}: no readable weights: {_why(file)}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"--weights {file} holds no state_dict: write one by {_SAVE}")
    return dict(state)


def _why(file: Path) -> str:
    if not file.stat().st_size:
        return f"the file is empty: {_AGAIN}"
    if file.suffix == ".safetensors":
        return f"damaged, or no safetensors file: {_AGAIN}"
    return f"damaged, or no state_dict: {_AGAIN}, or write it by {_SAVE}. Safetensors are named .safetensors"


def _difference(own: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    both = {key: [tuple(getattr(of[key], "shape", ())) for of in (state, own)] for key in own if key in state}
    other = [f"{key} is {there} there and {here} here" for key, (there, here) in both.items() if there != here]
    found = ("it lacks", missing), ("the model lacks", [key for key in state if key not in own]), ("", other)
    return "; ".join(f"{words} {_some(keys)}".strip() for words, keys in found if keys)


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
