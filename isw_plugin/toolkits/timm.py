"""Beside timm's training: feature decay in its tasks, and in its own script by one more argument file.

    python -m isw_plugin.toolkits.timm --isw decay.yaml train.py DATA -c args.yaml ...

``train.py`` is timm's, as it is; ``decay.yaml`` holds what ``InstanceWisePruner`` takes, such as
``lambda_: 1.0e-6``. Under torchrun: ``torchrun -m isw_plugin.toolkits.timm ...``.
"""

import argparse
import difflib
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any
from weakref import WeakSet

import yaml
from torch import Tensor, nn

from isw_plugin.errors import AttachError, MissingExtraError, SettingError
from isw_plugin.pruner import InstanceWisePruner
from isw_plugin.wrappers import unwrapped

try:
    from timm.task import TrainingTask
except ImportError as error:
    raise MissingExtraError(
        f"isw_plugin.toolkits.timm needs timm 1.0.27 or newer, for its training tasks ({error}): "
        "pip install --upgrade timm",
        name=error.name,
    ) from error
if not hasattr(TrainingTask, "get_trainable_module"):  # timm 1.0.23 to 1.0.26
    raise MissingExtraError(
        "isw_plugin.toolkits.timm needs timm 1.0.27 or newer, and the training tasks of this one do not tell their "
        "model: pip install --upgrade timm",
        name="timm.task",
    )

__all__ = ["add_feature_decay", "main"]


def add_feature_decay(task: TrainingTask, pruner: InstanceWisePruner, *, accumulation_steps: int = 1) -> None:
    """Add the penalty (Eq. 5) to the loss that a training task returns.

    Works with every task, before or after ``prepare_distributed``; in eval mode nothing is added.

    Args:
        task: Its trainable model has the pruner.
        accumulation_steps: Parts by which the training loop divides the loss (``--grad-accum-steps``).

    Raises:
        AttachError: The pruner is attached to another model.
        SettingError: No parts.
    """
    trained = task.get_trainable_module()
    if trained is None or unwrapped(trained) is not pruner.model:
        raise AttachError("the task trains another model than the one that the pruner is attached to")
    if accumulation_steps < 1:
        raise SettingError(f"accumulation_steps={accumulation_steps}: a count is 1 or more")
    task.register_forward_hook(_AddPenalty(pruner, accumulation_steps))


class _AddPenalty:
    def __init__(self, pruner: InstanceWisePruner, accumulation_steps: int) -> None:
        self.pruner = pruner
        self.accumulation_steps = accumulation_steps

    def __call__(self, task: nn.Module, args: Any, result: dict[str, Tensor]) -> dict[str, Tensor]:
        if not (self.pruner.model.training and result["loss"].requires_grad):
            return result
        model = self.pruner.model
        loss = self.pruner.regularize(model, result["loss"], accumulation_steps=self.accumulation_steps)
        return {**result, "loss": loss, "feature_decay": (loss - result["loss"]).detach()}


def main(argv: Sequence[str]) -> None:
    """Run timm's training script with feature decay in every task that it makes.

    Raises:
        SettingError: The argument file holds something else than settings, or the script makes no tasks.
    """
    parser = argparse.ArgumentParser(prog="python -m isw_plugin.toolkits.timm", description=__doc__)
    parser.add_argument("--isw", type=Path, required=True, help="YAML file of InstanceWisePruner's arguments")
    parser.add_argument("script", help="timm's train.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own")
    options = parser.parse_args(argv)
    settings = _settings(options.isw)
    if "timm.task" not in Path(options.script).read_text():
        raise SettingError(
            f"{options.script} does not use timm.task, so it would train without feature decay: take the train.py of "
            f"timm's source of this release ({version('timm')})"
        )
    parts = _accumulation_steps(options.arguments)

    def attach(task: Any) -> None:
        pruner = InstanceWisePruner(task.get_trainable_module(), **settings)
        add_feature_decay(task, pruner, accumulation_steps=parts)

    argv_before = sys.argv
    sys.argv = [options.script, *options.arguments]
    try:
        with _on_new_tasks(attach):
            runpy.run_path(options.script, run_name="__main__")
    finally:
        sys.argv = argv_before


def _settings(file: Path) -> dict[str, Any]:
    """What a file sets, checked before hours of training."""
    settings = yaml.safe_load(file.read_text())
    if not isinstance(settings, dict):
        raise SettingError(f"{file}: expected lines such as 'lambda_: 1.0e-6'")
    known = [name for name in signature(InstanceWisePruner).parameters if name not in ("model", "example_inputs")]
    for name, value in settings.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1) or known
            raise SettingError(f"{file}: InstanceWisePruner takes no {name!r}; did you mean {', '.join(close)}?")
        if name in ("lambda_", "alpha", "beta") and isinstance(value, str):
            raise SettingError(f"{file}: {name}: {value} is text to YAML; a number has a point, such as 1.0e-6")
    return settings


@contextmanager
def _on_new_tasks(attach: Callable[[Any], None]) -> Iterator[None]:
    """Inside the block, every task that timm makes is handed to ``attach``, once it has its model."""
    # Not the base of all: when that is done, a task has no model yet.
    made = {cls: cls.__init__ for cls in _below(TrainingTask) if "__init__" in vars(cls)}
    seen: WeakSet[Any] = WeakSet()

    def watched(cls: Any) -> Callable[..., None]:
        def init(task: Any, *args: Any, **kwargs: Any) -> None:
            made[cls](task, *args, **kwargs)
            if task not in seen:  # a class above it may have been first
                seen.add(task)
                attach(task)

        return init

    for cls in made:
        cls.__init__ = watched(cls)
    try:
        yield
    finally:
        for cls, init in made.items():
            cls.__init__ = init


def _below(cls: Any) -> list[Any]:
    return [found for direct in cls.__subclasses__() for found in (direct, *_below(direct))]


def _accumulation_steps(arguments: Sequence[str]) -> int:
    """What the script will read as --grad-accum-steps, from its arguments or its -c file."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", type=Path)
    parser.add_argument("--grad-accum-steps", type=int)
    known, _ = parser.parse_known_args(arguments)
    if known.grad_accum_steps is not None:
        return int(known.grad_accum_steps)
    config = yaml.safe_load(known.config.read_text()) if known.config else None
    return int((config or {}).get("grad_accum_steps", 1))


if __name__ == "__main__":
    main(sys.argv[1:])
