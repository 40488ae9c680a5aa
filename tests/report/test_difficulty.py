import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isw_plugin.errors import SettingError
from isw_plugin.report import easy_to_hard
from tests.report.material import made_records

IMAGES = st.lists(st.tuples(st.integers(0, 10), st.booleans()), min_size=1, max_size=40)


def test_the_curve_of_a_made_record() -> None:
    """0.9 0.7 | 0.5 0.3 | 0.1 dropped, of which 1 1 | 0 1 | 0 are right."""
    curve = easy_to_hard(made_records([0.5, 0.1, 0.9, 0.3, 0.7], [0, 0, 1, 1, 1]), window=2)
    assert curve.order.tolist() == [2, 4, 0, 3, 1]
    assert curve.scores.tolist() == [1, 1, 0, 1, 0]
    assert curve.windows.tolist() == [1, 0.5, 0]
    assert curve.cumulative.tolist() == pytest.approx([1, 1, 2 / 3, 3 / 4, 3 / 5])
    assert (curve.easier, curve.harder, curve.accuracy) == pytest.approx((2 / 3, 1 / 3, 3 / 5))
    assert curve.error == pytest.approx(math.sqrt(2 * (2 / 9) / 3))


def test_images_that_drop_equally_many_share_their_mean() -> None:
    curve = easy_to_hard(made_records([0.5] * 4, [1, 1, 0, 0]), window=1)
    assert curve.windows.tolist() == [0.5] * 4
    assert curve.easier == curve.harder == 0.5


@pytest.mark.parametrize(("count", "window"), [(1, 1), (9, 1), (50, 5), (1000, 100), (5000, 100)])
def test_the_window_is_the_papers_where_there_are_images_for_it(count: int, window: int) -> None:
    assert easy_to_hard(made_records([0.0] * count, [1.0] * count)).window == window


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_holds_an_image(window: int) -> None:
    with pytest.raises(SettingError, match="at least 1"):
        easy_to_hard(made_records([0.5], [1]), window)


def test_no_images_have_no_curve() -> None:
    with pytest.raises(SettingError, match="no image"):
        easy_to_hard(made_records([], []))


@given(images=IMAGES, seed=st.integers(0, 1000), window=st.integers(1, 10))
def test_the_loaders_order_does_not_matter(images: list[tuple[int, bool]], seed: int, window: int) -> None:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    one, other = (
        easy_to_hard(made_records([dropped / 10 for dropped, _ in seen], [float(right) for _, right in seen]), window)
        for seen in (images, [images[index] for index in order])
    )
    torch.testing.assert_close(one.windows, other.windows)
    torch.testing.assert_close(one.cumulative, other.cumulative)
    assert (one.easier, one.harder) == pytest.approx((other.easier, other.harder))


@given(images=IMAGES)
def test_the_means_agree(images: list[tuple[int, bool]]) -> None:
    records = made_records([dropped / 10 for dropped, _ in images], [float(right) for _, right in images])
    curve = easy_to_hard(records, window=1)
    assert curve.accuracy == pytest.approx(records.scores.mean().item())
    assert curve.cumulative[-1].item() == pytest.approx(curve.accuracy)
    torch.testing.assert_close(curve.windows, curve.scores)
    assert (records.prune_ratio[curve.order].diff() <= 0).all()
    if len(images) % 2 == 0:
        assert (curve.easier + curve.harder) / 2 == pytest.approx(curve.accuracy)
