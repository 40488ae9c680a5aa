"""What gates cost and gain: accuracy against MACs, time against channels."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from isw_plugin.calibrate import Calibration, Candidate
from isw_plugin.errors import SettingError
from isw_plugin.measure import LatencyPoint
from isw_plugin.report.canvas import Figure, blank, plain, save

__all__ = ["frontier", "latency_curve"]

_STYLES = {"accelerated": ("C0", "o-"), "masked": ("C1", "s"), "dense": ("C2", "D")}


def frontier(calibrations: Mapping[str, Calibration], path: Path, caption: str = "") -> Figure:
    """Draw accuracy against MACs saved: every candidate, the frontier as a line, the winner as a star.

    Args:
        calibrations: Label -> calibration.
        path: Image file to write; its ending chooses the format.
        caption: What was measured, where: data, model, hardware.
    """
    figure, axes = blank(7, 4.5)
    for index, (label, calibration) in enumerate(calibrations.items()):
        color = f"C{index}"
        axes.scatter(*_points(calibration.candidates), s=12, color=color, alpha=0.3)
        axes.plot(*_points(calibration.frontier), color=color, label=plain(label))
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
    return save(figure, path, caption)


def latency_curve(points: Sequence[LatencyPoint], path: Path, caption: str = "") -> Figure:
    """Draw measured time against the share of channels kept, with quartiles; a dense form also as a line across.

    Args:
        points: Of ``latency_by_keep``, or made of times taken elsewhere.
        path: Image file to write.
        caption: What was measured; batch, hardware and threads are in the title.

    Raises:
        SettingError: There is no point.
    """
    if not points:
        raise SettingError("no latency was given: a curve needs at least one point")
    figure, axes = blank(7, 4.5)
    for execution in dict.fromkeys(point.execution for point in points):
        color, style = _STYLES.get(execution, ("C3", "x"))
        same = sorted((p for p in points if p.execution == execution), key=lambda point: point.keep_ratio)
        ratios, times = [100 * p.keep_ratio for p in same], [p.latency.ms_per_image for p in same]
        below = [p.latency.ms_per_image - p.latency.low for p in same]
        above = [p.latency.high - p.latency.ms_per_image for p in same]
        axes.errorbar(ratios, times, (below, above), fmt=style, color=color, capsize=3, label=plain(execution))
        if execution == "dense":
            axes.axhline(min(times), color=color, linestyle=":", linewidth=1)
    machines = dict.fromkeys(f"{p.latency.hardware}, CPU threads: {p.latency.threads}" for p in points)
    sizes = dict.fromkeys(f"{p.latency.batches} batches of {p.latency.batch}" for p in points)
    axes.set_title(f"Median and quartiles of {', '.join(sizes)}; {'; '.join(machines)}", fontsize=8)
    axes.set_xlabel("channels kept (%)")
    axes.set_ylabel("time of an image (ms)")
    axes.set(xlim=(0, 105), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    return save(figure, path, caption)


def _points(candidates: Sequence[Candidate]) -> tuple[list[float], list[float]]:
    return [100 * c.macs_saved for c in candidates], [100 * c.accuracy for c in candidates]
