"""From a trained network to a fast one, within one budget of MACs.

    python examples/fast_within_budget.py resnet18 --weights w.safetensors --data DIR --macs-left .5 --epochs 10
    python examples/fast_within_budget.py my_net.py:make --weights w.pt --data cifar10 --macs-left .45
    python examples/fast_within_budget.py test_resnet --data digits --epochs 2          # does it run?

MODEL is a name of timm or torchvision, or a function of a Python file. It is fine-tuned twice for as long: without
gates, and with gates on, thresholds following the budget, norms predicted where that pays, and the first as teacher.
Thresholds are then settled on held-out training images and everything is reported on test images, which nothing was
chosen on. Saved after every epoch: interrupt it at any time and run the same command again. All is in --out.
"""

from isw_cli.script import in_one_line

import argparse
import json
import math
import shlex
import sys
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from budget_report import plots, table
from gated_training import GatedTraining, load_gates, save_gates, settle
from images import Batches, ImageSplits, load
from models import load_model
from run_folder import RunFolder, require_free_or_same
from torch import Tensor, nn
from training import Schedule, finish, train

from isw_plugin import InstanceWisePruner, evaluate
from isw_plugin.accelerate import Accelerated
from isw_plugin.errors import BudgetError, SettingError
from isw_plugin.measure import compare, hardware

TIMED = {1: 50, 32: 15}  # batch -> rounds
NOT_TRAINED_WITH = ("out", "device", "curve", "thin")


@dataclass
class Job:
    """What every stage needs."""

    args: argparse.Namespace
    splits: ImageSplits
    run: RunFolder
    device: torch.device

    def batches(self, part: str) -> Batches:
        images = getattr(self.splits, part)
        thinned = images.at(torch.arange(0, len(images), self.args.thin if part == "test" else 1))
        return Batches(thinned, self.splits, 250, self.device)

    def start(self) -> nn.Module:
        torch.manual_seed(self.args.seed)
        model = load_model(self.args.model, self.args.weights, self.splits.classes)
        return model.to(self.device, memory_format=torch.channels_last).eval()

    def stored(self, stage: str) -> nn.Module:
        model = self.start()
        model.load_state_dict(self.run.load(stage)[0])
        return model

    def pruner(self, model: nn.Module) -> InstanceWisePruner:
        args, example = self.args, torch.zeros(1, 3, self.args.size, self.args.size, device=self.device)
        chosen = {"layers": args.layers, "exclude": args.exclude, "reduction": "relative"}
        return InstanceWisePruner(model, example, args.lambda_, alpha=0.0, beta=0.0, **chosen)

    def train(self, model: nn.Module, stage: str, **besides: Any) -> None:
        schedule = Schedule(self.args.epochs, self.args.peak, self.args.batch)
        place = {"seed": self.args.seed, "device": self.device, "bfloat16": self.args.precision == "bfloat16"}
        train(model, self.splits, schedule, self.run, stage, **place, **besides)


def plain_stage(job: Job) -> None:
    """Fine-tune without gates: what ours is compared with, and its teacher."""
    if not job.run.has("plain"):
        model = job.start()
        job.train(model, "plain")
        finish(model, job.run, "plain")


