"""At digits scale: what carries over between networks, and what a gate does without training.

    python -m benchmarks.budget --out benchmarks/budget/results --seeds 0 1
    python -m benchmarks.budget --out runs/budget --quick      # a minute or two: does it run?

Three networks (benchmarks.paper's, at --width) are trained on the embedded digits at 32 pixels and then fine-tuned
with each form of feature decay. Every row: accuracy, mean CV (Eq. 6), and the most MACs that gates save while held-out
accuracy stays within --max-drop of the network fine-tuned without decay; accuracy, MACs and ratio are of test images.
Further: gates on the trained network as it is, and with --per-site thresholds of single sites; and scope="all"
against "consumers" at the same thresholds. A second run goes on where the first stopped, network by network.
"""

from isw_cli.script import in_one_line

import argparse
import copy
import itertools
import json
import statistics
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.lab.circumstances import command
from benchmarks.lab.images import Batches, ImageSplits, load, shuffled
from benchmarks.lab.networks import build
from benchmarks.lab.training import Schedule
from isw_plugin import InstanceWisePruner, calibrate, evaluate
from isw_plugin.errors import BudgetError
from isw_plugin.measure import hardware

BATCH = 32
GRID = {"alpha": (0.0,), "beta": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)}
SCOPE_BETAS = (0.2, 0.4, 0.6, 0.8)
CPU = torch.device("cpu")
NETWORKS = {"vgg16": "vgg16", "resnet18": "resnet18-pooled", "mobilenetv2": "mobilenetv2"}  # of benchmarks.paper


@dataclass(frozen=True)
class Decay:
    """A form of feature decay to fine-tune with."""

    reduction: str
    lambda_: float
    ramp: bool = False

    def at(self, progress: float) -> float:
        """Lambda at a share of the training in [0, 1): rising over the first half, then constant."""
        return self.lambda_ * min(1.0, 2 * progress) if self.ramp else self.lambda_

    def __str__(self) -> str:
        return f"{self.reduction}:{self.lambda_:g}{':ramp' if self.ramp else ''}" if self.lambda_ else "none"

    @classmethod
    def parse(cls, text: str) -> Self:
        """``none``, ``sum:1e-6``, ``relative:0.3``, ``relative:0.3:ramp``."""
        reduction, lambda_, *ramp = text.split(":") if text != "none" else ("sum", "0")
        return cls(reduction, float(lambda_), bool(ramp))


DECAYS = ("none", "sum:1e-6", "sum:1e-5", "relative:0.3", "relative:1", "relative:3", "relative:1:ramp")


@dataclass(frozen=True)
class Bench:
    """What every experiment on one seed needs."""

    args: argparse.Namespace
    splits: ImageSplits
    seed: int

    def batches(self, part: str) -> Batches:
        return Batches(getattr(self.splits, part), self.splits, 120, CPU)

    def attach(self, model: nn.Module, **settings: Any) -> InstanceWisePruner:
        return InstanceWisePruner(model, torch.zeros(1, 3, 32, 32), **settings)

    def train(self, model: nn.Module, epochs: int, peak: float, decay: Decay) -> None:
        """Train in place under a decay."""
        schedule = Schedule(epochs, peak, BATCH)
        pruner = self.attach(model, lambda_=decay.lambda_, reduction=decay.reduction)
        optimizer = torch.optim.SGD(model.parameters(), peak, momentum=0.9, weight_decay=5e-4, nesterov=True)
        steps = len(self.splits.train) // BATCH
        model.train()
        for epoch in range(epochs):
            for step, (images, labels) in enumerate(shuffled(self.splits, BATCH, self.seed * 1000 + epoch, CPU)):
                progress = (epoch + step / steps) / epochs
                optimizer.param_groups[0]["lr"] = schedule.learning_rate(progress)
                pruner.lambda_ = decay.at(progress)
                pruner.regularize(model, F.cross_entropy(model(images), labels)).backward()
                optimizer.step()
                optimizer.zero_grad()
        pruner.remove()
        model.eval()


def decay_rows(bench: Bench, name: str, trained: nn.Module) -> tuple[list[dict[str, Any]], dict[str, nn.Module]]:
    """Fine-tune with every form of decay; returns a row each, and the models."""
    rows: list[dict[str, Any]] = []
    models = {}
    for decay in bench.args.decays:
        model = copy.deepcopy(trained)
        bench.train(model, bench.args.epochs_finetune, 0.02, decay)
        row = {"network": name, "seed": bench.seed, "decay": str(decay)} | state(bench, model)
        floor = (rows[0]["held_out"] if rows else row["held_out"]) - bench.args.max_drop
        rows.append(row | best_above(bench, model, floor))
        models[str(decay)] = model
        print(rows[-1], flush=True)
    return rows, models


def state(bench: Bench, model: nn.Module) -> dict[str, Any]:
    """Accuracy on held-out and test images with gates off, and CV (Eq. 6): the mean over sites."""
    pruner = bench.attach(model)
    held_out = evaluate(model, bench.batches("held_out")).accuracy
    with pruner.gating(beta=0.0):
        report = evaluate(model, bench.batches("test"))
    pruner.remove()
    cv = statistics.fmean(site.cv for site in report.per_site.values())
    return {"held_out": held_out, "accuracy": report.accuracy, "cv": cv}


def best_above(bench: Bench, model: nn.Module, floor: float) -> dict[str, Any]:
    """What gates save at most with this accuracy on the held-out images, measured on the test images."""
    pruner = bench.attach(model)
    try:
        found = calibrate(pruner, bench.batches("held_out"), max_drop=0.49, grid=bench.args.grid)
        fitting = [c for c in found.candidates if c.accuracy >= floor - 1e-9 and not c.emptied and c.macs_saved > 0]
        if not fitting:
            return {"gated": None}
        best = max(fitting, key=lambda c: c.macs_saved)
        return {"gated": gated(bench, pruner, best.parameters)}
    finally:
        pruner.remove()


