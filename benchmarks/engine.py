"""Whole networks: the accelerated gated model against the best dense execution, in one process, taking turns.

    python -m benchmarks.engine --quick                      # under two minutes, without compiling
    python -m benchmarks.engine --out docs/results/engine    # everything; compiling takes a minute a row

Columns: milliseconds of a batch (median of rounds), and ratios (median of per-round ratios).
best eager: the faster of NCHW and channels_last; prepacked: batch norms folded, weights reordered once by oneDNN,
channels_last; compiled: torch.compile with freezing; floor: the convolutions alone, each dense and prepacked on a ready
map of as many channels as gates kept on average; all kept: the accelerated model with gates that drop nothing;
gated: with the gates. "x" is the fastest dense time over gated, "bound" dense over gated MACs, "share" x / bound.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from benchmarks.networks import NETWORKS, gate_at, network
from isw_plugin import InstanceWisePruner, count_macs
from isw_plugin.engine import cpu
from isw_plugin.engine.accelerate import Accelerated
from isw_plugin.engine.execution import DenseConv
from isw_plugin.engine.layers import Layer, conv
from isw_plugin.engine.simplify import constants_of, simplify
from isw_plugin.engine.trace import trace
from isw_plugin.measure import hardware
from isw_plugin.measure.latency import timed

CPU = torch.device("cpu")
SECONDS = 0.02  # a timing repeats a short run for about this long
Run = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; times in milliseconds a batch."""

    network: str
    side: int
    batch: int
    keep: float
    best_eager: float
    prepacked: float
    compiled: float | None
    floor: float
    all_kept: float
    gated: float
    speedup: float
    bound: float
    all_kept_over_dense: float
    gated_over_floor: float
    error: float
    execution: str

    @property
    def share(self) -> float:
        return self.speedup / self.bound


def measure(name: str, side: int, batch: int, keep: float, rounds: int, compiles: bool) -> Row:
    """Build one network, gate it at this keep ratio, time every way to run it."""
    model = network(name, side)
    images = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))
    pruner = gate_at(InstanceWisePruner(model, images[:1]), images, keep)
    pruner.step()
    fast = pruner.accelerate(images, backend="gated")
    dense = pruner.accelerate(images, backend="dense")
    automatic = pruner.accelerate(images)
    with torch.inference_mode():
        with fast.recording() as record:
            output = fast(images)
        error = ((output - model(images)).abs().max() / output.abs().max()).item()
        macs = count_macs(fast, images)
        runs = _runs(model, pruner, fast, dense, images, compiles)
        seconds = _in_turns(runs, rounds)
    return _row(name, side, images, seconds, record.keep_ratio, macs.dense / macs.gated.mean().item(), error, automatic)


def _runs(
    model: nn.Module, pruner: InstanceWisePruner, fast: Accelerated, dense: Accelerated, images: Tensor, compiles: bool
) -> dict[str, Run]:
    floor = _floor(pruner, images)
    open_gates = _all_kept(pruner, images)
    pruner.remove()
    channels_last = network_copy(model).to(memory_format=torch.channels_last)
    last = images.contiguous(memory_format=torch.channels_last)
    runs: dict[str, Run] = {
        "eager NCHW": lambda: model(images),
        "eager channels_last": lambda: channels_last(last),
        "prepacked": lambda: dense(images),
        "floor": floor,
        "all kept": lambda: open_gates(images),
        "gated": lambda: fast(images),
    }
    if compiles:
        compiled = _frozen(channels_last, last)
        runs["compiled"] = lambda: compiled(last)
    return runs


def network_copy(model: nn.Module) -> nn.Module:
    """A copy of a bare model."""
    import copy

    return copy.deepcopy(model)


def _frozen(model: nn.Module, images: Tensor) -> Callable[[Tensor], object]:
    import torch._inductor.config as config

    config.freezing = True
    torch.compiler.reset()
    compiled: Callable[[Tensor], object] = torch.compile(model)
    with torch.no_grad():
        compiled(images)
    return compiled


def _all_kept(pruner: InstanceWisePruner, images: Tensor) -> Accelerated:
    """The same graph with thresholds that drop nothing; beta = 0 would take the gates out."""
    with pruner.gating():
        gates = dict(pruner._memory.gates)
        pruner._memory.gates = {name: dataclasses.replace(gate, alpha=1e9) for name, gate in gates.items()}  # type: ignore[type-var]
        return pruner.accelerate(images, backend="gated")


def _floor(pruner: InstanceWisePruner, images: Tensor) -> Run:
    """Every convolution, prepacked, on a map that holds the mean kept channels only."""
    graph = simplify(trace(pruner.model, pruner.sites, images))
    layers = _CompactLayers(graph)
    layers.run(images)
    runs = layers.compact
    return lambda: [module(x, None, None, None) for module, x in runs]


