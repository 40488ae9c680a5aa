"""Fine-tuning a stored VGG16 with other forms of feature decay."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.budget import finetune
from benchmarks.lab.images import ImageSplits
from benchmarks.lab.images import load as load_images
from benchmarks.lab.networks import stored_vgg16, vgg16
from benchmarks.lab.run_folder import RunFolder


def few(data: str, side: int, seed: int) -> ImageSplits:
    splits = load_images(data, side, seed)
    return dataclasses.replace(splits, train=splits.train.at(torch.arange(64)))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = vgg16((8,) * 13, 10)
    RunFolder(tmp_path / "vgg16-0", {}).save("trained", dict(network.state_dict()), origin="random")
    return tmp_path / "vgg16-0" / "trained.safetensors"


def test_every_decay_is_trained_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "load", few)
    options = ["--data", "digits", "--epochs", "1", "--batch", "16", "--precision", "float32", "--out", str(tmp_path)]
    args = finetune.arguments([str(model), "--decays", "none", "relative:5", *options])
    finetune.main(args)
    files = [tmp_path / name / "trained.safetensors" for name in ("none", "relative-5")]
    none, relative = map(load_file, files)
    assert any(not torch.equal(none[name], relative[name]) for name in none)
    assert isinstance(stored_vgg16(files[1]), torch.nn.Module)
    before = [file.stat().st_mtime_ns for file in files]
    finetune.main(args)
    assert [file.stat().st_mtime_ns for file in files] == before


def test_norms_at_the_start_are_those_of_the_model_whatever_was_trained_since(model: Path) -> None:
    network = stored_vgg16(model)
    pruner = finetune.InstanceWisePruner(network, torch.zeros(1, 3, 32, 32), 1.0, reduction="relative")
    batch = torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = finetune.measured(network, batch)
    assert len(state["references"]) == len(pruner.sites)
    assert state["references"] == finetune.measured(network, batch)["references"]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_ramp_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        finetune.arguments(["model", "--data", "digits", "--decays", "relative:0.3:ramp", "--out", "out"])
    assert "a ramp is not for this benchmark" in capsys.readouterr().err
