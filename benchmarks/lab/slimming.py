"""Network slimming of a VGG16 in a run folder: train it with BN-L1, then prune the channels of smallest gamma."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.lab.images import Batches, ImageSplits
from benchmarks.lab.networks import MIN_CHANNELS, vgg16, vgg_widths
from benchmarks.lab.run_folder import RunFolder
from benchmarks.lab.training import Schedule, finish, train
from isw_plugin.errors import SettingError
from isw_plugin.toolkits.torch_pruning import SlimmingImportance

__all__ = ["Slimming"]

BATCH = 250  # of evaluation


@dataclass(frozen=True)
class Slimming:
    """Stages, each stored in the run folder when done: ``dense``, ``slimmed``, and what else is trained in it."""

    splits: ImageSplits
    run: RunFolder
    device: torch.device
    width: float
    epochs_dense: int
    batch: int
    bn_l1: float
    prune_ratio: float
    seed: int
    precision: str

    @property
    def inputs(self) -> Tensor:
        return torch.zeros(1, *self.splits.test.pixels.shape[1:], device=self.device)

    @property
    def widths(self) -> tuple[int, ...]:
        """Before slimming."""
        return vgg_widths(self.width)

    def batches(self, part: str) -> Batches:
        return Batches(getattr(self.splits, part), self.splits, BATCH, self.device)

    def stored(self, stage: str, widths: tuple[int, ...]) -> nn.Module:
        model = self._build(widths)
        model.load_state_dict(self.run.load(stage)[0])
        return model.eval()

    def train(self, model: nn.Module, stage: str, epochs: int, peak: float, **penalties: Callable[..., Any]) -> None:
        schedule, bfloat16 = Schedule(epochs, peak, self.batch), self.precision == "bfloat16"
        place = {"seed": self.seed, "device": self.device, "bfloat16": bfloat16}
        train(model, self.splits, schedule, self.run, stage, **place, **penalties)
        finish(model, self.run, stage)

    def train_dense(self) -> None:
        """Train with an L1 penalty on the batch norms' gamma."""
        if not self.run.has("dense"):
            model = self._build(self.widths)
            pruner = self._pruner(model)
            self.train(model, "dense", self.epochs_dense, 0.1, after_backward=lambda: pruner.regularize(model))

    def slim(self) -> tuple[int, ...]:
        """Prune; returns the widths that are left.

        Raises:
            SettingError: The least width of a layer leaves more channels than asked.
        """
        if not self.run.has("slimmed"):
            model = self.stored("dense", self.widths)
            self._pruner(model).step()
            widths = [module.num_features for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
            pruned = 1 - sum(widths) / sum(self.widths)
            if abs(pruned - self.prune_ratio) > 0.02:
                raise SettingError(
                    f"prune_ratio {self.prune_ratio:g}: only {pruned:.3f} of the channels can go, since every layer "
                    f"keeps {MIN_CHANNELS}; prune less, or a wider network"
                )
            self.run.save("slimmed", model.state_dict(), widths=widths)
        return tuple(self.run.load("slimmed")[1]["widths"])

    def _build(self, widths: tuple[int, ...]) -> nn.Module:
        torch.manual_seed(self.seed)
        return vgg16(widths, len(self.splits.classes)).to(self.device)

    def _pruner(self, model: nn.Module) -> Any:
        """torch-pruning as its users set it up: network slimming over the whole network."""
        return tp.pruner.BNScalePruner(
            model,
            self.inputs,
            importance=SlimmingImportance(MIN_CHANNELS),
            reg=self.bn_l1,
            global_pruning=True,
            pruning_ratio=self.prune_ratio,
            ignored_layers=[model.head.fc],
        )
