"""Hand-overs between cores: what is there to be tested of a clock is its order of magnitude."""

import os

import pytest

from benchmarks.speed import handover


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core has nobody to hand over to")
def test_a_hand_over_takes_nanoseconds() -> None:
    assert 1 < handover.nanoseconds() < 1e6
    assert handover._compiled() is handover._compiled()
