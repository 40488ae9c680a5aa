"""Training with gates whose thresholds follow a share to keep."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.budget import steered
from benchmarks.lab.images import ImageSplits
from benchmarks.lab.images import load as load_images
from benchmarks.lab.networks import build
from benchmarks.lab.run_folder import OtherRunError
from isw_plugin import InstanceWisePruner
from isw_plugin.errors import PatternError


def few(data: str, side: int, seed: int) -> ImageSplits:
    splits = load_images(data, side, seed)
    return dataclasses.replace(splits, train=splits.train.at(torch.arange(64)))


@pytest.fixture(autouse=True)
def _few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steered, "load", few)


def run(out: Path, keep: dict[str, float], *subject: str, epochs: int = 6) -> dict[str, Any]:
    small = ["--data", "digits", "--width", "0.125", "--epochs", str(epochs), "--batch", "8", "--thin", "18"]
    options = ["--keep", json.dumps(keep), "--ramp", "0", "0.1", "--peak", "0.01", "--precision", "float32"]
    words = [*small, *options, *(subject or ("--network", "vgg16")), "--out", str(out)]
    return steered.main(steered.arguments(words))


@pytest.mark.parametrize("network", ["vgg16", "resnet18-pooled"])
def test_a_network_ends_near_the_shares_that_it_was_steered_to(network: str, tmp_path: Path) -> None:
    results = run(tmp_path, {"*": 0.6}, "--network", network)
    assert json.loads((tmp_path / "steered.json").read_text()) == results | {"ramp": [0.0, 0.1]}
    assert 0.25 < results["gated"]["prune_ratio"] < 0.55
    assert results["off"]["prune_ratio"] == 0
    assert results["test_images"] == 20


def test_the_last_pattern_that_fits_holds(tmp_path: Path) -> None:
    results = run(tmp_path, {"*": 0.5, "features.3?": 0.2, "features.30": 1.0}, epochs=1)
    assert (results["keep"]["features.0"], results["keep"]["features.34"]) == (0.5, 0.2)
    assert results["keep"]["features.30"] == 1.0
    assert results["per_site"]["features.30"]["beta"] == 0.0


def test_what_is_stated_can_be_measured_again(tmp_path: Path) -> None:
    results = run(tmp_path, {"*": 0.6}, epochs=1)
    model = build("vgg16", 10, 0.125, 0)
    model.load_state_dict(load_file(tmp_path / "trained.safetensors"))
    pruner = InstanceWisePruner(model.eval(), torch.zeros(1, 3, 32, 32), alpha=0.0)
    pruner.enable(per_site=results["per_site"])
    splits = few("digits", 32, 0)
    test = splits.test.at(torch.arange(0, len(splits.test), 18))
    found = steered.measured(model, steered.Batches(test, splits, 250, steered.CPU))
    assert found == results["gated"]


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole", {"*": 0.6}, epochs=3)
    steer, calls = steered.steer_thresholds, []

    def stops(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 20:
            raise KeyboardInterrupt
        steer(*args)

    monkeypatch.setattr(steered, "steer_thresholds", stops)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", {"*": 0.6}, epochs=3)
    monkeypatch.setattr(steered, "steer_thresholds", steer)
    again = run(tmp_path / "stopped", {"*": 0.6}, epochs=3)
    assert again["per_site"] == whole["per_site"]
    assert again["gated"] == whole["gated"]


def test_a_trained_network_goes_on(tmp_path: Path) -> None:
    run(tmp_path / "first", {"*": 1.0}, epochs=1)
    trained = tmp_path / "first" / "trained.safetensors"
    results = run(tmp_path / "more", {"*": 0.6}, "--model", str(trained), "--peak", "0", epochs=1)
    assert results["model"] == "first/trained"
    first, more = (load_file(tmp_path / folder / "trained.safetensors") for folder in ("first", "more"))
    parameters = [name for name, _ in build("vgg16", 10, 0.125, 0).named_parameters()]
    assert all(torch.equal(first[name], more[name]) for name in parameters)


def test_a_finished_run_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path, {"*": 0.6}, epochs=1)
    monkeypatch.setattr(steered, "train", None)
    assert run(tmp_path, {"*": 0.6}, epochs=1) == first


def test_other_shares_need_another_folder(tmp_path: Path) -> None:
    run(tmp_path, {"*": 0.6}, epochs=1)
    with pytest.raises(OtherRunError, match="keep"):
        run(tmp_path, {"*": 0.5}, epochs=1)


def test_a_pattern_that_fits_no_site_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PatternError, match=r"--keep='feature.0' matches 0 .*features.0"):
        run(tmp_path, {"*": 0.6, "feature.0": 0.5})


@pytest.mark.parametrize("ramp", [("0.5", "0.5"), ("0.6", "0.5"), ("-0.1", "0.5"), ("0", "1.1")])
def test_a_ramp_rises_within_the_training(ramp: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        steered.arguments(["--network", "vgg16", "--data", "digits", "--keep", "{}", "--out", "out", "--ramp", *ramp])
    assert "--ramp" in capsys.readouterr().err
