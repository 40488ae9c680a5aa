"""The digits' experiments beyond the paper, on a few images."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.budget import __main__ as digits
from benchmarks.lab.images import ImageSplits
from benchmarks.lab.images import load as load_images


def few(data: str, side: int, seed: int) -> ImageSplits:
    splits = load_images(data, side, seed)
    counts = {"train": 64, "held_out": 20, "test": 20}
    return dataclasses.replace(
        splits, **{part: getattr(splits, part).at(torch.arange(n)) for part, n in counts.items()}
    )


def run(out: Path, *more: str) -> dict[str, Any]:
    return digits.main(digits.arguments(["--quick", "--networks", "resnet18", "--out", str(out), *more]))


def test_every_experiment_is_written_and_a_second_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "load", few)
    first = run(tmp_path)
    assert {row["decay"] for row in first["decay"]} == {"none", "relative:0.3"}
    assert {row["model"] for row in first["untrained"]} == {"trained", "relative:0.3"}
    both = {(row["scope"], row["parameters"]["beta"]): row["prune_ratio"] for row in first["scope"]}
    assert len(both) == 4
    assert all(0 < ratio < 1 for ratio in both.values())
    assert all(row["cv"] > 0 and row["gated"]["macs_saved"] > 0 for row in first["decay"])
    stored = json.loads((tmp_path / "digits.json").read_text())
    assert stored["scope"] == first["scope"]
    second = run(tmp_path, "--seeds", "0", "1")
    assert [row for row in second["decay"] if row["seed"] == 0] == first["decay"]
    assert {row["seed"] for row in second["scope"]} == {0, 1}


@pytest.mark.parametrize("text", ["none", "sum:1e-06", "relative:0.3", "relative:0.3:ramp"])
def test_a_decay_is_written_as_it_is_read(text: str) -> None:
    assert str(digits.Decay.parse(text)) == text


def test_a_ramp_rises_over_the_first_half() -> None:
    decay = digits.Decay.parse("relative:0.4:ramp")
    assert [decay.at(progress) for progress in (0, 0.25, 0.5, 0.75)] == pytest.approx([0, 0.2, 0.4, 0.4])
