"""The main job: slim a VGG16 with torch-pruning, fine-tune it with feature decay, gate it per image.

    python examples/slimmed_vgg16.py                          # embedded digits, a few minutes on a CPU
    python examples/slimmed_vgg16.py --data cifar10 --lambda 0 1e-7 1e-6
    python examples/slimmed_vgg16.py --data DIR               # DIR/train/CLASS/*.jpg and DIR/test or DIR/val

Six stages, each saved when done and training after every epoch: interrupt it at any time and run the
same command again. Ends with Table 6 of the paper for this run, and below it the network that was trained with
gates on, within a budget of MACs (--macs-left); everything is written into --out.
"""

from isw_cli.script import in_one_line

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from gated_training import GatedTraining, load_gates, save_gates, settle
from images import Batches, ImageSplits, load
from run_folder import RunFolder, damaged, require_free_or_same
from slimmed_vgg16_options import check, options
from table6 import table6
from torch import Tensor, nn
from training import Schedule, finish, train
from vgg import MIN_CHANNELS, WIDTHS, vgg16

from isw_plugin import Calibration, InstanceWisePruner, calibrate, evaluate
from isw_plugin.accelerate import Accelerated
from isw_plugin.errors import AttachError, BudgetError, SettingError
from isw_plugin.measure import GateReport, Latency, compare, hardware
from isw_plugin.report import channel_heatmap, frontier, write
from isw_plugin.toolkits.torch_pruning import SlimmingImportance

PAPER_PAIRS = ((0.5, 1.0), (0.7, 0.7))
NOT_TRAINED_WITH = ("out", "device", "lambdas", "max_drop", "macs_left")  # a run may go on with others of these
TIMED_BATCH = 64
TIMED_ROUNDS = 9
ROUNDS_OF_ONE = 50  # at batch 1


@dataclass
class Job:
    """What every stage needs."""

    args: argparse.Namespace
    splits: ImageSplits
    run: RunFolder
    device: torch.device

    @property
    def example(self) -> Tensor:
        return torch.zeros(1, 3, self.args.size, self.args.size, device=self.device)

    def batches(self, part: str) -> Batches:
        return Batches(getattr(self.splits, part), self.splits, 250, self.device)

    def build(self, widths: tuple[int, ...]) -> nn.Module:
        torch.manual_seed(self.args.seed)
        return vgg16(widths, len(self.splits.classes)).to(self.device)

    def dense_widths(self) -> tuple[int, ...]:
        return tuple(max(MIN_CHANNELS, int(width * self.args.width)) for width in WIDTHS)

    def stored(self, name: str, widths: tuple[int, ...]) -> nn.Module:
        model = self.build(widths)
        tensors, _ = self.run.load(name)
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise damaged(self.run.path / f"{name}.safetensors", error) from error
        return model.eval()

    def train(self, model: nn.Module, stage: str, epochs: int, peak: float, **penalties: Callable[..., Any]) -> None:
        schedule = Schedule(epochs, peak, self.args.batch)
        bfloat16 = self.args.precision == "bfloat16"
        train(
            model,
            self.splits,
            schedule,
            self.run,
            stage,
            seed=self.args.seed,
            device=self.device,
            bfloat16=bfloat16,
            **penalties,
        )
        finish(model, self.run, stage)


def static_pruner(job: Job, model: nn.Module) -> Any:
    """torch-pruning as its users set it up: network slimming over the whole network."""
    return tp.pruner.BNScalePruner(
        model,
        job.example,
        importance=SlimmingImportance(MIN_CHANNELS),
        reg=job.args.bn_l1,
        global_pruning=True,
        pruning_ratio=job.args.prune_ratio,
        ignored_layers=[model.head.fc],
    )


def dense_stage(job: Job) -> None:
    """Train with an L1 penalty on the batch norms' gamma."""
    if not job.run.has("dense"):
        model = job.build(job.dense_widths())
        slimming = static_pruner(job, model)
        job.train(model, "dense", job.args.epochs_dense, 0.1, after_backward=lambda: slimming.regularize(model))


