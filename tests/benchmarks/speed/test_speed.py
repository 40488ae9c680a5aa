"""The engine's benchmark gives a whole row, and a table that fits its head; what it times is not tested."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.speed import __main__ as engine
from benchmarks.speed.networks import NETWORKS, force, gate_at, network, trained_networks
from benchmarks.speed.steady import Probe
from benchmarks.speed.ways import FORCED, TRAINED, Row, measure
from isw_plugin import InstanceWisePruner
from isw_plugin.accelerate import choose, fit
from tests.accelerate.nets import clock, whole_clock
from tests.conftest import made
from tests.predict.nets import Inverted


class Alone(Probe):
    """A machine that nobody else uses."""

    def is_steady(self) -> bool:
        return True


@pytest.fixture(scope="module", autouse=True)
def nothing_to_choose() -> Iterator[None]:
    """What accelerate times to choose layers is most of what it takes, and none of what is looked at here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "seconds_in_place", clock("gated"))
        patch.setattr(choose, "take_turns", whole_clock("gated"))
        yield


@pytest.fixture(scope="module")
def row() -> Row:
    (row,) = measure("slimmed vgg16", 32, batch=2, masks=[0.5], rounds=1, compiles=False, probe=Alone())
    return row


def test_a_row_is_whole(row: Row) -> None:
    assert 0.3 < row.keep < 0.7
    assert row.bound > 1.3
    assert row.error < 1e-4
    assert row.compiled is None
    assert row.share == row.speedup / row.bound
    assert row.steady == 1
    assert row.all_rounds == row.speedup
    assert (row.handover is None) == (torch.get_num_threads() == 1)


def test_trained_masks_are_those_that_are_stored() -> None:
    from benchmarks.lab import decisions

    name, path = next(iter(trained_networks().items()))
    (row,) = measure(name, 32, batch=2, masks=[TRAINED], rounds=1, compiles=False, probe=Alone())
    masks = torch.cat(list(decisions.load(path)[0].values()), dim=1)
    assert row.masks == TRAINED
    assert row.keep == pytest.approx(masks[[0, -1]].float().mean().item(), abs=1e-6)
    assert row.error < 1e-4


@pytest.mark.slow  # two whole rows, timed
def test_forced_masks_skip_outputs_too() -> None:
    masks = [f"{way} 0.5" for way in FORCED]
    inputs, outputs = measure("slimmed vgg16", 32, batch=2, masks=masks, rounds=1, compiles=False, probe=Alone())
    assert [inputs.masks, outputs.masks] == masks
    assert inputs.keep == pytest.approx(outputs.keep) == pytest.approx(0.5, abs=0.01)
    assert max(inputs.error, outputs.error) < 1e-4
    assert 1.7 < inputs.bound < 2.1 < 2.5 < outputs.bound < 4


@pytest.mark.parametrize("outputs", [False, True])
def test_forced_masks_of_depthwise_layers_are_those_before_them(outputs: bool) -> None:
    net = made(Inverted)
    pruner = force(InstanceWisePruner(net, net.images(1)), 0.5, 4, outputs)
    assert pruner.followers == ({"dw": "pw"} if outputs else {})
    assert set(pruner.heads) == ({"pw", "pwl"} if outputs else set())
    net(net.images(4))
    assert torch.equal(pruner.keep["dw"], pruner.keep["pw"])
    assert (pruner.keep["dw"].sum(1) == 4).all()


def test_a_second_run_goes_on(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.write([row], 1, tmp_path)
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(engine, "measure", lambda *args: asked.append(args) or [])
    only = ["--networks", "slimmed vgg16", "--sides", "32", "--batches", "2", "--out", str(tmp_path)]
    engine.main([*only, "--keeps", "0.5", "0.7"])
    assert [call[:-2] for call in asked] == [("slimmed vgg16", 32, 2, [0.7], 15, True)]
    assert engine.read(tmp_path) == [row]


def test_disturbed_rows_are_taken_again(row: Row, tmp_path: Path) -> None:
    engine.write([row, dataclasses.replace(row, masks="0.7", steady=0)], 1, tmp_path)
    assert engine.read(tmp_path) == [row]


def test_the_middle_take_stands_for_all(row: Row) -> None:
    slow, fast = (dataclasses.replace(row, speedup=row.speedup * times) for times in (0.5, 2.0))
    (found,) = engine.middle([[fast], [slow], [row]])
    assert found == dataclasses.replace(row, takes=[fast.speedup, slow.speedup, row.speedup])
    assert engine.middle([[fast], [slow]])[0].speedup == slow.speedup
    assert engine.middle([[row], []]) == [dataclasses.replace(row, takes=[row.speedup])]


def test_takes_are_processes_of_their_own(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []

    def run(command: list[str], check: bool) -> None:
        called.append(command[1:])
        count = len(called)
        args = engine.arguments(command[3:])
        engine.write([dataclasses.replace(row, speedup=count, masks=str(keep)) for keep in args.keeps], 1, args.out)

    monkeypatch.setattr(engine.subprocess, "run", run)
    only = ["--networks", "slimmed vgg16", "--sides", "32", "--batches", "2", "--keeps", "0.5", "0.7", "--no-compile"]
    for _ in range(2):
        engine.main([*only, "--takes", "3", "--out", str(tmp_path)])
    assert len(called) == 3
    assert called[0][:2] == ["-m", "benchmarks.speed"]
    assert "--no-compile" in called[0]
    assert [(row.masks, row.speedup, row.takes) for row in engine.read(tmp_path)] == [
        ("0.5", 2, [1, 2, 3]),
        ("0.7", 2, [1, 2, 3]),
    ]


@pytest.mark.parametrize(("takes", "said"), [("3", "--out"), ("0", "at least 1")])
def test_takes_need_a_folder_and_a_number(takes: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        engine.main(["--takes", takes])
    assert said in capsys.readouterr().err


def test_table_fits_its_head(row: Row) -> None:
    assert engine.line(row).count(" | ") == engine.HEADER.count(" | ")


def test_write(row: Row, tmp_path: Path) -> None:
    engine.write([row], 1, tmp_path)
    assert json.loads((tmp_path / "engine.json").read_text())["rows"][0]["network"] == "slimmed vgg16"
    assert (tmp_path / "engine.png").read_bytes().startswith(b"\x89PNG")
    assert "slimmed vgg16" in (tmp_path / "engine.md").read_text()


@pytest.mark.parametrize(("name", "mmacs"), [("vgg16", 313.2), ("resnet18", 555.4), ("mobilenetv2", 88.0)])
def test_networks_have_the_papers_macs(name: str, mmacs: float) -> None:
    from isw_plugin import count_macs

    assert count_macs(network(name, 32), torch.zeros(1, 3, 32, 32)).dense / 1e6 == pytest.approx(mmacs, abs=0.1)
    assert name in NETWORKS


def test_gate_at_meets_the_ratio() -> None:
    model, images = network("slimmed vgg16", 32), torch.randn(3, 3, 32, 32)
    pruner = gate_at(InstanceWisePruner(model, images[:1]), images, 0.3)
    with torch.no_grad(), pruner.gating():
        model(images)
    kept = torch.cat(list(pruner.keep.values()), dim=1).float().mean().item()
    assert kept == pytest.approx(0.3, abs=0.08)
