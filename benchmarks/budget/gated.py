"""Fine-tune a trained network with its gates on, so that it learns to do without what they drop.

    python -m benchmarks.budget.gated runs/paper/runs/vgg16-3e-07/trained.safetensors --data DIR \\
        --saved 0.55 --epochs 4 --lambda 3e-7 --out runs/gated

Thresholds of single sites are chosen on held-out images for --saved of the MACs, or for the most channels within
--max-drop; then training goes on with gates on at these thresholds, in which they drop more and more. With --again,
thresholds are chosen anew afterwards, for another share of the MACs. Writes OUT/gated.json, accuracy on test images;
saved after every epoch, so a second run goes on.
"""

from isw_cli.script import in_one_line

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.lab.circumstances import circumstances
from benchmarks.lab.images import Batches, ImageSplits, load
from benchmarks.lab.networks import build, stored_vgg16
from benchmarks.lab.run_folder import RunFolder
from benchmarks.lab.training import Schedule, finish, train
from isw_plugin import InstanceWisePruner, calibrate, count_macs, evaluate

CPU = torch.device("cpu")


def stored(path: Path, classes: int) -> nn.Module:
    """A network of benchmarks.paper, or a VGG16 of any widths."""
    beside = path.with_name("settings.json")
    recipe = json.loads(beside.read_text()) if beside.exists() else {}
    if "network" not in recipe or "vgg16" in recipe["network"]:
        return stored_vgg16(path).to(memory_format=torch.channels_last)
    model = build(recipe["network"], classes, recipe["width"], recipe["seed"])
    model.load_state_dict(RunFolder(path.parent, recipe).load(path.stem)[0])
    return model.eval()


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="trained weights of benchmarks.paper, or of a VGG16 of the example")
    parser.add_argument("--data", required=True, help="what it was trained on: digits, cifar10, or a folder of images")
    aim = parser.add_mutually_exclusive_group(required=True)
    aim.add_argument("--saved", type=float, help="share of the MACs that the gates save before they are trained with")
    aim.add_argument("--max-drop", type=float, help="accuracy that they may lose then, for the most channels")
    parser.add_argument("--again", type=float, help="share of the MACs to choose thresholds anew for, after training")
    parser.add_argument("--images", type=int, default=1000, help="held-out images to choose thresholds on")
    parser.add_argument("--lambda", dest="lambda_", type=float, default=0.0, help="of feature decay meanwhile")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--peak", type=float, default=0.02, help="learning rate")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--thin", type=int, default=1, help="take every n-th test image")
    parser.add_argument("--out", type=Path, required=True, help="folder for the run")
    return parser.parse_args(argv)


def measured(model: nn.Module, test: Batches) -> dict[str, float]:
    report = evaluate(model, test)
    return {"accuracy": report.accuracy, "prune_ratio": report.prune_ratio, "macs_saved": report.macs_saved}


def chosen(
    pruner: InstanceWisePruner, splits: ImageSplits, images: int, saved: float | None, max_drop: float | None
) -> dict[str, Any]:
    """Thresholds of single sites for a share of the MACs or an accuracy; they are the pruner's from here."""
    pruner.enable(per_site={})  # not those of an earlier choice
    order = torch.randperm(len(splits.held_out), generator=torch.Generator().manual_seed(0))
    held_out = Batches(splits.held_out.at(order), splits, 250, CPU)
    few = {"max_instances": images, "per_site": True}
    if saved is None:
        best = calibrate(pruner, held_out, max_drop=max_drop, by_channels=True, **few).best
    else:
        dense = count_macs(pruner.model, torch.zeros(1, 3, 32, 32)).dense
        best = calibrate(pruner, held_out, max_drop=1.0, target_macs=(1 - saved) * dense, **few).best
    return {"parameters": best.parameters, "per_site": pruner.per_site}


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Choose thresholds or find them chosen, train with them, measure, write ``gated.json``."""
    splits = load(args.data, 32, 0)
    test = Batches(splits.test.at(torch.arange(0, len(splits.test), args.thin)), splits, 250, CPU)
    names = ("saved", "max_drop", "images", "lambda_", "epochs", "peak", "batch", "precision")
    origin = f"{args.model.absolute().parent.name}/{args.model.stem}"
    settings = {"model": origin, "data": Path(args.data).name, **{name: getattr(args, name) for name in names}}
    run = RunFolder(args.out, settings)
    model = stored(args.model, len(splits.classes))
    pruner = InstanceWisePruner(model, torch.zeros(1, 3, 32, 32), args.lambda_)
    bfloat16 = args.precision == "bfloat16"
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bfloat16)
    before = run.path / "before.json"
    if not before.exists():
        with autocast:
            off = measured(model, test)
            thresholds = chosen(pruner, splits, args.images, args.saved, args.max_drop)
            gated = {"off": off, "before": measured(model, test)}
        run.write(before.name, json.dumps(gated | thresholds))
    results: dict[str, Any] = settings | json.loads(before.read_text())
    pruner.enable(per_site=results["per_site"], **results["parameters"])
    if run.has("trained"):
        model.load_state_dict(run.load("trained")[0])
        model.eval()
    else:
        train(
            model,
            splits,
            Schedule(args.epochs, args.peak, args.batch),
            run,
            "trained",
            seed=0,
            device=CPU,
            bfloat16=bfloat16,
            regularize=lambda loss: pruner.regularize(model, loss),
        )
        finish(model, run, "trained", origin=f"{origin}, fine-tuned {args.epochs} epochs with gates on")
    with autocast:
        results["after"] = measured(model, test)
        if args.again is not None:
            thresholds = chosen(pruner, splits, args.images, args.again, None)
            results["again"] = {"saved": args.again} | measured(model, test) | thresholds
    results |= {
        "test_images": len(test.images),
        **circumstances("benchmarks.budget.gated"),
    }
    run.write("gated.json", json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    with in_one_line():
        found = main(arguments())
        print(*(f"{name}: {found[name]}" for name in ("off", "before", "after", "again") if name in found), sep="\n")
