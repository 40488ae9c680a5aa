import pytest

from isw_plugin.errors import SettingError
from isw_plugin.report.classes import by_prune_ratio, class_names, ends
from tests.report.material import made_records

RECORDS = made_records([0.1, 0.9, 0.5, 0.7], [1, 1, 1, 1], labels=[0, 2, 2, 0])


def test_labels_are_their_own_names() -> None:
    assert class_names(RECORDS, None) == ["0", "1", "2"]


def test_names_may_be_more_than_the_labels_seen() -> None:
    assert class_names(RECORDS, ("cat", "dog", "fox", "owl")) == ["cat", "dog", "fox", "owl"]


@pytest.mark.parametrize(
    ("classes", "message"), [(["cat", "dog"], "2 names, but label 2"), ("cats", "not one name"), ([], "0 names")]
)
def test_every_label_needs_a_name(classes: list[str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        class_names(RECORDS, classes)


def test_labels_count_from_zero() -> None:
    with pytest.raises(SettingError, match="label -1"):
        class_names(made_records([0.1, 0.2], [1, 1], labels=[-1, 0]), ["cat"])


def test_classes_by_mean_prune_ratio() -> None:
    assert by_prune_ratio(RECORDS) == pytest.approx({2: 0.7, 0: 0.4})
    assert list(by_prune_ratio(RECORDS)) == [2, 0]


@pytest.mark.parametrize(("most", "kept"), [(9, [5, 4, 3, 2, 1]), (5, [5, 4, 3, 2, 1]), (3, [5, 4, 1]), (2, [5, 1])])
def test_ends(most: int, kept: list[int]) -> None:
    assert ends([5, 4, 3, 2, 1], most) == kept
