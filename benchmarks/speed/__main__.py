"""Whole networks: the accelerated gated model against the best dense execution, taking turns.

    python -m benchmarks.speed --quick                      # under two minutes: batch 8, no compiling
    python -m benchmarks.speed --out benchmarks/speed/results    # everything; what is in the table already is left out
    python -m benchmarks.speed --takes 3 --out DIR          # the same in three processes a row, one after another

Columns: milliseconds of a batch (median of rounds, each the middle one of a turn's calls), and ratios (median of
per-round ratios). The first call of each turn is not counted: it finds memory and caches as another network left them.
Rounds count in which the machine was not seen to be disturbed (speed/steady.py): "steady" says how many there were,
"x, all rounds" what all give.
best eager: the faster of NCHW and channels_last; prepacked: batch norms folded, weights reordered once by oneDNN,
channels_last; compiled: torch.compile with freezing; OpenVINO, onnxruntime (extra ``benchmarks``): in float32, with as
many threads, of one ONNX file of torch.export; floor: the convolutions alone, each dense and prepacked on a ready map
of as many channels as gates kept on average; all kept: the accelerated model with gates that drop nothing; gated: with
the gates. Both runtimes and both of ours run in processes of their own, where nobody else's threads disturb them. "x"
is the fastest dense time over gated, "bound" dense over gated MACs, "share" x / bound.
takes: a process can be slow as a whole, so a row of several is that of the middle speed-up; "takes" has all of them.
hand-over: what a cache line takes from core to core (speed/handover.py); above 100 ns they had no cache in common.
masks: the keep ratio that thresholds were set for, or "trained", the stored decisions of that network on test images,
handed in as masks; "forced inputs", random masks of each image's own, at a keep ratio; "forced outputs", the same known
before layers run, as where norms are predicted, so that outputs are skipped too; sites behind depthwise layers follow.
"""

from isw_cli.script import in_one_line

import argparse
import dataclasses
import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.networks import NETWORKS, trained_networks
from benchmarks.speed.runtimes import installed
from benchmarks.speed.steady import Probe
from benchmarks.speed.ways import FORCED, TRAINED, Row, measure
from isw_plugin.measure import hardware
from isw_plugin.ops import cpu

__all__ = ["line", "main", "middle", "write"]

HEADER = (
    "network side batch masks | keep | best eager ms | prepacked ms | compiled ms | OpenVINO ms | onnxruntime ms | "
    "floor ms | all kept ms | "
    "gated ms | x best dense | bound | share | all kept / dense | gated / floor | x, all rounds | error | auto | "
    "steady | takes | hand-over ns"
)


_WITHOUT = 'A dash under OpenVINO or onnxruntime: that row\'s "x best dense" is without them.'


def line(row: Row) -> str:
    """A row of the table in Markdown."""
    dense = (row.best_eager, row.prepacked, row.compiled, row.openvino, row.onnxruntime)
    times = (*dense, row.floor, row.all_kept, row.gated)
    cells = [f"{row.network} {row.side} b{row.batch} {row.masks}", f"{row.keep:.2f}"]
    cells += ["-" if time is None else f"{time:.2f}" for time in times]
    ratios = (row.speedup, row.bound, row.share, row.all_kept_over_dense, row.gated_over_floor, row.all_rounds)
    takes = " ".join(f"{speedup:.2f}" for speedup in row.takes) or "-"
    about = (
        f"{row.error:.0e}",
        row.execution,
        f"{row.steady}",
        takes,
        "-" if row.handover is None else f"{row.handover:.0f}",
    )
    return f"| {' | '.join([*cells, *(f'{ratio:.2f}' for ratio in ratios), *about])} |"


def facts(rounds: int) -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "kernels": cpu.active(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "rounds": rounds,
    }


def read(out: Path | None) -> list[Row]:
    """The rows of a table that was begun; those without a steady round are to be taken again."""
    path = out / "engine.json" if out else None
    rows = [Row(**row) for row in json.loads(path.read_text())["rows"]] if path and path.exists() else []
    return [row for row in rows if row.steady]


def write(rows: Sequence[Row], rounds: int, out: Path) -> None:
    """engine.json, engine.md and engine.png."""
    out.mkdir(parents=True, exist_ok=True)
    about = facts(rounds)
    data = about | {
        "command": shlex.join(["python", "-m", "benchmarks.speed", *sys.argv[1:]]),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    (out / "engine.json").write_text(json.dumps(data, indent=1) + "\n")
    heads = HEADER.split(" | ")
    table = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(line(row) for row in rows)]
    (out / "engine.md").write_text(f"{about}\n\n{_WITHOUT}\n\n" + "\n".join(table) + "\n")
    _plot(rows, out / "engine.png")


