"""--data on the command line: a folder with a folder of images for every class, or with splits of such folders."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from isw_cli.errors import InputError

__all__ = ["Images", "Preparation", "images_in", "keep_preparation", "preparation"]

_ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as timm's models mostly want it
_FILE = "images.json"
_CROPS = ("center", "squash", "border")
_SPLITS = {"held out": ("val", "valid", "validation"), "test": ("test",)}


@dataclass(frozen=True)
class Preparation:
    """From a picture to what a model reads (C, size, size), by timm's steps.

    Attributes:
        crop_pct: Share of the scaled picture's side that is cut out.
        interpolation, crop_mode: As timm names them.
        classes: Of the images that the model was gated on, by label; None: not known.
    """

    size: int
    channels: int
    mean: Sequence[float]
    std: Sequence[float]
    crop_pct: float = 1.0
    interpolation: str = "bilinear"
    crop_mode: str = "center"
    classes: Sequence[str] | None = None

    def __call__(self, picture: Image.Image) -> Tensor:
        tensor: Tensor = self._steps(picture.convert("L" if self.channels == 1 else "RGB"))
        return tensor

    @cached_property
    def _steps(self) -> Any:
        given = asdict(self)
        side, channels, _ = given.pop("size"), given.pop("channels"), given.pop("classes")
        return create_transform((channels, side, side), **given)


def preparation(model: nn.Module, size: int | None, folder: Path | None = None) -> Preparation:
    """As `isw gate` wrote beside a model, else as a timm model declares it, else ImageNet's figures at 224 pixels.

    Args:
        size: Overrides.
        folder: Of the model, where it has one.
    """
    if folder is not None and (folder / _FILE).is_file():
        found = _stored(folder / _FILE)
        return found if size is None else replace(found, size=size)
    if not getattr(model, "pretrained_cfg", None):
        return Preparation(size or 224, 3, _MEAN, _STD)
    declared = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    channels, _, side = declared.pop("input_size")
    mean, std = (tuple(declared.pop(name))[:channels] for name in ("mean", "std"))
    picked = {name: declared[name] for name in ("crop_pct", "interpolation", "crop_mode")}
    return Preparation(size or side, channels, mean, std, **picked)


def keep_preparation(folder: Path, images: "Images") -> None:
    """For who loads the model from this folder: how images are prepared, and what its outputs stand for."""
    (folder / _FILE).write_text(json.dumps(asdict(replace(images.prepare, classes=images.classes))))


def _stored(file: Path) -> Preparation:
    try:
        found = Preparation(**json.loads(file.read_text()))
        fits = 0 < found.size <= 4096 and found.channels == len(found.mean) == len(found.std) and 0 not in found.std
        fits = fits and 0.1 <= found.crop_pct <= 1 and found.crop_mode in _CROPS and found._steps is not None
    except (ValueError, TypeError, KeyError):
        fits = False
    if not fits:
        raise InputError(f"{file} is damaged: write the folder anew with isw gate, or delete this file and pass --size")
    return found


@dataclass(frozen=True)
class Images:
    """Files and labels, read in batches; every pass gives the same order."""

    files: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    prepare: Preparation
    batch: int

    def __len__(self) -> int:
        """Batches."""
        return -(-len(self.files) // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.files), self.batch):
            part = slice(start, start + self.batch)
            yield torch.stack([self.read(file) for file in self.files[part]]), torch.tensor(self.labels[part])

    def read(self, file: Path) -> Tensor:
        try:
            with Image.open(file) as picture:
                return self.prepare(picture)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"{file} cannot be read as an image ({error}): mend it or remove it") from error

    def halves(self) -> tuple["Images", "Images"]:
        """Every second image, and the others."""
        return self._of(slice(0, None, 2)), self._of(slice(1, None, 2))

    def _of(self, part: slice) -> "Images":
        return Images(self.files[part], self.labels[part], self.classes, self.prepare, self.batch)


def images_in(folder: Path, prepare: Preparation, batch: int, limit: int) -> tuple[Images, Images]:
    """Images to choose thresholds on, and others to report on: the splits val and test, or halves of what is there.

    Args:
        limit: Images of each at most, drawn with a fixed seed.

    Raises:
        InputError: No such folder, no classes in it, or too few images.
    """
    if not folder.is_dir():
        raise InputError(f"--data {folder} is no folder: name one that holds a folder of images for every class")
    splits = {part: [folder / name for name in names if (folder / name).is_dir()] for part, names in _SPLITS.items()}
    given = [found[0] for found in splits.values() if found]
    if len(given) == 2:
        first, second = (_read(place, prepare, batch, limit) for place in given)
        if first.classes != second.classes:
            raise InputError(f"{given[0]} and {given[1]} hold folders of different classes: they need the same")
        return first, second
    return _read(given[0] if given else folder, prepare, batch, 2 * limit).halves()


def _read(folder: Path, prepare: Preparation, batch: int, limit: int) -> Images:
    classes = sorted(place.name for place in folder.iterdir() if place.is_dir() and not place.name.startswith("."))
    pairs = [(file, label) for label, name in enumerate(classes) for file in _files(folder / name)]
    if not pairs:
        loose = " (there are images, but not in folders)" if _files(folder) else ""
        raise InputError(
            f"{folder} holds no folder with images{loose}: expected one folder a class, as {folder}/cat/1.jpg"
        )
    if len(pairs) < 4:
        raise InputError(
            f"{folder} holds {len(pairs)} images: at least 4 are needed, two to choose on and two to report on"
        )
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:limit].tolist()
    files, labels = zip(*(pairs[place] for place in order), strict=True)
    return Images(files, labels, tuple(classes), prepare, batch)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in _ENDINGS)
