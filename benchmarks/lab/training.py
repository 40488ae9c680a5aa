"""The training loop of the examples: SGD, one warm-up and decay, saved after every epoch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.lab.images import ImageSplits, shuffled
from benchmarks.lab.run_folder import RunFolder, damaged


@dataclass(frozen=True)
class Schedule:
    """How long and how hard to train. The learning rate rises for a fifth of the steps, then falls to 0."""

    epochs: int
    peak: float
    batch: int
    weight_decay: float = 5e-4
    momentum: float = 0.9

    def learning_rate(self, progress: float) -> float:
        """Rate at a share of the training in [0, 1)."""
        return self.peak * min(progress / 0.2, (1 - progress) / 0.8)


class Beside(Protocol):
    """What goes on beside the weights, and is stored with them after every epoch."""

    def after_epoch(self) -> None: ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, and facts that JSON can hold."""

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None: ...


def task_loss(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


def train(
    model: nn.Module,
    splits: ImageSplits,
    schedule: Schedule,
    run: RunFolder,
    stage: str,
    *,
    seed: int,
    device: torch.device,
    bfloat16: bool = False,
    loss_of: Callable[[Tensor, Tensor, Tensor], Tensor] = task_loss,
    regularize: Callable[[Tensor], Tensor] = lambda loss: loss,
    after_backward: Callable[[], None] = lambda: None,
    beside: Beside | None = None,
) -> None:
    """Train in place; go on from the last finished epoch of ``stage`` if the run folder holds one.

    Args:
        model: On ``device``; its parameters are updated.
        loss_of: The loss of a batch, from images, logits and labels.
        regularize: Adds an activation penalty to the loss before backward.
        after_backward: Adds a weight penalty to the gradients after it.
    """
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=schedule.peak,
        momentum=schedule.momentum,
        weight_decay=schedule.weight_decay,
        nesterov=True,
    )
    started = _restore(model, optimizer, run, stage, beside)
    steps = len(splits.train) // schedule.batch
    for epoch in range(started, schedule.epochs):
        model.train()
        batches = shuffled(splits, schedule.batch, seed * 1000 + epoch, device)
        progress = tqdm(batches, f"{stage} {epoch + 1}/{schedule.epochs}", total=steps, unit="batch")
        for step, (images, labels) in enumerate(progress):
            rate = schedule.learning_rate((epoch + step / steps) / schedule.epochs)
            optimizer.param_groups[0]["lr"] = rate
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                logits = model(images)
            of_task = loss_of(images, logits.float(), labels)
            loss = regularize(of_task)
            loss.backward()
            after_backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 20 == 0:
                progress.set_postfix(loss=f"{of_task.item():.3f}", penalty=f"{(loss - of_task).item():.3f}")
        if beside is not None:
            beside.after_epoch()
        _save(model, optimizer, run, stage, epoch + 1, beside)
    model.eval()


def _partial(stage: str) -> str:
    return f"{stage}.partial"


def _save(
    model: nn.Module, optimizer: torch.optim.Optimizer, run: RunFolder, stage: str, epoch: int, beside: Beside | None
) -> None:
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        momentum = optimizer.state[parameter].get("momentum_buffer")
        if momentum is not None:
            tensors[f"momentum.{name}"] = momentum
    more, facts = beside.state() if beside is not None else ({}, {})
    tensors |= {f"beside.{name}": tensor for name, tensor in more.items()}
    run.save(_partial(stage), tensors, epoch=epoch, beside=facts)


def _restore(
    model: nn.Module, optimizer: torch.optim.Optimizer, run: RunFolder, stage: str, beside: Beside | None
) -> int:
    if not run.has(_partial(stage)):
        return 0
    tensors, facts = run.load(_partial(stage))
    try:
        model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        for name, parameter in model.named_parameters():
            if f"momentum.{name}" in tensors:
                momentum = tensors[f"momentum.{name}"].to(parameter.device)
                optimizer.state[parameter]["momentum_buffer"] = momentum.view_as(parameter)
        if beside is not None:
            more = {k.removeprefix("beside."): v for k, v in tensors.items() if k.startswith("beside.")}
            beside.restore(more, facts["beside"])
        return int(facts["epoch"])
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise damaged(run.path / f"{_partial(stage)}.safetensors", error) from error


def finish(model: nn.Module, run: RunFolder, stage: str, **facts: object) -> None:
    """Save the trained model under the stage's name, then drop the partial state."""
    run.save(stage, dict(model.state_dict()), **facts)
    run.delete(_partial(stage))
