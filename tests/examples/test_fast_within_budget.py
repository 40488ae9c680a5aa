"""From a trained network to a fast one, on a tiny network and few digits."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fast_within_budget
import pytest
import timm
import torch
from fast_within_budget import Job, arguments, main
from images import DataError, ImageSplits, load, normalise
from models import load_model
from run_folder import OtherRunError
from safetensors.torch import save_file
from torch import nn

from isw_plugin import InstanceWisePruner, load_pretrained
from isw_plugin.errors import SettingError

SCRIPT = Path(__file__).parents[2] / "examples" / "fast_within_budget.py"
NET = '''
from torch import nn

def make():
    """Four convolutions."""
    widths, layers = (3, 16, 16, 16, 16), []
    for before, after in zip(widths, widths[1:]):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] * (after == 16 and len(layers) in (3, 6))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))

def number():
    return 3
'''


def few(data: str, side: int, seed: int) -> ImageSplits:
    splits = load(data, side, seed)
    return dataclasses.replace(splits, train=splits.train.at(torch.arange(640)))


def options(folder: Path, *more: str) -> list[str]:
    (folder / "net.py").write_text(NET)
    words = "--data digits --size 16 --epochs 2 --peak 0.05 --macs-left 0.6 --curve 0.8 --device cpu".split()  # noqa: SIM905
    return [f"{folder / 'net.py'}:make", *words, "--out", str(folder / "run"), *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fast")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_within_budget, "load", few)
        patch.setattr(fast_within_budget, "TIMED", {1: 2, 32: 2})
        return folder, main(arguments(options(folder)))


def test_the_budget_is_met_on_images_that_nothing_was_chosen_on(finished: tuple[Path, dict[str, Any]]) -> None:
    results = finished[1]
    dense, plain, ours = results["rows"]
    assert [row["network"] for row in results["rows"]] == ["dense", "dense, fine-tuned", "ours"]
    assert (dense["macs_left"], plain["macs_left"]) == (1, 1)
    assert ours["macs_left"] == pytest.approx(0.6, abs=0.02)
    assert ours["accuracy"] > max(0.2, plain["accuracy"] - 0.1)  # two epochs of 640 images, ten classes
    assert results["curve"][0]["macs_left"] == pytest.approx(0.8, abs=0.02)
    for row in results["rows"]:
        assert row["batch_1"]["ms"] > 0
        assert row["batch_32"]["runs"] in ("dense", "accelerated")


def test_what_runs_is_chosen_on_held_out_and_timed_on_all_kinds_of_test_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = load("digits", 16, 0)
    by_class = splits.test.at(splits.test.labels.argsort(stable=True))  # as folders are
    job = Job(arguments(options(tmp_path)), dataclasses.replace(splits, test=by_class), None, torch.device("cpu"))
    places = torch.linspace(0, len(by_class) - 1, 32).long()
    assert by_class.labels[places].unique().tolist() == list(range(10))
    spread = normalise(by_class.pixels[places], splits)
    torch.testing.assert_close(fast_within_budget._images(job, "test", 32), spread)
    chosen: list[Any] = []
    timed: list[Any] = []
    gates = SimpleNamespace(model=None, save_pretrained=lambda folder: None, accelerate=chosen.append)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    attached = InstanceWisePruner(plain, torch.zeros(1, 3, 16, 16))
    attached.accelerate = lambda images, backend: chosen.append(images)  # type: ignore[method-assign]
    for name, made in {"start": None, "stored": plain, "pruner": attached}.items():
        monkeypatch.setattr(Job, name, lambda *_, made=made: made)
    job.run = SimpleNamespace(path=tmp_path)  # type: ignore[assignment]
    monkeypatch.setattr(fast_within_budget, "TIMED", {32: 1})
    monkeypatch.setattr(fast_within_budget, "gated_model", lambda job: gates)
    monkeypatch.setattr(fast_within_budget, "_row", lambda name, *_: {"network": name})
    monkeypatch.setattr(fast_within_budget, "_times", lambda fast, images, *_: timed.append(images) or [{}, {}])
    fast_within_budget.rows_of(job)
    held_out = fast_within_budget._images(job, "held_out", 32)
    torch.testing.assert_close(chosen, [held_out, held_out])
    torch.testing.assert_close(timed, [spread])


def test_table_plots_and_provenance_are_written(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, results = finished
    assert {file.name for file in (folder / "run").iterdir()} >= {"results.json", "results.txt", "accuracy.png"}
    assert "dense, fine-tuned" in (folder / "run" / "results.txt").read_text()
    assert results.keys() >= {"command", "seed", "hardware", "versions", "date", "data", "budget"}


def test_what_was_saved_comes_back_in_a_fresh_process(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); from net import make\n"
        "from isw_plugin import load_pretrained\n"
        "pruner = load_pretrained(sys.argv[2], make().eval())\n"
        "fast = pruner.accelerate(torch.rand(2, 3, 16, 16))\n"
        "print(pruner.enabled, len(pruner.per_site), len(pruner.predicted), fast(torch.rand(2, 3, 16, 16)).shape)"
    )
    command = [sys.executable, "-c", code, str(folder), str(folder / "run" / "pretrained")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.startswith("True 4")
    assert "torch.Size([2, 10])" in out


def test_a_finished_run_trains_nothing_again(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = finished
    monkeypatch.setattr(fast_within_budget, "load", few)
    monkeypatch.setattr(fast_within_budget, "TIMED", {1: 2, 32: 2})
    monkeypatch.setattr(fast_within_budget, "train", None)
    again = main(arguments(options(folder, "--curve")))
    assert [row["accuracy"] for row in again["rows"]] == [row["accuracy"] for row in results["rows"]]
    with pytest.raises(OtherRunError, match=r"macs_left: 0\.6 there, 0\.7 asked"):
        main(arguments(options(folder, "--macs-left", "0.7")))


@pytest.mark.slow  # half a minute
def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), *options(tmp_path, "--epochs", "4", "--thin", "4")]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = tmp_path / "run" / "gated.partial.safetensors"
    deadline = time.monotonic() + 120
    while not partial.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert partial.exists()
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text())["rows"][2]["macs_left"] == pytest.approx(
        0.6, abs=0.02
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--macs-left", "45"], "--macs-left 45: from 0.001 to 1"),
        (["--macs-left", "0"], "--macs-left 0"),
        (["--curve", "0.5", "2"], "--curve 2"),
        (["--distill", "1.5"], "--distill 1.5"),
        (["--epochs", "0"], "--epochs 0"),
        (["--mean", "0", "0", "0"], "--mean and --std belong together"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_made(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=message):
        main(arguments(options(tmp_path, *words)))
    assert not (tmp_path / "run").exists()


def test_models_come_from_timm_torchvision_and_files(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    assert load_model("test_resnet", None, ["a", "b"]).num_classes == 2
    assert load_model("torchvision:squeezenet1_1", None, ["a", "b"]).num_classes == 2
    assert isinstance(load_model(f"{tmp_path / 'net.py'}:make", None, ["a", "b"]), nn.Sequential)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet1999", "no model of timm or torchvision"),
        ("nowhere.py:make", r"nowhere\.py: no such file"),
        ("NET:build", "has no function 'build': .*make"),
        ("NET:number", "gave a int"),
    ],
)
def test_models_that_are_none(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    with pytest.raises(DataError, match=message):
        load_model(name.replace("NET", str(tmp_path / "net.py")), None, ["a", "b"])


def test_weights_of_as_many_classes_of_others_and_of_other_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = timm.create_model("test_resnet").eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pt")
    image = torch.randn(1, 3, 32, 32)
    for file in ("w.safetensors", "w.pt"):
        some = load_model("test_resnet", tmp_path / file, ["goose", "schipperke"]).eval()
        torch.testing.assert_close(some(image), model(image)[:, [99, 223]])
    assert "their rows are taken" in capsys.readouterr().out
    ten = timm.create_model("test_resnet", num_classes=10)
    save_file(ten.state_dict(), tmp_path / "ten.safetensors")
    anew = load_model("test_resnet", tmp_path / "ten.safetensors", ["cat", "dog"])
    torch.testing.assert_close(anew.conv1[0].weight, ten.conv1[0].weight)
    assert "fc.weight, fc.bias begin anew" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"no weights of resnet18.*"):
        load_model("resnet18", tmp_path / "ten.safetensors", ["cat", "dog"])
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"torn\.safetensors: no readable weights"):
        load_model("test_resnet", tmp_path / "torn.safetensors", ["cat", "dog"])


def test_the_saved_pruner_has_its_heads(finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = finished
    monkeypatch.syspath_prepend(str(folder))
    from net import make  # type: ignore[import-not-found]  # written by the test

    pruner = load_pretrained(folder / "run" / "pretrained", make())
    assert isinstance(pruner, InstanceWisePruner)
    assert pruner.state_dict()["budget"] == pytest.approx(0.6)
