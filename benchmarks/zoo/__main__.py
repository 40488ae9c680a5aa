"""Every timm model: are its sites found, and does gating one do what it should?

    python -m benchmarks.zoo sites --out FOLDER          # (a) every entry point, on meta
    python -m benchmarks.zoo gates --out FOLDER          # (b) the smallest of every module, and tiny models
    python -m benchmarks.zoo engine --out FOLDER         #     accelerated
    python -m benchmarks.zoo predicted --out FOLDER      #     accelerated, with norms predicted wherever they can be
    python -m benchmarks.zoo graphs --out FOLDER         #     exported and compiled
    python -m benchmarks.zoo pruned --out FOLDER         # (c) after torch-pruning took half of the channels
    python -m benchmarks.zoo report --out FOLDER         # results/ of the parts that were run
    python -m benchmarks.zoo gates --only "resnet*" --out FOLDER

A line of JSON a model is written as soon as it is known; a second run goes on where the first stopped.
"""

from isw_cli.script import in_one_line

import argparse
import json
import time
from collections.abc import Callable, Iterable
from datetime import date
from fnmatch import fnmatchcase
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.zoo import predicted
from benchmarks.zoo.checks import check
from benchmarks.zoo.graphs import check_engine, check_graphs
from benchmarks.zoo.models import build, smallest
from benchmarks.zoo.pruning import pruned
from benchmarks.zoo.report import page, summary
from benchmarks.zoo.sites import module_of, site_record
from benchmarks.zoo.subject import described
from isw_plugin.measure import hardware

__all__ = ["check_pruned", "main", "report", "resume"]

ROOT = Path(__file__).parents[2]
Record = dict[str, Any]


def resume(out: Path, names: Iterable[str], record: Callable[[str], Record]) -> None:
    """Append a line of JSON for every name that the file does not have yet."""
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {record["model"] for record in read(out)}
    with out.open("a") as lines:
        for name in names:
            if name not in done:
                print(json.dumps(record(name)), file=lines, flush=True)


def read(path: Path) -> list[Record]:
    """The records of a file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def gate_record(name: str) -> Record:
    return _record(name, check)


def engine_record(name: str) -> Record:
    return _record(name, check_engine)


def predicted_record(name: str) -> Record:
    return _record(name, partial(check_engine, predicted=True))


def graph_record(name: str) -> Record:
    return _record(name, check_graphs)


def pruned_record(name: str) -> Record:
    return _record(name, check_pruned)


def check_pruned(model: nn.Module, images: Tensor) -> dict[str, str]:
    try:
        small, which = pruned(model, images)
    except RuntimeError as error:
        return {"prune": f"skipped: torch-pruning: {error}"}
    return {"pruned": which} | check(small, images)


def _record(name: str, checks: Callable[[nn.Module, Tensor], dict[str, str]]) -> Record:
    start = time.perf_counter()
    record: Record = {"model": name, "module": module_of(name)}
    try:
        model, images = build(name)
    except Exception as error:
        return record | {"steps": {"build": described(error)}}
    steps = checks(model, images)
    return record | {"size": list(images.shape), "steps": steps, "seconds": round(time.perf_counter() - start, 1)}


PARTS: dict[str, Callable[[str], Record]] = {
    "sites": site_record,
    "gates": gate_record,
    "engine": engine_record,
    "predicted": predicted_record,
    "graphs": graph_record,
    "pruned": pruned_record,
}


def report(records: dict[str, list[Record]], root: Path) -> None:
    """Write the pages of what was run, and their numbers, below the root of the repository."""
    results = root / "benchmarks" / "zoo" / "results"
    results.mkdir(parents=True, exist_ok=True)
    where = f"{hardware()}, threads: {torch.get_num_threads()}, {date.today()}"
    if any(those for part, those in records.items() if part != "predicted"):
        told = summary(records)
        (results / "summary.json").write_text(json.dumps(told, indent=1) + "\n")
        (results / "models.md").write_text(page(told, where))
    if records.get("predicted"):
        rows = predicted.rows(records["predicted"])
        (results / "predicted.json").write_text(json.dumps(rows, indent=1) + "\n")
        versions = ", ".join(f"{name} {version(name)}" for name in ("timm", "torch"))
        (results / "predicted.md").write_text(predicted.page(rows, f"{versions}; {where}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "report"])
    parser.add_argument("--only", default="*", help="a glob over entry points")
    parser.add_argument("--out", type=Path, default=Path("runs/zoo"), help="a folder for the records")
    args = parser.parse_args()
    if args.part == "report":
        report({part: read(args.out / f"{part}.jsonl") for part in PARTS}, ROOT)
        return
    sites = args.out / "sites.jsonl"
    if args.part != "sites" and not sites.exists():
        parser.error(f"{args.part}: the smallest models are those of {sites}; run `sites` first")
    names = timm.list_models() if args.part == "sites" else smallest(read(sites))
    chosen = [name for name in names if fnmatchcase(name, args.only)]
    resume(args.out / f"{args.part}.jsonl", chosen, PARTS[args.part])


if __name__ == "__main__":
    with in_one_line():
        main()
