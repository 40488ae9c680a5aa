"""Networks within a budget, by one command: examples/fast_within_budget.py, a row a network.

    python -m benchmarks.budget.networks --data DIR --weights FOLDER --runs runs/networks
    python -m benchmarks.budget.networks --only resnet20 --epochs 2 --data DIR --weights FOLDER --runs runs/networks

Runs what --only names, or all, one after another, each resumable by itself, stores what came out as
results/networks/NAME.json and writes results/networks/table.md, in which what did not run is listed as not run.
"""

from isw_cli.script import in_one_line

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["NETWORKS", "main"]

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "networks"
PEERS = "benchmarks/budget/peers.py"
SLIMMED = "benchmarks/paper/results/slimmed-vgg16-1e-07.safetensors"
AKAMASTER = ("--mean", ".485", ".456", ".406", "--std", ".229", ".224", ".225")
TORCH_PRUNING = ("--mean", ".4914", ".4822", ".4465", "--std", ".2023", ".1994", ".2010")


@dataclass(frozen=True)
class Network:
    """A row.

    Attributes:
        model: Of the example.
        weights: A file of --weights, or of this project.
        macs_left: The budget.
        epochs: Of each of the two trainings.
        options: More of the example's.
    """

    model: str
    weights: str
    macs_left: float
    epochs: int
    options: tuple[str, ...] = ()


NETWORKS = {
    "VGG16": Network(f"{PEERS}:vgg16", "vgg16-0.safetensors", 0.4, 12),
    "slimmed VGG16": Network(f"{PEERS}:slimmed_vgg16", SLIMMED, 0.7, 12),
    "resnet20": Network(f"{PEERS}:resnet20", "akamaster-resnet20.safetensors", 0.55, 20, AKAMASTER),
    "resnet56": Network(f"{PEERS}:resnet56", "akamaster-resnet56.safetensors", 0.5, 20, AKAMASTER),
    "torch-pruning's pruned ResNet-56": Network(
        f"{PEERS}:pruned_resnet56", "torch-pruning-resnet56-pruned.safetensors", 0.8, 20, TORCH_PRUNING
    ),
    "mobilenetv2": Network(f"{PEERS}:mobilenetv2", "mobilenetv2-0.safetensors", 0.65, 12),
    "efficientnet-lite0": Network(
        "tf_efficientnet_lite0",
        "efficientnet-lite0.safetensors",
        0.75,
        4,
        ("--size", "160", "--mean", ".5", ".5", ".5", "--std", ".5", ".5", ".5"),
    ),
    "resnet18 with max-pool": Network(f"{PEERS}:resnet18_pooled", "resnet18-pooled-0.safetensors", 0.5, 12),
}


def command(name: str, args: argparse.Namespace) -> list[str]:
    """The example's command line for a network."""
    network = NETWORKS[name]
    inside = ROOT / network.weights
    weights = inside if inside.is_file() else args.weights / network.weights
    words = [network.model, "--weights", str(weights), "--data", str(args.data), "--macs-left", str(network.macs_left)]
    words += ["--epochs", str(args.epochs or network.epochs), "--seed", str(args.seed), *network.options, *args.more]
    return [*words, "--out", str(args.runs / f"{name.replace(' ', '-')}-{args.seed}")]


def run(name: str, args: argparse.Namespace) -> None:
    """Run the example for a network, and store what it wrote."""
    words = command(name, args)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "examples/fast_within_budget.py", *words], cwd=ROOT, env=environment, check=True)
    found = json.loads((Path(words[-1]) / "results.json").read_text())
    found["command"] = f"python -m benchmarks.budget.networks --only {name!r} --epochs {found['epochs']}"
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / f"{name.replace(' ', '-')}-{args.seed}.json").write_text(json.dumps(found, indent=1) + "\n")


def table(results: Path) -> str:
    """All networks, those that did not run among them, as Markdown."""
    lines = [
        "| network | epochs | dense, fine-tuned | ours | channels dropped | MACs left | x at batch 1 | x at batch 32 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in NETWORKS:
        stored = sorted(results.glob(f"{name.replace(' ', '-')}-*.json"))
        lines += [_line(name, json.loads(file.read_text())) for file in stored] or [f"| {name} | not run | | | | | | |"]
    return "\n".join(lines) + "\n"


def _line(name: str, found: dict[str, Any]) -> str:
    _, plain, ours = found["rows"]
    faster = [
        f"{plain[batch]['ms'] / ours[batch]['ms']:.2f} ({ours[batch]['runs']})" for batch in ("batch_1", "batch_32")
    ]
    cells = [f"{name}, seed {found['seed']}", found["epochs"], f"{plain['accuracy']:.4f}", f"{ours['accuracy']:.4f}"]
    cells += [f"{ours['dropped']:.3f}", f"{ours['macs_left']:.3f}", *faster]
    return f"| {' | '.join(map(str, cells))} |"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(NETWORKS), choices=list(NETWORKS), help="networks to run")
    parser.add_argument("--data", type=Path, required=True, help="folder of images")
    parser.add_argument("--weights", type=Path, required=True, help="folder with the files of weights")
    parser.add_argument("--runs", type=Path, default=Path("runs/networks"), help="folder for the run folders")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--epochs", type=int, help="other than the network's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("more", nargs=argparse.REMAINDER, help="after --: more options of the example")
    args = parser.parse_args(argv)
    args.data, args.weights, args.runs = (path.absolute() for path in (args.data, args.weights, args.runs))
    args.more = args.more[1:] if args.more[:1] == ["--"] else args.more
    return args


def main(args: argparse.Namespace) -> str:
    """Run, store and write the table."""
    for name in args.only:
        run(name, args)
        (args.results / "table.md").write_text(table(args.results))
    return table(args.results)


if __name__ == "__main__":
    with in_one_line():
        print(main(arguments()))