def gated(bench: Bench, pruner: InstanceWisePruner, parameters: dict[str, float]) -> dict[str, Any]:
    """On the test images."""
    with pruner.gating(**parameters):
        report = evaluate(pruner.model, bench.batches("test"))
    measured = {"accuracy": report.accuracy, "prune_ratio": report.prune_ratio, "macs_saved": report.macs_saved}
    return {"parameters": parameters, **measured, "emptied": report.emptied}


def untrained_rows(bench: Bench, name: str, models: dict[str, nn.Module]) -> list[dict[str, Any]]:
    """Gates on networks without decay, and on some with: one pair of thresholds, then thresholds of single sites."""
    rows = []
    for training, model in models.items():
        row = {"network": name, "seed": bench.seed, "model": training} | state(bench, model)
        floor = row["held_out"] - bench.args.max_drop
        rows.append(row | {"per_site": False} | best_above(bench, model, floor))
        if name in bench.args.per_site:
            rows.append(row | {"per_site": True} | single_sites(bench, model))
        print(rows[-1], flush=True)
    return rows


def single_sites(bench: Bench, model: nn.Module) -> dict[str, Any]:
    pruner = bench.attach(model)
    try:
        found = calibrate(pruner, bench.batches("held_out"), max_drop=bench.args.max_drop, per_site=True)
        return {"gated": gated(bench, pruner, found.best.parameters)}
    except BudgetError:
        return {"gated": None}
    finally:
        pruner.remove()


def scope_rows(bench: Bench, name: str, models: dict[str, nn.Module]) -> list[dict[str, Any]]:
    """Both scopes at the same thresholds, alpha 0."""
    rows = []
    for training, model in models.items():
        for scope in ("all", "consumers"):
            pruner = bench.attach(model, scope=scope, alpha=0.0)
            for beta in bench.args.scope_betas:
                row = {"network": name, "seed": bench.seed, "model": training, "scope": scope}
                rows.append(row | gated(bench, pruner, {"beta": beta}))
            pruner.remove()
    return rows


def experiment(args: argparse.Namespace, name: str, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Everything on one network and seed, in float32."""
    bench = Bench(args, load("digits", 32, seed), seed)
    trained = build(NETWORKS[name], 10, args.width, seed)
    bench.train(trained, args.epochs, 0.05, Decay("sum", 0.0))
    decays, models = decay_rows(bench, name, trained)
    chosen = {"trained": trained, **{str(decay): models[str(decay)] for decay in args.compared}}
    scopes = scope_rows(bench, name, chosen) if name != "vgg16" else []
    return {"decay": decays, "untrained": untrained_rows(bench, name, chosen), "scope": scopes}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--width", type=float, default=0.5, help="share of the networks' channels")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--epochs-finetune", type=int, default=6)
    parser.add_argument("--max-drop", type=float, default=0.01, help="accuracy that gates may lose")
    parser.add_argument("--quick", action="store_true", help="one epoch, few settings: does it run?")
    parser.add_argument("--out", type=Path, default=Path("runs/budget"), help="folder for digits.json")
    parser.add_argument("--decays", type=Decay.parse, nargs="+", default=[Decay.parse(text) for text in DECAYS])
    parser.add_argument(
        "--compared", type=Decay.parse, nargs="*", default=[Decay("relative", 1.0)], help="decays to compare scopes on"
    )
    parser.add_argument("--per-site", nargs="*", default=[], help="networks to choose thresholds of single sites on")
    args = parser.parse_args(argv)
    args.grid, args.scope_betas = GRID, SCOPE_BETAS
    if args.quick:
        args.width, args.epochs, args.epochs_finetune = 0.25, 1, 1
        args.decays, args.compared = [Decay("sum", 0.0), Decay("relative", 0.3)], [Decay("relative", 0.3)]
        args.grid, args.scope_betas, args.max_drop = {"alpha": (0.0,), "beta": (0.1, 0.5)}, (0.3, 0.6), 0.49
    return args


TABLES = ("decay", "untrained", "scope")


def begun(file: Path, settings: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of a run of these settings, nothing if there is none."""
    found = json.loads(file.read_text()) if file.exists() else {}
    same = found and all(found[name] == value for name, value in settings.items())
    return {name: found[name] if same else [] for name in TABLES}


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run what ``digits.json`` lacks, and write it after every network and seed."""
    settings = {
        "data": "digits at 32 pixels, 1,077 training, 360 held-out, 360 test images",
        "width": args.width,
        "epochs": [args.epochs, args.epochs_finetune],
        "batch": BATCH,
        "max_drop": args.max_drop,
        "decays": [str(decay) for decay in args.decays],
        "hardware": f"{hardware(CPU)}, {torch.get_num_threads()} CPU threads",
        "torch": torch.__version__,
    }
    file = args.out / "digits.json"
    rows = begun(file, settings)
    args.out.mkdir(parents=True, exist_ok=True)
    for seed, name in itertools.product(args.seeds, args.networks):
        if any((row["seed"], row["network"]) == (seed, name) for row in rows["decay"]):
            continue
        for table, more in experiment(args, name, seed).items():
            rows[table] += more
        about = {"command": command("benchmarks.budget"), "date": date.today().isoformat()}
        file.write_text(json.dumps(about | settings | rows, indent=1) + "\n")
    return settings | rows


if __name__ == "__main__":
    with in_one_line():
        main(arguments())
