"""Train every recipe once, resumably, or find it trained: one run folder a recipe."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.lab.images import Batches, DataError, Images, ImageSplits
from benchmarks.lab.networks import build, vgg16
from benchmarks.lab.run_folder import OtherRunError, RunFolder
from benchmarks.lab.slimming import Slimming
from benchmarks.lab.training import Schedule, finish, train
from benchmarks.paper.recipes import Recipe
from isw_plugin import InstanceWisePruner

__all__ = ["Adopted", "Bench", "as_pretrained", "on_device", "pretrained"]

BATCH = 250  # of evaluation
PRETRAINED = "mobilenetv2_100"


def on_device(splits: ImageSplits, device: torch.device) -> ImageSplits:
    """The same images held on the device as uint8, where batches are then picked and augmented."""
    parts = {
        part: Images(getattr(splits, part).pixels.to(device), getattr(splits, part).labels.to(device))
        for part in ("train", "held_out", "test")
    }
    return replace(splits, **parts)


def as_pretrained(splits: ImageSplits) -> ImageSplits:
    """The same images, normalised as timm's weights expect them."""
    config = timm.get_pretrained_cfg(PRETRAINED)
    assert config is not None
    return replace(splits, mean=255 * torch.tensor(config.mean), std=255 * torch.tensor(config.std))


def pretrained(classes: int) -> nn.Module:
    """timm's network of these classes with its weights from the hub."""
    try:
        model = timm.create_model(PRETRAINED, pretrained=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{PRETRAINED}: no pretrained weights from the hub ({error}): leave out --pretrained"
        ) from error
    if model.num_classes != classes:
        raise DataError(f"{PRETRAINED} knows {model.num_classes} classes and the folder has {classes}")
    return model


@dataclass(frozen=True)
class Bench:
    """Images, a folder of runs, and the networks trained in it.

    Args:
        adopt: A run folder of examples/slimmed_vgg16.py, whose networks of the same settings are taken over.
    """

    splits: ImageSplits
    out: Path
    device: torch.device
    adopt: Path | None = None

    @property
    def inputs(self) -> Tensor:
        return torch.zeros(1, *self.splits.test.pixels.shape[1:], device=self.device)

    def batches(self, part: str) -> Batches:
        return Batches(getattr(self.splits, part), self.splits, BATCH, self.device)

    def run(self, recipe: Recipe) -> RunFolder:
        """The recipe's run folder; a slimmed one's holds the networks that it starts from as well."""
        return RunFolder(self.out / "runs" / recipe.name, recipe.settings())

    def has(self, recipe: Recipe) -> bool:
        return (self.out / "runs" / recipe.name / "trained.safetensors").exists()

    def network(self, recipe: Recipe) -> nn.Module:
        """The trained network, in eval mode, gates not attached."""
        weights, facts = self.run(recipe).load("trained")
        if recipe.of_slimming:
            model = vgg16(tuple(facts["widths"]), len(self.splits.classes))
        else:
            model = build(recipe.network, len(self.splits.classes), recipe.width, recipe.seed)
        model.load_state_dict(weights)
        return model.to(self.device).eval()

    def facts(self, recipe: Recipe) -> dict[str, Any]:
        """What was stored beside the trained weights: where they are from."""
        return self.run(recipe).load("trained")[1]

    def train(self, recipe: Recipe) -> None:
        """Train it, from the last finished epoch on, unless that was done."""
        if self.has(recipe):
            return
        if recipe.of_slimming:
            self._slimmed(recipe) if recipe.network == "slimmed-vgg16" else self._before_slimming(recipe)
            return
        if recipe.pretrained:
            self._pretrained(recipe)
            return
        model = build(recipe.network, len(self.splits.classes), recipe.width, recipe.seed).to(self.device)
        self._train(recipe, model, self.run(recipe), origin=f"trained from scratch, epochs: {recipe.epochs}")

    def _pretrained(self, recipe: Recipe) -> None:
        """timm's weights as they are, or fine-tuned with feature decay."""
        model = pretrained(len(self.splits.classes)).to(self.device)
        if recipe.lambda_ == 0:
            finish(model, self.run(recipe), "trained", origin=f"{PRETRAINED} of timm as it is")
        else:
            origin = f"{PRETRAINED} of timm, fine-tuned, epochs: {recipe.epochs}"
            self._train(recipe, model, self.run(recipe), origin=origin)

    def _train(self, recipe: Recipe, model: nn.Module, run: RunFolder, **facts: Any) -> None:
        pruner = InstanceWisePruner(model, self.inputs, recipe.lambda_, scope=recipe.scope)
        if recipe.compile:
            model.compile()  # in place: names of parameters stay
        train(
            model,
            self.splits,
            Schedule(recipe.epochs, recipe.peak, recipe.batch),
            run,
            "trained",
            seed=recipe.seed,
            device=self.device,
            bfloat16=recipe.precision == "bfloat16",
            regularize=lambda loss: pruner.regularize(model, loss),
        )
        finish(model, run, "trained", **facts)

    def _before_slimming(self, recipe: Recipe) -> None:
        """The network that slimming cuts, trained with BN-L1."""
        slimming = self._slimming(recipe)
        slimming.train_dense()
        origin = f"{'adopted' if self.adopt else 'made here'}: {recipe.epochs_dense} epochs with BN-L1 {recipe.bn_l1:g}"
        weights, _ = slimming.run.load("dense")
        self.run(recipe).save("trained", weights, widths=list(slimming.widths), origin=origin)

    def _slimmed(self, recipe: Recipe) -> None:
        """Fine-tune the slimmed network, which is trained with BN-L1 and pruned first if no run is adopted."""
        run, slimming = self.run(recipe), self._slimming(recipe)
        source = f"{'adopted' if self.adopt else 'made here'}: {recipe.epochs_dense} epochs with BN-L1 {recipe.bn_l1:g}"
        origin = f"slimmed network {source}; fine-tuned {recipe.epochs} epochs"
        finetuned = f"finetuned-{recipe.lambda_!r}"
        if slimming.run.has(finetuned):
            widths = slimming.run.load("slimmed")[1]["widths"]
            run.save("trained", slimming.run.load(finetuned)[0], widths=widths, origin=f"{origin}, adopted too")
            return
        slimming.train_dense()
        widths = slimming.slim()
        model = slimming.stored("slimmed", widths)
        self._train(recipe, model, run, widths=list(widths), origin=origin)

    def _slimming(self, recipe: Recipe) -> Slimming:
        """Slimming in a run folder that all lambdas of this network share."""
        names = ("width", "epochs_dense", "batch", "bn_l1", "prune_ratio", "seed", "precision")
        settings: dict[str, Any] = {name: getattr(recipe, name) for name in names}
        if self.adopt:
            finetuned = {"epochs_finetune": recipe.epochs} if recipe.network == "slimmed-vgg16" else {}
            run: RunFolder = Adopted(self.adopt, settings | finetuned)
        else:
            run = RunFolder(self.out / "runs" / "slimming", settings | {"data": recipe.data})
        return Slimming(self.splits, run, self.device, **settings)


class Adopted(RunFolder):
    """A run folder of examples/slimmed_vgg16.py, read only.

    Raises:
        OtherRunError: It has no slimmed network, or one of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        if not self.has("slimmed"):
            raise OtherRunError(f"{path}: no slimmed.safetensors there to adopt")
        found = json.loads((path / "settings.json").read_text())
        other = {name: found.get(name) for name in settings if found.get(name) != settings[name]}
        if other:
            raise OtherRunError(f"{path} cannot be adopted: it has {other}, asked is {settings}")
