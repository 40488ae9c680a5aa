"""What the trainers' examples share: arguments, digits, a network, and gating and measuring after training."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
import yaml
from images import Batches, Images, ImageSplits, load, normalise
from torch import nn
from torch.utils.data import TensorDataset

from isw_plugin import InstanceWisePruner, calibrate, evaluate

SIZE = 32  # pixels of a side


def arguments(description: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of every trainer's example."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, cifar10, or a folder with train/ and test/")
    parser.add_argument("--model", default="test_resnet", help="timm model name")
    parser.add_argument("--lambda", dest="lambda_", type=float, default=1e-5, help="weight of the penalty")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32, help="of each process, before accumulation")
    parser.add_argument("--accumulate", type=int, default=1, help="batches in an optimizer step")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--ema", type=float, help="decay of an averaged copy of the weights, which is then gated")
    parser.add_argument("--max-drop", type=float, default=0.02, help="accuracy that gating may lose")
    parser.add_argument("--images", type=int, help="use this many training images only")
    parser.add_argument(
        "--max-instances", type=int, default=2000, help="images of each process to choose thresholds on"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints; run again to go on")
    parser.add_argument("-c", "--config", type=Path, help="YAML file of other defaults")
    config = parser.parse_known_args(argv)[0].config
    if config:
        defaults = yaml.safe_load(config.read_text())
        unknown = sorted(defaults.keys() - {action.dest for action in parser._actions})
        if unknown:
            parser.error(f"{config}: no such options: {', '.join(unknown)}")
        parser.set_defaults(**defaults)
    return parser.parse_args(argv)


def data(args: argparse.Namespace) -> tuple[ImageSplits, TensorDataset]:
    """All images, and those to train on."""
    splits = load(args.data, SIZE, args.seed)
    train = splits.train.at(torch.arange(len(splits.train))[: args.images])
    return splits, TensorDataset(normalise(train.pixels, splits), train.labels)


def network(args: argparse.Namespace, splits: ImageSplits) -> tuple[nn.Module, InstanceWisePruner]:
    """A timm model with a pruner attached."""
    torch.manual_seed(args.seed)
    model = timm.create_model(args.model, num_classes=len(splits.classes))
    return model, InstanceWisePruner(model, torch.zeros(1, 3, SIZE, SIZE), lambda_=args.lambda_)


def shard(images: Images) -> Images:
    """This process's part of the images: every one is seen by one process, none twice."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    return images.at(torch.arange(rank, len(images), world))


def gates_of(averaged: nn.Module, pruner: InstanceWisePruner) -> InstanceWisePruner:
    """The pruner of an averaged copy, with the trained model's settings, which a checkpoint may have brought."""
    gates = InstanceWisePruner.of(averaged)
    gates.load_state_dict(pruner.state_dict())
    return gates


def gate_and_measure(
    pruner: InstanceWisePruner, splits: ImageSplits, args: argparse.Namespace, device: torch.device, main: bool
) -> None:
    """Choose thresholds on held-out images, switch gates on, report; all processes take part, one writes."""
    model = pruner.model.to(device)
    held_out = Batches(shard(splits.held_out), splits, 100, device)
    calibrate(pruner, held_out, max_drop=args.max_drop, max_instances=args.max_instances)
    test = Batches(shard(splits.test), splits, 100, device)
    dense = evaluate(model, test)
    pruner.step()
    gated = evaluate(model, test)
    if main:
        print(f"gates off: {dense}\ngates on:  {gated}")
        results = {"dense": dense.to_dict(), "gated": gated.to_dict(), "pruner": pruner.state_dict()}
        (args.out / "results.json").write_text(json.dumps(results, indent=2))
