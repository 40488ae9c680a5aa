"""Which channels to prune: importances of torch-pruning and ours at equal MACs, on one trained VGG16.

PYTHONPATH=examples python benchmarks/importance.py --out runs/importance      # embedded digits, width 0.5

The network is trained with BN-L1 and fine-tuned with feature decay. Every importance then prunes a copy of it,
globally, to the same MACs; accuracy on the test images is given right after that, and after fine-tuning.
"""

import argparse
import copy
import datetime
import json
import shlex
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import slimmed_vgg16 as example
import torch
import torch_pruning as tp
from images import load, shuffled
from run_folder import RunFolder
from torch import nn
from torch.nn import functional as F

from isw_plugin import InstanceWisePruner, count_macs, evaluate
from isw_plugin.measure import hardware
from isw_plugin.toolkits.torch_pruning import InstanceFrequencyImportance, SlimmingImportance

Importance = Callable[[example.Job, nn.Module], Any]


def frequency(job: example.Job, model: nn.Module) -> Any:
    pruner = InstanceWisePruner(model, job.example, alpha=job.args.alpha, beta=job.args.beta)
    found = InstanceFrequencyImportance(pruner, job.batches("train"))
    pruner.remove()
    return found


def taylor(job: example.Job, model: nn.Module) -> Any:
    """Of the loss on all training images, one gradient."""
    for images, labels in job.batches("train"):
        (F.cross_entropy(model(images), labels) / len(job.splits.train) * len(labels)).backward()
    return tp.importance.GroupTaylorImportance(normalizer=None)


IMPORTANCES: dict[str, Importance] = {
    "instance frequency": frequency,
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


def pruned(job: example.Job, ranked: nn.Module, ranking: Any, target: float) -> nn.Module:
    """A copy with at most this share of the MACs: the lowest pruning ratio that reaches it, to 1/250."""
    whole = count_macs(ranked, job.example).dense
    low, high = 0.0, 1.0
    best = ranked
    while high - low > 4e-3:
        torch.manual_seed(job.args.seed)
        ratio = (low + high) / 2
        model, same = copied(ranked, ranking)
        tp.pruner.BasePruner(
            model, job.example, same, pruning_ratio=ratio, global_pruning=True, ignored_layers=[model.head.fc]
        ).step()
        if count_macs(model, job.example).dense <= target * whole:
            high, best = ratio, model
        else:
            low = ratio
    best.zero_grad()
    return best


def finetuned(job: example.Job, model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    for epoch in range(job.args.epochs_after):
        for images, labels in shuffled(job.splits, job.args.batch, epoch, job.device):
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def rows(job: example.Job, trained: nn.Module, name: str, targets: list[float]) -> list[dict[str, Any]]:
    ranked = copy.deepcopy(trained)
    ranking = IMPORTANCES[name](job, ranked)
    return [row(job, pruned(job, ranked, ranking, target), name, target) for target in targets]


def row(job: example.Job, model: nn.Module, name: str, target: float) -> dict[str, Any]:
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    found = {
        "importance": name,
        "target": target,
        "macs": count_macs(model, job.example).dense,
        "channels": sum(norm.num_features for norm in norms),
        "widths": [norm.num_features for norm in norms],
        "accuracy": evaluate(model, job.batches("test")).accuracy,
        "accuracy_finetuned": evaluate(finetuned(job, model), job.batches("test")).accuracy,
    }
    print(found, flush=True)
    return found


def trained_network(job: example.Job) -> nn.Module:
    """As the main job trains it, without its static step in between."""
    example.dense_stage(job)
    name = "decayed"
    if not job.run.has(name):
        model = job.stored("dense", job.dense_widths())
        pruner = InstanceWisePruner(model, job.example, lambda_=job.args.lambdas[0])
        regularize = lambda loss: pruner.regularize(model, loss)  # noqa: E731
        job.train(model, name, job.args.epochs_finetune, 0.05, regularize=regularize)
    return job.stored(name, job.dense_widths())


def versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "torch-pruning"))


def table(results: dict[str, Any]) -> str:
    lines = [
        results["about"],
        "",
        "| MACs | importance | channels | accuracy | after fine-tuning |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['macs'] / 1e6:.2f} M | {row['importance']} | {row['channels']} | {row['accuracy']:.4f} | "
        f"{row['accuracy_finetuned']:.4f} |"
        for row in results["rows"]
    ]
    return "\n".join(lines) + "\n"


def about(job: example.Job, trained: nn.Module, own: argparse.Namespace) -> str:
    """What was run, on what."""
    accuracy = evaluate(trained, job.batches("test")).accuracy
    macs = count_macs(trained, job.example).dense / 1e6
    return (
        f"VGG16, width {job.args.width}, digits at {job.args.size}x{job.args.size}, {own.epochs} epochs with BN-L1 and "
        f"{own.epochs} with lambda {job.args.lambdas[0]:g} ({own.precision}), seed {own.seed}: accuracy {accuracy:.4f} "
        f"on {len(job.splits.test)} test images, {macs:.2f} MMACs. Importances see the training images; gate alpha "
        f"{job.args.alpha}, beta {job.args.beta}; fine-tuned for {own.epochs_after} epochs. {hardware()}, "
        f"{torch.get_num_threads()} threads, {versions()}, {datetime.date.today()}: "
        f"{shlex.join(['python', *sys.orig_argv[1:]])}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/importance"))
    parser.add_argument("--epochs", type=int, default=12, help="dense, and again with feature decay")
    parser.add_argument("--epochs-after", type=int, default=1)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of training")
    own = parser.parse_args()
    args = example.arguments(
        f"--epochs-dense {own.epochs} --epochs-finetune {own.epochs} --seed {own.seed} --precision {own.precision} "
        f"--out {own.out}".split()
    )
    args.epochs_after, args.alpha, args.beta = own.epochs_after, 0.5, 1.0
    settings = {"epochs": own.epochs, "seed": own.seed, "precision": own.precision}
    job = example.Job(args, load("digits", args.size, args.seed), RunFolder(own.out, settings), torch.device("cpu"))
    trained = trained_network(job)
    found = [line for name in IMPORTANCES for line in rows(job, trained, name, own.targets)]
    found.sort(key=lambda line: -line["target"])
    results = {"about": about(job, trained, own), "rows": found}
    job.run.write("importance.json", json.dumps(results, indent=2))
    job.run.write("importance.md", table(results))
    print(table(results))


if __name__ == "__main__":
    main()
