"""What the penalty costs a training step: steps with and without it, in turn, in one process.

python -m benchmarks.speed.penalty --batch 64 --rounds 15
"""

from isw_cli.script import in_one_line

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.lab.networks import WIDTHS, vgg16
from isw_plugin import InstanceWisePruner
from isw_plugin.measure import hardware


def step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, penalized: bool) -> Callable[[], None]:
    pruner = InstanceWisePruner(model, images[:1], lambda_=1e-7) if penalized else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train()

    def run() -> None:
        loss = F.cross_entropy(model(images), labels)
        if pruner:
            loss = pruner.regularize(model, loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    images = torch.randn(args.batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (args.batch,))
    steps = [step(vgg16(WIDTHS, 10), images, labels, penalized) for penalized in (False, True)]
    ratios, seconds = [], []
    for _ in range(args.rounds + 2):
        taken = []
        for run in steps:
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
        seconds.append(taken[0])
        ratios.append(taken[1] / taken[0])
    low, middle, high = statistics.quantiles(ratios[2:], n=4)  # the first two warm up
    print(
        f"VGG16-BN, 32x32, batch {args.batch}, float32, channels_last; {hardware()}, {torch.get_num_threads()} CPU "
        f"threads, torch {torch.__version__}\nstep without penalty {statistics.median(seconds[2:]):.3f} s (median); "
        f"with / without, median of {args.rounds} rounds in turn: {middle:.3f} (quartiles {low:.3f} to {high:.3f})"
    )


if __name__ == "__main__":
    with in_one_line():
        main()
