"""A row a network, by one command; what did not run is listed as not run."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.budget import networks, peers
from isw_plugin import InstanceWisePruner


def arguments(folder: Path, *more: str) -> list[str]:
    places = ["--data", str(folder), "--weights", str(folder), "--runs", str(folder / "runs")]
    return ["--only", "resnet20", *places, "--results", str(folder / "results"), *more]


@pytest.mark.parametrize(("make", "parameters"), [(peers.resnet20, 269_722), (peers.resnet56, 853_018)])
def test_networks_of_others_have_their_parameters(make: Any, parameters: int) -> None:
    assert sum(parameter.numel() for parameter in make().parameters()) == parameters


@pytest.mark.parametrize("make", [peers.resnet20, peers.pruned_resnet56])
def test_every_map_of_them_is_a_site(make: Any) -> None:
    model = make().eval()
    pruner = InstanceWisePruner(model, torch.zeros(1, 3, 32, 32), alpha=0.0, beta=0.3)
    assert len(pruner.sites) == sum(isinstance(module, torch.nn.ReLU) for module in model.modules())


def test_a_run_is_the_example_and_its_results_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def example(words: list[str], **_: object) -> None:
        calls.append(words)
        out = Path(words[words.index("--out") + 1])
        out.mkdir(parents=True)
        timed = {"batch_1": {"ms": 2.0, "runs": "dense"}, "batch_32": {"ms": 1.0, "runs": "dense"}}
        ours = {"batch_1": {"ms": 1.0, "runs": "accelerated"}, "batch_32": {"ms": 0.8, "runs": "accelerated"}}
        row = {"accuracy": 0.9, "dropped": 0.5, "macs_left": 0.6}
        rows = [row | timed, row | timed, row | ours]
        (out / "results.json").write_text(json.dumps({"rows": rows, "epochs": 3, "seed": 0}))

    monkeypatch.setattr(subprocess, "run", example)
    words = arguments(tmp_path, "--epochs", "3", "--", "--thin", "5")
    table = networks.main(networks.arguments(words))
    assert calls[0][1:3] == ["examples/fast_within_budget.py", "benchmarks/budget/peers.py:resnet20"]
    assert calls[0][calls[0].index("--thin") + 1] == "5"
    assert calls[0][calls[0].index("--weights") + 1] == str(tmp_path / "akamaster-resnet20.safetensors")
    assert (
        "| resnet20, seed 0 | 3 | 0.9000 | 0.9000 | 0.500 | 0.600 | 2.00 (accelerated) | 1.25 (accelerated) |" in table
    )
    assert table.count("not run") == len(networks.NETWORKS) - 1
    stored = (tmp_path / "results" / "resnet20-0.json").read_text()
    assert str(tmp_path) not in stored
