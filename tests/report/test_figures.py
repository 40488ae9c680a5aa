"""Accuracy against MACs is in test_figures.py; here is time against channels."""

from dataclasses import replace
from pathlib import Path

import pytest

from isw_plugin.errors import SettingError
from isw_plugin.measure import LatencyPoint
from isw_plugin.report import latency_curve
from tests.report.material import LATENCY

POINTS = [
    LatencyPoint(1.0, "dense", LATENCY),
    LatencyPoint(0.75, "accelerated", replace(LATENCY, ms_per_image=1.8)),
    LatencyPoint(0.25, "accelerated", replace(LATENCY, ms_per_image=1.0, low=0.9, high=1.2)),
]


def test_points_are_where_they_were_measured(tmp_path: Path) -> None:
    figure = latency_curve(POINTS, tmp_path / "l.png")
    dense, fast = figure.axes[0].containers
    assert dense.lines[0].get_xydata().tolist() == [[100, 2]]
    assert fast.lines[0].get_xydata().tolist() == [[25, 1], [75, 1.8]]
    caps = [cap.get_ydata().tolist() for cap in fast.lines[1]]
    assert caps == [pytest.approx([0.9, 1.5]), pytest.approx([1.2, 2.5])]
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")


def test_the_title_names_the_machine(tmp_path: Path) -> None:
    title = latency_curve(POINTS, tmp_path / "l.png").axes[0].get_title()
    assert title == "Median and quartiles of 3 batches of 4; Some CPU, CPU threads: 2"


def test_machines_that_differ_are_both_named(tmp_path: Path) -> None:
    other = LatencyPoint(0.5, "accelerated", replace(LATENCY, hardware="Another CPU", batch=8))
    title = latency_curve([*POINTS, other], tmp_path / "l.png").axes[0].get_title()
    assert "3 batches of 4, 3 batches of 8; Some CPU, CPU threads: 2; Another CPU, CPU threads: 2" in title


def test_no_points_are_no_curve(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="at least one"):
        latency_curve([], tmp_path / "l.png")
    assert not list(tmp_path.iterdir())
