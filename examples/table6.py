"""A run of the main job in the form of the paper's Table 6."""

from typing import Any

__all__ = ["table6"]


def table6(results: dict[str, Any]) -> str:
    """The run in the form of the paper's Table 6, a line a row, with the MACs and times it lacks."""
    data = results["data"]
    lines = [
        f"{data['name']}: {data['train']} training, {data['held_out']} held-out, {data['test']} test images; "
        f"seed {results['seed']}; {results['hardware']}; {results['date']}",
        ", ".join(f"{name} {number}" for name, number in results["versions"].items()),
        results["command"],
        f"widths after slimming: {results['widths']}",
        "saved: share of the MACs of the same network ungated. ms: of an image, median and quartiles of "
        f"{results['timed']['rounds']} batches of {results['timed']['batch']}, all rows in turn; dense: the best dense "
        "form, accelerated: dropped channels are skipped.",
        "",
        "stage       lambda  alpha   beta     acc     pr    MMACs  saved      ms  (quartiles)",
    ]
    for row in results["rows"]:
        low, high = row["ms_quartiles"]
        numbers = [_number(row[name], "g") for name in ("lambda", "alpha", "beta")]
        lines.append(
            f"{row['stage']:<10} {numbers[0]:>7} {numbers[1]:>6} {numbers[2]:>6} {row['accuracy']:>7.4f} "
            f"{row['prune_ratio']:>6.3f} {row['macs'] / 1e6:>8.2f} {row['macs_saved']:>6.1%} "
            f"{row['ms_per_image']:>7.3f}  ({low:.3f} to {high:.3f}) {row['execution']}"
        )
    lines += ["", *(_alone(row) for row in results["rows"] if "batch_1" in row)]
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _alone(row: dict[str, Any]) -> str:
    """A row's time for one image at a time."""
    alone = row["batch_1"]
    low, high = alone["ms_quartiles"]
    return (
        f"{row['stage']:<10} one image at a time: {alone['ms']:.3f} ms ({low:.3f} to {high:.3f}) {alone['execution']}"
    )
