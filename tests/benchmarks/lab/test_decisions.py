from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.lab import decisions


@given(count=st.integers(1, 20), channels=st.lists(st.integers(1, 30), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_what_is_saved_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, count: int, channels: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    keep = {
        f"features.{9 - index}": torch.rand(count, width, generator=generator) < 0.5
        for index, width in enumerate(channels)
    }
    path = tmp_path_factory.mktemp("decisions") / "deep" / "vgg16.npz"
    decisions.save(path, keep, alpha=0.5, images=[1, 2])
    loaded, facts = decisions.load(path)
    assert list(loaded) == list(keep)
    assert all(loaded[name].dtype == torch.bool and torch.equal(loaded[name], keep[name]) for name in keep)
    assert facts == {"alpha": 0.5, "images": [1, 2]}


def test_mobilenetv2_of_256_images_stays_small(tmp_path: Path) -> None:
    torch.manual_seed(0)
    often = torch.rand(17056).pow(8)  # most channels are decided alike for nearly all images
    path = tmp_path / "mobilenetv2.npz"
    decisions.save(path, {"all": torch.rand(256, 17056) < often})
    assert path.stat().st_size < 300_000 < 256 * 17056 / 8


@pytest.mark.parametrize(
    "keep",
    [
        {},
        {"conv": torch.ones(2, 3)},
        {"conv": torch.ones(2, dtype=torch.bool)},
        {"a": torch.ones(2, 3, dtype=torch.bool), "b": torch.ones(3, 3, dtype=torch.bool)},
    ],
)
def test_other_masks_are_refused(tmp_path: Path, keep: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"bool \(N, C\) of one N"):
        decisions.save(tmp_path / "x.npz", keep)
    assert not list(tmp_path.iterdir())
