"""Gate a pretrained timm model per image, without training: choose thresholds, then report.

    python examples/gate_pretrained.py resnet50.a1_in1k --data IMAGENET
    python examples/gate_pretrained.py resnet18 --data DIR --checkpoint my_weights.safetensors

DIR holds train/CLASS/*.jpg and val/CLASS or test/CLASS. Thresholds are chosen on training images and
reported on the others; where the model was trained on the former, they look too easy, so compare the loss
on the others with --max-drop. DIR may hold some of the model's classes, folders named by WordNet id (n01855672)
or class name (goose): those rows of the classifier are taken. Weights come from the hub, or from a local file
with --checkpoint.
"""

from isw_cli.script import in_one_line

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import timm
import torch
from classes import keep_classes, some_rows
from images import UNREADABLE, DataError
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder

from isw_plugin import InstanceWisePruner, calibrate, evaluate
from isw_plugin.report import frontier


def open_image(path: str) -> Image.Image:
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except UNREADABLE as error:
        raise DataError(f"{path}: not a readable image ({error})") from error


def folders(root: Path) -> tuple[ImageFolder, ImageFolder]:
    """The images to choose thresholds on, and those to report on."""
    report = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or report is None:
        raise DataError(f"{root}: expected train/ and val/ (or test/) in it, one folder a class in each")
    try:
        return ImageFolder(str(root / "train"), loader=open_image), ImageFolder(str(report), loader=open_image)
    except FileNotFoundError as error:
        raise DataError(f"{root}: no class folders with images in it ({error})") from error


def load_model(name: str, checkpoint: Path | None, folders: list[str]) -> nn.Module:
    """A pretrained timm model for the classes of these folders, which may be some of those that it knows."""
    if checkpoint is None:
        try:
            model = timm.create_model(name, pretrained=True)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"{name}: no pretrained weights from the hub ({error}); give a file with --checkpoint"
            ) from error
    else:
        model = _from_file(name, checkpoint, len(folders))
    if rows := some_rows(model, folders):
        knows = model.num_classes
        keep_classes(model, rows)
        if len(rows) < knows:
            print(f"{name} knows {knows} classes, the folder has {len(rows)}: rows {_shortened(rows)} are taken")
    if model.num_classes != len(folders):
        raise DataError(f"{name} knows {model.num_classes} classes and the folder has {len(folders)}")
    return model


def _from_file(name: str, checkpoint: Path, classes: int) -> nn.Module:
    """For so many classes, or for as many as timm's model of that name has."""
    if not checkpoint.is_file():
        raise DataError(f"{checkpoint}: no such checkpoint")
    try:
        return timm.create_model(name, num_classes=classes, checkpoint_path=str(checkpoint))
    except (OSError, RuntimeError) as error:
        try:
            return timm.create_model(name, checkpoint_path=str(checkpoint))
        except (OSError, RuntimeError):
            raise DataError(f"{checkpoint}: no weights of {name} for {classes} classes ({error})") from error
    except Exception as error:  # whatever is said of a damaged file
        raise DataError(f"{checkpoint}: no readable weights: damaged, or no state_dict: copy it again") from error


def _shortened(rows: list[int]) -> str:
    shown = [str(row) for row in rows[:5]]
    return ", ".join([*shown, "..."] if len(rows) > 5 else shown)


def sample(folder: ImageFolder, count: int, seed: int) -> Subset[tuple[torch.Tensor, int]]:
    """A fixed random part of a folder, over all classes."""
    order = torch.randperm(len(folder), generator=torch.Generator().manual_seed(seed))
    return Subset(folder, order[:count].tolist())


def main(args: argparse.Namespace) -> None:
    choose, report = folders(args.data)
    if choose.classes != report.classes:
        raise DataError(f"{args.data}: the classes of train/ are not those of {Path(report.root).name}/")
    device = torch.device(args.device)
    model = load_model(args.model, args.checkpoint, choose.classes).eval().to(device)
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    choose.transform = report.transform = transform
    loaders = [
        DataLoader(part, batch_size=args.batch, num_workers=args.workers)
        for part in (sample(choose, args.max_instances, args.seed), report)
    ]
    pruner = InstanceWisePruner(model, lambda_=0, layers=args.layers, exclude=args.exclude, scope=args.scope)
    print(pruner.summary())
    calibration = calibrate(pruner, loaders[0], max_drop=args.max_drop, max_instances=args.max_instances)
    print(f"chosen on {calibration.instances} training images: {calibration.best}")
    dense = evaluate(model, loaders[1])
    with pruner.gating():
        gated = evaluate(model, loaders[1])
    print(f"gates off: {dense}\ngates on:  {gated}\nlost {dense.accuracy - gated.accuracy:.4f} of accuracy")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        frontier({args.model: calibration}, args.out / "frontier.png", f"{args.model}, {args.data.name}, no training")
        results = {
            "command": shlex.join(["python", *sys.argv]),
            "seed": args.seed,
            "versions": {name: version(name) for name in ("torch", "timm", "isw_plugin")},
            "chosen_on": {"instances": calibration.instances, "accuracy": calibration.accuracy},
            "pruner": pruner.state_dict(),
            "dense": dense.to_dict(),
            "gated": gated.to_dict(),
        }
        (args.out / "results.json").write_text(json.dumps(results, indent=2))


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="timm model name, with the tag of its weights")
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/ or test/")
    parser.add_argument("--checkpoint", type=Path, help="local weights instead of the hub's")
    parser.add_argument("--layers", default="*", help="which layers to gate, a glob or re:REGEX")
    parser.add_argument("--exclude", nargs="*", default=[], help="layers to leave out")
    parser.add_argument("--scope", choices=("all", "consumers"), default="all")
    parser.add_argument("--max-drop", type=float, default=0.01, help="accuracy that may be lost")
    parser.add_argument("--max-instances", type=int, default=2000, help="images to choose thresholds on")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for results.json and frontier.png")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with in_one_line():
        main(arguments())
