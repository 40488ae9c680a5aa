from dataclasses import replace

import pytest

from isw_plugin.calibrate import Calibration, Candidate
from isw_plugin.measure import LatencyPoint
from isw_plugin.report import easy_to_hard, tables
from tests.report.material import LATENCY, made_records, made_report

RECORDS = made_records([0.2, 0.4, 0.6, 0.8], [1, 1, 0, 1], labels=[0, 0, 1, 1])
REPORT = made_report(RECORDS)
NAMES = ["cat", "dog"]
ALL = {
    "keep": tables.keep_table(REPORT, RECORDS),
    "cv": tables.cv_table(RECORDS),
    "channels": tables.channel_table(RECORDS),
    "classes": tables.class_table(REPORT, RECORDS, NAMES),
    "halves": tables.halves_table(RECORDS, easy_to_hard(RECORDS)),
    "extremes": tables.extremes_table(RECORDS, NAMES),
    "latency": tables.latency_table([LatencyPoint(1.0, "dense", LATENCY)]),
}


@pytest.mark.parametrize("name", ALL)
def test_every_row_has_every_column(name: str) -> None:
    table = ALL[name]
    assert table.rows
    assert {len(row) for row in table.rows} == {len(table.columns)}


def test_channels_kept() -> None:
    assert ALL["keep"].rows[0] == ("first", "10", "50.0%", "23.0% to 77.0%", "25.00%")


def test_cv() -> None:
    assert ALL["cv"].rows[1] == ("second", "1.000", "1.000", "0.460 to 1.540")


def test_channels_that_all_some_and_no_images_drop() -> None:
    assert ALL["channels"].rows == (("first", "10", "2", "6", "2"), ("second", "10", "2", "6", "2"))


def test_classes_from_the_one_that_drops_most() -> None:
    assert ALL["classes"].rows == (
        ("dog", "2", "70.0%", "70.0%", "50.00%"),
        ("cat", "2", "30.0%", "30.0%", "100.00%"),
    )


def test_halves() -> None:
    assert ALL["halves"].rows == (
        ("drop most", "2", "60.0% to 80.0%", "50.00%"),
        ("drop least", "2", "20.0% to 40.0%", "100.00%"),
        ("all images", "4", "20.0% to 80.0%", "75.00%"),
    )


def test_extremes_side_by_side() -> None:
    assert ALL["extremes"].rows == (
        ("1", "3", "dog", "80.0%", "1", "0", "cat", "20.0%", "1"),
        ("2", "2", "dog", "60.0%", "0", "1", "cat", "40.0%", "1"),
    )


def test_times_against_the_first_row() -> None:
    points = [
        LatencyPoint(1.0, "dense", LATENCY),
        LatencyPoint(0.5, "accelerated", replace(LATENCY, ms_per_image=1.6)),
    ]
    assert tables.latency_table(points).rows == (
        ("100.0%", "dense", "2.000", "1.500 to 2.500", "1.00"),
        ("50.0%", "accelerated", "1.600", "1.500 to 2.500", "1.25"),
    )


def test_the_frontier_with_the_chosen_candidate_marked() -> None:
    some = Candidate({"alpha": 0.5, "beta": 0.25}, 0.9, 0.2, 80, 0.2, 0)
    more = Candidate({"alpha": 0.5, "beta": 0.5}, 0.8, 0.4, 60, 0.4, 0, {"first": {"beta": 1.0}})
    beaten = Candidate({"alpha": 1.0, "beta": 0.5}, 0.7, 0.1, 90, 0.1, 0)
    table = tables.calibration_table(Calibration(more, (beaten, some, more), 0.95, 1234))
    assert "1,234 held-out images" in table.caption
    assert table.rows == (
        ("gates off", "95.00%", "0.0%", "0.0%"),
        ("alpha 0.5, beta 0.25", "90.00%", "20.0%", "20.0%"),
        ("★ alpha 0.5, beta 0.5, 1 sites with their own", "80.00%", "40.0%", "40.0%"),
    )
