import importlib
import sys
from pathlib import Path

import pytest
import torch

from isw_plugin.errors import MissingExtraError
from isw_plugin.report.canvas import blank, draw_spreads, plain, save
from isw_plugin.report.spread import spread


def test_names_are_shown_letter_by_letter(tmp_path: Path) -> None:
    figure, axes = blank(3, 2)
    axes.set_title(plain(r"$\nonsense$ and $"))
    save(figure, tmp_path / "f.png", r"$\more$")  # raises where it is taken for a formula
    assert (tmp_path / "f.png").exists()


def test_long_names_lose_their_middle() -> None:
    assert plain("a" * 40) == "a" * 40
    assert plain("a" * 30 + "b" * 30) == "a" * 19 + "…" + "b" * 20


def test_long_captions_are_wrapped(tmp_path: Path) -> None:
    figure, _ = blank(2, 2)
    save(figure, tmp_path / "f.png", "word " * 40)
    assert max(len(line) for line in figure.get_supxlabel().splitlines()) <= 34


def test_spreads_are_drawn_from_top_to_bottom() -> None:
    _, axes = blank(3, 2)
    draw_spreads(axes, ["low", "high"], [spread(torch.arange(101)), spread(torch.arange(100, 201))], scale=2)
    assert [bar.get_width() for bar in axes.patches] == [100, 300]
    thin, thick = ([part[:, 0].tolist() for part in lines.get_segments()] for lines in axes.collections)
    assert thin == [pytest.approx([10, 190]), pytest.approx([210, 390])]
    assert thick == [pytest.approx([50, 150]), pytest.approx([250, 350])]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["low", "high"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == "matplotlib" or name.startswith("isw_plugin.report"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'isw_plugin\[report\]'"):
        importlib.import_module("isw_plugin.report")
