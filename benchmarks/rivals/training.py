"""A network without gates, then every gate for the same epochs from there: resumable, one run folder each."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.lab.images import Batches, ImageSplits, shuffled
from benchmarks.lab.run_folder import RunFolder
from benchmarks.lab.training import Schedule
from benchmarks.rivals.networks import network
from benchmarks.rivals.rivals import RIVALS, Rival
from isw_plugin import InstanceWisePruner

__all__ = ["Bench", "Scale"]

_FITTED = 6000  # images for heads


@dataclass(frozen=True)
class Scale:
    """What every gate gets.

    Attributes:
        width: Share of every network's channels.
        epochs_dense, epochs: Without gates, and from there with each.
        images: Training images, None: all.
        test_images: The same of the test set.
        rounds: In which times are taken; 0: none are.
        bfloat16: Train under autocast; float32 is measured all the same.
    """

    networks: tuple[str, ...]
    width: float
    epochs_dense: int
    epochs: int
    images: int | None
    test_images: int | None
    rounds: int
    batch: int = 64
    peak: float = 0.05
    bfloat16: bool = False


@dataclass(frozen=True)
class Bench:
    """Trains in run folders under ``out``."""

    splits: ImageSplits
    out: Path
    scale: Scale
    seed: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def batches(self, part: str) -> Batches:
        return Batches(getattr(self.splits, part), self.splits, 250, self.device)

    def run(self, name: str, row: str) -> RunFolder:
        """The folder of a network's row; "dense" is where all start."""
        scale = self.scale
        settings = {
            "network": name,
            "row": row,
            "rival": repr(RIVALS.get(row)),
            "seed": self.seed,
            "data": self.splits.name,
            "images": len(self.splits.train),
            **{key: getattr(scale, key) for key in ("width", "epochs_dense", "epochs", "batch", "peak", "bfloat16")},
        }
        return RunFolder(self.out / "runs" / f"{name}-{row.replace(', ', '-').replace(' ', '-')}-{self.seed}", settings)

    def trained(self, name: str, row: str) -> InstanceWisePruner:
        """The pruner of a trained row, gates on (off for "none"); trains what is missing."""
        rival = RIVALS[row]
        if rival.trained_as:
            pruner = self.trained(name, rival.trained_as)
        else:
            pruner = self._trained(name, row, rival, self._dense(name))
        if rival.predicted:
            images = self.splits.train.at(torch.arange(min(_FITTED, len(self.splits.train))))
            pruner.fit_predictors(Batches(images, self.splits, 250, self.device))
        return pruner

    def _dense(self, name: str) -> dict[str, Tensor]:
        model = self._network(name)
        pruner = InstanceWisePruner(model, self._image, 0.0)
        run = self.run(name, "dense")
        self._train(run, pruner, Rival(None), self.scale.epochs_dense, self.scale.peak)
        return dict(model.state_dict())

    def _trained(self, name: str, row: str, rival: Rival, start: dict[str, Tensor]) -> InstanceWisePruner:
        model = self._network(name)
        model.load_state_dict(start)
        gate, exclude = rival.gate or "cv", rival.leaves_out(name)
        pruner = InstanceWisePruner(model, self._image, rival.lambda_, gate=gate, exclude=exclude)
        if rival.gate is not None:
            pruner.step()
        self._train(self.run(name, row), pruner, rival, self.scale.epochs, self.scale.peak / 2)
        return pruner

    def _network(self, name: str) -> nn.Module:
        return network(name, len(self.splits.classes), self.scale.width, self.seed).to(self.device)

    @property
    def _image(self) -> Tensor:
        return torch.zeros(1, *self.splits.test.pixels.shape[1:], device=self.device)

    def _train(self, run: RunFolder, pruner: InstanceWisePruner, rival: Rival, epochs: int, peak: float) -> None:
        """From the last finished epoch on."""
        schedule = Schedule(epochs, peak, self.scale.batch)
        model, own = pruner.model, pruner.gate_parameters()
        groups: list[dict[str, Any]] = [{"params": list(model.parameters())}, {"params": own, "weight_decay": 0.0}]
        optimizer = torch.optim.SGD(
            groups, peak, momentum=schedule.momentum, weight_decay=schedule.weight_decay, nesterov=True
        )
        steps = len(self.splits.train) // schedule.batch
        for epoch in range(_restored(run, pruner, optimizer), epochs):
            model.train()
            batches = shuffled(self.splits, schedule.batch, self.seed * 1000 + epoch, self.device)
            for step, (images, labels) in enumerate(batches):
                progress = (epoch + step / steps) / epochs
                rival.before_step(pruner, progress)
                for group in optimizer.param_groups:
                    group["lr"] = schedule.learning_rate(progress)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.scale.bfloat16):
                    logits = model(images)
                loss = F.cross_entropy(logits.float(), labels)
                pruner.regularize(model, loss).backward()
                optimizer.step()
                optimizer.zero_grad()
            _save(run, pruner, optimizer, epoch + 1)
            print(f"{run.path.name}: epoch {epoch + 1} of {epochs}, loss {loss.item():.3f}", flush=True)
        model.eval()


def _parameters(pruner: InstanceWisePruner) -> list[nn.Parameter]:
    return [*pruner.model.parameters(), *pruner.gate_parameters()]


def _save(run: RunFolder, pruner: InstanceWisePruner, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    tensors = {f"model.{key}": value for key, value in pruner.model.state_dict().items()}
    for site, learned in pruner.learned.items():
        tensors |= {f"gate.{site}.{key}": value for key, value in learned.state_dict().items()}
    for number, parameter in enumerate(_parameters(pruner)):
        if (momentum := optimizer.state[parameter].get("momentum_buffer")) is not None:
            tensors[f"momentum.{number}"] = momentum
    run.save("trained", tensors, epoch=epoch)


def _restored(run: RunFolder, pruner: InstanceWisePruner, optimizer: torch.optim.Optimizer) -> int:
    """Epochs that are done."""
    if not run.has("trained"):
        return 0
    tensors, facts = run.load("trained")
    pruner.model.load_state_dict(_below("model.", tensors))
    for site, learned in pruner.learned.items():
        learned.load_state_dict(_below(f"gate.{site}.", tensors))
    for number, parameter in enumerate(_parameters(pruner)):
        if f"momentum.{number}" in tensors:
            optimizer.state[parameter]["momentum_buffer"] = tensors[f"momentum.{number}"].to(parameter.device)
    return int(facts["epoch"])


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
