import json
from pathlib import Path

import pytest
import torch
from run_folder import OtherRunError, RunFolder


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
