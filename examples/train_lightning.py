"""Feature decay in Lightning's Trainer, by one callback; then per-image gates.

    python examples/train_lightning.py --out runs/lightning
    torchrun --nproc-per-node 2 examples/train_lightning.py --out runs/lightning --accumulate 2 --bf16 --ema 0.99

Interrupted, it goes on from the last finished epoch when it is run again.
"""

from isw_cli.script import in_one_line

import argparse
import os

import recipe
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from isw_plugin.toolkits.lightning import FeatureDecay


class Classifier(LightningModule):
    """A LightningModule as anybody writes it: nothing in it knows of gates."""

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net = net
        self.lr = lr

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images).float(), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def trainer(args: argparse.Namespace) -> Trainer:
    callbacks = [FeatureDecay(), ModelCheckpoint(args.out, save_last=True)]
    if args.ema:
        callbacks.append(EMAWeightAveraging(decay=args.ema))
    return Trainer(
        max_epochs=args.epochs,
        accelerator="cpu" if args.cpu else "auto",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", 1)),
        precision="bf16-mixed" if args.bf16 else "32-true",
        accumulate_grad_batches=args.accumulate,
        callbacks=callbacks,
        default_root_dir=args.out,
        logger=False,
        enable_model_summary=False,
    )


def main(args: argparse.Namespace) -> nn.Module:
    seed_everything(args.seed, verbose=False)
    splits, train = recipe.data(args)
    net, pruner = recipe.network(args, splits)
    run = trainer(args)
    last = args.out / "last.ckpt"
    loader = DataLoader(train, args.batch, shuffle=True, drop_last=True)
    run.fit(Classifier(net, args.lr), loader, ckpt_path=last if last.exists() else None)
    recipe.gate_and_measure(pruner, splits, args, run.strategy.root_device, run.is_global_zero)
    return net


if __name__ == "__main__":
    with in_one_line():
        main(recipe.arguments(__doc__, None))
