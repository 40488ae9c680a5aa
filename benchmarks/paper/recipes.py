"""What to train: a recipe is a network, a lambda and a schedule; recipes.json lists those of every scale."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["SCALES", "Recipe", "recipes"]

_FILE = json.loads(Path(__file__).with_name("recipes.json").read_text())
SCALES: tuple[str, ...] = tuple(_FILE["scales"])


@dataclass(frozen=True)
class Recipe:
    """One trained network.

    ``epochs`` are those of fine-tuning for a slimmed or pretrained one; ``epochs_dense`` those before slimming. A
    pretrained one of lambda 0 is taken as it is.
    """

    network: str
    lambda_: float
    width: float
    epochs: int
    epochs_dense: int
    peak: float
    batch: int
    precision: str
    compile: bool
    scope: str
    bn_l1: float
    prune_ratio: float
    seed: int
    data: str
    side: int = 32
    pretrained: bool = False

    @property
    def name(self) -> str:
        return f"{self.network}-{self.lambda_:g}"

    @property
    def of_slimming(self) -> bool:
        """Whether network slimming makes it: the slimmed network, and the one with BN-L1 that it is cut from."""
        return self.network in ("slimmed-vgg16", "vgg16-bn-l1")

    def settings(self) -> dict[str, Any]:
        """What the trained weights depend on."""
        foreign = set() if self.of_slimming else {"epochs_dense", "bn_l1", "prune_ratio"}
        if not self.network.endswith("-imagenet"):
            foreign |= {"side", "pretrained"}
        return {name: value for name, value in asdict(self).items() if name not in foreign}


def recipes(scale: str, *, data: str, seed: int = 0, epochs: int | None = None, imagenet: bool = False) -> list[Recipe]:
    """The recipes of a scale, in the order to train them: CIFAR-10's, or ImageNet's.

    Args:
        data: What the images are called in a run's settings.
        epochs: From scratch, instead of the scale's.
    """
    chosen = _FILE["scales"][scale]
    epochs = epochs or chosen["epochs"]
    found = []
    for network, lambdas in chosen["lambdas"].items():
        slimmed = network == "slimmed-vgg16"
        if network.endswith("-imagenet") != imagenet:
            continue
        found += [
            Recipe(
                network=network,
                lambda_=float(lambda_),
                width=chosen["width"],
                epochs=chosen["epochs_finetune"] if slimmed else epochs,
                epochs_dense=chosen["epochs"],
                peak=_FILE["peak"][network],
                batch=chosen["batch"],
                precision=chosen["precision"],
                compile=chosen["compile"],
                scope=_FILE["scope"],
                bn_l1=_FILE["bn_l1"],
                prune_ratio=_FILE["prune_ratio"],
                seed=seed,
                data=data,
            )
            for lambda_ in lambdas
        ]
    return found
