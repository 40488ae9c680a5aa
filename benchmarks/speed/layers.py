"""One convolution at a time: the engine's kernel against oneDNN with prepacked weights, in turn, in one process.

    python -m benchmarks.speed.layers --rounds 15
    python -m benchmarks.speed.layers --rounds 15 --bfloat16 --isa avx512_bf16

Times are ratios to the dense layer (3x3 convolution, bias, ReLU): below 1 is faster. "all kept" is the engine's
kernel with a mask that keeps everything; "gated" decides in the operator, from statistics, at about half the channels.
"""

from isw_cli.script import in_one_line

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from isw_plugin.measure import hardware
from isw_plugin.measure.latency import timed
from isw_plugin.ops import Statistics, conv2d, cpu, pack_weight, sum_squares

LAYERS = ((64, 32), (128, 16), (256, 8), (512, 4), (512, 2), (64, 56), (256, 14), (512, 14))  # channels, map side
SECONDS = 0.004  # a timing runs a layer as often as fills about this
CPU = torch.device("cpu")


def prepacked(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    """The dense layer with its weights reordered once, as a frozen compiled model runs it."""
    window = ([1, 1], [1, 1], [1, 1], 1)
    packed = torch._C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *window, list(x.shape))
    channels_last = x.contiguous(memory_format=torch.channels_last)
    return lambda: torch.ops.mkldnn._convolution_pointwise(channels_last, packed, bias, *window, "relu", [], "")


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Time of so many calls."""
    return timed(lambda: [run() for _ in range(repeats)], CPU)[1]


def layer(channels: int, side: int, instances: int, rounds: int, dtype: torch.dtype) -> str:
    """A row: medians of per-round ratios."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(instances, channels, side, side, generator=generator).relu()
    x = (x * torch.rand(instances, channels, 1, 1, generator=generator)).to(dtype)  # norms differ, and by instance
    weight = (torch.randn(channels, channels, 3, 3, generator=generator) * 0.05).to(dtype)
    bias = torch.zeros(channels, dtype=dtype)
    packed, squares = pack_weight(weight), sum_squares(x)
    norms = squares.sum(1).sqrt()
    beta = (norms.median(1).values / norms.mean(1)).mean().item()
    kept = (norms >= beta * norms.mean(1, keepdim=True)).float().mean().item()
    gatings = (torch.ones(instances, channels, dtype=torch.bool), Statistics(squares, 0.0, beta))
    runs = [prepacked(x, weight, bias)]
    runs += [lambda g=g: conv2d(x, packed, bias, padding=1, act="relu", gating=g) for g in gatings]
    repeats = max(1, int(SECONDS / timed(runs[0], CPU)[1]))
    taken = [[seconds(run, repeats) for run in runs] for _ in range(rounds + 2)]
    dense = statistics.median(row[0] for row in taken[2:]) / repeats  # the first two warm up
    full, gated = (statistics.median(row[way] / row[0] for row in taken[2:]) for way in (1, 2))
    cells = (f"{channels} -> {channels} @ {side}", f"{instances}", f"{dense * 1e3:.3f}")
    return f"| {' | '.join(cells)} | {full:.2f} | {kept:.2f} | {gated:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--bfloat16", action="store_true", help="maps and weights, both ways (float32)")
    parser.add_argument("--isa", choices=cpu.available(), help="instruction set of the kernels (the best)")
    args = parser.parse_args()
    cpu.use(args.isa)
    dtype = torch.bfloat16 if args.bfloat16 else torch.float32
    machine = f"{hardware()}, {torch.get_num_threads()} threads, {cpu.active()}, {dtype}"
    print(f"{machine}, torch {torch.__version__}, {args.rounds} rounds")
    print("| layer | batch | prepacked ms | all kept | keep | gated |\n|---|---|---|---|---|---|")
    with torch.inference_mode():
        for instances in (1, 8):
            for channels, side in LAYERS:
                print(layer(channels, side, instances, args.rounds, dtype))


if __name__ == "__main__":
    with in_one_line():
        main()
