from pathlib import Path

import pytest
import torch
from images import Batches, DataError, augment, load, shuffled

from tests.folders import make_folder


def test_digits_are_split_by_class_and_apart() -> None:
    splits = load("digits", 32, seed=0)
    sizes = [len(part) for part in (splits.train, splits.held_out, splits.test)]
    assert sizes == [1077, 360, 360]
    assert splits.train.pixels.shape[1:] == (3, 32, 32)
    for part in (splits.train, splits.held_out, splits.test):
        share = torch.bincount(part.labels).double() / len(part)
        assert (share - 0.1).abs().max() < 0.01
    assert not splits.flip


@pytest.mark.parametrize("test", ["test", "val"])
def test_a_folder_is_read_at_the_asked_size(tmp_path: Path, test: str) -> None:
    splits = load(str(make_folder(tmp_path, test=test)), 16, seed=0)
    assert splits.classes == ("cat", "dog")
    assert splits.train.pixels.shape == (38, 3, 16, 16)
    assert (len(splits.held_out), len(splits.test)) == (2, 40)
    assert splits.test.pixels[splits.test.labels == 1].min() >= 40


def test_batches_are_normalised_and_in_order() -> None:
    splits = load("digits", 8, seed=0)
    batches = Batches(splits.train, splits, 100, torch.device("cpu"))
    images, labels = zip(*batches, strict=True)
    assert len(batches) == len(images) == 11
    assert torch.equal(torch.cat(labels), splits.train.labels)
    assert torch.cat(images).mean().abs() < 1e-3
    assert abs(torch.cat(images).std() - 1) < 1e-2


def test_shuffled_batches_depend_on_the_seed_alone() -> None:
    splits = load("digits", 8, seed=0)
    first, again, other = (
        torch.cat([labels for _, labels in shuffled(splits, 64, seed, torch.device("cpu"))]) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first) == 1077 // 64 * 64


def test_augment_shifts_and_mirrors_whole_images() -> None:
    image = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(200, 3, 8, 8) + 1
    out = augment(image, True, torch.Generator().manual_seed(0))
    shifts = {
        (dy, dx, flip): shifted(image[0], dy, dx, flip) for dy in (-1, 0, 1) for dx in (-1, 0, 1) for flip in (0, 1)
    }
    assert all(any(torch.equal(one, wanted) for wanted in shifts.values()) for one in out)
    assert len({one.numpy().tobytes() for one in out}) == len(shifts)


def shifted(image: torch.Tensor, dy: int, dx: int, flip: int) -> torch.Tensor:
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
    moved = padded[:, 1 + dy : 9 + dy, 1 + dx : 9 + dx]
    return moved.flip(2) if flip else moved


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected train/"):
        load(str(tmp_path), 8, seed=0)
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match="no class folders"):
        load(str(tmp_path), 8, seed=0)


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    (root / "train" / "dog" / "7.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"7\.png: not a readable image"):
        load(str(root), 8, seed=0)


def test_classes_must_agree(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    (root / "test" / "dog").rename(root / "test" / "wolf")
    with pytest.raises(DataError, match="are not those of train"):
        load(str(root), 8, seed=0)


def test_too_few_images_to_hold_some_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too few images"):
        load(str(make_folder(tmp_path, count=1)), 8, seed=0)
