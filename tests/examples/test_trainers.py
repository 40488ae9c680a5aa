"""The trainers' examples run on digits, go on where they were interrupted, and run under torchrun."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe import arguments, network, shard
from torch import nn

from isw_plugin import InstanceWisePruner

ROOT = Path(__file__).parents[2]
NEEDS = {"train_timm": "isw_plugin.toolkits.timm", "train_lightning": "lightning", "train_accelerate": "accelerate"}
FEW = [
    "--images=64",
    "--batch=16",
    "--accumulate=2",
    "--bf16",
    "--ema=0.5",
    "--max-drop=0.49",
    "--max-instances=20",
    "--cpu",
]
pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers, about loaders and devices


def require(example: str) -> None:
    pytest.importorskip(NEEDS[example], reason="needs isw_plugin[trainers], or timm 1.0.27", exc_type=ImportError)


def run(example: str, out: Path, *more: str) -> nn.Module:
    require(example)
    trained: nn.Module = importlib.import_module(example).main(arguments(None, [*FEW, "--out", str(out), *more]))
    return trained


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


@pytest.mark.parametrize("example", NEEDS)
def test_it_trains_gates_and_goes_on(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    regularize = InstanceWisePruner.regularize

    def counted(pruner: InstanceWisePruner, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(kwargs["accumulation_steps"])
        return regularize(pruner, *args, **kwargs)

    monkeypatch.setattr(InstanceWisePruner, "regularize", counted)
    first = run(example, tmp_path, "--epochs", "1")
    assert calls == [2] * 4
    found = results(tmp_path)
    assert found["gated"]["instances"] == found["dense"]["instances"] == 360
    assert found["gated"]["macs"] < found["dense"]["macs"]
    calls.clear()
    second = run(example, tmp_path, "--epochs", "2", "--lambda", "0.5")
    assert calls == [2] * 4  # one epoch more, not two
    assert results(tmp_path)["pruner"]["lambda_"] == 1e-5  # the checkpoint's
    moved = [not a.equal(b) for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    assert all(moved)
    assert InstanceWisePruner.of(second).enabled


@pytest.mark.slow
@pytest.mark.parametrize("example", NEEDS)
def test_torchrun_on_two_processes_goes_on(example: str, tmp_path: Path) -> None:
    require(example)
    places = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # where the package is not installed
    for epochs in ("1", "2"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += [str(ROOT / "examples" / f"{example}.py"), *FEW, "--out", str(tmp_path), "--epochs", epochs]
        subprocess.run(command, check=True, env=os.environ | places, cwd=tmp_path)
        found = results(tmp_path)
        assert found["gated"]["instances"] == 360  # of both processes
        (tmp_path / "results.json").unlink()


def test_defaults_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "args.yaml").write_text("lr: 0.125\nepochs: 7\n")
    given = ["--out", str(tmp_path), "-c", str(tmp_path / "args.yaml")]
    args = arguments(None, [*given, "--epochs", "3"])
    assert (args.lr, args.epochs) == (0.125, 3)
    shipped = arguments(None, ["--out", "x", "-c", str(ROOT / "examples" / "train_timm.yaml")])
    assert shipped.model == "test_resnet"
    (tmp_path / "args.yaml").write_text("learning_rate: 0.1\n")
    with pytest.raises(SystemExit):
        arguments(None, given)


def test_alone_a_process_sees_every_image() -> None:
    from images import Images

    images = Images(torch.arange(5), torch.arange(5))
    assert shard(images).labels.tolist() == [0, 1, 2, 3, 4]


def test_the_network_is_the_same_for_the_same_seed() -> None:
    args = argparse.Namespace(seed=1, model="test_resnet", lambda_=0.1)
    splits = argparse.Namespace(classes=("a", "b"))
    first, second = (network(args, splits)[0].state_dict() for _ in range(2))
    assert all(first[name].equal(second[name]) for name in first)
