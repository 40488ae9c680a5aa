"""The paper's figures, drawn from a calibration and from the records of ``evaluate``."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from isw_plugin.calibrate import Calibration, Candidate
from isw_plugin.measure import Records

__all__ = ["channel_heatmap", "frontier"]


def frontier(calibrations: Mapping[str, Calibration], path: Path, caption: str = "") -> None:
    """Draw accuracy against MACs saved: every candidate, the frontier as a line, the winner as a star.

    Args:
        calibrations: Label -> calibration.
        path: Image file to write; its ending chooses the format.
        caption: What was measured, where: data, model, hardware.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (label, calibration) in enumerate(calibrations.items()):
        color = f"C{index}"
        axes.scatter(*_points(calibration.candidates), s=12, color=color, alpha=0.3)
        axes.plot(*_points(calibration.frontier), color=color, label=label)
        axes.scatter(*_points([calibration.best]), s=140, marker="*", color=color, edgecolors="black", zorder=3)
        axes.axhline(100 * calibration.accuracy, color=color, linestyle=":", linewidth=1)
    worst = min(calibration.best.accuracy for calibration in calibrations.values())
    best = max(calibration.accuracy for calibration in calibrations.values())
    margin = max(100 * (best - worst), 0.5)
    axes.set_ylim(100 * worst - 6 * margin, 100 * best + margin)
    axes.set_xlabel("MACs saved (%)")
    axes.set_ylabel("accuracy on held-out images (%)")
    axes.set_title("Dotted: gates off. Star: chosen thresholds.", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.supxlabel(caption, fontsize=7)
    figure.savefig(path, dpi=150)


def channel_heatmap(records: Records, classes: Sequence[str], path: Path, caption: str = "") -> None:
    """Draw which channels each class drops (Figure 3): a band a site, a row a class, a column a channel.

    Args:
        records: Of ``evaluate(..., records=True)`` with gates on.
        classes: Names, by label.
        path: Image file to write.
        caption: What was measured, where.
    """
    bands = [_dropped_by_class(records, name, len(classes)) for name in records.keep]
    width = max(band.shape[1] for band in bands)
    rows = np.concatenate(
        [np.pad(band, ((0, 1), (0, width - band.shape[1])), constant_values=np.nan) for band in bands]
    )
    figure = Figure(figsize=(9, 1.5 + 0.035 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(rows, aspect="auto", interpolation="nearest", vmin=0, vmax=1, cmap="viridis")
    axes.set_yticks([index * (len(classes) + 1) + len(classes) / 2 for index in range(len(bands))], list(records.keep))
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("channel")
    axes.set_title(f"Share of images that drop the channel; rows of a site: {', '.join(classes)}", fontsize=8)
    figure.colorbar(image, ax=axes)
    figure.supxlabel(caption, fontsize=7)
    figure.savefig(path, dpi=150)


def _points(candidates: Sequence[Candidate]) -> tuple[list[float], list[float]]:
    return [100 * c.macs_saved for c in candidates], [100 * c.accuracy for c in candidates]


def _dropped_by_class(records: Records, site: str, classes: int) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]]":
    dropped = (~records.keep[site]).double().numpy()
    labels = records.labels.numpy()
    nothing = np.full(dropped.shape[1], np.nan)
    rows = [dropped[labels == label].mean(0) if (labels == label).any() else nothing for label in range(classes)]
    return np.stack(rows)
