from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from isw_plugin.errors import SettingError
from isw_plugin.report import accuracy_curve, class_ratios, extreme_images, extremes
from tests.report.material import made_records

RATIOS = [0.5, 0.1, 0.9, 0.3, 0.7]
RECORDS = made_records(RATIOS, [0, 0, 1, 1, 1], labels=[0, 1, 0, 1, 0])
IMAGES = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 8, 8)


def test_the_curve_is_drawn_as_it_was_computed(tmp_path: Path) -> None:
    axes, below = accuracy_curve(RECORDS, tmp_path / "a.png", window=2).axes
    windows, cumulative, average = axes.lines
    assert windows.get_xydata().tolist() == [[1, 100], [3, 50], [4.5, 0]]
    assert cumulative.get_xdata().tolist() == [2, 3, 4, 5]
    assert cumulative.get_ydata().tolist() == pytest.approx([100, 200 / 3, 75, 60])
    assert average.get_ydata() == pytest.approx([60, 60])
    halves = [line.get_segments()[0].tolist() for line in axes.collections]
    assert halves[0] == [pytest.approx([0, 200 / 3]), pytest.approx([3, 200 / 3])]
    assert halves[1] == [pytest.approx([2, 100 / 3]), pytest.approx([5, 100 / 3])]
    assert "Half that drops most: 66.67%, half that drops least: 33.33%; +33.33 points" in axes.get_title()
    assert below.lines[0].get_ydata().tolist() == pytest.approx([90, 70, 50, 30, 10])


def test_extremes_are_the_ends_of_the_order() -> None:
    assert extremes(RECORDS) == ([2, 4], [1, 3])
    assert extremes(RECORDS, 1) == ([2], [1])
    assert extremes(made_records([0.5], [1])) == ([0], [0])


def test_no_extremes_are_refused() -> None:
    with pytest.raises(SettingError, match="count=0"):
        extremes(RECORDS, 0)


def test_the_images_shown_are_the_extreme_ones(tmp_path: Path) -> None:
    figure = extreme_images(RECORDS, IMAGES, tmp_path / "e.png", classes=["cat", "dog"])
    shown = [round(255 * axes.images[0].get_array()[0, 0, 0]) for axes in figure.axes]
    assert shown == [2, 4, 1, 3]
    assert [axes.get_title() for axes in figure.axes] == ["cat\n90.0%", "cat\n70.0%", "dog\n10.0%", "dog\n30.0%"]
    wrong = [axes.spines["left"].get_linewidth() > 1 for axes in figure.axes]
    assert wrong == [False, False, True, False]


def test_a_data_set_with_labels_is_shown(tmp_path: Path) -> None:
    figure = extreme_images(RECORDS, TensorDataset(IMAGES, RECORDS.labels), tmp_path / "e.png", count=1)
    assert [axes.get_title() for axes in figure.axes] == ["0\n90.0%", "1\n10.0%"]


def test_images_in_another_order_are_refused(tmp_path: Path) -> None:
    shuffled = TensorDataset(IMAGES, RECORDS.labels.roll(1))
    with pytest.raises(SettingError, match=r"images\[2\] has label 1, the record 0: .* must not shuffle"):
        extreme_images(RECORDS, shuffled, tmp_path / "e.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("images", "message"), [(IMAGES[:4], "4 images for 5 records"), (iter(IMAGES), "needs a length")]
)
def test_images_that_do_not_fit_are_refused(tmp_path: Path, images: torch.Tensor, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        extreme_images(RECORDS, images, tmp_path / "e.png")


def test_classes_are_drawn_from_the_one_that_drops_most(tmp_path: Path) -> None:
    (axes,) = class_ratios(RECORDS, ["same name", "same name"], tmp_path / "c.png").axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([70, 20])
    assert [line.get_xdata()[0] for line in axes.lines if "all images" in line.get_label()] == [pytest.approx(50)]


def test_of_many_classes_the_ends_are_drawn(tmp_path: Path) -> None:
    records = made_records([index / 50 for index in range(50)], [1.0] * 50, labels=list(range(50)))
    (axes,) = class_ratios(records, [str(label) for label in range(50)], tmp_path / "c.png", most=4).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["49", "48", "1", "0"]
