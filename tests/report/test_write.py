"""The page of a made report, and of a real model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from isw_plugin import InstanceWisePruner, evaluate
from isw_plugin.calibrate import Calibration, Candidate
from isw_plugin.errors import SettingError
from isw_plugin.measure import LatencyPoint
from isw_plugin.report import write
from isw_plugin.report.canvas import Figure
from tests.report.material import LATENCY, made_records, made_report
from tests.report.test_page import Reader

IMAGES = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 8, 8)
RECORDS = made_records([0.2, 0.4, 0.6, 0.8], [1, 1, 0, 1], labels=[0, 0, 1, 1])
REPORT = made_report(RECORDS)
BEST = Candidate({"alpha": 0.5, "beta": 0.5}, 0.9, 0.2, 80, 0.2, 0)
FIGURES = {
    "frontier.png",
    "keep_per_site.png",
    "cv_per_site.png",
    "heatmap.png",
    "easy_to_hard.png",
    "easiest_hardest.png",
    "classes.png",
    "latency.png",
}
SECTIONS = ["frontier", "keep-ratio", "cv", "channels", "easy-to-hard", "images", "classes", "latency"]
EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all that it can have, full of tags that must not become any."""
    out = tmp_path_factory.mktemp("report") / "new" / "folder"
    return write(
        REPORT,
        out,
        classes=[EVIL, "$dog$"],
        calibration=Calibration(BEST, (BEST,), 0.91, 500),
        images=IMAGES,
        latencies=[LatencyPoint(1.0, "dense", LATENCY), LatencyPoint(0.5, "accelerated", LATENCY)],
        title=f"Title {EVIL}",
        caption=f"Model {EVIL}",
    )


def test_page_and_figures_are_written_and_nothing_else(whole: Path) -> None:
    assert whole.name == "index.html"
    assert {file.name for file in whole.parent.iterdir()} == {*FIGURES, "index.html"}
    assert all((whole.parent / name).read_bytes().startswith(b"\x89PNG") for name in FIGURES)


def test_every_figure_is_embedded_and_has_words(whole: Path) -> None:
    page = Reader(whole.read_text())
    assert page.open == []
    assert len(page.of("img")) == len(FIGURES)
    assert all((picture["src"] or "").startswith("data:image/png;base64,iVBOR") for picture in page.of("img"))
    assert all(len(picture["alt"] or "") > 20 for picture in page.of("img"))
    assert [section["id"] for section in page.of("section")] == SECTIONS
    assert len(page.of("table")) == len(SECTIONS)


def test_every_figure_says_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions: list[str] = []
    monkeypatch.setattr(Figure, "supxlabel", lambda figure, text, **how: captions.append(text))
    calibration, latencies = Calibration(BEST, (BEST,), 0.91, 500), [LatencyPoint(1.0, "dense", LATENCY)]
    page = write(REPORT, tmp_path, calibration=calibration, images=IMAGES, latencies=latencies, caption="A model")
    assert len(captions) == len(FIGURES)
    assert all("A model" in caption for caption in captions)
    assert sum("4 images; Some CPU" in caption for caption in captions) == len(FIGURES) - 1
    assert sum("500 held-out images" in caption for caption in captions) == 1
    assert len(Reader(page.read_text()).of("figcaption")) == len(FIGURES)


def test_names_stay_text(whole: Path) -> None:
    page = Reader(whole.read_text())
    assert page.of("script") == []
    assert f"Title {EVIL}" in page.text
    assert f"Model {EVIL}" in page.text


def test_the_page_says_what_was_measured_where(whole: Path) -> None:
    text = Reader(whole.read_text()).text
    for words in ("75.00%", "50.0%", "2.000 ms (1.500 to 2.500)", "3 batches of 4; Some CPU, CPU threads: 2", "masked"):
        assert words in text
    assert "50.00 points less accurate" in text  # the easier half has one of two right, the harder both
    assert "500 held-out images" in text


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (
            [1] * 20 + [0] * 20,
            "100.00 points less accurate than the half that drops least (standard error 0.00): harder",
        ),
        (
            [0] * 20 + [1] * 20,
            "100.00 points more accurate than the half that drops least (standard error 0.00): easier",
        ),
        ([0, 1] * 20, "0.00 points more accurate than the half that drops least"),
    ],
)
def test_the_caption_follows_the_figures(tmp_path: Path, scores: list[float], words: str) -> None:
    records = made_records([n / 40 for n in range(40)], scores, labels=[0, 1] * 20)
    text = Reader(write(made_report(records), tmp_path).read_text()).text
    assert words in text
    assert "easier half" not in text


def test_cards_tell_gates_off_thresholds_and_speed(tmp_path: Path) -> None:
    calibration = Calibration(BEST, (BEST,), 0.91, 500)
    off = replace(REPORT, execution="dense", accuracy=0.875, records=None)
    page = Reader(write(REPORT, tmp_path, off=off, calibration=calibration, speed="1.50 times as fast").read_text())
    for words in ("Accuracy, gates off", "87.50%", "alpha=0.5, beta=0.5", "1.50 times as fast"):
        assert words in page.text
    with pytest.raises(SettingError, match=r"off is masked, of 4 images: .* with gates off"):
        write(REPORT, tmp_path, off=REPORT)


def test_what_is_not_given_is_left_out_with_a_sentence(tmp_path: Path) -> None:
    page = Reader(write(REPORT, tmp_path).read_text())
    assert {file.name for file in tmp_path.iterdir()} == {
        *FIGURES - {"frontier.png", "easiest_hardest.png", "latency.png"},
        "index.html",
    }
    assert [section["id"] for section in page.of("section")] == SECTIONS
    for argument in ("calibration=", "images=", "latencies="):
        assert argument in page.text


def test_records_are_needed(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"evaluate\(\.\.\., records=True\)"):
        write(replace(REPORT, records=None), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gates_must_have_acted(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    report = evaluate(model, [(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))], records=True)
    with pytest.raises(SettingError, match=r"no gate acted \(dense\).*pruner\.step"):
        write(report, tmp_path / "out")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"classes": ["only one"]}, "1 names, but label 1"),
        ({"images": IMAGES[:3]}, "3 images for 4 records"),
        ({"images": iter(IMAGES)}, "needs a length"),
        ({"images": IMAGES[:, :2]}, "expected"),
    ],
)
def test_what_does_not_fit_leaves_an_earlier_page_as_it_was(
    tmp_path: Path, wrong: dict[str, object], message: str
) -> None:
    for name in ("index.html", "heatmap.png"):
        (tmp_path / name).write_text("earlier")
    with pytest.raises(SettingError, match=message):
        write(REPORT, tmp_path, **wrong)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "index.html": "earlier",
        "heatmap.png": "earlier",
    }


def test_a_real_model_from_start_to_page(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3)
    )
    pruner = InstanceWisePruner(model, torch.zeros(1, 3, 8, 8), alpha=0.0, beta=1.0)
    pruner.step()
    images, labels = torch.randn(12, 3, 8, 8), torch.arange(12) % 3
    batches = [(images[:6], labels[:6]), (images[6:], labels[6:])]
    page = Reader(write(evaluate(model, batches, records=True), tmp_path, images=images).read_text())
    assert page.open == []
    assert len(page.of("img")) == 6
