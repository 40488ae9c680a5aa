"""The crowded study and its processes: what they compute and how they are kept, not what they time."""

import dataclasses
import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks.speed import apart, crowded
from benchmarks.speed.apart import Apart, Task
from benchmarks.speed.crowded import Cell
from benchmarks.speed.networks import network, noise
from benchmarks.speed.quota import quota
from benchmarks.speed.runtimes import installed, load, onnx_of
from isw_plugin.ops import cpu

NAME = "slimmed vgg16"
LINUX = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity masks here")


def test_a_process_times_what_it_was_given(tmp_path: Path) -> None:
    task = Task("gated", NAME, 32, 2, threads=1, models=tmp_path)
    with Apart(task) as process:
        assert process.error < 1e-4
        assert process.threads == 1
        assert len(process.seconds(3)) == 3
        assert all(0 < seconds < 60 for seconds in process.seconds(2))
        child = process._process
    assert not child.is_alive()
    assert [path.name for path in tmp_path.iterdir()] == [f"slimmed-vgg16-32-2-gated-0.5-1-{active()}.pickle"]


def active() -> str | None:
    cpu.load()
    return cpu.active()


def test_a_model_made_otherwise_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was chosen for other gates, threads or instructions is another model."""
    made: list[Task] = []

    class Pruner:
        def accelerate(self, images: torch.Tensor, backend: str) -> str:
            made.append(task)
            return backend

    task = Task("gated", NAME, 32, 2, models=tmp_path)
    images, held = noise(2, 32), torch.get_num_threads()
    assert [apart._fast(task, Pruner(), images) for _ in range(2)] == ["gated", "gated"]  # type: ignore[arg-type]
    assert len(made) == 1
    apart._fast(dataclasses.replace(task, keep=0.3), Pruner(), images)  # type: ignore[arg-type]
    assert len(made) == 2
    torch.set_num_threads(held + 1)
    try:
        apart._fast(task, Pruner(), images)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(held)
    assert len(made) == 3
    monkeypatch.setattr(cpu, "active", lambda: "other")
    apart._fast(task, Pruner(), images)  # type: ignore[arg-type]
    assert len(made) == 4


@LINUX
def test_a_process_runs_on_the_cores_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    held, (core, *_) = os.sched_getaffinity(0), sorted(os.sched_getaffinity(0))
    entered: list[int] = []
    with Apart(Task("dense", NAME, 32, 1), {core}, entered.append) as process:
        assert os.sched_getaffinity(process._process.pid) == {core}
        assert entered == [process._process.pid]
        assert process.threads == 1
    assert os.sched_getaffinity(0) == held


def test_what_fails_apart_is_raised_here() -> None:
    with pytest.raises(RuntimeError, match="no_such_network"):
        Apart(Task("dense", "no_such_network", 32, 1))


@pytest.mark.skipif(not installed(), reason="the extra benchmarks is not installed")
def test_runtimes_give_what_the_model_does() -> None:
    model, images = network(NAME, 32), noise(2, 32)
    exported = onnx_of(model, images)
    with torch.no_grad():
        wanted = model(images)
    for name in installed():
        torch.testing.assert_close(load(name, exported, images, threads=1)(), wanted, rtol=1e-4, atol=1e-4)


def test_without_the_export_no_runtime_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    assert installed() == []


def test_a_quota_is_a_group_or_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks.speed import quota as module

    monkeypatch.setattr(module, "_ROOT", tmp_path / "missing")
    with quota(1.5) as enter:
        assert enter is None
    group = tmp_path / "cpu" / f"isw-speed-{os.getpid()}"
    monkeypatch.setattr(module, "_ROOT", tmp_path)
    monkeypatch.setattr(Path, "mkdir", lambda path: made(path) if path == group else denied(path))
    with quota(1.5) as enter:
        assert (group / "cpu.cfs_quota_us").read_text() == "150000\n"
        assert enter is not None
        enter(42)
        assert (group / "cgroup.procs").read_text() == "42\n"
        for file in group.iterdir():
            file.unlink()
    assert not group.exists()


def made(group: Path) -> None:
    """As the system makes one, with its files."""
    os.makedirs(group)  # noqa: PTH103  # Path.mkdir is replaced
    for name in ("cpu.cfs_period_us", "cpu.cfs_quota_us", "cgroup.procs"):
        (group / name).touch()


def denied(path: Path) -> None:
    raise PermissionError(path)


CELLS = [
    Cell("a:32:1", "quiet", "gated", 2.04, 3.0, 9, 1e-7),
    Cell("a:32:1", "quiet", "openvino", 4.0, 5.0, 9, 1e-7),
    Cell("a:32:1", crowded.QUOTA, "gated", None, None),
]


def test_the_table_says_what_is_missing(tmp_path: Path) -> None:
    lines = crowded.table(CELLS).splitlines()
    assert lines[0] == "| network:pixels:batch | situation | gated | openvino |"
    assert lines[2:] == [
        "| a:32:1 | quiet | 2.0 (3.0) | 4.0 (5.0) |",
        f"| a:32:1 | {crowded.QUOTA} | not available | - |",
    ]
    crowded.write(CELLS, 2, tmp_path)
    assert crowded.read(tmp_path) == CELLS
    assert json.loads((tmp_path / "crowded.json").read_text())["threads of each"] == 2


def test_a_second_run_takes_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def cells(name: str, tasks: list[Task], situations: list[str], rounds: int, calls: int) -> list[Cell]:
        asked.extend((name, situation, *(task.way for task in tasks)) for situation in situations)
        return [Cell(name, situation, task.way, 1.0, 2.0) for situation in situations for task in tasks]

    monkeypatch.setattr(crowded, "_cells", cells)
    command = ["--networks", f"{NAME}:32:1", "--ways", "gated", "dense", "--out", str(tmp_path), "--situations"]
    crowded.main([*command, "quiet"])
    crowded.main([*command, "quiet", "one busy process"])
    assert asked == [(f"{NAME}:32:1", situation, "gated", "dense") for situation in ("quiet", "one busy process")]
    assert len(crowded.read(tmp_path)) == 4
    crowded.main([*command, "quiet", "--ways", "dense", "torch"])
    assert [cell.way for cell in crowded.read(tmp_path) if cell.situation == "quiet"] == ["gated", "dense", "torch"]
    assert len(crowded.read(tmp_path)) == 5


@LINUX
def test_quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One way, as each takes a process seconds to make ready, and no second process of it but under the quota."""
    situations = ["quiet", "one busy process", crowded.QUOTA]
    command = ["--quick", "--ways", "dense", "--threads", "1", "--models", str(tmp_path / "models")]
    crowded.main([*command, "--out", str(tmp_path), "--situations", *situations])
    cells = crowded.read(tmp_path)
    assert [cell.situation for cell in cells] == situations
    assert all(cell.calls == 6 and cell.error < 1e-4 for cell in cells if cell.median is not None)
    assert {cell.situation for cell in cells if cell.median is None} <= {crowded.QUOTA}
    assert len(list((tmp_path / "models").iterdir())) == 1
