"""A network on a machine that others use, too: ours, torch.compile, OpenVINO and onnxruntime, a process each.

    python -m benchmarks.speed.crowded --quick                          # under two minutes: does it run?
    python -m benchmarks.speed.crowded --out benchmarks/speed/results   # everything; what is stored is left out

Situations: quiet; beside one and two busy processes; two threads on one core; a quota of 1.5 cores of a control group
(where one can be made). Processes take turns; a turn's first call is not counted. Cells are the median and the 95th
percentile of single calls in milliseconds. "gated" keeps half of the channels, by forced gates; all are float32.
"""

from isw_cli.script import in_one_line

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.lab.circumstances import circumstances
from benchmarks.speed.apart import WAYS, Apart, Task
from benchmarks.speed.quota import quota
from benchmarks.speed.runtimes import RUNTIMES, installed
from isw_plugin.ops import cpu

__all__ = ["SITUATIONS", "Cell", "main", "table"]

BUSY = {"quiet": 0, "one busy process": 1, "two busy processes": 2}
ONE_CORE, QUOTA = "two threads on one core", "a quota of 1.5 cores"
SITUATIONS = (*BUSY, ONE_CORE, QUOTA)
NETWORKS = ("vgg16:32:1", "resnet18:224:1", "tf_efficientnet_lite0:224:1")
_REST = 0.05  # seconds between turns: threads of the one before look for work, onnxruntime's for 40 ms


@dataclasses.dataclass(frozen=True)
class Cell:
    """One way in one situation; milliseconds of single calls. None: the situation is not to be had here."""

    network: str
    situation: str
    way: str
    median: float | None
    high: float | None
    calls: int = 0
    error: float = 0.0

    @property
    def row(self) -> tuple[str, str]:
        return self.network, self.situation


@contextmanager
def _processes(tasks: Sequence[Task], situation: str) -> Iterator[list[Apart] | None]:
    """Those that can be had in a situation, ready; each was made ready alone."""
    with quota(1.5) if situation == QUOTA else ExitStack() as group, ExitStack() as stack:
        if situation == QUOTA and group is None:
            yield None
            return
        enter = group if situation == QUOTA else None
        cores = {min(os.sched_getaffinity(0))} if situation == ONE_CORE else None
        yield [stack.enter_context(Apart(task, cores, enter)) for task in tasks]


@contextmanager
def _busy(count: int) -> Iterator[None]:
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def _taken(processes: Sequence[Apart], rounds: int, calls: int) -> list[list[float]]:
    taken: list[list[float]] = [[] for _ in processes]
    for _ in range(rounds):
        for seconds, process in zip(taken, processes, strict=True):
            time.sleep(_REST)
            seconds += process.seconds(calls)
    return taken


def _cells(name: str, tasks: Sequence[Task], situations: Sequence[str], rounds: int, calls: int) -> Iterator[Cell]:
    """Situations that differ in others alone share their processes."""
    apart = [[each] for each in situations if each not in BUSY]
    for group in [[each for each in situations if each in BUSY], *apart]:
        if not group:
            continue
        with _processes(tasks, group[0]) as processes:
            for situation in group:
                if processes is None:
                    yield from (Cell(name, situation, task.way, None, None) for task in tasks)
                    continue
                with _busy(BUSY.get(situation, 0)):
                    taken = _taken(processes, rounds, calls)
                for task, process, seconds in zip(tasks, processes, taken, strict=True):
                    high = sorted(seconds)[int(0.95 * len(seconds))]
                    median = statistics.median(seconds)
                    yield Cell(name, situation, task.way, 1e3 * median, 1e3 * high, len(seconds), process.error)


def table(cells: Sequence[Cell]) -> str:
    """In Markdown, a row for each network and situation."""
    ways = [way for way in WAYS if any(cell.way == way for cell in cells)]
    lines = [f"| network:pixels:batch | situation | {' | '.join(ways)} |", "|---" * (2 + len(ways)) + "|"]
    by_row: dict[tuple[str, str], dict[str, Cell]] = {}
    for cell in cells:
        by_row.setdefault(cell.row, {})[cell.way] = cell
    for row, found in by_row.items():
        lines.append(f"| {' | '.join([*row, *(_text(found.get(way)) for way in ways)])} |")
    return "\n".join(lines)


def _text(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    return "not available" if cell.median is None else f"{cell.median:.1f} ({cell.high:.1f})"


def read(out: Path | None) -> list[Cell]:
    path = out / "crowded.json" if out else None
    return [Cell(**cell) for cell in json.loads(path.read_text())["cells"]] if path and path.exists() else []


def write(cells: Sequence[Cell], threads: int, out: Path) -> None:
    """crowded.json and crowded.md."""
    out.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = circumstances("benchmarks.speed.crowded") | {"threads of each": threads}
    about |= {"kernels": cpu.active(), "runtimes": {name: _version(name) for name in installed()}}
    stored = about | {"cells": [dataclasses.asdict(cell) for cell in cells]}
    (out / "crowded.json").write_text(json.dumps(stored, indent=1) + "\n")
    (out / "crowded.md").write_text(f"{about}\n\n{table(cells)}\n")


def _version(name: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(name)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = [way for way in WAYS if way not in RUNTIMES or way in installed()]
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="name:pixels:batch")
    parser.add_argument("--situations", nargs="+", default=SITUATIONS, choices=SITUATIONS)
    parser.add_argument("--ways", nargs="+", default=ways, choices=ways)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--calls", type=int, default=20, help="of a process in a round")
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--models", type=Path, help="folder that keeps models made ready, for other runs")
    parser.add_argument("--quick", action="store_true", help="the slimmed VGG16, 2 rounds of 3 calls, no compiling")
    parser.add_argument("--out", type=Path, help="folder for the table and JSON")
    args = parser.parse_args(argv)
    if args.quick:
        args.networks, args.rounds, args.calls = ["slimmed vgg16:32:1"], 2, 3
        args.ways = [way for way in args.ways if way != "torch"]
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    with TemporaryDirectory() as folder:
        take(args, args.models or Path(folder))


def take(args: argparse.Namespace, models: Path) -> None:
    models.mkdir(parents=True, exist_ok=True)
    cpu.load()
    cells = read(args.out)
    known = {(*cell.row, cell.way) for cell in cells}
    for name in args.networks:
        situations = [each for each in args.situations if not {(name, each, way) for way in args.ways} <= known]
        if not situations:
            continue
        network_name, side, batch = name.rsplit(":", 2)
        task = Task("", network_name, int(side), int(batch), args.threads, models=models)
        tasks = [dataclasses.replace(task, way=way) for way in args.ways]
        again = {(name, situation, way) for situation in situations for way in args.ways}
        cells = [cell for cell in cells if (*cell.row, cell.way) not in again]
        cells += _cells(name, tasks, situations, args.rounds, args.calls)
        if args.out:
            write(cells, args.threads, args.out)
    print(table(cells))


if __name__ == "__main__":
    with in_one_line():
        main()