def gated_stage(job: Job) -> None:
    """Fine-tune with gates on, then meet the budget in eval mode on held-out images."""
    if job.run.has("gated"):
        return
    model, args = job.start(), job.args
    teacher = job.stored("plain").requires_grad_(False) if args.distill else None
    steps = args.epochs * (len(job.splits.train) // args.batch)
    gates = GatedTraining(
        job.pruner(model),
        job.splits,
        args.macs_left,
        steps,
        teacher=teacher,
        distill=args.distill,
        predict=args.predict,
    )
    job.train(model, "gated", **gates.hooks)
    settle(gates.pruner, job.batches("held_out"), args.macs_left)
    save_gates(job.run, "gated", gates.pruner)
    finish(model, job.run, "gated")


def gated_model(job: Job) -> InstanceWisePruner:
    """The network that training with gates on left, with its gates."""
    return load_gates(job.run, "gated", job.pruner(job.stored("gated")))


def rows_of(job: Job) -> list[dict[str, Any]]:
    """Test accuracy, MACs and milliseconds of all three networks."""
    before, plain, gates = job.start(), job.stored("plain"), gated_model(job)
    gates.save_pretrained(job.run.path / "pretrained")
    models = {"dense": before, "dense, fine-tuned": plain, "ours": gates.model}
    rows = [_row(name, model, job) for name, model in models.items()]
    for batch, rounds in TIMED.items():
        chosen_on = _images(job, "held_out", batch)
        fast = {"dense, fine-tuned": job.pruner(plain).accelerate(chosen_on, backend="dense")}
        fast["ours"] = gates.accelerate(chosen_on)
        for row, of_row in zip(rows[1:], _times(fast, _images(job, "test", batch), rounds, job.device), strict=True):
            row[f"batch_{batch}"] = of_row
        rows[0][f"batch_{batch}"] = rows[1][f"batch_{batch}"]  # the same layers
        InstanceWisePruner.of(plain).remove()
    return rows


def _row(name: str, model: nn.Module, job: Job) -> dict[str, Any]:
    report = evaluate(model, job.batches("test"))
    return {
        "network": name,
        "accuracy": report.accuracy,
        "dropped": report.prune_ratio,
        "macs_left": 1 - report.macs_saved,
        "macs": report.macs,
    }


def _images(job: Job, part: str, count: int) -> Tensor:
    """From all over a part: folders are in the order of classes."""
    images = getattr(job.splits, part)
    spread = images.at(torch.linspace(0, len(images) - 1, count).long())
    return next(iter(Batches(spread, job.splits, count, job.device)))[0]


def _times(fast: dict[str, Accelerated], images: Tensor, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    runs = {name: partial(model, images) for name, model in fast.items()}
    with torch.inference_mode():
        taken = compare(runs, len(images), rounds, device)
    return [
        {"ms": taken[name].ms_per_image, "quartiles": [taken[name].low, taken[name].high], "runs": model.execution}
        for name, model in fast.items()
    ]


def curve_of(job: Job) -> list[dict[str, Any]]:
    """Test accuracy of the same weights at other budgets, thresholds settled on held-out images."""
    points = []
    for budget in job.args.curve:
        gates = gated_model(job)
        try:
            settle(gates, job.batches("held_out"), budget)
        except BudgetError as error:
            print(f"  {error}")
            continue
        points.append(_row(f"ours at {budget:g}", gates.model, job))
    return points


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run the stages that the run folder does not hold yet; returns what results.json holds."""
    check(args)
    settings = {name: _plain(value) for name, value in vars(args).items() if name not in NOT_TRAINED_WITH}
    require_free_or_same(args.out, settings)
    splits = load(args.data, args.size, args.seed)
    if args.mean and args.std:
        splits = replace(splits, mean=255 * torch.tensor(args.mean), std=255 * torch.tensor(args.std))
    splits = replace(splits, train=splits.train.at(torch.arange(len(splits.train))[: args.images]))
    if len(splits.train) < args.batch:
        raise SettingError(f"--batch {args.batch}: there are only {len(splits.train)} training images")
    job = Job(args, splits, RunFolder(args.out, settings), torch.device(args.device))
    print(f"[1/3] fine-tune without gates, {args.epochs} epochs")
    plain_stage(job)
    print(f"[2/3] fine-tune with gates on, {args.macs_left:g} of the MACs left")
    gated_stage(job)
    print("[3/3] measure on test images")
    results = _circumstances(job) | {"rows": rows_of(job), "curve": curve_of(job)}
    job.run.write("results.json", json.dumps(results, indent=1) + "\n")
    job.run.write("results.txt", table(results) + "\n")
    plots(results, job.run.path / "accuracy.png")
    print(
        f"\n{table(results)}\n\nwritten to {job.run.path}; load_pretrained({str(job.run.path / 'pretrained')!r}, ...)"
    )
    return results


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _circumstances(job: Job) -> dict[str, Any]:
    args, splits = job.args, job.splits
    test = job.batches("test").images
    return {
        "model": args.model,
        "weights": args.weights.name if args.weights else None,
        "epochs": args.epochs,
        "budget": args.macs_left,
        "seed": args.seed,
        "command": shlex.join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        "hardware": f"{hardware(job.device)}, {torch.get_num_threads()} CPU threads",
        "versions": {name: version(name) for name in ("torch", "timm", "isw_plugin")},
        "data": {
            "name": splits.name,
            "size": args.size,
            "train": len(splits.train),
            "held_out": len(splits.held_out),
            "test": len(test),
        },
    }


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="of timm or torchvision (torchvision:NAME), or FILE.py:FUNCTION")
    parser.add_argument("--weights", type=Path, help="safetensors or a torch file; without, training begins at random")
    parser.add_argument("--data", required=True, help="digits, cifar10, or a folder with train/ and test/ (or val/)")
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels")
    parser.add_argument("--mean", type=float, nargs=3, help="of inputs in [0, 1], with --std; the training images' own")
    parser.add_argument("--std", type=float, nargs=3)
    parser.add_argument("--macs-left", type=float, default=0.5, help="the budget, a share of the dense MACs")
    parser.add_argument("--curve", type=float, nargs="*", default=[], help="further budgets to measure, untrained")
    parser.add_argument("--epochs", type=int, default=10, help="of each of the two trainings")
    parser.add_argument("--batch", type=int, help="training batch (32 on digits, else 128)")
    parser.add_argument("--peak", type=float, default=0.02, help="learning rate")
    parser.add_argument("--lambda", dest="lambda_", type=float, default=0.1, help="feature decay, relative")
    parser.add_argument("--distill", type=float, default=0.5, help="how much the teacher weighs; 0: there is none")
    parser.add_argument("--no-predict", dest="predict", action="store_false", help="measure norms at every site")
    parser.add_argument("--layers", default="*", help="which layers to gate, a glob or re:REGEX")
    parser.add_argument("--exclude", nargs="*", default=[], help="layers to leave out")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, help="use this many training images only")
    parser.add_argument("--thin", type=int, default=1, help="take every n-th test image")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="run folder (runs/fast-MODEL-DATA)")
    args = parser.parse_args(argv)
    if args.batch is None:
        args.batch = 32 if args.data == "digits" else 128
    if args.out is None:
        model = args.model.replace(":", "-").replace("/", "-")
        args.out = Path("runs") / f"fast-{model}-{Path(args.data).name}"
    return args


def check(args: argparse.Namespace) -> None:
    """Raise SettingError for options that a later stage would refuse."""
    ranges = {
        "--macs-left": ([args.macs_left], 1e-3, 1),
        "--curve": (args.curve, 1e-3, 1),
        "--epochs": ([args.epochs], 1, math.inf),
        "--batch": ([args.batch], 1, math.inf),
        "--size": ([args.size], 8, math.inf),
        "--peak": ([args.peak], 1e-9, 10),
        "--lambda": ([args.lambda_], 0, 1e6),
        "--distill": ([args.distill], 0, 1),
        "--seed": ([args.seed], 0, 2**32 - 1),  # what scikit-learn takes
        "--thin": ([args.thin], 1, math.inf),
    }
    for name, (values, low, high) in ranges.items():
        for value in values:
            if not low <= value <= high:
                raise SettingError(f"{name} {value:.10g}: from {low:g} to {high:.10g}")
    if bool(args.mean) != bool(args.std):
        raise SettingError("--mean and --std belong together")


if __name__ == "__main__":
    with in_one_line(resumable=True):
        main(arguments())