def middle(takes: Sequence[Sequence[Row]]) -> list[Row]:
    """Of every row the take of middle speed-up (of two, the lower), in the order of the first take."""
    found: dict[tuple[str, int, int, str], list[Row]] = {}
    for row in itertools.chain(*takes):
        found.setdefault(row.key, []).append(row)
    rows = [(sorted(same, key=lambda row: row.speedup)[(len(same) - 1) // 2], same) for same in found.values()]
    return [dataclasses.replace(row, takes=[take.speedup for take in same]) for row, same in rows]


def take_apart(args: argparse.Namespace) -> None:
    """Every row in processes of its own, one pass over all rows after another; a second run goes on."""
    folders = [args.out / "takes" / str(number) for number in range(args.takes)]
    for folder, (name, side, batch, masks) in itertools.product(folders, list(_settings(args))):
        keeps = [str(ratio) for ratio in masks if isinstance(ratio, float)]
        if {(name, side, batch, str(ratio)) for ratio in masks} <= {row.key for row in read(folder)}:
            continue
        command = [sys.executable, "-m", "benchmarks.speed", "--networks", name, "--out", str(folder)]
        command += ["--sides", str(side), "--batches", str(batch), "--rounds", str(args.rounds)]
        command += ["--keeps", *keeps, *(["--no-compile"] if args.no_compile else [])]
        command += ["--forced", *map(str, args.forced)] if args.forced else []
        command += ["--runtimes", *args.runtimes]
        subprocess.run(command, check=True)
        write(middle([read(folder) for folder in folders]), args.rounds, args.out)


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
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _settings(args: argparse.Namespace) -> Iterator[tuple[str, int, int, list[float | str]]]:
    for name in args.networks:
        trained = name in trained_networks()
        for side in [32] if trained else args.sides:
            for batch in args.batches if side <= 64 else [b for b in args.batches if b < 32]:
                forced = [f"{way} {ratio}" for ratio in args.forced for way in FORCED]
                yield name, side, batch, [TRAINED] if trained else [*args.keeps, *forced]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = [*NETWORKS, *trained_networks()]
    parser.add_argument("--networks", nargs="+", help=f"{', '.join(everything)} (these); or of timm")
    parser.add_argument("--sides", nargs="+", type=int, default=[32, 224])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--keeps", nargs="*", type=float, default=[0.3, 0.5, 0.7])
    parser.add_argument("--forced", nargs="+", type=float, default=[], help="keep ratios of forced masks")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled column out")
    runtimes, which = installed(), "other runtimes to compare with (those installed)"
    parser.add_argument("--runtimes", nargs="*", choices=runtimes or None, default=runtimes, help=which)
    quick = "batch 8 at 32 pixels, keep 0.5, 3 rounds, no compile, no other runtimes, no trained masks"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--takes", type=int, default=1, help="processes a row; above 1 they need --out")
    parser.add_argument("--out", type=Path, help="folder for the table, JSON and plot")
    args = parser.parse_args(argv)
    if args.takes < 1:
        parser.error(f"--takes: expected at least 1, got {args.takes}")
    if args.takes > 1 and not args.out:
        parser.error("--takes: say where the takes go, with --out")
    if args.quick:
        args.sides, args.batches, args.keeps, args.rounds, args.no_compile = [32], [8], [0.5], 3, True
        args.runtimes = []
    args.networks = args.networks or (list(NETWORKS) if args.quick else everything)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    if args.takes > 1:
        return take_apart(args)
    cpu.load()
    print(", ".join(f"{key} {value}" for key, value in facts(args.rounds).items()))
    heads = HEADER.split(" | ")
    print(f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", sep="\n", flush=True)
    rows = read(args.out)
    known = {row.key for row in rows}
    probe = Probe()
    for name, side, batch, masks in _settings(args):
        missing = [ratio for ratio in masks if (name, side, batch, str(ratio)) not in known]
        settings = (args.rounds, not args.no_compile, probe, args.runtimes)
        for row in measure(name, side, batch, missing, *settings) if missing else ():
            print(line(row), flush=True)
            rows.append(row)
        if args.out and missing:
            write(rows, args.rounds, args.out)


if __name__ == "__main__":
    with in_one_line():
        main()
