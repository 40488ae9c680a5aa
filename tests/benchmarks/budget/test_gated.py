"""Fine-tuning with gates on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.budget import gated
from benchmarks.lab.images import ImageSplits
from benchmarks.lab.images import load as load_images
from benchmarks.lab.networks import build
from benchmarks.lab.run_folder import OtherRunError, RunFolder
from isw_plugin import InstanceWisePruner, calibrate
from isw_plugin.calibrate import Calibration


def few(data: str, side: int, seed: int) -> ImageSplits:
    splits = load_images(data, side, seed)
    return dataclasses.replace(splits, train=splits.train.at(torch.arange(64)))


def store(folder: Path, network: str) -> Path:
    recipe = {"network": network, "width": 0.125, "seed": 0}
    RunFolder(folder, recipe).save("trained", dict(build(network, 10, 0.125, 0).state_dict()), origin="random")
    return folder / "trained.safetensors"


def run(model: Path, out: Path, *aim: str) -> dict[str, Any]:
    options = ["--data", "digits", "--epochs", "1", "--batch", "16", "--images", "20", "--thin", "18"]
    more = ["--precision", "float32", "--out", str(out)]
    return gated.main(gated.arguments([str(model), *options, *aim, *more]))


Asked = list[tuple[dict[str, Any], float | None]]


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Few images and candidates; what differed at single sites when thresholds were chosen, and for how many MACs."""
    calls: Asked = []

    def choose(pruner: InstanceWisePruner, *args: Any, **kwargs: Any) -> Calibration:
        calls.append((pruner.per_site, kwargs.get("target_macs")))
        return calibrate(pruner, *args, grid={"beta": [0.0, 0.5, 1.0]}, **kwargs)

    monkeypatch.setattr(gated, "load", few)
    monkeypatch.setattr(gated, "calibrate", choose)
    return calls


@pytest.mark.parametrize("network", ["vgg16", "resnet18-pooled"])
def test_a_stored_network_is_trained_with_the_gates_that_were_chosen(network: str, tmp_path: Path) -> None:
    results = run(store(tmp_path / network, network), tmp_path / "out", "--max-drop", "0.49")
    assert json.loads((tmp_path / "out" / "gated.json").read_text()) == results
    assert results["off"]["prune_ratio"] == 0 < results["before"]["prune_ratio"]
    assert results["test_images"] == 20
    trained = build(network, 10, 0.125, 0)
    trained.load_state_dict(load_file(tmp_path / "out" / "trained.safetensors"))
    assert gated_accuracy(trained.eval(), results) == results["after"]["accuracy"]


def gated_accuracy(model: nn.Module, results: dict[str, Any]) -> float:
    """Of the same 20 test images, with the thresholds that the file states."""
    splits = few("digits", 32, 0)
    pruner = InstanceWisePruner(model, torch.zeros(1, 3, 32, 32))
    pruner.enable(per_site=results["per_site"], **results["parameters"])
    test = gated.Batches(splits.test.at(torch.arange(0, len(splits.test), 18)), splits, 250, gated.CPU)
    return gated.measured(model, test)["accuracy"]


def test_the_aim_may_be_macs(tmp_path: Path) -> None:
    results = run(store(tmp_path / "vgg16", "vgg16"), tmp_path / "out", "--saved", "0.2")
    assert results["before"]["macs_saved"] > 0.1  # of test images; 0.2 of the held-out ones


def test_a_second_run_goes_on_with_the_same_thresholds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = store(tmp_path / "vgg16", "vgg16")
    first = run(model, tmp_path / "out", "--max-drop", "0.49")
    monkeypatch.setattr(gated, "calibrate", None)
    again = run(model, tmp_path / "out", "--max-drop", "0.49")
    assert again["per_site"] == first["per_site"]
    assert again["before"] == first["before"]


def test_thresholds_may_be_chosen_anew_after_training(tmp_path: Path, asked: Asked) -> None:
    model = store(tmp_path / "vgg16", "vgg16")
    first = run(model, tmp_path / "out", "--saved", "0.2")
    weights = (tmp_path / "out" / "trained.safetensors").stat().st_mtime_ns
    more = run(model, tmp_path / "out", "--saved", "0.2", "--again", "0.4")
    assert (tmp_path / "out" / "trained.safetensors").stat().st_mtime_ns == weights  # not trained again
    assert "again" not in first
    assert more["after"] == first["after"]
    # Untrained, all candidates are as accurate as chance: which of them wins hangs on rounding, so on threads.
    (before, macs), (again, fewer) = asked
    assert (before, again) == ({}, {})  # not from the earlier choice on
    assert macs is not None
    assert fewer == pytest.approx(0.6 / 0.8 * macs)
    assert more["again"]["macs_saved"] > 0.3  # of test images; 0.4 of the held-out ones
    trained = build("vgg16", 10, 0.125, 0)
    trained.load_state_dict(load_file(tmp_path / "out" / "trained.safetensors"))
    assert gated_accuracy(trained.eval(), more["again"]) == more["again"]["accuracy"]


def test_another_aim_needs_another_folder(tmp_path: Path) -> None:
    model = store(tmp_path / "vgg16", "vgg16")
    run(model, tmp_path / "out", "--max-drop", "0.49")
    with pytest.raises(OtherRunError, match="max_drop"):
        run(model, tmp_path / "out", "--max-drop", "0.4")


def test_an_aim_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gated.arguments(["model", "--data", "digits", "--out", "out"])
    assert "--saved --max-drop is required" in capsys.readouterr().err
