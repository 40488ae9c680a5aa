"""Feature decay in a training task of timm, by one line; then per-image gates.

    python examples/train_timm.py -c examples/train_timm.yaml --out runs/timm
    torchrun --nproc-per-node 2 examples/train_timm.py -c examples/train_timm.yaml --out runs/timm --accumulate 2 --bf16

Interrupted, it goes on from the last finished epoch when it is run again. timm's own train.py, unchanged, gets
feature decay from ``python -m isw_plugin.toolkits.timm`` (see docs/training.md).
"""

from isw_cli.script import in_one_line

import argparse

import recipe
import torch
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import init_distributed_device, is_primary
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from isw_plugin import InstanceWisePruner
from isw_plugin.toolkits.timm import add_feature_decay


def train(task: ClassificationTask, pruner: InstanceWisePruner, train_set: Dataset, args: argparse.Namespace) -> None:
    """Train in place, from the last finished epoch on."""
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=args.lr, momentum=0.9)
    started = restore(task, pruner, optimizer, args)
    if args.distributed:
        task.prepare_distributed()
    sampler = DistributedSampler(train_set, seed=args.seed) if args.distributed else None
    loader = DataLoader(train_set, args.batch, shuffle=sampler is None, sampler=sampler, drop_last=True)
    for epoch in range(started, args.epochs):
        torch.manual_seed(args.seed * 1000 + epoch)
        if sampler:
            sampler.set_epoch(epoch)
        task.train()
        optimizer.zero_grad()  # parts of a step that the last epoch did not finish
        for index, (images, labels) in enumerate(loader):
            with torch.autocast(task.device.type, torch.bfloat16, enabled=args.bf16):
                loss = task(images.to(task.device), labels.to(task.device))["loss"]
            (loss / args.accumulate).backward()
            if (index + 1) % args.accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                task.update_ema()
        if is_primary(args):
            save(task, pruner, optimizer, args, epoch + 1)


def save(
    task: ClassificationTask,
    pruner: InstanceWisePruner,
    optimizer: torch.optim.Optimizer,
    args: argparse.Namespace,
    epoch: int,
) -> None:
    state = task.get_checkpoint_state() | task.get_checkpoint_state(ema=True)
    state |= {"optimizer": optimizer.state_dict(), "pruner": pruner.state_dict(), "epoch": epoch}
    args.out.mkdir(parents=True, exist_ok=True)
    torch.save(state, args.out / "draft.pth")
    (args.out / "draft.pth").replace(args.out / "last.pth")


def restore(
    task: ClassificationTask, pruner: InstanceWisePruner, optimizer: torch.optim.Optimizer, args: argparse.Namespace
) -> int:
    """Load the last checkpoint if there is one; the number of finished epochs."""
    if not (args.out / "last.pth").exists():
        return 0
    state = torch.load(args.out / "last.pth", map_location=task.device, weights_only=True)
    task.load_checkpoint_state(state["state_dict"])
    if "state_dict_ema" in state:
        task.load_checkpoint_state(state["state_dict_ema"], ema=True)
    optimizer.load_state_dict(state["optimizer"])
    pruner.load_state_dict(state["pruner"])
    return int(state["epoch"])


def main(args: argparse.Namespace) -> nn.Module:
    args.device = "cpu" if args.cpu else "cuda" if torch.cuda.is_available() else "cpu"
    device = init_distributed_device(args)
    splits, train_set = recipe.data(args)
    net, pruner = recipe.network(args, splits)
    task = ClassificationTask(net.to(device), nn.CrossEntropyLoss(), device=device, verbose=False)
    add_feature_decay(task, pruner, accumulation_steps=args.accumulate)
    if args.ema:
        task.setup_ema(decay=args.ema)
    train(task, pruner, train_set, args)
    trained = task.get_trainable_module(ema=True).module if args.ema else net
    recipe.gate_and_measure(recipe.gates_of(trained, pruner), splits, args, device, is_primary(args))
    return trained


if __name__ == "__main__":
    with in_one_line():
        main(recipe.arguments(__doc__, None))
