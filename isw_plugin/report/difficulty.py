"""How right a model is from easy to hard images (Figure 4), where easy is what drops many channels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from isw_plugin.errors import SettingError
from isw_plugin.measure import Records

__all__ = ["EasyToHard", "easy_to_hard"]


@dataclass(frozen=True)
class EasyToHard:
    """Accuracy from the image that drops most channels to the one that drops least.

    Images that drop equally many have no order: each counts with the mean score of all of them, which is what every
    number here would be on average over their orders.

    Attributes:
        order: (N,) indices into the records, easiest first; the loader's order among equals.
        scores: (N,) in that order, equals averaged.
        window: Images a window.
        windows: (ceil(N / window),) mean score of each window of neighbours; the last may hold fewer.
        cumulative: (N,) mean score of the easiest 1, 2, ... N images.
        easier, harder: Mean score of the half that drops most, and of the half that drops least; of an odd number
            of images the middle one is in both.
        error: Standard error of ``easier - harder``.
    """

    order: Tensor
    scores: Tensor
    window: int
    windows: Tensor
    cumulative: Tensor
    easier: float
    harder: float
    error: float

    @property
    def accuracy(self) -> float:
        """Mean score of all images."""
        return self.scores.mean().item()


def easy_to_hard(records: Records, window: int | None = None) -> EasyToHard:
    """Put images in order of the share of channels that they drop.

    Args:
        records: Of ``evaluate(..., records=True)`` with gates on.
        window: Images a window; None: 100 as in the paper, a tenth of the images where they are under 1,000.

    Raises:
        SettingError: ``window`` is under 1, or there is no image.
    """
    count = len(records.prune_ratio)
    if not count:
        raise SettingError("the records hold no image")
    size = max(1, min(100, count // 10)) if window is None else window
    if size < 1:
        raise SettingError(f"window={window}: at least 1 image")
    order = records.prune_ratio.argsort(descending=True, stable=True)
    scores = _shared(records.prune_ratio, records.scores)[order]
    half = -(-count // 2)
    raw = records.scores.double()[order]
    return EasyToHard(
        order=order,
        scores=scores,
        window=size,
        windows=torch.stack([part.mean() for part in torch.split(scores, size)]),
        cumulative=scores.cumsum(0) / torch.arange(1, count + 1),
        easier=scores[:half].mean().item(),
        harder=scores[-half:].mean().item(),
        error=((raw[:half].var(correction=0) + raw[-half:].var(correction=0)) / half).sqrt().item(),
    )


def _shared(ratios: Tensor, scores: Tensor) -> Tensor:
    """Each image's score, averaged over the images of equal ratio; (N,) float64."""
    group: Tensor = torch.unique(ratios, return_inverse=True)[1]
    sums = torch.zeros(int(group.max()) + 1, dtype=torch.float64).index_add_(0, group, scores.double())
    return (sums / group.bincount())[group]
