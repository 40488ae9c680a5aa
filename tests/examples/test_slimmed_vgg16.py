"""The main job, on a VGG16 an eighth as wide and few epochs: a few seconds a run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from images import DataError
from run_folder import OtherRunError, RunFolder
from slimmed_vgg16 import arguments, main, vgg16

from isw_plugin.errors import SettingError
from isw_plugin.measure import Latency

SCRIPT = Path(__file__).parents[2] / "examples" / "slimmed_vgg16.py"
SMALL = ["--width", "0.125", "--epochs-dense", "2", "--epochs-finetune", "1", "--epochs-budget", "1"]
SMALL += ["--macs-left", "0.8", "--prune-ratio", "0.2", "--max-drop", "0.49", "--device", "cpu"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with all stages done: a copy, so that workers of pytest-xdist do them once for all."""
    own = tmp_path_factory.getbasetemp()
    done = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "slimmed_vgg16"
    with FileLock(f"{done}.lock"):
        if not done.exists():
            made = tmp_path_factory.mktemp("made") / "run"
            main(arguments([*SMALL, "--lambda", "1e-6", "--out", str(made)]))
            made.rename(done)
        return Path(shutil.copytree(done, tmp_path_factory.mktemp("runs") / "done"))


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerating and timing every row takes most of a run, and going on with one is not about that."""
    time_of_each = Latency(1.0, 1.0, 1.0, batch=1, batches=1, hardware="none", threads=1)
    monkeypatch.setattr("slimmed_vgg16._times", lambda job, models, batch: [("dense", time_of_each)] * len(models))


def test_results_hold_every_row_with_its_provenance(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    rows = results["rows"]
    assert [row["stage"] for row in rows[:3]] == ["dense", "slimmed", "finetuned"]
    assert [(row["alpha"], row["beta"]) for row in rows[3:5]] == [(0.5, 1.0), (0.7, 0.7)]
    assert {row["lambda"] for row in rows[2:]} == {1e-6}
    assert [row["execution"] for row in rows[:3]] == ["dense"] * 3
    assert {row["execution"] for row in rows[3:]} <= {"dense", "accelerated"}  # the clock chooses
    assert rows[1]["macs"] < rows[0]["macs"]
    assert (rows[-1]["stage"], rows[-1]["macs_left"], rows[-1]["lambda"]) == ("budget", 0.8, 1e-6)
    assert rows[-1]["macs_saved"] == pytest.approx(0.2, abs=0.02)  # of test images, by thresholds for held-out ones
    assert all(rows[at]["batch_1"]["ms"] > 0 for at in (1, -1))
    for row in rows:
        assert row.keys() >= {"accuracy", "prune_ratio", "macs", "macs_saved", "ms_per_image"}
        assert row["ms_per_image"] > 0
    assert results.keys() >= {"command", "seed", "hardware", "versions", "date"}


def test_figures_table_and_models_are_written(finished: Path) -> None:
    names = {file.name for file in finished.iterdir()}
    assert names >= {"results.txt", "frontier.png", "heatmap.png", "slimmed.safetensors", "finetuned-1e-06.safetensors"}
    assert not any(name.endswith((".draft", ".partial.safetensors", ".pt", ".pkl")) for name in names)


def test_the_slimmed_model_can_be_rebuilt_from_its_file(finished: Path) -> None:
    settings = json.loads((finished / "settings.json").read_text())
    tensors, facts = RunFolder(finished, settings).load("slimmed")
    model = vgg16(tuple(facts["widths"]), 10)
    model.load_state_dict(tensors)
    dense = sum(int(64 * 0.125 * factor) for factor in (1, 1, 2, 2, 4, 4, 4, 8, 8, 8, 8, 8, 8))
    assert sum(facts["widths"]) < 0.85 * dense


@pytest.mark.usefixtures("untimed")
def test_a_finished_run_trains_nothing_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in finished.glob("*.safetensors")}
    main(arguments([*SMALL, "--lambda", "1e-6", "--out", str(finished)]))
    assert {file.name: file.stat().st_mtime_ns for file in finished.glob("*.safetensors")} == before
    assert "[6/6] gate and measure" in capsys.readouterr().out


def test_a_run_of_other_settings_is_refused(finished: Path) -> None:
    with pytest.raises(OtherRunError, match="seed: 0 there, 1 asked"):
        main(arguments([*SMALL, "--lambda", "0", "1e-6", "--seed", "1", "--out", str(finished)]))


def test_a_missing_folder_makes_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected train/"):
        main(arguments(["--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("untimed")
def test_kill_9_loses_at_most_an_epoch(finished: Path, tmp_path: Path) -> None:
    """Killed in the second dense epoch, the run goes on and ends in the same weights, bit for bit."""
    out = tmp_path / "killed"
    options = [*SMALL, "--lambda", "1e-6", "--out", str(out)]
    command = [sys.executable, str(SCRIPT), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 240
        while not (out / "dense.partial.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    assert not (out / "results.json").exists()
    main(arguments(options))
    settings = json.loads((out / "settings.json").read_text())
    for name in ("dense", "slimmed", "finetuned-1e-06"):
        ours, theirs = (RunFolder(folder, settings).load(name)[0] for folder in (out, finished))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    "option",
    ["--lambda -1", "--max-drop -1", "--prune-ratio 1.5", "--batch 0", "--batch 5000", "--size 16", "--seed -1"],
)
def test_wrong_options_are_refused_before_anything_is_made(tmp_path: Path, option: str) -> None:
    with pytest.raises(SettingError):
        main(arguments([*SMALL, "--out", str(tmp_path / "out"), *option.split()]))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("untimed")
def test_further_lambdas_need_no_new_dense_training(finished: Path) -> None:
    before = (finished / "dense.safetensors").stat().st_mtime_ns
    results = main(arguments([*SMALL, "--lambda", "0", "1e-6", "--out", str(finished)]))
    assert (finished / "dense.safetensors").stat().st_mtime_ns == before
    assert (finished / "finetuned-0.0.safetensors").exists()
    assert {row["lambda"] for row in results["rows"][2:]} == {0, 1e-6}


def test_errors_end_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    command = [sys.executable, str(SCRIPT), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
