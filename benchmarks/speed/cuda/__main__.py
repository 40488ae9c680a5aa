"""Gated layers and whole networks on a GPU, against the best dense execution of the same network.

    python -m benchmarks.speed.cuda --out FOLDER                 # everything: hours, most of it compiling
    python -m benchmarks.speed.cuda --quick --out FOLDER         # a few minutes
    python -m benchmarks.speed.cuda --nets vgg16 --sides 224 --batches 32 --dtypes bfloat16 --out FOLDER

In one process, in turn, medians of per-round ratios; every image of a batch has a mask of its own. Dense: cuDNN in
channels_last (eager), in a CUDA graph, and torch.compile with CUDA graphs. Gated: the engine in a CUDA graph; chosen:
the same with every layer that is faster masked and dense left to cuDNN. "x best dense" above 1 is faster. The results
are written after every configuration, so a run that is cut short loses nothing.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.cuda.nets import (
    Calibrated,
    Chosen,
    Dense,
    Feature,
    Gated,
    Layer,
    Masked,
    Network,
    resnet18,
    vgg16,
)
from isw_plugin.engine import Statistics, sum_squares
from isw_plugin.measure import hardware
from isw_plugin.measure.latency import timed

SECONDS = 0.02  # a timing runs as often as fills about this
LAYERS = ((64, 224), (128, 112), (256, 56), (512, 28), (512, 14), (64, 32), (128, 16), (256, 8), (512, 4))
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Run = Callable[[], object]


def captured(run: Run) -> Run:
    """The work of `run` as a CUDA graph, once it has compiled what it needs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def times(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call, a list over rounds, the ways in turn."""
    device, repeats = torch.device("cuda"), {}
    for name, run in runs.items():
        run()
        repeats[name] = max(1, min(1000, int(SECONDS / timed(run, device)[1])))
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 2):
        for name, run in runs.items():
            seconds = timed(lambda run=run, n=repeats[name]: [run() for _ in range(n)], device)[1]
            taken[name].append(seconds / repeats[name])
    return {name: seconds[2:] for name, seconds in taken.items()}  # the first two warm up


def gain(taken: dict[str, list[float]], name: str, others: list[str]) -> float:
    """How many times faster than the best of the others: the median of per-round ratios."""
    best = min(others, key=lambda other: statistics.median(taken[other]))
    return statistics.median(a / b for a, b in zip(taken[best], taken[name], strict=True))


def milliseconds(taken: dict[str, list[float]]) -> dict[str, float]:
    return {name: 1e3 * statistics.median(seconds) for name, seconds in taken.items()}


def layer_record(channels: int, side: int, batch: int, dtype: torch.dtype, keep: float, rounds: int) -> dict[str, Any]:
    """One gated 3x3 convolution against cuDNN's, each in a CUDA graph."""
    torch.manual_seed(0)
    layer = Layer(channels, channels, 3).to("cuda", dtype, memory_format=torch.channels_last)
    layer.pack()
    x = torch.randn(batch, channels, side, side, device="cuda").relu() * torch.rand(
        batch, channels, 1, 1, device="cuda"
    )
    x = x.to(dtype, memory_format=torch.channels_last)
    norms = sum_squares(x).sum(1).sqrt()
    beta = float((norms / norms.mean(1, keepdim=True)).flatten()[:1_000_000].quantile(1 - keep)) if keep < 1 else 0.0
    feature = Feature(x, Statistics(sum_squares(x), 0.0, beta))
    ways: dict[str, Run] = {
        "dense": lambda: Dense().conv(feature, layer),
        "masked": lambda: Masked().conv(feature, layer),
        "gated": lambda: Gated().conv(feature, layer),
    }
    taken = times({name: captured(run) for name, run in ways.items()}, rounds)
    gains = {"x dense": gain(taken, "gated", ["dense"]), "x masked": gain(taken, "gated", ["masked"])}
    shape = {"channels": channels, "side": side, "batch": batch, "dtype": str(dtype), "keep": keep}
    return shape | {"ms": milliseconds(taken)} | gains


class Choosing(Gated):
    """Times every layer both ways on the maps that reach it."""

    def conv(self, feature: Feature, layer: Layer, residual: Feature | None = None) -> Feature:
        ways = {"gated": Gated(), "masked": Masked()}
        runs = {name: captured(lambda way=way: way.conv(feature, layer, residual)) for name, way in ways.items()}
        layer.dense = gain(times(runs, 5), "gated", ["masked"]) < 1
        return super().conv(feature, layer, residual)


def dense_ways(network: Network, images: Tensor, compiled: bool) -> dict[str, Run]:
    way = Dense()
    ways: dict[str, Run] = {"eager": lambda: network(images, way), "graph": captured(lambda: network(images, way))}
    if compiled:
        torch.compiler.reset()
        fast = torch.compile(lambda x: network(x, way), mode="reduce-overhead")
        ways["compiled"] = lambda: fast(images)
        for _ in range(3):
            ways["compiled"]()
    return ways


def network_record(name: str, side: int, batch: int, dtype: torch.dtype, keep: float, args: Any) -> dict[str, Any]:
    """A whole network: every way's time, gains, the bound by MACs and the error against masked execution."""
    torch.manual_seed(0)
    network = (vgg16() if name == "vgg16" else resnet18(side)).placed(torch.device("cuda"), dtype)
    images = torch.randn(batch, 3, side, side, device="cuda").to(dtype, memory_format=torch.channels_last)
    calibrated = Calibrated(keep)
    network(images[: min(batch, 16)], calibrated)
    network(images, Choosing())
    wanted, found = network(images, Masked()).float(), network(images, Gated()).float()
    dense = dense_ways(network, images, not args.no_compile)
    gated = {
        "gated": captured(lambda: network(images, Gated())),
        "chosen": captured(lambda: network(images, Chosen())),
        "gated eager": lambda: network(images, Gated()),
    }
    taken = times(dense | gated, args.rounds)
    return {
        **{"net": name, "side": side, "batch": batch, "dtype": str(dtype), "keep": keep, "ms": milliseconds(taken)},
        "x best dense": {way: gain(taken, way, list(dense)) for way in gated},
        "bound": calibrated.macs / calibrated.kept_macs,
        "layers left dense": sum(layer.dense for layer in network.layers),
        "layers": len(network.layers),
        "error": float((found - wanted).abs().max() / wanted.abs().max()),
    }


def machine() -> dict[str, Any]:
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "cudnn": torch.backends.cudnn.version()}
    return {"gpu": hardware(torch.device("cuda")), "command": " ".join(sys.argv), **versions}


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a line a configuration, numbers with three digits, nested ones spread over columns."""
    rows = [{**{k: v for k, v in r.items() if not isinstance(v, dict)}, **_spread(r)} for r in records]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(key, "")) for key in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _spread(record: dict[str, Any]) -> dict[str, Any]:
    return {f"{key}: {name}": v for key, part in record.items() if isinstance(part, dict) for name, v in part.items()}


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).removeprefix("torch.")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--nets", nargs="*", choices=("vgg16", "resnet18"), default=["vgg16", "resnet18"])
    parser.add_argument("--sides", nargs="*", type=int, default=[32, 224])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 32, 128, 256])
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=["bfloat16", "float16"])
    parser.add_argument("--keeps", nargs="*", type=float, default=[0.3, 0.5, 0.7, 1.0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-layers", action="store_true", help="networks only")
    parser.add_argument("--quick", action="store_true", help="bfloat16, keep 0.5, batches 1 and 32, 5 rounds")
    args = parser.parse_args()
    if args.quick:
        args.batches, args.dtypes, args.keeps, args.rounds = [1, 32], ["bfloat16"], [0.5], 5
    return args


def main() -> None:
    args = arguments()
    if not torch.cuda.is_available():
        raise SystemExit(
            "this times kernels on a GPU and found none. Without one, python -m benchmarks.speed.cuda.assembly "
            "compiles the kernels and pytest tests/test_engine_triton.py interprets them on the CPU."
        )
    torch.backends.cudnn.benchmark = True
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine(), "layers": [], "networks": [], "too large": []}
    settings = list(itertools.product(args.batches, (DTYPES[name] for name in args.dtypes), args.keeps))
    jobs = [
        ("layers", lambda layer=layer, s=s: layer_record(*layer, *s, args.rounds)) for layer in LAYERS for s in settings
    ]
    jobs = [] if args.no_layers else jobs
    for net, side in itertools.product(args.nets, args.sides):
        jobs += [("networks", lambda n=net, side=side, s=s: network_record(n, side, *s, args)) for s in settings]
    with torch.inference_mode():
        for kind, job in jobs:
            try:
                results[kind].append(job())
            except torch.cuda.OutOfMemoryError as error:
                results["too large"].append(f"{kind}: {error}")
            torch.cuda.empty_cache()
            (args.out / "results.json").write_text(json.dumps(results, indent=1))
            print(f"{len(results['layers'])} layers, {len(results['networks'])} networks of {len(jobs)}", flush=True)
    text = "\n\n".join(table(results[kind]) for kind in ("layers", "networks") if results[kind])
    (args.out / "results.md").write_text(f"{results['machine']}\n\n{text}\n")
    print(text)


if __name__ == "__main__":
    main()
