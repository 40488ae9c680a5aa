"""The numbers beside the figures."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from isw_plugin.calibrate import Calibration, Candidate
from isw_plugin.measure import GateReport, LatencyPoint, Records
from isw_plugin.report.classes import by_prune_ratio
from isw_plugin.report.difficulty import EasyToHard
from isw_plugin.report.image_figures import extremes
from isw_plugin.report.spread import keep_ratio, spread

__all__ = [
    "Table",
    "calibration_table",
    "channel_table",
    "class_table",
    "cv_table",
    "extremes_table",
    "halves_table",
    "keep_table",
    "latency_table",
]

Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names its row."""

    caption: str
    columns: Row
    rows: tuple[Row, ...]


def calibration_table(calibration: Calibration) -> Table:
    """The frontier's candidates, from the most accurate on; the chosen one is marked."""
    rows = [
        (
            ("★ " if candidate == calibration.best else "") + _gate(candidate),
            _percent(candidate.accuracy, 2),
            _percent(candidate.prune_ratio),
            _percent(candidate.macs_saved),
        )
        for candidate in calibration.frontier
    ]
    off = ("gates off", _percent(calibration.accuracy, 2), _percent(0), _percent(0))
    columns = ("gate", "accuracy", "channels dropped", "MACs saved")
    return Table(f"The frontier on {calibration.instances:,} held-out images; ★ chosen", columns, (off, *rows))


def keep_table(report: GateReport, records: Records) -> Table:
    """Share of channels kept, and what the site saves, site by site."""
    rows = []
    for name, keep in records.keep.items():
        kept = spread(keep_ratio(keep))
        saved = report.per_site[name].macs_saved
        between = f"{_percent(kept.low)} to {_percent(kept.high)}"
        rows.append((name, str(keep.shape[1]), _percent(kept.mean), between, _percent(saved, 2)))
    columns = ("site", "channels", "kept", "90 % of images", "of all MACs, saved")
    return Table("Channels kept, mean and range over images", columns, tuple(rows))


def cv_table(records: Records) -> Table:
    """CV of the channel norms (Table 2), site by site."""
    rows = []
    for name, values in records.cv.items():
        cv = spread(values)
        rows.append((name, f"{cv.mean:.3f}", f"{cv.median:.3f}", f"{cv.low:.3f} to {cv.high:.3f}"))
    return Table("CV of channel norms over images", ("site", "mean", "median", "90 % of images"), tuple(rows))


def channel_table(records: Records) -> Table:
    """How many channels no image, some images and every image drops, site by site."""
    rows = []
    for name, keep in records.keep.items():
        always, never = int((~keep.any(0)).sum()), int(keep.all(0).sum())
        channels = keep.shape[1]
        rows.append((name, str(channels), str(never), str(channels - never - always), str(always)))
    columns = ("site", "channels", "no image drops", "some drop", "every image drops")
    return Table("Channels by who drops them", columns, tuple(rows))


def class_table(report: GateReport, records: Records, classes: Sequence[str]) -> Table:
    """Every class, the one that drops most channels first."""
    rows = []
    for label in by_prune_ratio(records):
        of = report.per_class[label]
        shares = (_percent(of.prune_ratio), _percent(of.macs_saved), _percent(of.accuracy, 2))
        rows.append((classes[label], f"{of.instances:,}", *shares))
    columns = ("class", "images", "channels dropped", "MACs saved", "accuracy")
    return Table("By class, most channels dropped first", columns, tuple(rows))


def halves_table(records: Records, curve: EasyToHard) -> Table:
    """Accuracy of the half that drops most, of the half that drops least, and of all."""
    half = -(-len(curve.order) // 2)
    parts = (
        ("drop most", curve.order[:half], curve.easier),
        ("drop least", curve.order[-half:], curve.harder),
        ("all images", curve.order, curve.accuracy),
    )
    rows = [
        (name, f"{len(part):,}", _range(records.prune_ratio[part]), _percent(accuracy, 2))
        for name, part, accuracy in parts
    ]
    return Table("Halves by share of channels dropped", ("", "images", "channels dropped", "accuracy"), tuple(rows))


def extremes_table(records: Records, classes: Sequence[str], count: int = 10) -> Table:
    """The images that drop most and least, as positions in the loader, side by side."""
    sides = [[_image(records, classes, index) for index in indices] for indices in extremes(records, count)]
    rows = tuple((str(rank), *easy, *hard) for rank, (easy, hard) in enumerate(zip(*sides, strict=True), 1))
    each = ("class", "dropped", "score")
    columns = ("rank", "drop most: image", *each, "drop least: image", *each)
    return Table("By share of channels dropped; image: position in the loader", columns, rows)


def _image(records: Records, classes: Sequence[str], index: int) -> Row:
    dropped = _percent(records.prune_ratio[index].item())
    return f"{index:,}", classes[int(records.labels[index])], dropped, f"{records.scores[index].item():g}"


def latency_table(points: Sequence[LatencyPoint]) -> Table:
    """Every point, in the order given."""
    rows = [
        (
            _percent(point.keep_ratio),
            point.execution,
            f"{point.latency.ms_per_image:.3f}",
            f"{point.latency.low:.3f} to {point.latency.high:.3f}",
            f"{points[0].latency.ms_per_image / point.latency.ms_per_image:.2f}",
        )
        for point in points
    ]
    columns = ("channels kept", "runs", "ms an image", "quartiles", "times as fast")
    return Table("Measured time; times as fast as the first row", columns, tuple(rows))


def _percent(share: float, digits: int = 1) -> str:
    return f"{share:.{digits}%}"


def _range(ratios: Tensor) -> str:
    return f"{_percent(ratios.min().item())} to {_percent(ratios.max().item())}"


def _gate(candidate: Candidate) -> str:
    own = [f"{len(candidate.per_site)} sites with their own"] if candidate.per_site else []
    return ", ".join([f"{name} {value:g}" for name, value in candidate.parameters.items()] + own)
