"""Thresholds of single sites against one pair, on stored VGG16s."""

import json
from pathlib import Path

import torch

from benchmarks.budget import sites
from benchmarks.lab.networks import stored_vgg16, vgg16
from benchmarks.lab.run_folder import RunFolder

WIDTHS = (8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20)  # each its own, so that no order but the right one fits


def store(folder: Path) -> Path:
    torch.manual_seed(0)
    RunFolder(folder, {}).save("trained", dict(vgg16(WIDTHS, 10).state_dict()), origin="random")
    return folder / "trained.safetensors"


def test_a_stored_vgg16_is_built_at_its_own_widths(tmp_path: Path) -> None:
    model = stored_vgg16(store(tmp_path / "vgg16-0"))
    assert [len(weight) for weight in model.state_dict().values() if weight.dim() == 4] == list(WIDTHS)
    assert not model.training


def test_the_pair_and_single_sites_are_written_for_every_budget(tmp_path: Path) -> None:
    models = [str(store(tmp_path / name)) for name in ("vgg16-0", "vgg16-1e-07")]
    options = ["--data", "digits", "--images", "20", "--thin", "18", "--max-drops", "0.49", "--out", str(tmp_path)]
    results = sites.main(sites.arguments([*models, *options]))
    assert json.loads((tmp_path / "sites.json").read_text()) == results
    assert [row["model"] for row in results["rows"]] == ["vgg16-0/trained"] * 2 + ["vgg16-1e-07/trained"] * 2
    pair, own = results["rows"][:2]
    assert not pair["per_site"]
    assert pair["held_out"]["saved"] <= own["held_out"]["saved"]
    assert pair["held_out"]["images"] == pair["test"]["images"] == 20


def test_the_aim_may_be_channels(tmp_path: Path) -> None:
    options = ["--data", "digits", "--images", "20", "--thin", "18", "--max-drops", "0.49", "--out", str(tmp_path)]
    arguments = sites.arguments([str(store(tmp_path / "vgg16-0")), *options, "--by-channels"])
    pair, own = sites.main(arguments)["rows"]
    assert pair["held_out"]["dropped"] <= own["held_out"]["dropped"]
