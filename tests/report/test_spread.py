import pytest
import torch

from isw_plugin.report.spread import keep_ratio, spread


def test_spread_of_a_hundred_and_one_numbers() -> None:
    found = spread(torch.arange(101).flip(0))
    assert (found.count, found.mean) == (101, 50)
    assert (found.low, found.first, found.median, found.third, found.high) == pytest.approx((5, 25, 50, 75, 95))


def test_spread_of_one_number_is_that_number() -> None:
    found = spread(torch.tensor([0.25]))
    assert {found.mean, found.low, found.first, found.median, found.third, found.high} == {0.25}


def test_keep_ratio_is_a_share_of_each_image() -> None:
    keep = torch.tensor([[True, True, False, False], [True, True, True, False]])
    assert keep_ratio(keep).tolist() == [0.5, 0.75]
