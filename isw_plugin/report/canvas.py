"""A figure with its caption, in a file. The one module that knows matplotlib."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isw_plugin.errors import MissingExtraError
from isw_plugin.report.spread import Spread

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingExtraError(
        f"isw_plugin.report needs matplotlib ({error}): pip install 'isw_plugin[report]'", name=error.name
    ) from error

__all__ = ["Figure", "blank", "draw_spreads", "plain", "save"]

_LETTERS_PER_INCH = 17  # of the caption's type
_LONGEST = 40  # letters of a name beside an axis


def blank(width: float, height: float, rows: int = 1, columns: int = 1, **layout: Any) -> tuple[Figure, Any]:
    """A figure of ``width`` x ``height`` inches and its axes; belongs to no window and no global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **layout)


def plain(text: str) -> str:
    """A name as it is to be read: dollar signs are no formulas, and what is too long loses its middle."""
    half = _LONGEST // 2
    short = text if len(text) <= _LONGEST else f"{text[: half - 1]}…{text[-half:]}"
    return short.replace("$", r"\$")


def save(figure: Figure, path: Path, caption: str) -> Figure:
    """Write a figure, its caption below it; the path's ending chooses the format."""
    lines = textwrap.fill(caption, round(_LETTERS_PER_INCH * figure.get_figwidth()))
    figure.supxlabel(lines.replace("$", r"\$"), fontsize=7)
    figure.savefig(path, dpi=150)
    return figure


def draw_spreads(axes: Any, names: Sequence[str], spreads: Sequence[Spread], scale: float = 1.0) -> None:
    """A row a name, the first on top: bar to the mean, box from quartile to quartile, whisker over 90 % of images."""
    rows = range(len(spreads))
    mean, low, first, median, third, high = (
        [scale * getattr(of, name) for of in spreads] for name in ("mean", "low", "first", "median", "third", "high")
    )
    axes.barh(rows, mean, height=0.8, color="C0", alpha=0.25, label="mean")
    axes.hlines(rows, low, high, color="C0", linewidth=1, label="90 % of images")
    axes.hlines(rows, first, third, color="C0", linewidth=4, label="half of them")
    axes.plot(median, rows, linestyle="", marker="|", color="black", label="median")
    axes.set_yticks(rows, [plain(name) for name in names], fontsize=7)
    axes.set_ylim(len(spreads) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.3)
