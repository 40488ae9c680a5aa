"""One pair of thresholds for a network against thresholds of single sites, on trained VGG16s.

    python -m benchmarks.budget.sites --data DIR --out benchmarks/budget/results \\
        runs/paper/runs/vgg16-0/trained.safetensors runs/paper/runs/vgg16-1e-07/trained.safetensors

The models are VGG16s of benchmarks.paper or examples/slimmed_vgg16.py, trained on --data with seed 0. Thresholds are
chosen on held-out training images and reported on test images, in float32.
"""

from isw_cli.script import in_one_line

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.lab.circumstances import circumstances
from benchmarks.lab.images import Batches, ImageSplits, load
from benchmarks.lab.networks import stored_vgg16
from isw_plugin import InstanceWisePruner, calibrate, evaluate
from isw_plugin.calibrate.choice import Choice

CPU = torch.device("cpu")


def site_rows(args: argparse.Namespace, splits: ImageSplits) -> Iterator[dict[str, Any]]:
    """One pair and thresholds of single sites, for every model and budget."""
    held_out = Batches(splits.held_out, splits, 250, CPU)
    test = list(Batches(splits.test.at(torch.arange(0, len(splits.test), args.thin)), splits, 250, CPU))
    for path, drop in itertools.product(args.models, args.max_drops):
        pruner = InstanceWisePruner(stored_vgg16(path), torch.zeros(1, 3, 32, 32))
        dense = evaluate(pruner.model, test)
        aim = {"by_channels": args.by_channels}
        found = calibrate(pruner, held_out, max_drop=drop, max_instances=args.images, per_site=True, **aim)
        pair = Choice(found.accuracy, drop, None, **aim).best([c for c in found.candidates if not c.per_site])
        for candidate in (pair, found.best):
            with pruner.gating(per_site=candidate.per_site, **candidate.parameters):
                report = evaluate(pruner.model, test)
            yield {
                "model": f"{path.absolute().parent.name}/{path.stem}",
                "max_drop": drop,
                "dense": {"held_out": found.accuracy, "test": dense.accuracy, "macs": dense.macs},
                "held_out": {
                    "images": found.instances,
                    "accuracy": candidate.accuracy,
                    "dropped": candidate.prune_ratio,
                    "saved": candidate.macs_saved,
                },
                "test": {"images": report.instances, "accuracy": report.accuracy, "saved": report.macs_saved},
                "prune_ratio": report.prune_ratio,
                "parameters": candidate.parameters,
                "per_site": candidate.per_site,
                "candidates": len(found.candidates),
            }


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="weights of VGG16s")
    parser.add_argument("--data", required=True, help="what they were trained on: digits, cifar10, or a folder")
    parser.add_argument("--max-drops", type=float, nargs="+", default=[0.005, 0.01], help="budgets of accuracy")
    parser.add_argument("--by-channels", action="store_true", help="drop the most channels, not the most MACs")
    parser.add_argument("--images", type=int, default=1000, help="held-out images to calibrate on")
    parser.add_argument("--thin", type=int, default=5, help="take every n-th test image")
    parser.add_argument("--out", type=Path, default=Path("runs/budget"), help="folder for sites.json")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run, and write ``sites.json`` after every row."""
    results: dict[str, Any] = {
        **circumstances("benchmarks.budget.sites"),
        "data": Path(args.data).name,
        "rows": [],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for row in site_rows(args, load(args.data, 32, 0)):
        results["rows"].append(row)
        print(row, flush=True)
        (args.out / "sites.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    with in_one_line():
        main(arguments())
