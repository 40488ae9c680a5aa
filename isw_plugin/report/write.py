"""The page for a user's own model and data."""

import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from isw_plugin.calibrate import Calibration
from isw_plugin.errors import SettingError
from isw_plugin.machine import own_version
from isw_plugin.measure import GateReport, Latency, LatencyPoint, Records
from isw_plugin.report.classes import class_names
from isw_plugin.report.image_figures import require_fitting
from isw_plugin.report.page import render
from isw_plugin.report.sections import Material, sections

__all__ = ["write"]

_NAME = "index.html"


def write(
    report: GateReport,
    out: str | Path,
    *,
    classes: Sequence[str] | None = None,
    calibration: Calibration | None = None,
    images: Sequence[Any] | None = None,
    latencies: Sequence[LatencyPoint] = (),
    title: str = "Instance-wise channel sparsity",
    caption: str = "",
    off: GateReport | None = None,
    speed: str = "",
) -> Path:
    """Write ``index.html``, which needs no other file, and its figures as PNG files.

    Args:
        report: Of ``evaluate(model, loader, records=True)`` with gates on.
        out: Folder; made if missing. Files of an earlier page are replaced, once all is drawn without an error.
        classes: Names, by label; the labels themselves if None.
        calibration: What ``calibrate`` returned: draws the accuracy-MACs frontier.
        images: The loader's images in its order, to show the easiest and hardest: (N, 3, H, W), or a data set.
        latencies: Of ``latency_by_keep``: draws time against channels kept.
        title: Heading of the page.
        caption: Model, data and gate in a sentence; it stands on the page and on every figure.
        off: What ``evaluate`` gave for the same images with gates off.
        speed: How much faster the model became, or why not: ``fast.verdict()`` of an accelerated one.

    Returns:
        The page's path.

    Raises:
        SettingError: The report has no records or its gates were off; ``off`` is of other images or has gates on;
            ``classes`` or ``images`` do not fit it.
        MissingExtraError: On import, without matplotlib (``isw_plugin[report]``).
    """
    records = _records(report)
    names = class_names(records, classes)
    if images is not None:
        require_fitting(images, len(records.labels))
    if off is not None and (off.execution != "dense" or off.instances != report.instances):
        raise SettingError(
            f"off is {off.execution}, of {off.instances} images: evaluate the same images with gates off"
        )
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".report-", dir=out) as draft:
        folder = Path(draft)
        stamp = " · ".join(part for part in (caption, _provenance(report)) if part)
        material = Material(report, records, names, calibration, images, latencies, folder, caption, stamp)
        facts, values = _facts(report, off, calibration, speed), _values(report, off, calibration, speed)
        page = render(title, caption, facts, sections(material), _footer(), values)
        (folder / _NAME).write_text(page, encoding="utf-8")
        for file in sorted(folder.iterdir(), key=lambda file: file.name == _NAME):  # the page last
            file.replace(out / file.name)
    return out / _NAME


def _records(report: GateReport) -> Records:
    if report.records is None:
        raise SettingError("the report has no records: make it with evaluate(..., records=True)")
    if not report.records.keep:
        raise SettingError(
            f"no gate acted ({report.execution}): switch gates on with pruner.step() before evaluate, and give it the "
            "masked model where the accelerated one runs dense"
        )
    return report.records


def _provenance(report: GateReport) -> str:
    return f"{report.instances:,} images; {_machine(report.latency)}"


def _machine(latency: Latency) -> str:
    return f"{latency.hardware}, CPU threads: {latency.threads}"


def _facts(report: GateReport, off: GateReport | None, calibration: Calibration | None, speed: str) -> dict[str, str]:
    time = report.latency
    own = {
        "Accuracy, gates off": f"{off.accuracy:.2%}" if off else "",
        "Thresholds": str(calibration.best).partition(":")[0] if calibration else "",
        "Speed": speed,
    }
    return {
        "Images": f"{report.instances:,}",
        "Accuracy, gates on": f"{report.accuracy:.2%}",
        **{name: text for name, text in own.items() if text},
        "Channels dropped (prune ratio)": f"{report.prune_ratio:.1%}",
        "MACs saved": f"{report.macs_saved:.1%}",
        "MACs of an image": f"{report.macs / 1e6:,.2f} of {report.dense_macs / 1e6:,.2f} million",
        "The gates' own MACs": f"{report.gate_macs / 1e6:,.2f} million",
        "Maps emptied": f"{report.emptied:,}",
        "Execution": _EXECUTIONS.get(report.execution, report.execution),
        "Time of an image, median and quartiles": f"{time.ms_per_image:.3f} ms ({time.low:.3f} to {time.high:.3f})",
        "Timed": f"{time.batches} batches of {time.batch}; {_machine(time)}",
    }


_EXECUTIONS = {
    "masked": "masked: dropped channels zeroed, not skipped",
    "accelerated": "accelerated: dropped channels skipped",
}


def _values(report: GateReport, off: GateReport | None, calibration: Calibration | None, speed: str) -> dict[str, Any]:
    """All numbers of the page, as JSON values."""
    parts = {"gates_on": report, "gates_off": off, "calibration": calibration}
    return {name: part.to_dict() for name, part in parts.items() if part is not None} | {"speed": speed}


def _footer() -> str:
    return f"isw_plugin {own_version()}, torch {torch.__version__}, {date.today().isoformat()}"
