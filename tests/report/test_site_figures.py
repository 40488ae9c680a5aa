from pathlib import Path

import numpy as np
import pytest

from isw_plugin.report import channel_heatmap, cv_per_site, keep_per_site
from tests.report.material import made_records

RECORDS = made_records([0.2, 0.4, 0.6], [1, 1, 0], labels=[0, 0, 2])


def test_keep_ratio_is_a_bar_a_site(tmp_path: Path) -> None:
    (axes,) = keep_per_site(RECORDS, tmp_path / "k.png").axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([60, 60])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "second"]
    assert (tmp_path / "k.png").exists()


def test_cv_is_a_bar_a_site_with_alpha_across(tmp_path: Path) -> None:
    (axes,) = cv_per_site(RECORDS, tmp_path / "c.png", alpha=0.5).axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.4, 0.8])
    assert [line.get_xdata() for line in axes.lines if line.get_label() == "alpha 0.5"] == [[0.5, 0.5]]


def test_heatmap_has_a_band_a_site_and_a_row_a_class(tmp_path: Path) -> None:
    figure = channel_heatmap(RECORDS, ["cat", "dog", "fox"], tmp_path / "h.png")
    shares = np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)
    assert shares.shape == (2 * (3 + 1), 10)
    cat, fox = [1, 1, 0.5, 0.5, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    np.testing.assert_equal(shares[0], cat)
    np.testing.assert_equal(shares[2], fox)
    np.testing.assert_equal(shares[4], cat[::-1])
    assert np.isnan(shares[[1, 3]]).all()  # no dog, and the gap between bands
    assert figure.axes[0].get_yticks().tolist() == [1, 5]


def test_of_many_classes_the_ends_are_drawn(tmp_path: Path) -> None:
    ratios = [index / 100 for index in range(100)]
    records = made_records(ratios, [1.0] * 100, labels=list(range(100)))
    figure = channel_heatmap(records, [f"class {label}" for label in range(100)], tmp_path / "h.png", most=4)
    assert figure.axes[0].images[0].get_array().shape == (2 * (4 + 1), 10)
    assert "class 99, class 98, class 1, class 0" in figure.axes[0].get_title().replace("\n", " ")
