"""The study on digits: every gate is trained, measured and listed; what was not run says so."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.lab.networks import build
from benchmarks.rivals.__main__ import SCALES, arguments, main
from benchmarks.rivals.networks import network
from isw_plugin import count_macs


def test_smoke_fills_the_rows_that_were_asked_for(tmp_path: Path) -> None:
    options = ["--scale", "smoke", "--out", str(tmp_path), "--rows", "none", "cv", "fbs", "channel gating", "lccl"]
    table = main(arguments(options))
    rows = table["networks"]["m-cifarnet"]
    assert json.loads((tmp_path / "rivals.json").read_text())["networks"]["m-cifarnet"] == rows
    assert {name for name, found in rows.items() if found} == {"none", "cv", "fbs", "channel gating", "lccl"}
    assert rows["none"][0]["macs_saved"] == 0
    assert rows["fbs"][0]["prune_ratio"] >= 0.5
    assert 0.5 < rows["fbs"][0]["macs_saved"] < 0.9
    assert rows["lccl"][0]["extra_parameters"] > rows["fbs"][0]["extra_parameters"] > 0
    page = (tmp_path / "rivals.md").read_text()
    assert "| min-norm | 0 | not run |" in page
    assert "*FBS, density .5 (authors)*" in page
    before = (tmp_path / "rows" / "m-cifarnet-fbs-0.json").stat().st_mtime_ns
    main(arguments(options))  # nothing is done twice
    assert (tmp_path / "rows" / "m-cifarnet-fbs-0.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(("name", "millions"), [("m-cifarnet", 174.3), ("resnet20", 40.8)])
def test_networks_have_the_macs_of_their_papers(name: str, millions: float) -> None:
    macs = count_macs(network(name, 10, 1.0, 0).eval(), torch.zeros(1, 3, 32, 32))
    assert macs.dense / 1e6 == pytest.approx(millions, abs=0.1)


def test_other_networks_are_the_labs() -> None:
    assert SCALES["cpu"].networks == ("m-cifarnet", "resnet20", "vgg16", "resnet18")
    weights = network("vgg16", 10, 0.25, 1).state_dict(), build("vgg16", 10, 0.25, 1).state_dict()
    assert all(map(torch.equal, weights[0].values(), weights[1].values()))
