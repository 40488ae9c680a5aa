"""Which channels to prune: importances of torch-pruning and ours at equal MACs, on one trained VGG16.

PYTHONPATH=examples python benchmarks/importance.py --out runs/importance      # embedded digits, width 0.5

The network is trained with BN-L1 and fine-tuned with feature decay. Every importance then prunes a copy of it,
globally, to the same MACs; accuracy on the test images is given right after that, and after fine-tuning.
"""

import argparse
import copy
import json
from collections.abc import Callable
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


def pruned(job: example.Job, trained: nn.Module, importance: Importance, target: float) -> nn.Module:
    """A copy with at most this share of the MACs: the lowest pruning ratio that reaches it, to 1/250."""
    whole = count_macs(trained, job.example).dense
    low, high = 0.0, 1.0
    best = trained
    while high - low > 4e-3:
        torch.manual_seed(job.args.seed)
        ratio, model = (low + high) / 2, copy.deepcopy(trained)
        ranking = importance(job, model)
        tp.pruner.BasePruner(
            model, job.example, ranking, pruning_ratio=ratio, global_pruning=True, ignored_layers=[model.head.fc]
        ).step()
        if count_macs(model, job.example).dense <= target * whole:
            high, best = ratio, model
        else:
            low = ratio
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


def row(job: example.Job, trained: nn.Module, name: str, target: float) -> dict[str, Any]:
    model = pruned(job, trained, IMPORTANCES[name], target)
    model.zero_grad()
    channels = sum(module.num_features for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    return {
        "importance": name,
        "target": target,
        "macs": count_macs(model, job.example).dense,
        "channels": channels,
        "accuracy": evaluate(model, job.batches("test")).accuracy,
        "accuracy_finetuned": evaluate(finetuned(job, model), job.batches("test")).accuracy,
    }


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/importance"))
    parser.add_argument("--epochs", type=int, default=12, help="dense, and again with feature decay")
    parser.add_argument("--epochs-after", type=int, default=1)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--seed", type=int, default=0)
    own = parser.parse_args()
    args = example.arguments(
        f"--epochs-dense {own.epochs} --epochs-finetune {own.epochs} --seed {own.seed} --out {own.out}".split()
    )
    args.epochs_after, args.alpha, args.beta = own.epochs_after, 0.5, 1.0
    job = example.Job(
        args,
        load("digits", args.size, args.seed),
        RunFolder(own.out, {"epochs": own.epochs, "seed": own.seed}),
        torch.device("cpu"),
    )
    trained = trained_network(job)
    accuracy = evaluate(trained, job.batches("test")).accuracy
    about = (
        f"VGG16, width 0.5, digits at {args.size}x{args.size}, {own.epochs} epochs with BN-L1 and {own.epochs} with "
        f"lambda {args.lambdas[0]:g}, seed {own.seed}: accuracy {accuracy:.4f} on {len(job.splits.test)} test images, "
        f"{count_macs(trained, job.example).dense / 1e6:.2f} MMACs. Importances see the training images; gate alpha "
        f"{args.alpha}, beta {args.beta}; fine-tuned for {own.epochs_after} epochs. {hardware()}, "
        f"torch {torch.__version__}."
    )
    results = {"about": about, "rows": [row(job, trained, name, t) for t in own.targets for name in IMPORTANCES]}
    job.run.write("importance.json", json.dumps(results, indent=2))
    job.run.write("importance.md", table(results))
    print(table(results))


if __name__ == "__main__":
    main()
