"""Folders of images, for the tests of what reads them."""

from pathlib import Path

import numpy as np
from PIL import Image


def make_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 20, test: str = "test") -> Path:
    """Images of one grey level a class."""
    for part in ("train", test):
        for level, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                grey = np.full((24, 40, 3), 40 * level + 5 * (index % 4), dtype=np.uint8)
                Image.fromarray(grey).save(root / part / name / f"{index}.png")
    return root
