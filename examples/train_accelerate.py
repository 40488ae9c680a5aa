"""Feature decay in a loop that Accelerate runs, in one line; then per-image gates.

    python examples/train_accelerate.py --out runs/accelerate
    torchrun --nproc-per-node 2 examples/train_accelerate.py --out runs/accelerate --accumulate 2 --bf16 --ema 0.99

Interrupted, it goes on from the last finished epoch when it is run again.
"""

from isw_cli.script import in_one_line

import argparse

import recipe
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from isw_plugin import InstanceWisePruner


class Progress:
    """Finished epochs, saved with Accelerate's state."""

    def __init__(self) -> None:
        self.epochs = 0

    def state_dict(self) -> dict[str, int]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epochs = state["epochs"]


def train(
    accelerator: Accelerator,
    net: nn.Module,
    pruner: InstanceWisePruner,
    train_set: Dataset[tuple[Tensor, Tensor]],
    args: argparse.Namespace,
) -> nn.Module:
    """Train; the averaged copy if one is asked for, else the network."""
    optimizer = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=0.9)
    loader = DataLoader(train_set, args.batch, shuffle=True, drop_last=True)
    ema = ModelEmaV3(net, decay=args.ema, device=accelerator.device) if args.ema else None
    model, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    progress = Progress()
    accelerator.register_for_checkpointing(progress, pruner, *([ema] if ema else []))
    if (args.out / "last").exists():
        accelerator.load_state(str(args.out / "last"))
    for epoch in range(progress.epochs, args.epochs):
        loader.set_epoch(epoch)
        model.train()
        for images, labels in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(images).float(), labels)
                loss = pruner.regularize(model, loss, accumulation_steps=accelerator.gradient_accumulation_steps)
                accelerator.backward(loss)  # divides by gradient_accumulation_steps
                optimizer.step()
                optimizer.zero_grad()
            if ema and accelerator.sync_gradients:
                ema.update(net)
        progress.epochs = epoch + 1
        accelerator.save_state(str(args.out / "last"))
    return ema.module if ema else net


def main(args: argparse.Namespace) -> nn.Module:
    accelerator = Accelerator(
        gradient_accumulation_steps=args.accumulate,
        mixed_precision="bf16" if args.bf16 else "no",
        cpu=args.cpu,
        step_scheduler_with_optimizer=False,
    )
    set_seed(args.seed)
    splits, train_set = recipe.data(args)
    net, pruner = recipe.network(args, splits)
    trained = train(accelerator, net, pruner, train_set, args)
    accelerator.free_memory()
    gates = recipe.gates_of(trained, pruner)
    recipe.gate_and_measure(gates, splits, args, accelerator.device, accelerator.is_main_process)
    return trained


if __name__ == "__main__":
    with in_one_line():
        main(recipe.arguments(__doc__, None))
