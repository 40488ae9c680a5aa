"""What a training with gates on needs beside its loop: a budget that thresholds follow, heads, a teacher."""

from typing import Any

import torch
from images import Batches, ImageSplits
from run_folder import RunFolder
from torch import Tensor, nn
from torch.nn import functional as F

from isw_plugin import InstanceWisePruner, steer_thresholds
from isw_plugin.errors import PredictionError
from isw_plugin.heads import heads_of, heads_tensors

FIT_ON = 6000  # training images, for heads
_TEMPERATURE = 2.0
_PASSES = 30  # batches that thresholds are settled on at least


class GatedTraining:
    """Gates on, thresholds on their way to a budget, heads that follow the weights and are judged after every epoch.

    Args:
        pruner: alpha and beta 0, so that training begins with every channel.
        splits: The training images that heads are fitted to.
        macs_left: The budget, a share of the dense MACs.
        steps: Of the whole training; the budget is reached after half of them.
        teacher: Whose outputs are a part of what is learnt; None: labels alone.
        distill: How large a part, in [0, 1].
        predict: Whether sites get heads, where those pay.
    """

    def __init__(
        self,
        pruner: InstanceWisePruner,
        splits: ImageSplits,
        macs_left: float,
        steps: int,
        *,
        teacher: nn.Module | None = None,
        distill: float = 0.5,
        predict: bool = True,
    ) -> None:
        self.pruner, self.splits, self.macs_left, self.ramp = pruner, splits, macs_left, max(1, steps // 2)
        self.teacher, self.distill, self.predict = teacher, distill, predict
        pruner.step()

    @property
    def hooks(self) -> dict[str, Any]:
        """What ``training.train`` calls."""
        calls = {"loss_of": self.loss_of, "regularize": self.regularize, "after_backward": self.after_backward}
        return {**calls, "beside": self}

    def loss_of(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, labels)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            wanted = F.log_softmax(self.teacher(images).float() / _TEMPERATURE, 1)
        given = F.log_softmax(logits / _TEMPERATURE, 1)
        apart = F.kl_div(given, wanted, log_target=True, reduction="batchmean") * _TEMPERATURE**2
        return (1 - self.distill) * loss + self.distill * apart

    def regularize(self, loss: Tensor) -> Tensor:
        return self.pruner.regularize(self.pruner.model, loss)

    def after_backward(self) -> None:
        if heads := self.pruner.heads:
            needed = 2 * max(head.weight.shape[1] for head in heads.values())  # images, for the widest head
            batch = len(next(iter(self.pruner.norms.values())))
            self.pruner.follow_predictors(decay=max(0.99, 1 - batch / (2 * needed)))
        steer_thresholds(self.pruner, macs_left=self.macs_left, ramp=self.ramp)

    def after_epoch(self) -> None:
        if self.predict:
            self.predict = fit_heads(self.pruner, self.splits)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        plain, tensors = heads_tensors(self.pruner.state_dict())
        return tensors, {"pruner": plain, "predict": self.predict}

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        self.pruner.load_state_dict(heads_of(facts["pruner"], tensors))
        self.predict = bool(facts["predict"])


def save_gates(run: RunFolder, name: str, pruner: InstanceWisePruner) -> None:
    plain, heads = heads_tensors(pruner.state_dict())
    run.save(f"{name}.gates", heads, pruner=plain)


def load_gates(run: RunFolder, name: str, pruner: InstanceWisePruner) -> InstanceWisePruner:
    """The pruner with what ``save_gates`` was given under this name."""
    heads, facts = run.load(f"{name}.gates")
    pruner.load_state_dict(heads_of(facts["pruner"], heads))
    return pruner


def fit_heads(pruner: InstanceWisePruner, splits: ImageSplits) -> bool:
    """Fit heads to training images; False where no site can have one, and all go on measuring."""
    device = next(pruner.model.parameters()).device
    images = Batches(splits.train.at(torch.arange(min(FIT_ON, len(splits.train)))), splits, 250, device)
    try:
        pruner.fit_predictors(images, max_instances=FIT_ON)
    except PredictionError as error:
        pruner.drop_predictors()  # a failed fit leaves the heads of an earlier one
        print(f"norms are measured everywhere: {error}")
        return False
    return True


def settle(pruner: InstanceWisePruner, images: Batches, macs_left: float) -> None:
    """Meet the budget in eval mode, on images that weights were not trained on."""
    pruner.model.eval()
    pruner.step()
    seen = 0
    with torch.no_grad():
        while seen < _PASSES:
            for batch, _ in images:
                pruner.model(batch)
                steer_thresholds(pruner, macs_left=macs_left, rate=0.2)
                seen += 1
