"""Beside Lightning: callbacks that add feature decay to a module's loss, and train it with gates on within a budget.

Needs ``isw_plugin[trainers]``.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from isw_plugin.errors import AttachError, MissingExtraError, UnsupportedError
from isw_plugin.hooks import memory_of
from isw_plugin.pruner import InstanceWisePruner
from isw_plugin.steering import checked_budget, steer_thresholds

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise MissingExtraError(
        f"isw_plugin.toolkits.lightning needs Lightning ({error}): pip install 'isw_plugin[trainers]'", name=error.name
    ) from error

__all__ = ["FeatureDecay", "MacsBudget"]


class _OfPruners(Callback):  # type: ignore[misc]  # checked without Lightning's types
    """Knows the pruners in a module while it is fitted, and saves their settings with the Trainer's checkpoints."""

    def __init__(self) -> None:
        self._pruners: dict[str, InstanceWisePruner] = {}
        self._saved: Mapping[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the pruners.

        Raises:
            AttachError: No part of the module has one.
        """
        if stage == "fit":
            self._pruners = _pruners_in(pl_module)
            self._restore()

    def state_dict(self) -> dict[str, Any]:
        """Settings of the pruners, for the Trainer's checkpoint."""
        return {name: pruner.state_dict() for name, pruner in self._pruners.items()} or dict(self._saved)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what a checkpoint holds."""
        self._saved = state_dict
        self._restore()

    def _restore(self) -> None:
        for name, pruner in self._pruners.items():
            if name in self._saved:
                pruner.load_state_dict(self._saved[name])


class MacsBudget(_OfPruners):
    """Trains with gates on, thresholds of every pruner in the LightningModule following one budget.

    Attach the pruner with ``alpha=0.0, beta=0.0`` to the network inside the module before ``fit``. Gates stay on
    afterwards. Settings are saved with the Trainer's checkpoints, and come back with them. ``macs_left`` is logged.

    Args:
        macs_left, ramp, rate: Of ``steer_thresholds``, which is called after every training batch.

    Raises:
        SettingError: A share or rate outside its range.
    """

    def __init__(self, macs_left: float, *, ramp: int = 0, rate: float = 0.05) -> None:
        super().__init__()
        self.macs_left, self.ramp, self.rate = checked_budget(macs_left, ramp, rate), ramp, rate

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch gates on."""
        for pruner in self._pruners.values():
            pruner.step()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Move the thresholds."""
        for pruner in self._pruners.values():
            left = steer_thresholds(pruner, macs_left=self.macs_left, ramp=self.ramp, rate=self.rate)
            pl_module.log("macs_left", left)


class FeatureDecay(_OfPruners):
    """Adds the penalty (Eq. 5) of every pruner in the LightningModule to what its training_step returns.

    Attach the pruner to the network inside the module before ``fit``. Gradient accumulation, ranks and
    precision are the Trainer's; the penalty does not shrink under them. Its settings are saved with the
    Trainer's checkpoints, and come back with them. ``feature_decay`` is logged.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the penalty into ``training_step`` for the time of ``fit``.

        Raises:
            AttachError: No part of the module has a pruner.
            UnsupportedError: Manual optimization, where the module calls backward itself.
        """
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise UnsupportedError("manual optimization: call pruner.regularize before manual_backward instead")
        super().setup(trainer, pl_module, stage)
        pl_module.training_step = _RegularizedStep(self, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the penalty out again."""
        if isinstance(pl_module.__dict__.get("training_step"), _RegularizedStep):
            del pl_module.training_step

    def regularized(self, loss: Tensor, pl_module: LightningModule) -> Tensor:
        """Loss and penalty of one training step; the Trainer divides both by its accumulated batches."""
        parts = pl_module.trainer.accumulate_grad_batches
        total = loss
        for pruner in self._pruners.values():
            total = pruner.regularize(pruner.model, total, accumulation_steps=parts)
        pl_module.log("feature_decay", (total - loss).detach() / parts)
        return total


class _RegularizedStep:
    """A module's training_step with the penalty in its loss; it is copied and pickled with the module."""

    def __init__(self, callback: FeatureDecay, module: LightningModule) -> None:
        self.callback = callback
        self.module = module
        self.__wrapped__ = module.training_step  # Lightning asks it whether the step is overridden

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.__wrapped__(*args, **kwargs)
        if isinstance(output, Tensor):
            return self.callback.regularized(output, self.module)
        if isinstance(output, Mapping) and "loss" in output:
            return {**output, "loss": self.callback.regularized(output["loss"], self.module)}
        for pruner in self.callback._pruners.values():
            pruner.penalty()  # a skipped step: what it recorded is of no use
        return output


def _pruners_in(module: nn.Module) -> dict[str, InstanceWisePruner]:
    found = {name: InstanceWisePruner.of(part) for name, part in module.named_modules() if memory_of(part) is not None}
    if not found:
        raise AttachError(f"{type(module).__name__} has no pruner: InstanceWisePruner(module.net, ...) before fit")
    return found
