"""What gates do at every site: channels kept, CV, and which channels which class drops."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from isw_plugin.measure import Records
from isw_plugin.report.canvas import Figure, blank, draw_spreads, plain, save
from isw_plugin.report.classes import by_prune_ratio, ends
from isw_plugin.report.spread import keep_ratio, spread

__all__ = ["channel_heatmap", "cv_per_site", "keep_per_site"]


def keep_per_site(records: Records, path: Path, caption: str = "") -> Figure:
    """Draw the share of channels that images keep, site by site, with its spread over images.

    Args:
        records: Of ``evaluate(..., records=True)`` with gates on.
        path: Image file to write; its ending chooses the format.
        caption: What was measured, where.
    """
    figure, axes = blank(7, 1.4 + 0.2 * len(records.keep))
    draw_spreads(axes, list(records.keep), [spread(keep_ratio(keep)) for keep in records.keep.values()], 100)
    axes.set_xlim(0, 102)
    axes.set_xlabel("channels kept (%)")
    figure.legend(loc="outside upper center", ncols=4, fontsize=7)
    return save(figure, path, caption)


def cv_per_site(records: Records, path: Path, caption: str = "", *, alpha: float | None = None) -> Figure:
    """Draw the coefficient of variation of the channel norms (Eq. 6), site by site, with its spread over images.

    Args:
        alpha: Draws a line: images right of it are pruned at a site.
    """
    figure, axes = blank(7, 1.4 + 0.2 * len(records.cv))
    draw_spreads(axes, list(records.cv), [spread(cv) for cv in records.cv.values()])
    if alpha is not None:
        axes.axvline(alpha, color="C3", linestyle="--", linewidth=1, label=f"alpha {alpha:g}")
    axes.set_xlabel("CV of channel norms (standard deviation / mean)")
    figure.legend(loc="outside upper center", ncols=5, fontsize=7)
    return save(figure, path, caption)


def channel_heatmap(
    records: Records, classes: Sequence[str], path: Path, caption: str = "", *, most: int = 20
) -> Figure:
    """Draw which channels each class drops (Figure 3): a band a site, a row a class, a column a channel.

    Args:
        records: Of ``evaluate(..., records=True)`` with gates on.
        classes: Names, by label.
        path: Image file to write.
        caption: What was measured, where.
        most: Of more classes than this, those that drop most and those that drop least are drawn.
    """
    labels = list(range(len(classes)))
    if len(labels) > most:
        labels = ends(list(by_prune_ratio(records)), most)
    bands = [_dropped_by_class(records, name, labels) for name in records.keep]
    width = max(band.shape[1] for band in bands)
    rows = np.concatenate(
        [np.pad(band, ((0, 1), (0, width - band.shape[1])), constant_values=np.nan) for band in bands]
    )
    figure, axes = blank(min(24, max(9, width / 100)), 1.5 + 0.035 * len(rows))
    image = axes.imshow(rows, aspect="auto", interpolation="nearest", vmin=0, vmax=1, cmap="viridis")
    middles = [index * (len(labels) + 1) + (len(labels) - 1) / 2 for index in range(len(bands))]
    axes.set_yticks(middles, [plain(name) for name in records.keep])
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("channel (index)")
    axes.set_ylabel("site")
    named = ", ".join(plain(classes[label]) for label in labels)
    axes.set_title(textwrap.fill(f"Share of images that drop the channel; rows of a site: {named}", 110), fontsize=8)
    figure.colorbar(image, ax=axes, label="share of images that drop it")
    return save(figure, path, caption)


def _dropped_by_class(records: Records, site: str, labels: Sequence[int]) -> Any:
    dropped = (~records.keep[site]).double().numpy()
    found = records.labels.numpy()
    nothing = np.full(dropped.shape[1], np.nan)
    return np.stack([dropped[found == label].mean(0) if (found == label).any() else nothing for label in labels])