class _CompactLayers(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.constants = constants_of(graph)
        self.compact: list[tuple[DenseConv, Tensor]] = []

    def run_node(self, n: fx.Node) -> Any:
        layer = Layer.of(n, self.constants) if n.target is conv else None
        if layer is not None:
            (x, *_, keep, _) = self.fetch_args_kwargs_from_env(n)[0][:6]
            self.compact.append(_compact(layer, x, keep))
        return super().run_node(n)


def _compact(layer: Layer, x: Tensor, keep: Tensor | None) -> tuple[DenseConv, Tensor]:
    count = x.shape[1] if keep is None else max(1, round(keep.float().sum(1).mean().item()))
    x = x[:, :count].contiguous(memory_format=torch.channels_last)
    if layer.groups == 1:
        layer = dataclasses.replace(layer, weight=layer.weight[:, :count].contiguous())
    else:  # depthwise
        layer = dataclasses.replace(
            layer, weight=layer.weight[:count].contiguous(), bias=layer.bias[:count].contiguous(), groups=count
        )
    return DenseConv(layer, x), x


def _in_turns(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    repeats = {name: max(1, int(SECONDS / timed(run, CPU)[1])) for name, run in runs.items()}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 2):
        for name, run in runs.items():
            seconds = timed(lambda run=run, name=name: [run() for _ in range(repeats[name])], CPU)[1]  # type: ignore[misc]
            taken[name].append(seconds / repeats[name])
    return {name: column[2:] for name, column in taken.items()}  # the first two warm up


def _row(
    name: str,
    side: int,
    images: Tensor,
    seconds: dict[str, list[float]],
    keep: float,
    bound: float,
    error: float,
    automatic: Accelerated,
) -> Row:
    middle = {way: statistics.median(column) for way, column in seconds.items()}
    ways = ["eager NCHW", "eager channels_last", "prepacked", *(["compiled"] if "compiled" in seconds else [])]
    best = min(ways, key=middle.__getitem__)

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))

    return Row(
        network=name,
        side=side,
        batch=len(images),
        keep=keep,
        best_eager=1e3 * min(middle["eager NCHW"], middle["eager channels_last"]),
        prepacked=1e3 * middle["prepacked"],
        compiled=1e3 * middle["compiled"] if "compiled" in middle else None,
        floor=1e3 * middle["floor"],
        all_kept=1e3 * middle["all kept"],
        gated=1e3 * middle["gated"],
        speedup=ratio(best, "gated"),
        bound=bound,
        all_kept_over_dense=ratio("all kept", best),
        gated_over_floor=ratio("gated", "floor"),
        error=error,
        execution=automatic.execution,
    )


HEADER = (
    "network side batch keep | best eager ms | prepacked ms | compiled ms | floor ms | all kept ms | gated ms | "
    "x best dense | bound | share | all kept / dense | gated / floor | error | auto"
)


def line(row: Row) -> str:
    """A row of the table in Markdown."""
    times = (row.best_eager, row.prepacked, row.compiled, row.floor, row.all_kept, row.gated)
    cells = [f"{row.network} {row.side} b{row.batch} keep {row.keep:.2f}"]
    cells += ["-" if time is None else f"{time:.2f}" for time in times]
    ratios = (row.speedup, row.bound, row.share, row.all_kept_over_dense, row.gated_over_floor)
    return f"| {' | '.join([*cells, *(f'{r:.2f}' for r in ratios), f'{row.error:.0e}', row.execution])} |"


def facts(rounds: int) -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "kernels": cpu.active(),
        "torch": torch.__version__,
        "rounds": rounds,
    }


def write(rows: Sequence[Row], rounds: int, out: Path) -> None:
    """engine.json, engine.md and engine.png."""
    out.mkdir(parents=True, exist_ok=True)
    about = facts(rounds)
    data = about | {"command": " ".join(sys.argv), "rows": [dataclasses.asdict(row) for row in rows]}
    (out / "engine.json").write_text(json.dumps(data, indent=1) + "\n")
    heads = HEADER.split(" | ")
    table = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(line(row) for row in rows)]
    (out / "engine.md").write_text(f"{about}\n\n" + "\n".join(table) + "\n")
    _plot(rows, out / "engine.png")


def _plot(rows: Sequence[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for name in dict.fromkeys(row.network for row in rows):
        chosen = [row for row in rows if row.network == name]
        axes.scatter([row.bound for row in chosen], [row.speedup for row in chosen], label=name)
    most = max(row.bound for row in rows)
    axes.plot([1, most], [1, most], color="gray", linewidth=1, label="MAC bound")
    axes.axhline(1, color="black", linewidth=0.5)
    axes.set(xlabel="dense / gated MACs", ylabel="best dense / gated time")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="ours, or names of timm models")
    parser.add_argument("--sides", nargs="+", type=int, default=[32, 224])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--keeps", nargs="+", type=float, default=[0.3, 0.5, 0.7])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled column out")
    parser.add_argument(
        "--quick", action="store_true", help="batch 1 and 8 at 32 pixels, keep 0.5, 5 rounds, no compile"
    )
    parser.add_argument("--out", type=Path, help="folder for the table, JSON and plot")
    args = parser.parse_args(argv)
    if args.quick:
        args.sides, args.batches, args.keeps, args.rounds, args.no_compile = [32], [1, 8], [0.5], 5, True
    cpu.load()
    print(", ".join(f"{key} {value}" for key, value in facts(args.rounds).items()))
    heads = HEADER.split(" | ")
    print(f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", sep="\n")
    rows = []
    for name in args.networks:
        for side in args.sides:
            for batch in args.batches if side <= 64 else [b for b in args.batches if b < 32]:
                for keep in args.keeps:
                    rows.append(measure(name, side, batch, keep, args.rounds, not args.no_compile))
                    print(line(rows[-1]), flush=True)
                    if args.out:
                        write(rows, args.rounds, args.out)


if __name__ == "__main__":
    main()
