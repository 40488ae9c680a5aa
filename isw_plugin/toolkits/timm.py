"""Beside timm's training: feature decay in its tasks, and in its own script by one more argument file.

    python -m isw_plugin.toolkits.timm --isw decay.yaml train.py DATA -c args.yaml ...

``train.py`` is timm's, as it is; ``decay.yaml`` holds what ``InstanceWisePruner`` takes, such as
``lambda_: 1.0e-6``. Under torchrun: ``torchrun -m isw_plugin.toolkits.timm ...``.
"""

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from isw_plugin.errors import AttachError, MissingExtraError, SettingError
from isw_plugin.pruner import InstanceWisePruner
from isw_plugin.wrappers import unwrapped

try:
    from timm.task import ClassificationTask, TrainingTask
except ImportError as error:
    raise MissingExtraError(
        f"isw_plugin.toolkits.timm needs a timm that has training tasks ({error}): pip install --upgrade timm"
    ) from error

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
    """Run timm's training script with feature decay in every classification task that it makes.

    Raises:
        SettingError: The argument file holds something else than settings.
    """
    parser = argparse.ArgumentParser(prog="python -m isw_plugin.toolkits.timm", description=__doc__)
    parser.add_argument("--isw", type=Path, required=True, help="YAML file of InstanceWisePruner's arguments")
    parser.add_argument("script", help="timm's train.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own")
    options = parser.parse_args(argv)
    settings = yaml.safe_load(options.isw.read_text())
    if not isinstance(settings, dict):
        raise SettingError(f"{options.isw}: expected lines such as 'lambda_: 1.0e-6'")
    parts = _accumulation_steps(options.arguments)
    task_class: Any = ClassificationTask
    made = task_class.__init__

    def init(task: Any, *args: Any, **kwargs: Any) -> None:
        made(task, *args, **kwargs)
        pruner = InstanceWisePruner(task.get_trainable_module(), **settings)
        add_feature_decay(task, pruner, accumulation_steps=parts)

    argv_before = sys.argv
    task_class.__init__ = init
    sys.argv = [options.script, *options.arguments]
    try:
        runpy.run_path(options.script, run_name="__main__")
    finally:
        task_class.__init__ = made
        sys.argv = argv_before


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
