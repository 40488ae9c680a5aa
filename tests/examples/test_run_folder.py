import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_folder import OtherRunError, RunFolder
from safetensors.torch import save


def test_tensors_and_facts_come_back(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run", {"seed": 0})
    run.save("dense", {"w": torch.arange(3.0)}, epoch=2)
    tensors, facts = RunFolder(tmp_path / "run", {"seed": 0}).load("dense")
    assert torch.equal(tensors["w"], torch.arange(3.0))
    assert facts == {"epoch": 2}


def test_other_settings_are_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    RunFolder(tmp_path, {"seed": 0, "width": 0.5}).save("dense", {"w": torch.ones(1)})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(OtherRunError, match=r"seed: 0 there, 1 asked"):
        RunFolder(tmp_path, {"seed": 1, "width": 0.5})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all my work")
    with pytest.raises(OtherRunError, match="no run folder"):
        RunFolder(tmp_path, {})
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_draft_left_by_a_kill_is_harmless(tmp_path: Path) -> None:
    (tmp_path / ".settings.json.draft").write_text("{")
    run = RunFolder(tmp_path, {"seed": 0})
    assert json.loads((run.path / "settings.json").read_text()) == {"seed": 0}


def test_drafts_of_killed_runs_go(tmp_path: Path) -> None:
    RunFolder(tmp_path, {"seed": 0})
    (tmp_path / ".dense.safetensors.123.draft").write_text("half")
    RunFolder(tmp_path, {"seed": 0})
    assert {file.name for file in tmp_path.iterdir()} - {".lock"} == {"settings.json"}


def test_a_failed_write_leaves_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path, {})
    run.write("a.txt", "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        run.write("a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert not list(tmp_path.glob(".*.draft"))


def test_a_second_process_is_refused_in_one_line(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", {"seed": 0})
    code = "import sys, pathlib, run_folder as r; r.RunFolder(pathlib.Path(sys.argv[1]), {'seed': 0})"
    examples = Path(__file__).parents[2] / "examples"
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=examples)
    assert done.returncode == 1
    assert f"OtherRunError: {tmp_path / 'run'} is in use by another run" in done.stderr
    assert RunFolder(tmp_path / "run", {"seed": 0}).path.exists()  # this process goes on


@pytest.mark.parametrize("content", ["{", "[1]", "3", "\udcff"])
def test_damaged_settings_are_told_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "settings.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(OtherRunError, match=r"settings\.json is damaged .*delete it"):
        RunFolder(tmp_path, {"seed": 0})


def test_damaged_tensors_are_told_in_one_line(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, {})
    for content in (b"", b"half", save({"w": torch.ones(1)}), save({}, {"facts": "{"})):
        (tmp_path / "dense.safetensors").write_bytes(content)
        with pytest.raises(OtherRunError, match=r"dense\.safetensors is damaged .*delete it"):
            run.load("dense")


def test_write_replaces_at_once(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, {})
    run.write("a.txt", "old")
    reader = (tmp_path / "a.txt").open()
    run.write("a.txt", "new")
    assert reader.read() == "old"
    reader.close()
    assert (tmp_path / "a.txt").read_text() == "new"


def test_delete_is_safe_twice(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, {})
    run.save("part", {"w": torch.ones(1)})
    run.delete("part")
    run.delete("part")
    assert not run.has("part")
