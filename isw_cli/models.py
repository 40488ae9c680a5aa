"""MODEL on the command line: a timm name, a folder of ours, or file.py:function."""

import difflib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from isw_cli.errors import InputError, line
from isw_cli.request import Request
from isw_cli.weights import fill
from isw_plugin import InstanceWisePruner, load_accelerated, load_pretrained
from isw_plugin.accelerate import LoadedModel
from isw_plugin.errors import ISWError

__all__ = ["Subject", "attached", "subject"]

_FUNCTION = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)")


@dataclass(frozen=True)
class Subject:
    """A model and what is known of it.

    Attributes:
        pruner: Where it has one already.
        random: Whether its weights are.
    """

    name: str
    model: nn.Module
    pruner: InstanceWisePruner | None = None
    random: bool = False


def subject(request: Request, classes: int | None = None) -> Subject:
    """The model that a user names.

    Args:
        classes: How many a timm model is made for; None: as many as it declares.

    Raises:
        InputError: There is none; says what is close.
    """
    name, weights = request.model, request.weights
    function, path = _FUNCTION.fullmatch(name), Path(name)
    if request.architecture is not None and (function or not path.is_dir()):
        raise InputError(f"--model {request.architecture} is for a saved folder, and {name} is none: leave it out")
    if function:
        found = _called(Path(function["file"]), function["name"])
    elif path.is_dir():
        if weights is not None:
            raise InputError(f"--weights: {name} is a saved folder, which has its own")
        return _loaded(path, request.architecture)
    elif path.suffix == ".py" or path.is_file():
        raise InputError(f"{name} is a file: name the function in it that makes the model, as {name}:make")
    else:
        found = _of_timm(name, classes, request.pretrained)
    if weights is not None:
        fill(found.model, weights)
        found = Subject(found.name, found.model, found.pruner)
    return found


def attached(found: Subject, inputs: Tensor | None, alpha: float = 0.5, beta: float = 1.0) -> InstanceWisePruner:
    """Its pruner as it is, or a new one with these thresholds."""
    if isinstance(found.model, LoadedModel):
        raise InputError(f"{found.name} is a fast model, which has no gates to set: name the gated model's folder")
    return found.pruner or InstanceWisePruner(found.model, inputs, alpha=alpha, beta=beta)


def _of_timm(name: str, classes: int | None, pretrained: bool) -> Subject:
    import timm

    architecture = name.removeprefix("timm/").partition(".")[0]
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), 3)
        hint = f"did you mean {' or '.join(close)}?" if close else "`timm.list_models()` has all names of timm"
        raise InputError(f"{name!r} is no timm model, no folder and no file.py:function: {hint}")
    options: dict[str, Any] = {} if classes is None or pretrained else {"num_classes": classes}
    try:
        model = timm.create_model(name.removeprefix("timm/"), pretrained=pretrained, **options)
    except Exception as error:  # no network, no such weights
        raise InputError(
            f"{name}: timm cannot make it: {line(error)}. --weights FILE takes weights that you have"
        ) from error
    return Subject(name, model.eval(), random=not pretrained)


def _called(file: Path, function: str) -> Subject:
    if not file.is_file():
        raise InputError(f"{file} does not exist: give file.py:function, a timm name or a saved folder")
    spec = importlib.util.spec_from_file_location(f"isw_model_{file.stem}", file)
    assert spec is not None  # of a .py file
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        made = getattr(module, function, None)
        found = made() if callable(made) else None
    except Exception as error:  # the user's own
        raise InputError(f"{file}:{function} raised {type(error).__name__}: {line(error)}") from error
    if made is None or not callable(made):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"{file} has no function {function!r}; it has {', '.join(names[:8]) or 'none'}")
    if isinstance(found, InstanceWisePruner):
        return Subject(f"{file}:{function}", found.model.eval(), found)
    if not isinstance(found, nn.Module):
        raise InputError(
            f"{file}:{function} gave a {type(found).__name__}: it has to return a torch.nn.Module or a pruner"
        )
    return Subject(f"{file}:{function}", found.eval())


def _loaded(folder: Path, architecture: str | None) -> Subject:
    fast = (folder / "accelerated.json").is_file() and not (folder / "pruner.json").is_file()
    if fast and architecture is not None:
        raise InputError(f"--model {architecture}: {folder} holds a fast model, which needs none: leave it out")
    model = None if architecture is None else _bare(architecture)
    try:
        if fast:
            return Subject(str(folder), load_accelerated(folder))
        pruner = load_pretrained(folder, model)
    except ISWError as error:
        hint = ". Here: --model file.py:function" if "load_pretrained(folder, model)" in str(error) else ""
        raise InputError(f"{folder}: {line(error)}{hint}") from error
    return Subject(str(folder), pruner.model, pruner)


def _bare(architecture: str) -> nn.Module:
    """What a function makes, without gates: the saved ones take their place."""
    function = _FUNCTION.fullmatch(architecture)
    if function is None:
        raise InputError(f"--model {architecture}: name a function that makes the model, as file.py:make")
    made = _called(Path(function["file"]), function["name"])
    if made.pruner is not None:
        made.pruner.remove()
    return made.model
