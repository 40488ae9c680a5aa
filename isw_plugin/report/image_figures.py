"""What gates do with every image: easy and hard ones, and classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isw_plugin.errors import SettingError
from isw_plugin.measure import Records
from isw_plugin.report.canvas import Figure, blank, draw_spreads, plain, save
from isw_plugin.report.classes import by_prune_ratio, class_names, ends
from isw_plugin.report.difficulty import easy_to_hard
from isw_plugin.report.pixels import pixels
from isw_plugin.report.spread import spread

__all__ = ["accuracy_curve", "class_ratios", "extreme_images", "extremes", "require_fitting"]


def accuracy_curve(records: Records, path: Path, caption: str = "", *, window: int | None = None) -> Figure:
    """Draw accuracy from the images that drop most channels to those that drop least (Figure 4).

    Args:
        records: Of ``evaluate(..., records=True)`` with gates on.
        path: Image file to write; its ending chooses the format.
        caption: What was measured, where.
        window: Images a point, as in ``easy_to_hard``, which has the numbers.
    """
    curve = easy_to_hard(records, window)
    count, half = len(curve.order), (len(curve.order) + 1) / 2
    figure, (axes, below) = blank(7, 5, rows=2, sharex=True, height_ratios=[3, 1])
    middles = [min(start + curve.window, count) / 2 + start / 2 for start in range(0, count, curve.window)]
    axes.plot(middles, 100 * curve.windows, "o-", markersize=3, linewidth=1, label=f"every {curve.window} images")
    settled = slice(curve.window - 1, None)  # before, a mean of a few images
    axes.plot(range(curve.window, count + 1), 100 * curve.cumulative[settled], color="C2", label="all up to here")
    axes.axhline(100 * curve.accuracy, color="C3", linestyle="--", linewidth=1, label="all images")
    axes.hlines(100 * curve.easier, 0, half, color="black", linewidth=2, label="halves")
    axes.hlines(100 * curve.harder, count - half, count, color="black", linewidth=2)
    axes.set_title(
        f"Half that drops most: {curve.easier:.2%}, half that drops least: {curve.harder:.2%}; "
        f"{100 * (curve.easier - curve.harder):+.2f} points (standard error {100 * curve.error:.2f})",
        fontsize=9,
    )
    axes.set_ylabel("accuracy (% of images)")
    below.plot(range(1, count + 1), 100 * records.prune_ratio[curve.order])
    below.set_ylabel("channels\ndropped (%)")
    below.set_xlabel("images (count), from those that drop most channels to those that drop least")
    for each in (axes, below):
        each.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return save(figure, path, caption)


def extremes(records: Records, count: int = 10) -> tuple[list[int], list[int]]:
    """Indices of the images that drop most channels and of those that drop least, the extreme ones first.

    Args:
        count: Of each, at most half of all images (one at least).

    Raises:
        SettingError: ``count`` is under 1.
    """
    if count < 1:
        raise SettingError(f"count={count}: at least 1 image")
    order = easy_to_hard(records).order.tolist()
    shown = max(1, min(count, len(order) // 2))
    return order[:shown], order[: -shown - 1 : -1]


def require_fitting(images: Sequence[Any], count: int) -> None:
    """Raise SettingError unless there is an image for each of ``count`` records."""
    if not hasattr(images, "__len__") or not hasattr(images, "__getitem__"):
        raise SettingError(f"images is a {type(images).__name__}: it needs a length, and images by index")
    if len(images) != count:
        raise SettingError(
            f"{len(images)} images for {count} records: give the images of evaluate's loader, in its order"
        )


def extreme_images(
    records: Records,
    images: Sequence[Any],
    path: Path,
    caption: str = "",
    *,
    classes: Sequence[str] | None = None,
    count: int = 10,
) -> Figure:
    """Show the images that drop most channels and those that drop least (Figures 1 and 5).

    Args:
        records: Of ``evaluate(..., records=True)`` with gates on.
        images: In the order of the records: a tensor or array (N, 3, H, W) or (N, H, W, 3), uint8 or float, or a
            data set whose items are images or tuples that start with one.
        path: Image file to write.
        caption: What was measured, where.
        classes: Names, by label.
        count: Images of either kind.

    Raises:
        SettingError: ``images`` and the records differ in length or, where items are tuples, in a label; a label
            has no name.
    """
    require_fitting(images, len(records.labels))
    names = class_names(records, classes)
    rows = extremes(records, count)
    figure, axes = blank(1 + 1.05 * len(rows[0]), 3.1, rows=2, columns=len(rows[0]), squeeze=False)
    for line, row, title in zip(axes, rows, ("drop most", "drop least"), strict=True):
        line[0].set_ylabel(title)
        for place, index in zip(line, row, strict=True):
            place.imshow(_image(images, index, records), interpolation="nearest")
            _annotate(place, names[int(records.labels[index])], records, index)
    return save(figure, path, caption)


def class_ratios(records: Records, classes: Sequence[str], path: Path, caption: str = "", *, most: int = 30) -> Figure:
    """Draw the share of channels dropped, class by class, with its spread over the images of the class.

    Args:
        records: Of ``evaluate(..., records=True)`` with gates on.
        classes: Names, by label.
        path: Image file to write.
        caption: What was measured, where.
        most: Of more classes than this, those that drop most and those that drop least are drawn.
    """
    labels = ends(list(by_prune_ratio(records)), most)
    figure, axes = blank(7, 1.4 + 0.2 * len(labels))
    spreads = [spread(records.prune_ratio[records.labels == label]) for label in labels]
    draw_spreads(axes, [classes[label] for label in labels], spreads, 100)
    mean = 100 * records.prune_ratio.mean().item()
    axes.axvline(mean, color="C3", linestyle="--", linewidth=1, label=f"all images, {mean:.1f}%")
    axes.set_xlabel("channels dropped (%)")
    figure.legend(loc="outside upper center", ncols=5, fontsize=7)
    return save(figure, path, caption)


def _image(images: Sequence[Any], index: int, records: Records) -> Any:
    item, label = images[index], int(records.labels[index])
    if isinstance(item, tuple | list) and len(item) > 1 and int(item[1]) != label:
        raise SettingError(
            f"images[{index}] has label {int(item[1])}, the record {label}: give the images in the order of evaluate's "
            "loader, which must not shuffle"
        )
    return pixels(item)


def _annotate(axes: Any, name: str, records: Records, index: int) -> None:
    """Class and share dropped above an image; framed red where the model is wrong."""
    dropped = 100 * records.prune_ratio[index].item()
    short = name if len(name) <= 16 else f"{name[:15]}…"
    axes.set_title(f"{plain(short)}\n{dropped:.1f}%", fontsize=7)
    axes.set(xticks=[], yticks=[])
    wrong = records.scores[index].item() < 0.5
    axes.spines[:].set(color="C3" if wrong else "0.7", linewidth=2.5 if wrong else 0.8)
