"""Which channels to prune: importances of torch-pruning and ours at equal MACs, on one trained VGG16.

python -m benchmarks.importance --out runs/importance      # embedded digits, width 0.5

The network is trained with BN-L1 and fine-tuned with feature decay. Every importance, as torch-pruning sets it up by
default, then prunes a copy of it, globally, to the same MACs; every layer keeps 8 channels, whatever the importance.
Accuracy on the test images is given right after that, and after fine-tuning: mean and range of the seeds.
"""

from isw_cli.script import in_one_line

import argparse
import copy
import datetime
import json
import shlex
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F

from benchmarks.lab.images import load, shuffled
from benchmarks.lab.networks import MIN_CHANNELS
from benchmarks.lab.run_folder import RunFolder
from benchmarks.lab.slimming import Slimming
from isw_plugin import InstanceWisePruner, count_macs, evaluate
from isw_plugin.measure import hardware
from isw_plugin.toolkits.torch_pruning import InstanceFrequencyImportance, SlimmingImportance

ALPHA, BETA = 0.5, 1.0  # of the gates that tell the frequencies
LAMBDA = 1e-6
Importance = Callable[[Slimming, nn.Module], Any]


class Spared(tp.importance.Importance):  # type: ignore[misc]  # torch-pruning ships no types
    """Another importance, with the most important channels of every layer safe: one alone would be a bottleneck."""

    def __init__(self, importance: Any) -> None:
        self.importance = importance

    def __call__(self, group: Any) -> torch.Tensor | None:
        found: torch.Tensor | None = self.importance(group)
        if found is None:
            return None
        safe = found.topk(min(MIN_CHANNELS, len(found))).indices
        return found.index_add(0, safe, found.new_full((len(safe),), 1e6))


def frequency(job: Slimming, model: nn.Module, normalizer: Literal["mean"] | None = "mean") -> Any:
    pruner = InstanceWisePruner(model, job.inputs, alpha=ALPHA, beta=BETA)
    found = InstanceFrequencyImportance(pruner, job.batches("train"), normalizer=normalizer)
    pruner.remove()
    return found


def taylor(job: Slimming, model: nn.Module) -> Any:
    """Of the loss on all training images, one gradient."""
    for images, labels in job.batches("train"):
        (F.cross_entropy(model(images), labels) / len(job.splits.train) * len(labels)).backward()
    return tp.importance.GroupTaylorImportance()


IMPORTANCES: dict[str, Importance] = {
    "instance frequency": frequency,
    "instance frequency, normalizer=None": partial(frequency, normalizer=None),
    "BN scale": lambda job, model: SlimmingImportance(),
    "L1": lambda job, model: tp.importance.GroupMagnitudeImportance(p=1),
    "Taylor": taylor,
    "random": lambda job, model: tp.importance.RandomImportance(),
}


def copied(model: nn.Module, ranking: Any) -> tuple[nn.Module, Any]:
    """Both, which know each other, with gradients."""
    other, same = copy.deepcopy((model, ranking))
    for old, new in zip(model.parameters(), other.parameters(), strict=True):
        new.grad = None if old.grad is None else old.grad.clone()
    return other, same


def pruned(job: Slimming, ranked: nn.Module, ranking: Any, target: float) -> nn.Module:
    """A copy with at most this share of the MACs: the lowest pruning ratio that reaches it, to 1/250."""
    whole = count_macs(ranked, job.inputs).dense
    low, high = 0.0, 1.0
    best = None
    while high - low > 4e-3:
        torch.manual_seed(job.seed)
        ratio = (low + high) / 2
        model, same = copied(ranked, Spared(ranking))
        tp.pruner.BasePruner(
            model, job.inputs, same, pruning_ratio=ratio, global_pruning=True, ignored_layers=[model.head.fc]
        ).step()
        if count_macs(model, job.inputs).dense <= target * whole:
            high, best = ratio, model
        else:
            low = ratio
    if best is None:
        raise RuntimeError(f"no pruning ratio leaves at most {target:.0%} of the MACs")
    best.zero_grad()
    return best


def finetuned(job: Slimming, model: nn.Module, epochs: int) -> nn.Module:
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    for epoch in range(epochs):
        for images, labels in shuffled(job.splits, job.batch, epoch, job.device):
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def rows(job: Slimming, trained: nn.Module, name: str, own: argparse.Namespace) -> list[dict[str, Any]]:
    ranked = copy.deepcopy(trained)
    ranking = IMPORTANCES[name](job, ranked)
    found = []
    for target in own.targets:
        model = pruned(job, ranked, ranking, target)
        found.append({"importance": name, "target": target} | state(job, model, own.epochs_after))
        print(found[-1], flush=True)
    return found


