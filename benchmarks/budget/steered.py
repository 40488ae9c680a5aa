"""Train a network with gates on, thresholds following a share to keep at every site.

    python -m benchmarks.budget.steered --network vgg16 --data DIR --epochs 12 --lambda 3e-7 \\
        --keep '{"*": 0.75, "features.2?": 0.3, "features.3?": 0.1}' --out runs/steered

From scratch, in the epochs that training without gates takes, or from trained weights on (--model). The shares to keep
fall from 1 to those of --keep (patterns, the last that fits holds) between two points of the training, --ramp. Writes
OUT/steered.json, accuracy on test images at the thresholds that training ended with; saved after every epoch, so a
second run goes on.
"""

from isw_cli.script import in_one_line

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.budget.gated import measured, stored
from benchmarks.lab.circumstances import circumstances
from benchmarks.lab.images import Batches, load
from benchmarks.lab.networks import build
from benchmarks.lab.run_folder import RunFolder
from benchmarks.lab.training import Schedule, finish, train
from isw_plugin import InstanceWisePruner
from isw_plugin.sites.patterns import select
from isw_plugin.steering import steer_thresholds

CPU = torch.device("cpu")
STAGE, PRUNER = "trained", "pruner.json"


class Steering:
    """The regularizer of a training that steers thresholds after every step; goes on from what the run folder holds.

    Args:
        keep: Site name -> share to keep at the end of the ramp.
        ramp: Points of the training, in [0, 1], at which shares begin to fall and have fallen.
        epoch: Steps of an epoch, after each of which the thresholds are stored.
        steps: Of the whole training.
    """

    def __init__(
        self,
        pruner: InstanceWisePruner,
        keep: dict[str, float],
        ramp: tuple[float, float],
        run: RunFolder,
        epoch: int,
        steps: int,
    ) -> None:
        self.pruner, self.keep, self.ramp, self.run = pruner, keep, ramp, run
        self.epoch, self.steps = epoch, steps
        self.step = 0
        if run.has(f"{STAGE}.partial"):
            self.step = run.load(f"{STAGE}.partial")[1]["epoch"] * epoch
            pruner.load_state_dict(json.loads((run.path / PRUNER).read_text()))

    def __call__(self, loss: Tensor) -> Tensor:
        self.step += 1
        begin, end = self.ramp
        fallen = min(max((self.step / self.steps - begin) / (end - begin), 0.0), 1.0)
        steer_thresholds(self.pruner, {site: 1 - fallen * (1 - share) for site, share in self.keep.items()})
        if self.step % self.epoch == 0:
            self.run.write(PRUNER, json.dumps(self.pruner.state_dict()))
        return self.pruner.regularize(self.pruner.model, loss)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--network", help="of benchmarks.paper, from scratch")
    subject.add_argument("--model", type=Path, help="trained weights of benchmarks.paper, or of a VGG16 of the example")
    parser.add_argument("--data", required=True, help="digits, cifar10, or a folder of images")
    parser.add_argument("--keep", type=json.loads, required=True, help="site pattern -> share of channels, as JSON")
    parser.add_argument("--ramp", type=float, nargs=2, default=(0.1, 0.5), metavar=("FROM", "TO"))
    parser.add_argument("--lambda", dest="lambda_", type=float, default=0.0, help="of feature decay")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--peak", type=float, default=0.1, help="learning rate")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=float, default=1.0, help="of --network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--thin", type=int, default=1, help="take every n-th test image")
    parser.add_argument("--out", type=Path, required=True, help="folder for the run")
    args = parser.parse_args(argv)
    if not 0 <= args.ramp[0] < args.ramp[1] <= 1:
        parser.error("argument --ramp: FROM and TO are points of the training, 0 <= FROM < TO <= 1")
    return args


def shares(pruner: InstanceWisePruner, patterns: dict[str, float]) -> dict[str, float]:
    """Site name -> share to keep, of the last pattern that fits; sites that none fits keep everything."""
    sites = {site.name: pruner.model.get_submodule(site.name) for site in pruner.sites}
    found = dict.fromkeys(sites, 1.0)
    for pattern, share in patterns.items():
        found |= dict.fromkeys(select(sites, pattern, setting="--keep"), share)
    return found


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train with steered gates or find it done, measure, write ``steered.json``."""
    splits = load(args.data, 32, 0)
    origin = f"{args.model.absolute().parent.name}/{args.model.stem}" if args.model else f"{args.network} from scratch"
    names = ("keep", "ramp", "lambda_", "epochs", "peak", "batch", "width", "seed", "precision")
    settings = {"model": origin, "data": Path(args.data).name, **{name: getattr(args, name) for name in names}}
    run = RunFolder(args.out, settings)
    classes = len(splits.classes)
    model = stored(args.model, classes) if args.model else build(args.network, classes, args.width, args.seed)
    pruner = InstanceWisePruner(model, torch.zeros(1, 3, 32, 32), args.lambda_, alpha=0.0, beta=0.0)
    keep = shares(pruner, args.keep)
    bfloat16 = args.precision == "bfloat16"
    pruner.step()
    if not run.has(STAGE):
        epoch = len(splits.train) // args.batch
        train(
            model,
            splits,
            Schedule(args.epochs, args.peak, args.batch),
            run,
            STAGE,
            seed=args.seed,
            device=CPU,
            bfloat16=bfloat16,
            regularize=Steering(pruner, keep, args.ramp, run, epoch, args.epochs * epoch),
        )
        finish(model, run, STAGE, origin=f"{origin}, {args.epochs} epochs with steered gates")
    pruner.load_state_dict(json.loads((run.path / PRUNER).read_text()))
    model.load_state_dict(run.load(STAGE)[0])
    model.eval()
    test = Batches(splits.test.at(torch.arange(0, len(splits.test), args.thin)), splits, 250, CPU)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        gated = measured(model, test)
        pruner.disable()
        off = measured(model, test)
    results: dict[str, Any] = settings | {
        "off": off,
        "gated": gated,
        "keep": keep,
        "per_site": pruner.per_site,
        "test_images": len(test.images),
        **circumstances("benchmarks.budget.steered"),
    }
    run.write("steered.json", json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    with in_one_line():
        found = main(arguments())
        print(*(f"{name}: {found[name]}" for name in ("off", "gated")), sep="\n")
