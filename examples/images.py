"""Images for the examples: small enough to be held in memory as uint8, split once, augmented per batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F
from torchvision.datasets import CIFAR10, ImageFolder
from tqdm import tqdm

from isw_cli.errors import InputError

UNREADABLE = (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError)  # all that Pillow raises


class DataError(InputError):
    """The data set cannot be read as asked; the message names the folder or file."""


@dataclass(frozen=True)
class Images:
    """Pixels (N, 3, H, W) uint8 and labels (N,) int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, indices: Tensor) -> "Images":
        return Images(self.pixels[indices], self.labels[indices])


@dataclass(frozen=True)
class ImageSplits:
    """Train to learn, held_out to choose thresholds, test only to report.

    ``mean`` and ``std`` (3,) are the training images' in units of 1/255; ``flip`` says whether a
    mirrored image shows the same class.
    """

    name: str
    classes: tuple[str, ...]
    train: Images
    held_out: Images
    test: Images
    mean: Tensor
    std: Tensor
    flip: bool


@dataclass(frozen=True)
class Batches:
    """Normalised batches of (images, labels) in order, as evaluate and calibrate read them."""

    images: Images
    splits: ImageSplits
    size: int
    device: torch.device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.images), self.size):
            pixels = self.images.pixels[start : start + self.size]
            labels = self.images.labels[start : start + self.size]
            yield normalise(pixels.to(self.device), self.splits), labels.to(self.device)

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)


def normalise(pixels: Tensor, splits: ImageSplits) -> Tensor:
    """uint8 (N, 3, H, W) -> float32 with the training images' mean 0 and std 1, channels_last."""
    mean = splits.mean.to(pixels.device).view(1, 3, 1, 1)
    std = splits.std.to(pixels.device).view(1, 3, 1, 1)
    return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)


def shuffled(splits: ImageSplits, size: int, seed: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of augmented training batches of exactly ``size`` images; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(splits.train), generator=generator)
    for start in range(0, len(order) - size + 1, size):
        batch = splits.train.at(order[start : start + size])
        pixels = augment(batch.pixels, splits.flip, generator)
        yield normalise(pixels.to(device), splits), batch.labels.to(device)


def augment(pixels: Tensor, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift each image by up to an eighth of its side, and mirror half of them where that is allowed."""
    count, _, height, width = pixels.shape
    pad = height // 8
    padded = F.pad(pixels, (pad, pad, pad, pad))
    tops, lefts = torch.randint(0, 2 * pad + 1, (2, count), generator=generator)
    rows = tops[:, None] + torch.arange(height)
    columns = lefts[:, None] + torch.arange(width)
    if flip:
        mirrored = torch.rand(count, generator=generator) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    instance = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[instance, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def load(data: str, size: int, seed: int) -> ImageSplits:
    """Load ``digits``, ``cifar10`` or an ImageFolder with train/ and test/ or val/.

    Raises:
        DataError: No such folder, no classes, an unreadable image, or too few images to hold some out.
    """
    if data == "digits":
        images, classes = _digits(size)
        train, test = _split(images, 0.2, seed)
        train, held_out = _split(train, 0.25, seed)
        return _splits("digits", classes, train, held_out, test, flip=False)
    if data == "cifar10":
        train, test, classes = _cifar10(size)
    else:
        train, test, classes = _folder(Path(data), size)
    train, held_out = _split(train, 0.05, seed)
    name = data if data == "cifar10" else f"folder {Path(data).resolve().name}"
    return _splits(name, classes, train, held_out, test, flip=True)


def _splits(
    name: str, classes: tuple[str, ...], train: Images, held_out: Images, test: Images, *, flip: bool
) -> ImageSplits:
    sample = train.pixels[:5000].float()
    return ImageSplits(
        name, classes, train, held_out, test, sample.mean((0, 2, 3)), sample.std((0, 2, 3)).clamp_min(1), flip
    )


def _split(images: Images, share: float, seed: int) -> tuple[Images, Images]:
    try:
        rest, taken = train_test_split(
            np.arange(len(images)), test_size=share, random_state=seed, stratify=images.labels.numpy()
        )
    except ValueError as error:
        raise DataError(f"too few images to hold {share:.0%} out of {len(images)}, class by class: {error}") from error
    return images.at(torch.from_numpy(rest)), images.at(torch.from_numpy(taken))


def _digits(size: int) -> tuple[Images, tuple[str, ...]]:
    pixels, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) * (255 / 16)
    large = F.interpolate(small, (size, size), mode="bilinear", align_corners=False)
    rgb = large.round().byte().expand(-1, 3, -1, -1).contiguous()
    return Images(rgb, torch.from_numpy(labels).long()), tuple("0123456789")


def _cifar10(size: int) -> tuple[Images, Images, tuple[str, ...]]:
    if size != 32:
        raise DataError(f"CIFAR-10 has 32x32 images: --size {size} is for a folder of images")
    root = Path(torch.hub.get_dir()) / "datasets"
    try:
        parts = [CIFAR10(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"CIFAR-10 could not be downloaded to {root} ({error}): give a folder of images with --data"
        ) from error
    train, test = (
        Images(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    )
    return train, test, tuple(parts[0].classes)


def _folder(root: Path, size: int) -> tuple[Images, Images, tuple[str, ...]]:
    test_root = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test_root is None:
        raise DataError(f"{root}: expected train/ and test/ (or val/) in it, one folder a class in each")
    train, classes = read_folder(root / "train", size)
    test, test_classes = read_folder(test_root, size)
    if classes != test_classes:
        raise DataError(f"{test_root}: classes {list(test_classes)[:5]} are not those of train {list(classes)[:5]}")
    return train, test, classes


def read_folder(root: Path, size: int) -> tuple[Images, tuple[str, ...]]:
    """Read an ImageFolder at size x size pixels (short side scaled, centre cropped).

    Raises:
        DataError: No class folders, or an image that cannot be read; the message names it.
    """
    try:
        folder = ImageFolder(str(root))
    except FileNotFoundError as error:
        raise DataError(f"{root}: no class folders with images in it ({error})") from error
    pixels = torch.empty(len(folder.samples), 3, size, size, dtype=torch.uint8)
    for index, (path, _) in enumerate(tqdm(folder.samples, f"reading {root.name}", leave=False, unit="image")):
        pixels[index] = _read(path, size)
    return Images(pixels, torch.tensor(folder.targets)), tuple(folder.classes)


def _read(path: str, size: int) -> Tensor:
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except UNREADABLE as error:
        raise DataError(f"{path}: not a readable image ({error})") from error
    if image.size != (size, size):
        scale = size / min(image.size)
        wide, high = (max(size, round(side * scale)) for side in image.size)
        left, top = (wide - size) // 2, (high - size) // 2
        image = image.resize((wide, high), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
