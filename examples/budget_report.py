"""The table and the plots of fast_within_budget.py."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

__all__ = ["plots", "table"]

BATCHES = (1, 32)  # that were timed


def table(results: dict[str, Any]) -> str:
    """A line a network, with circumstances."""
    data = results["data"]
    lines = [
        f"{results['model']}, {data['name']} at {data['size']} px: {data['train']} training, "
        f"{data['held_out']} held-out, {data['test']} test images; {results['epochs']} epochs; seed {results['seed']}",
        f"{results['hardware']}; {results['date']}; "
        + ", ".join(f"{name} {number}" for name, number in results["versions"].items()),
        "ms: of an image, median (quartiles); dense: the best dense form, accelerated: dropped channels are skipped",
        "",
        f"{'network':<18} {'accuracy':>8} {'dropped':>8} {'MACs left':>9}  {'ms at batch 1':<36} ms at batch 32",
    ]
    for row in [*results["rows"], *results["curve"]]:
        times = [_time(row[f"batch_{batch}"]) if f"batch_{batch}" in row else "-" for batch in BATCHES]
        lines.append(
            f"{row['network']:<18} {row['accuracy']:>8.4f} {row['dropped']:>8.3f} {row['macs_left']:>9.3f}  "
            f"{times[0]:<36} {times[1]}"
        )
    return "\n".join(lines)


def _time(of_row: dict[str, Any]) -> str:
    low, high = of_row["quartiles"]
    return f"{of_row['ms']:.3f} ({low:.3f} to {high:.3f}) {of_row['runs']}"


def plots(results: dict[str, Any], file: Path) -> None:
    """Accuracy against MACs left and against milliseconds."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True, layout="constrained")
    for row in [*results["rows"], *results["curve"]]:
        style = {"marker": "o", "color": "C0" if row["network"].startswith("ours") else "C7"}
        axes[0].plot(row["macs_left"], row["accuracy"], **style)
        axes[0].annotate(row["network"], (row["macs_left"], row["accuracy"]), fontsize=8)
        for axis, batch in zip(axes[1:], BATCHES, strict=True):
            if f"batch_{batch}" in row:
                axis.plot(row[f"batch_{batch}"]["ms"], row["accuracy"], **style)
                axis.annotate(row["network"], (row[f"batch_{batch}"]["ms"], row["accuracy"]), fontsize=8)
    axes[0].set(xlabel="MACs left, share of the dense network's", ylabel="test accuracy")
    for axis, batch in zip(axes[1:], BATCHES, strict=True):
        axis.set(xlabel=f"ms an image at batch {batch}", xlim=(0, None))
    figure.savefig(file, dpi=120)
    plt.close(figure)
