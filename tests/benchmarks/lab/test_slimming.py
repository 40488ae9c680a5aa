"""Network slimming of a VGG16 of random weights."""

from pathlib import Path

import pytest
import torch

from benchmarks.lab.images import load
from benchmarks.lab.networks import vgg_widths
from benchmarks.lab.run_folder import RunFolder
from benchmarks.lab.slimming import Slimming
from isw_plugin.errors import SettingError


def a_slimming(folder: Path, prune_ratio: float) -> Slimming:
    run, cpu = RunFolder(folder, {}), torch.device("cpu")
    slimming = Slimming(load("digits", 32, 0), run, cpu, 0.25, 1, 32, 5e-4, prune_ratio, seed=0, precision="float32")
    model = slimming._build(slimming.widths)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight)
    run.save("dense", dict(model.state_dict()))
    return slimming


def test_the_slimmed_network_has_the_widths_that_are_stored(tmp_path: Path) -> None:
    slimming = a_slimming(tmp_path, 0.5)
    widths = slimming.slim()
    assert 1 - sum(widths) / sum(vgg_widths(0.25)) == pytest.approx(0.5, abs=0.02)
    assert min(widths) >= 8
    assert slimming.stored("slimmed", widths)(slimming.inputs).shape == (1, 10)
    assert slimming.slim() == widths


def test_a_ratio_that_the_least_widths_do_not_allow_is_refused(tmp_path: Path) -> None:
    slimming = a_slimming(tmp_path, 0.95)
    with pytest.raises(SettingError, match=r"prune_ratio 0\.95: only 0\.\d+ of the channels can go"):
        slimming.slim()
    assert not slimming.run.has("slimmed")
