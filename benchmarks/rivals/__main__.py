"""Table 7 of the paper with every gate trained alike, and the column that it lacked: measured time.

    python -m benchmarks.rivals --scale smoke --out runs/rivals                  # digits, seconds, no times
    python -m benchmarks.rivals --scale minutes --data DIR --out runs/rivals     # a narrow M-CifarNet
    python -m benchmarks.rivals --scale hours --data DIR --out runs/rivals       # two networks, full width, all images
    python -m benchmarks.rivals --scale cpu --data DIR --out runs/rivals         # four networks, days
    python -m benchmarks.rivals --scale minutes --data DIR --out runs/rivals --measured    # write what is done

DIR/train/CLASS/*.jpg and DIR/test or DIR/val. Interrupt it and run the same command again: every epoch is saved.
"""

from isw_cli.script import in_one_line

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.lab.circumstances import circumstances
from benchmarks.lab.images import Images, ImageSplits, load
from benchmarks.lab.run_folder import require_equal
from benchmarks.rivals.measuring import BATCHES, measure
from benchmarks.rivals.networks import NETWORKS
from benchmarks.rivals.rivals import RIVALS
from benchmarks.rivals.training import Bench, Scale

PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())
SCALES = {
    "smoke": Scale(("m-cifarnet",), 0.125, 1, 1, 256, 64, rounds=0, batch=32),
    "minutes": Scale(("m-cifarnet",), 0.25, 6, 3, 4000, 2000, rounds=101),
    "hours": Scale(("m-cifarnet", "resnet20"), 1.0, 4, 2, None, None, rounds=101, batch=128, bfloat16=True),
    "cpu": Scale(NETWORKS, 1.0, 12, 12, None, None, rounds=101, batch=128),
}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="smoke")
    parser.add_argument("--data", default="digits", help="digits, cifar10, or a folder of images")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and the table")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, help="instead of the scale's")
    parser.add_argument(
        "--rows", nargs="+", choices=RIVALS, default=list(RIVALS), metavar="ROW", help=", ".join(RIVALS)
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--measured", action="store_true", help="train and measure nothing: write what is known")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train and measure what is missing, row by row, and write the table after every one."""
    scale = SCALES[args.scale]
    scale = replace(scale, networks=tuple(args.networks or scale.networks))
    table: dict[str, Any] = {}
    if not args.measured:
        for seed in args.seeds:
            bench = Bench(_fewer(load(args.data, 32, seed), scale), args.out, scale, seed)
            for name in scale.networks:
                for row in args.rows:
                    _measured(bench, name, row, _settings(args, scale, row))
                    table = _written(args, scale)
    return table or _written(args, scale)


def _fewer(splits: ImageSplits, scale: Scale) -> ImageSplits:
    """Spread over the set, which is sorted by class."""

    def some(images: Images, count: int | None) -> Images:
        if count is None or count >= len(images):
            return images
        return images.at(torch.linspace(0, len(images) - 1, count).round().long())

    return replace(splits, train=some(splits.train, scale.images), test=some(splits.test, scale.test_images))


def _file(out: Path, name: str, row: str, seed: int) -> Path:
    return out / "rows" / f"{name}-{row}-{seed}.json"


def _settings(args: argparse.Namespace, scale: Scale, row: str) -> dict[str, Any]:
    """What a row depends on besides the names in its file's."""
    settings = {"data": Path(args.data).name, "rival": repr(RIVALS[row]), **vars(scale)}
    del settings["networks"]
    return settings


def _known(file: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """A row that was measured; None: not yet."""
    if not file.exists():
        return None
    found: dict[str, Any] = json.loads(file.read_text())
    require_equal(found.get("settings", {}), settings, file)
    return found


def _measured(bench: Bench, name: str, row: str, settings: dict[str, Any]) -> None:
    file = _file(bench.out, name, row, bench.seed)
    if _known(file, settings) is None:
        print(f"{name}, {row}, seed {bench.seed}", flush=True)
        found = measure(bench, name, row) | {"settings": settings, "circumstances": circumstances("benchmarks.rivals")}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1))


def _written(args: argparse.Namespace, scale: Scale) -> dict[str, Any]:
    """rivals.json and rivals.md."""
    found = {name: {row: _of_seeds(args, scale, name, row) for row in RIVALS} for name in scale.networks}
    table = {"scale": args.scale, "settings": vars(scale), "networks": found}
    (args.out / "rivals.json").write_text(json.dumps(table, indent=1) + "\n")
    (args.out / "rivals.md").write_text("\n".join(_page(name, rows) for name, rows in found.items()))
    return table


def _of_seeds(args: argparse.Namespace, scale: Scale, name: str, row: str) -> list[dict[str, Any]]:
    settings = _settings(args, scale, row)
    found = (_known(_file(args.out, name, row, seed), settings) for seed in args.seeds)
    return [each for each in found if each is not None]


def _page(name: str, rows: dict[str, list[dict[str, Any]]]) -> str:
    times = [f"ms, batch {batch}" for batch in BATCHES]
    head = ["gate", "seeds", "error %", "pruned", "MACs", "MACs saved", *times, "extra parameters"]
    lines = [f"## {name}", "", _line(head), "|---" * len(head) + "|"]
    lines += [_line([row, *_cells(found)]) for row, found in rows.items()]
    lines += [
        _line([f"*{label}*", "-", f"{error:.2f}", _share(pruned), _millions(macs), *["-"] * (len(head) - 5)])
        for label, error, pruned, macs in PUBLISHED[name]
    ]
    return "\n".join([*lines, ""])


def _cells(found: list[dict[str, Any]]) -> list[str]:
    if not found:
        return ["0", *["not run"] * 7]

    def mean(key: str) -> float:
        return statistics.mean(row[key] for row in found)

    spread = f" ± {statistics.stdev(row['error'] for row in found):.2f}" if len(found) > 1 else ""
    shown = [f"{mean('error'):.2f}{spread}", _share(mean("prune_ratio")), _millions(mean("macs"))]
    times = [_time(found, batch) for batch in BATCHES]
    extra = f"{mean('extra_parameters') / mean('parameters'):.1%}"
    return [str(len(found)), *shown, _share(mean("macs_saved")), *times, extra]


def _time(found: list[dict[str, Any]], batch: int) -> str:
    timed = [row["ms"][str(batch)] for row in found if "ms" in row]
    if not timed:
        return "not run"
    return f"{statistics.median(one['ms'] for one in timed):.2f} ({timed[0]['runs']})"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _millions(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:.1f} M"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    with in_one_line(resumable=True):
        main(arguments())