def slim_stage(job: Job) -> tuple[int, ...]:
    """Prune the channels of smallest gamma; returns the widths that are left."""
    if not job.run.has("slimmed"):
        model = job.stored("dense", job.dense_widths())
        static_pruner(job, model).step()
        widths = [module.num_features for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        pruned = 1 - sum(widths) / sum(job.dense_widths())
        if abs(pruned - job.args.prune_ratio) > 0.02:
            raise SettingError(
                f"--prune-ratio {job.args.prune_ratio:g}: only {pruned:.3f} of the channels can go, since every layer "
                f"keeps {MIN_CHANNELS}; prune less, or a wider network"
            )
        job.run.save("slimmed", model.state_dict(), widths=widths)
    widths = job.run.load("slimmed")[1].get("widths")
    if not isinstance(widths, list) or len(widths) != len(WIDTHS) or not all(type(w) is int and w > 0 for w in widths):
        raise damaged(job.run.path / "slimmed.safetensors", f"widths {widths}")
    return tuple(widths)


def finetune_stage(job: Job, widths: tuple[int, ...], lambda_: float) -> str:
    """Fine-tune with feature decay (Eq. 5); returns the name that the model is stored under."""
    name = f"finetuned-{lambda_!r}"
    if not job.run.has(name):
        model = job.stored("slimmed", widths)
        pruner = InstanceWisePruner(model, job.example, lambda_=lambda_)
        regularize = lambda loss: pruner.regularize(model, loss)  # noqa: E731
        job.train(model, name, job.args.epochs_finetune, 0.05, regularize=regularize)
    return name


def calibrate_stage(job: Job, widths: tuple[int, ...], lambda_: float) -> Calibration | None:
    """Choose alpha and beta on held-out images; None where the budget cannot be met."""
    file = f"calibrated-{lambda_!r}-{job.args.max_drop!r}.json"
    if (job.run.path / file).exists():
        return _calibration(job.run.path / file)
    model = job.stored(f"finetuned-{lambda_!r}", widths)
    pruner = InstanceWisePruner(model, job.example)
    try:
        calibration = calibrate(pruner, job.batches("held_out"), max_drop=job.args.max_drop)
    except BudgetError as error:
        print(f"  lambda {lambda_:g}: {error}")
        return None
    job.run.write(file, json.dumps(asdict(calibration), indent=2))
    return calibration


def _calibration(file: Path) -> Calibration:
    try:
        return Calibration.from_dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise damaged(file, error) from error


def budget_stage(job: Job, widths: tuple[int, ...], lambda_: float) -> str:
    """Go on from the fine-tuned network with gates on, thresholds following the budget; returns the stored name."""
    name = f"budget-{lambda_!r}-{job.args.macs_left!r}"
    if job.run.has(name):
        return name
    model, args = job.stored(f"finetuned-{lambda_!r}", widths), job.args
    pruner = InstanceWisePruner(model, job.example, lambda_=lambda_, alpha=0.0, beta=0.0)
    teacher = job.stored(f"finetuned-{lambda_!r}", widths).requires_grad_(False)
    steps = args.epochs_budget * (len(job.splits.train) // args.batch)
    gates = GatedTraining(pruner, job.splits, args.macs_left, steps, teacher=teacher)
    job.train(model, name, args.epochs_budget, 0.02, **gates.hooks)
    settle(pruner, job.batches("held_out"), args.macs_left)
    save_gates(job.run, name, pruner)
    finish(model, job.run, name)
    return name


def budgeted(job: Job, widths: tuple[int, ...], name: str) -> nn.Module:
    """The network that ``budget_stage`` stored, with its gates on."""
    model = job.stored(name, widths)
    load_gates(job.run, name, InstanceWisePruner(model, job.example))
    return model


def measure_stage(
    job: Job, widths: tuple[int, ...], calibrations: dict[float, Calibration | None], name: str
) -> dict[str, Any]:
    """Every stage's model on the test images, all timed in turn in one process."""
    variants = [("dense", None, None, None), ("slimmed", None, None, None)]
    for lambda_, calibration in calibrations.items():
        variants.append(("finetuned", lambda_, None, None))
        pairs = [*PAPER_PAIRS]
        if calibration:
            pairs.append((calibration.best.parameters["alpha"], calibration.best.parameters["beta"]))
        variants += [("gated", lambda_, alpha, beta) for alpha, beta in pairs]
    models = [_variant(job, widths, *variant) for variant in variants]
    drawn = ("gated", max(calibrations), *PAPER_PAIRS[0])  # Figure 3 is drawn at this pair
    rows = []
    for variant, model in zip(variants, models, strict=True):
        report = evaluate(model, job.batches("test"), records=variant == drawn)
        if report.records is not None:
            caption = f"{job.splits.name}, lambda {variant[1]:g}, alpha {variant[2]:g}, beta {variant[3]:g}"
            channel_heatmap(report.records, job.splits.classes, job.run.path / "heatmap.png", caption)
            write(
                report,
                job.run.path / "report",
                classes=job.splits.classes,
                calibration=calibrations[drawn[1]],
                images=job.splits.test.pixels,
                title="Slimmed VGG16, gated per image",
                caption=caption,
            )
        rows.append(_row(*variant, report))
    models.append(budgeted(job, widths, name))
    report = evaluate(models[-1], job.batches("test"))
    rows.append(_row("budget", max(calibrations), 0.0, None, report) | {"macs_left": job.args.macs_left})
    for row, (execution, latency) in zip(rows, _times(job, models, TIMED_BATCH), strict=True):
        row |= {"execution": execution, "ms_per_image": latency.ms_per_image}
        row |= {"ms_quartiles": [latency.low, latency.high]}
    alone = _times(job, [models[1], models[-1]], 1)
    for row, (execution, latency) in zip((rows[1], rows[-1]), alone, strict=True):
        quartiles = [latency.low, latency.high]
        row["batch_1"] = {"execution": execution, "ms": latency.ms_per_image, "ms_quartiles": quartiles}
    return _provenance(job, widths) | {"rows": rows}


def _variant(
    job: Job, widths: tuple[int, ...], stage: str, lambda_: float | None, alpha: float | None, beta: float | None
) -> nn.Module:
    if lambda_ is None:
        return job.stored(stage, job.dense_widths() if stage == "dense" else widths)
    model = job.stored(f"finetuned-{lambda_!r}", widths)
    if alpha is not None and beta is not None:
        InstanceWisePruner(model, job.example, alpha=alpha, beta=beta).step()
    return model


def _row(
    stage: str, lambda_: float | None, alpha: float | None, beta: float | None, report: GateReport
) -> dict[str, Any]:
    return {
        "stage": stage,
        "alpha": alpha,
        "beta": beta,
        "lambda": lambda_,
        "accuracy": report.accuracy,
        "prune_ratio": report.prune_ratio,
        "macs": report.macs,
        "macs_saved": report.macs_saved,
        "emptied": report.emptied,
    }


def _times(job: Job, models: list[nn.Module], batch: int) -> list[tuple[str, Latency]]:
    """How each model runs fastest, and its time: gated ones accelerated, the others in their best dense form."""
    images, _ = next(iter(Batches(job.splits.test, job.splits, batch, job.device)))
    fast = [_accelerated(job, model, images) for model in models]
    runs = {str(index): partial(model, images) for index, model in enumerate(fast)}
    with torch.inference_mode():
        rounds = TIMED_ROUNDS if batch > 1 else ROUNDS_OF_ONE
        times = compare(runs, len(images), rounds, job.device).values()
    return [(model.execution, latency) for model, latency in zip(fast, times, strict=True)]


def _accelerated(job: Job, model: nn.Module, images: Tensor) -> Accelerated:
    try:
        pruner = InstanceWisePruner.of(model)
    except AttachError:
        pruner = InstanceWisePruner(model, job.example)
        fast = pruner.accelerate(images, backend="dense")
        pruner.remove()
        return fast
    return pruner.accelerate(images)


def _provenance(job: Job, widths: tuple[int, ...]) -> dict[str, Any]:
    splits = job.splits
    return {
        "command": shlex.join(["python", *sys.argv]),
        "seed": job.args.seed,
        "date": date.today().isoformat(),
        "hardware": f"{hardware(job.device)}, {torch.get_num_threads()} CPU threads",
        "versions": {name: version(name) for name in ("torch", "timm", "torch-pruning", "isw_plugin")},
        "data": {
            "name": splits.name,
            "train": len(splits.train),
            "held_out": len(splits.held_out),
            "test": len(splits.test),
        },
        "widths": list(widths),
        "timed": {"batch": TIMED_BATCH, "rounds": TIMED_ROUNDS},
    }


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    return options(__doc__, argv)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run all stages that the run folder does not hold yet; returns what results.json holds."""
    check(args)
    settings = {name: value for name, value in vars(args).items() if name not in NOT_TRAINED_WITH}
    require_free_or_same(args.out, settings)
    splits = load(args.data, args.size, args.seed)
    if len(splits.train) < args.batch:
        raise SettingError(f"--batch {args.batch}: there are only {len(splits.train)} training images")
    job = Job(args, splits, RunFolder(args.out, settings), torch.device(args.device))
    print(f"[1/6] train with BN-L1 {args.bn_l1:g}")
    dense_stage(job)
    print(f"[2/6] prune {args.prune_ratio:.0%} of the channels")
    widths = slim_stage(job)
    print("[3/6] fine-tune with feature decay")
    for lambda_ in args.lambdas:
        finetune_stage(job, widths, lambda_)
    print("[4/6] calibrate alpha and beta on held-out images")
    calibrations = {lambda_: calibrate_stage(job, widths, lambda_) for lambda_ in args.lambdas}
    met = {f"lambda {lambda_:g}": found for lambda_, found in calibrations.items() if found}
    if met:
        frontier(met, job.run.path / "frontier.png", f"slimmed VGG16, {splits.name}, {len(splits.held_out)} images")
    print(f"[5/6] train with gates on, {args.macs_left:g} of the MACs left")
    name = budget_stage(job, widths, max(args.lambdas))
    print("[6/6] gate and measure")
    results = measure_stage(job, widths, calibrations, name)
    job.run.write("results.json", json.dumps(results, indent=2))
    job.run.write("results.txt", table6(results) + "\n")
    print(f"\n{table6(results)}\n\nwritten to {job.run.path}")
    return results


if __name__ == "__main__":
    with in_one_line(resumable=True):
        main(arguments())
