"""The study on digits: every gate is trained, measured and listed; what was not run says so."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.lab.images import load, normalise
from benchmarks.lab.networks import build
from benchmarks.lab.run_folder import OtherRunError
from benchmarks.rivals import __main__ as study
from benchmarks.rivals import measuring
from benchmarks.rivals.__main__ import SCALES, arguments, main
from benchmarks.rivals.networks import network
from benchmarks.rivals.training import Bench
from isw_plugin import count_macs

ROW = {"error": 1.0, "prune_ratio": 0.0, "macs_saved": 0.0, "macs": 1, "parameters": 1, "extra_parameters": 0}


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


def test_rows_of_other_settings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "measure", lambda bench, name, row: ROW)
    options = ["--out", str(tmp_path), "--rows", "none"]
    table = main(arguments(options))
    assert main(arguments([*options, "--measured"])) == table
    for other, said in (
        (["--scale", "minutes"], r"test_images: 64 there, 2000 asked"),
        (["--data", "cifar10"], r"data: 'digits' there, 'cifar10' asked"),
    ):
        with pytest.raises(OtherRunError, match=said):
            main(arguments([*options, *other, "--measured"]))
    monkeypatch.setitem(SCALES, "smoke", replace(SCALES["smoke"], test_images=32))
    with pytest.raises(OtherRunError, match="test_images: 64 there, 32 asked"):
        main(arguments(options))


def test_times_are_chosen_for_the_threads_and_not_the_images_that_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = load("digits", 32, 0)
    scale = replace(SCALES["smoke"], rounds=3)
    bench = Bench(splits, Path("nowhere"), scale, 0)
    chosen: list[tuple[int, torch.Tensor]] = []

    class Pruner:
        def accelerate(self, images: torch.Tensor, backend: str) -> SimpleNamespace:
            chosen.append((torch.get_num_threads(), images))
            return Fast(execution=backend, reason="")

    class Fast(SimpleNamespace):
        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            assert not torch.equal(images, chosen[0][1])
            return images

    held = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        row = measuring._ms(bench, Pruner(), 4, True)  # type: ignore[arg-type]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(held)
    assert (row["threads"], row["runs"], chosen[0][0]) == (1, "auto", 1)
    every = normalise(splits.train.pixels, splits)
    assert all((every == image).flatten(1).all(1).any() for image in chosen[0][1])


@pytest.mark.parametrize(("name", "millions"), [("m-cifarnet", 174.3), ("resnet20", 40.8)])
def test_networks_have_the_macs_of_their_papers(name: str, millions: float) -> None:
    macs = count_macs(network(name, 10, 1.0, 0).eval(), torch.zeros(1, 3, 32, 32))
    assert macs.dense / 1e6 == pytest.approx(millions, abs=0.1)


def test_other_networks_are_the_labs() -> None:
    assert SCALES["cpu"].networks == ("m-cifarnet", "resnet20", "vgg16", "resnet18")
    weights = network("vgg16", 10, 0.25, 1).state_dict(), build("vgg16", 10, 0.25, 1).state_dict()
    assert all(map(torch.equal, weights[0].values(), weights[1].values()))
