"""Importances at equal MACs, on a narrow network and a few images."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks.importance import __main__ as importance
from benchmarks.lab.slimming import Slimming


def test_every_importance_leaves_the_macs_that_were_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job_of = importance.job_of

    def small(*given: object) -> Slimming:
        job = job_of(*given)
        few = {part: getattr(job.splits, part).at(torch.arange(64)) for part in ("train", "test")}
        return dataclasses.replace(job, width=0.25, splits=dataclasses.replace(job.splits, **few))

    monkeypatch.setattr(importance, "job_of", small)
    some = ("instance frequency", "Taylor")
    monkeypatch.setattr(importance, "IMPORTANCES", {name: importance.IMPORTANCES[name] for name in some})
    options = ["--seeds", "0", "--epochs", "1", "--targets", "0.5", "--out", str(tmp_path)]
    results = importance.main(importance.arguments(options))
    assert json.loads((tmp_path / "importance.json").read_text()) == results
    dense = 1e6 * float(results["about"].split(" test images, ")[1].split(" MMACs")[0])
    assert [row["importance"] for row in results["rows"]] == list(some)
    for row in results["rows"]:
        assert 0.45 * dense < row["macs"] <= 0.501 * dense  # printed to a hundredth of a million
        assert row["channels"] == sum(row["widths"])
        assert min(row["widths"]) >= 8
    assert "| 50% | Taylor |" in (tmp_path / "importance.md").read_text()
