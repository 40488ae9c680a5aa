"""What a user names on the command line; imports nothing that computes."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Request"]


@dataclass(frozen=True)
class Request:
    """A model, and images for it.

    Attributes:
        model: A timm name, a saved folder, or file.py:function.
        architecture: file.py:function, for a saved folder of a model that timm does not make.
        size: Side of the images in pixels; None: as the model declares.
        batch, limit: Images in a batch, and of each part at most.
        pretrained: Whether timm downloads weights.
        weights: A file of them.
    """

    model: str
    data: Path = Path()
    architecture: str | None = None
    size: int | None = None
    batch: int = 16
    limit: int = 1000
    pretrained: bool = False
    weights: Path | None = None
