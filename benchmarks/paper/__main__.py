"""The paper's section 4, run again: its tables and figures in its own rows and columns, ours beside the paper's.

    python -m benchmarks.paper all --scale smoke --out runs/paper               # digits, minutes
    python -m benchmarks.paper all --scale cpu --data DIR --out runs/paper      # VGG16 and slimmed VGG16, hours
    python -m benchmarks.paper all --scale full --data DIR --imagenet DIR --out runs/paper    # a GPU
    python -m benchmarks.paper train --scale cpu --data DIR --out runs/paper    # the trained networks only
    python -m benchmarks.paper table4 figure3 --scale cpu --data DIR --out runs/paper

DIR/train/CLASS/*.jpg and DIR/test or DIR/val. Every network is trained once and saved after every epoch: interrupt it
at any time and run the same command again. What was not run is listed as such.
"""

from isw_cli.script import in_one_line

import argparse
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from benchmarks.lab.images import ImageSplits, load
from benchmarks.paper.figures import FIGURES
from benchmarks.paper.measuring import Measurer
from benchmarks.paper.recipes import SCALES, Recipe, recipes
from benchmarks.paper.tables import TABLES
from benchmarks.paper.training import Bench, as_pretrained, on_device
from benchmarks.paper.writing import Writer


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = ("all", "train", *TABLES, *FIGURES)
    parser.add_argument("what", nargs="+", choices=what, metavar="TABLE|FIGURE|train|all", help=", ".join(what))
    parser.add_argument("--scale", choices=SCALES, default="smoke")
    parser.add_argument("--data", default="digits", help="digits, cifar10, or a folder of images")
    parser.add_argument("--imagenet", type=Path, help="folder of images for Table 8 and Figure 5")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, tables and figures")
    parser.add_argument("--data-name", help="what the images are, for captions (the folder's name)")
    parser.add_argument("--imagenet-name", help="the same of --imagenet")
    parser.add_argument("--imagenet-side", type=int, default=64, help="pixels; all images are held in memory")
    parser.add_argument("--pretrained", action="store_true", help="on ImageNet, start from timm's weights (the hub)")
    parser.add_argument("--test-images", type=int, help="measure on so many, spread over the test set (all)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of measuring")
    parser.add_argument("--trained", action="store_true", help="train nothing: report on what is trained")
    parser.add_argument("--measured", action="store_true", help="train and measure nothing: write what is known")
    parser.add_argument("--only", default="*", help="recipes to train, a pattern such as vgg16-*")
    parser.add_argument("--epochs", type=int, help="from scratch, instead of the scale's")
    parser.add_argument("--adopt", type=Path, help="a run folder of examples/slimmed_vgg16.py to take networks from")
    parser.add_argument("--earlier", type=Path, help="a folder of tables: what they have and this run lacks is kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


IMAGENET = ("table8", "figure5")


def fewer(splits: ImageSplits, count: int | None) -> ImageSplits:
    """The same with so many test images, evenly spread over the test set, which is sorted by class."""
    if count is None or count >= len(splits.test):
        return splits
    return replace(splits, test=splits.test.at(torch.linspace(0, len(splits.test) - 1, count).round().long()))


def cifar(args: argparse.Namespace) -> tuple[Bench, list[Recipe]]:
    """The images of --data and what to train on them."""
    device = torch.device(args.device)
    splits = on_device(fewer(load(args.data, 32, args.seed), args.test_images), device)
    found = recipes(args.scale, data=Path(args.data).resolve().name, seed=args.seed, epochs=args.epochs)
    return Bench(splits, args.out, device, args.adopt), found


def imagenet(args: argparse.Namespace) -> tuple[Bench, list[Recipe]]:
    """The images of --imagenet and what to train on them."""
    device = torch.device(args.device)
    splits = load(str(args.imagenet), args.imagenet_side, args.seed)
    splits = on_device(fewer(splits, args.test_images), device)
    if args.pretrained:
        splits = as_pretrained(splits)
    found = recipes(args.scale, data=args.imagenet.resolve().name, seed=args.seed, epochs=args.epochs, imagenet=True)
    more = {"side": args.imagenet_side, "pretrained": args.pretrained}
    return Bench(splits, args.out, device), [replace(recipe, **more) for recipe in found]


def train(args: argparse.Namespace, bench: Bench, found: list[Recipe]) -> None:
    for recipe in found:
        if fnmatchcase(recipe.name, args.only) and not (args.trained or args.measured):
            print(f"{recipe.name}: {'found' if bench.has(recipe) else 'training'}", flush=True)
            bench.train(recipe)


def main(args: argparse.Namespace) -> None:
    """Train what is missing, then write what was asked; ImageNet has images and networks of its own."""
    everything = [*TABLES, *FIGURES]
    asked = everything if "all" in args.what else [name for name in everything if name in args.what]
    training = "train" in args.what
    if training or any(name not in IMAGENET for name in asked):
        bench, found = cifar(args)
        train(args, bench, found)
        if asked:
            writer = Writer(
                Measurer(bench, found, args.precision == "bfloat16", args.measured),
                args.out,
                args.data_name or bench.splits.name,
                args.scale,
                args.earlier,
            )
            writer.write([name for name in asked if name not in IMAGENET])
    if args.imagenet and (training or any(name in IMAGENET for name in asked)):
        bench, found = imagenet(args)
        train(args, bench, found)
        if asked:
            writer = Writer(
                Measurer(bench, found, args.precision == "bfloat16", args.measured),
                args.out,
                args.imagenet_name or bench.splits.name,
                args.scale,
                args.earlier,
            )
            writer.write([name for name in asked if name in IMAGENET])
    elif any(name in IMAGENET for name in asked):
        bench = Bench(load("digits", 32, args.seed), args.out, torch.device(args.device))
        writer = Writer(Measurer(bench, []), args.out, "ImageNet (no --imagenet: not run)", args.scale, args.earlier)
        writer.write([name for name in asked if name in IMAGENET])


if __name__ == "__main__":
    with in_one_line(resumable=True):
        main(arguments())