def state(job: Slimming, model: nn.Module, epochs: int) -> dict[str, Any]:
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    return {
        "macs": count_macs(model, job.inputs).dense,
        "channels": sum(norm.num_features for norm in norms),
        "widths": [norm.num_features for norm in norms],
        "accuracy": evaluate(model, job.batches("test")).accuracy,
        "accuracy_finetuned": evaluate(finetuned(job, model, epochs), job.batches("test")).accuracy,
    }


def trained_network(job: Slimming) -> nn.Module:
    """With BN-L1, then with feature decay, for as long each; nothing is pruned in between."""
    job.train_dense()
    name = "decayed"
    if not job.run.has(name):
        model = job.stored("dense", job.widths)
        pruner = InstanceWisePruner(model, job.inputs, lambda_=LAMBDA)
        job.train(model, name, job.epochs_dense, 0.05, regularize=lambda loss: pruner.regularize(model, loss))
    return job.stored(name, job.widths)


def versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "torch-pruning"))


def table(results: dict[str, Any]) -> str:
    lines = [results["about"], ""]
    lines += ["| MACs left | importance | channels | accuracy | after fine-tuning |", "|---|---|---|---|---|"]
    for target in sorted({row["target"] for row in results["rows"]}, reverse=True):
        for name in IMPORTANCES:
            same = [row for row in results["rows"] if (row["target"], row["importance"]) == (target, name)]
            channels = "-".join(str(count) for count in dict.fromkeys(spread([row["channels"] for row in same])))
            accuracy, finetuned = (ranged([row[key] for row in same]) for key in ("accuracy", "accuracy_finetuned"))
            lines.append(f"| {target:.0%} | {name} | {channels} | {accuracy} | {finetuned} |")
    return "\n".join(lines) + "\n"


def spread(values: list[Any]) -> tuple[Any, Any]:
    return min(values), max(values)


def ranged(values: list[float]) -> str:
    low, high = spread(values)
    return f"{sum(values) / len(values):.3f} ({low:.3f}-{high:.3f})"


def about(own: argparse.Namespace, job: Slimming, whole: list[dict[str, float]]) -> str:
    """What was run, on what."""
    return (
        f"VGG16, width {job.width}, digits at 32x32, {own.epochs} epochs with BN-L1 and "
        f"{own.epochs} with lambda {LAMBDA:g} ({own.precision}), seeds {own.seeds}: accuracy "
        f"{ranged([one['accuracy'] for one in whole])} on {len(job.splits.test)} test images, "
        f"{whole[0]['macs'] / 1e6:.2f} MMACs. Importances see the {len(job.splits.train)} training images; gate alpha "
        f"{ALPHA}, beta {BETA}; fine-tuned for {own.epochs_after} epochs. {hardware()}, "
        f"{torch.get_num_threads()} threads, {versions()}, {datetime.date.today()}: "
        f"{shlex.join(['python', *sys.orig_argv[1:]])}"
    )


def job_of(own: argparse.Namespace, seed: int) -> Slimming:
    settings = {"epochs": own.epochs, "seed": seed, "precision": own.precision}
    return Slimming(
        splits=load("digits", 32, seed),
        run=RunFolder(own.out / str(seed), settings),
        device=torch.device("cpu"),
        width=0.5,
        epochs_dense=own.epochs,
        batch=32,
        bn_l1=5e-4,
        prune_ratio=0.67,
        seed=seed,
        precision=own.precision,
    )


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/importance"))
    parser.add_argument("--epochs", type=int, default=12, help="dense, and again with feature decay")
    parser.add_argument("--epochs-after", type=int, default=1)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.75, 0.5, 0.25], help="shares of the MACs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of training")
    return parser.parse_args(argv)


def main(own: argparse.Namespace) -> dict[str, Any]:
    """Train, prune by every importance, and write ``importance.json`` and ``importance.md``."""
    found, whole = [], []
    for seed in own.seeds:
        job = job_of(own, seed)
        trained = trained_network(job)
        macs = count_macs(trained, job.inputs).dense
        whole.append({"macs": macs, "accuracy": evaluate(trained, job.batches("test")).accuracy})
        found += [{"seed": seed, **line} for name in IMPORTANCES for line in rows(job, trained, name, own)]
    results = {"about": about(own, job, whole), "rows": found}
    (own.out / "importance.json").write_text(json.dumps(results, indent=2))
    (own.out / "importance.md").write_text(table(results))
    print(table(results))
    return results


if __name__ == "__main__":
    with in_one_line():
        main(arguments())
