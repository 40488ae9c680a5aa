"""What does another form of feature decay do to a trained VGG16? Fine-tunes it, for benchmarks.budget.sites.

    python -m benchmarks.budget.finetune runs/paper/runs/vgg16-0/trained.safetensors --data DIR \\
        --decays none relative:0.3 --out runs/decay

Writes OUT/DECAY/trained.safetensors, decay by decay; saved after every epoch, so a second run goes on.
"""

from isw_cli.script import in_one_line

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.budget.__main__ import Decay
from benchmarks.lab.images import load, shuffled
from benchmarks.lab.networks import stored_vgg16
from benchmarks.lab.run_folder import RunFolder
from benchmarks.lab.training import Schedule, finish, train
from isw_plugin import InstanceWisePruner

CPU = torch.device("cpu")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="weights of a VGG16 of benchmarks.paper or examples/slimmed_vgg16.py")
    parser.add_argument("--data", required=True, help="what it was trained on: digits, cifar10, or a folder of images")
    parser.add_argument(
        "--decays", type=Decay.parse, nargs="+", required=True, help="none, sum:1e-6, relative:0.3, ..."
    )
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--peak", type=float, default=0.02, help="learning rate")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    args = parser.parse_args(argv)
    if any(decay.ramp for decay in args.decays):
        parser.error("a ramp is not for this benchmark: benchmarks.budget has it")
    return args


def measured(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """The state of the pruner with the norms that training starts from, which an interrupted run starts from too."""
    model = copy.deepcopy(model).train()
    pruner = InstanceWisePruner.of(model)
    images, labels = batch
    pruner.regularize(model, F.cross_entropy(model(images), labels))
    return pruner.state_dict()


def main(args: argparse.Namespace) -> None:
    splits = load(args.data, 32, 0)
    settings = {
        "model": f"{args.model.absolute().parent.name}/{args.model.stem}",
        "data": Path(args.data).name,
        **{name: getattr(args, name) for name in ("epochs", "peak", "batch", "precision")},
    }
    for decay in args.decays:
        run = RunFolder(args.out / str(decay).replace(":", "-"), settings | {"decay": str(decay)})
        if run.has("trained"):
            continue
        model = stored_vgg16(args.model).to(memory_format=torch.channels_last)
        pruner = InstanceWisePruner(model, torch.zeros(1, 3, 32, 32), decay.lambda_, reduction=decay.reduction)
        pruner.load_state_dict(measured(model, next(shuffled(splits, args.batch, 0, CPU))))
        train(
            model,
            splits,
            Schedule(args.epochs, args.peak, args.batch),
            run,
            "trained",
            seed=0,
            device=CPU,
            bfloat16=args.precision == "bfloat16",
            regularize=lambda loss, pruner=pruner, model=model: pruner.regularize(model, loss),
        )
        finish(model, run, "trained", origin=f"{settings['model']}, fine-tuned {args.epochs} epochs with {decay}")


if __name__ == "__main__":
    with in_one_line():
        main(arguments())
