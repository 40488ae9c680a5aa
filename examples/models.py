"""Any model by name or file, with weights of one's own, for the classes of a folder."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import timm
import torchvision
from classes import keep_classes, some_rows
from images import DataError
from torch import Tensor, nn

from isw_cli.errors import InputError
from isw_cli.weights import read

__all__ = ["load_model"]


def load_model(name: str, weights: Path | None, folders: Sequence[str]) -> nn.Module:
    """A model for these classes.

    Args:
        name: Of a timm model, else of torchvision, or ``torchvision:NAME``; or ``FILE.py:FUNCTION``, a function without
            arguments that makes the model.
        weights: Its state_dict; None: random. Weights for other classes than the folder's: where folders are named
            after some of ImageNet's, those rows of the classifier are taken, else it begins anew.

    Raises:
        DataError: No such model, function or file, or weights of another model.
    """
    if weights is None:
        return _made(name, len(folders))
    model = _made(name, len(folders))
    own = model.state_dict()
    state = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")} | _read(weights)
    odd = [key for key, value in own.items() if key not in state or state[key].shape != value.shape]
    if not odd and len(state) == len(own):
        model.load_state_dict(state)
        return model
    return _with_other_classes(name, model, state, odd, folders, weights)


def _with_other_classes(
    name: str, model: nn.Module, state: dict[str, Tensor], odd: list[str], folders: Sequence[str], weights: Path
) -> nn.Module:
    """Where all but a classifier's weight and bias fits: some of its rows, or a new one."""
    known = {len(state[key]) for key in odd if key in state and state[key].dim() and state[key].dim() in (1, 2, 4)}
    if len(odd) > 4 or len(known) != 1 or state.keys() != model.state_dict().keys():
        raise DataError(f"{weights}: no weights of {name}: {_difference(model.state_dict(), state, odd)}")
    (classes,) = known
    if timm.is_model(name):
        whole = timm.create_model(name, num_classes=classes)
        whole.load_state_dict(state)
        if rows := some_rows(whole, folders):
            keep_classes(whole, rows)
            print(f"the weights know {classes} classes, the folder has {len(rows)}: their rows are taken")
            return whole
    model.load_state_dict({key: model.state_dict()[key] if key in odd else value for key, value in state.items()})
    print(f"the weights know {classes} classes, the folder has {len(folders)}: {', '.join(odd)} begin anew")
    return model


def _difference(own: dict[str, Tensor], state: dict[str, Tensor], odd: Sequence[str]) -> str:
    missing = [key for key in own if key not in state]
    other = [key for key in state if key not in own]
    if missing or other:
        return f"missing {', '.join(missing[:3]) or 'nothing'}; of another {', '.join(other[:3]) or 'nothing'}"
    return f"{odd[0]} is {tuple(state[odd[0]].shape)} there and {tuple(own[odd[0]].shape)} here"


def _made(name: str, classes: int) -> nn.Module:
    file, _, function = name.partition(":")
    if file.endswith(".py"):
        return _from_file(Path(file), function)
    if timm.is_model(name):
        return timm.create_model(name, num_classes=classes)
    try:
        return torchvision.models.get_model(name.removeprefix("torchvision:"), weights=None, num_classes=classes)
    except ValueError as error:
        raise DataError(
            f"{name}: no model of timm or torchvision; a function of your own is FILE.py:FUNCTION"
        ) from error


def _from_file(file: Path, function: str) -> nn.Module:
    if not file.is_file():
        raise DataError(f"{file}: no such file")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        found = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise DataError(f"{file} has no function {function!r}: FILE.py:FUNCTION, one of {', '.join(found)}")
    model = getattr(module, function)()
    if not isinstance(model, nn.Module):
        raise DataError(f"{function} of {file} gave a {type(model).__name__}, and no torch.nn.Module")
    return model


def _read(weights: Path) -> dict[str, Tensor]:
    """A state_dict from safetensors, or from a torch file of tensors alone."""
    try:
        state = read(weights)
    except InputError as error:
        raise DataError(str(error)) from error
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(f"{weights}: a state_dict of tensors was expected")
    return {key.removeprefix("module."): value for key, value in state.items()}
