"""The command line: what it shows, its exit codes, and one line for every bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from isw_cli import gating
from isw_cli.main import app
from isw_plugin import load_accelerated, load_pretrained

NET = """
import torch
from torch import nn
from isw_plugin import InstanceWisePruner

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(8, 3))

def gated():
    pruner = InstanceWisePruner(net(), torch.zeros(1, 3, 16, 16), alpha=0.0, beta=1.0)
    return pruner

def broken():
    raise KeyError("no such width")

def words():
    return "a model"
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model's file and images of three classes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    for label, name in enumerate(("cat", "dog", "fox")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for count in range(6):
            pixels = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(9 * label + count))
            Image.fromarray(pixels.byte().numpy()).save(tmp_path / "data" / name / f"{count}.png")
    return tmp_path


def isw(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    if result.exit_code != code:
        raise AssertionError(f"exit code {result.exit_code}: {result.output} {result.stderr}") from result.exception
    return result


def refused(*arguments: str, code: int = 1) -> str:
    """The one line that is said."""
    result = isw(*arguments, code=code)
    said = [line for line in result.stderr.splitlines() if not line.startswith("warning:")]
    assert len(said) == 1, result.stderr
    assert result.stdout == ""
    return str(said[0])


def test_sites(place: Path) -> None:
    assert "2 sites, 16 channels" in isw("sites", "net.py:net", "--size", "16").stdout
    found = json.loads(isw("sites", "net.py:net", "--size", "16", "--json").stdout)
    assert found["sites"] == {"0": {"channels": 8, "readers": ["2"]}, "2": {"channels": 8, "readers": ["6"]}}
    assert found["left_out"] == {"6": "the model's output"}


def test_gate_from_a_model_to_a_page_and_two_folders(place: Path) -> None:
    images = ("--data", "data", "--size", "16", "--batch", "4")
    found = json.loads(isw("gate", "net.py:net", *images, "--max-drop", "0.49", "--out", "out", "--json").stdout)
    assert found["images"] == 9
    assert found["execution"] in ("accelerated", "dense")
    assert found["verdict"].startswith(("not faster", "1.", "2.", "3."))
    assert sorted(file.name for file in Path("out").iterdir()) == ["fast", "gated", "report"]
    page = Path("out/report/index.html").read_text()
    assert "Accuracy, gates off" in page
    pruner, fast = load_pretrained("out/gated", _net(place)), load_accelerated("out/fast")
    x = torch.randn(4, 3, 16, 16)
    if fast.execution == "accelerated":
        torch.testing.assert_close(fast(x), pruner.model(x), atol=1e-5, rtol=1e-4)
    assert "is not empty" in refused("gate", "net.py:net", *images, "--out", "out")
    isw("gate", "net.py:net", *images, "--max-drop", "0.49", "--out", "out", "--force")
    assert [file.name for file in place.iterdir() if file.name.startswith(".out")] == []
    evaluated = json.loads(isw("evaluate", "out/fast", "--data", "data", "--json").stdout)  # at 16 pixels, as gated
    assert (evaluated["instances"], evaluated["execution"]) == (9, fast.execution)
    if fast.execution == "accelerated":
        assert evaluated["accuracy"] == pytest.approx(found["accuracy"])
    Path("out/fast/images.json").write_text('{"size": 0}')
    assert "images.json is damaged" in refused("evaluate", "out/fast", "--data", "data")


def _net(place: Path) -> torch.nn.Module:
    names: dict[str, Any] = {}
    exec((place / "net.py").read_text(), names)
    return names["net"]()


def test_force_replaces_what_isw_wrote_and_nothing_else(place: Path) -> None:
    images = ("--data", "data", "--size", "16", "--out", "deep/page")
    assert "has no gates" in refused("report", "net.py:net", *images)
    assert not Path("deep").exists()
    isw("report", "net.py:gated", *images)
    before = Path("deep/page/index.html").stat().st_ino
    assert "pass --force" in refused("report", "net.py:gated", *images)
    isw("report", "net.py:gated", *images, "--force")
    assert Path("deep/page/index.html").stat().st_ino != before
    Path("deep/page/thesis.tex").write_text("years")
    assert "holds thesis.tex, which isw did not write" in refused("report", "net.py:gated", *images, "--force")
    assert Path("deep/page/thesis.tex").read_text() == "years"


@pytest.mark.parametrize(
    "name", ["holiday.png", "report/me.png", "gated/net.py", "fast/deeper/index.html", "photos/1.png"]
)
def test_force_never_replaces_what_isw_does_not_write(place: Path, name: str) -> None:
    images = ("--data", "data", "--size", "16", "--out", "page")
    isw("report", "net.py:gated", *images)
    theirs = place / "page" / name
    theirs.parent.mkdir(parents=True, exist_ok=True)
    theirs.write_text("mine")
    assert f"holds {name}, which isw did not write" in refused("report", "net.py:gated", *images, "--force")
    assert theirs.read_text() == "mine"
    assert (place / "page" / "index.html").is_file()


def test_evaluate_and_report_and_export_of_a_gated_model(place: Path) -> None:
    images = ("--data", "data", "--size", "16")
    assert json.loads(isw("evaluate", "net.py:gated", *images, "--json").stdout)["instances"] == 9
    assert Path("net.py").exists()
    isw("report", "net.py:gated", *images, "--out", "page")
    assert Path("page/index.html").is_file()
    pytest.importorskip("onnxscript")
    isw("export", "net.py:gated", "--to", "m.onnx", "--size", "16")
    assert Path("m.onnx").stat().st_size > 1000
    assert "pass --force" in refused("export", "net.py:gated", "--to", "m.onnx")


def test_bench_says_how_fast_or_why_not(place: Path) -> None:
    found = json.loads(isw("bench", "net.py:net", "--size", "16", "--json").stdout)
    assert found["dense"] > 0
    assert re.match(r"not faster|\d+\.\d\d times as fast", found["verdict"])


def test_doctor_says_what_is_here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(isw("doctor", "--json").stdout)
    assert found["torch"] == torch.__version__
    assert found["kernels"] == "loaded"
    monkeypatch.setattr("isw_cli.doctor.load", lambda: False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    result = isw("doctor", code=1)
    assert "missing: compiler: install a C++ compiler" in result.stdout


BAD = {
    "no such model": (("sites", "resnet81"), "did you mean resnet1"),
    "a folder that nothing was saved in": (("sites", "data"), "nothing was saved"),
    "a file without a function": (("sites", "net.py"), "net.py:make"),
    "a file that is not there": (("sites", "gone.py:net"), "gone.py does not exist"),
    "no such function": (("sites", "net.py:nets"), "net.py has no function 'nets'; it has"),
    "a function that fails": (("sites", "net.py:broken"), "broken raised KeyError"),
    "a function that gives words": (("sites", "net.py:words"), "gave a str: it has to return"),
    "no data": (("evaluate", "net.py:net", "--data", "gone"), "--data gone is no folder"),
    "no classes": (("evaluate", "net.py:net", "--data", "data/cat"), "there are images, but not in folders"),
    "an ending": (("export", "net.py:gated", "--to", "m.pt"), "ends in .onnx, or in .xml"),
    "no gates": (("export", "net.py:net", "--to", "m.onnx"), "net.py:net has no gates"),
    "no gates to report": (("report", "net.py:net", "--data", "data", "--size", "16"), "isw gate net.py:net --data"),
    "no weights": (("evaluate", "net.py:net", "--data", "data", "--weights", "gone.pt"), "gone.pt does not exist"),
    "weights that are none": (("evaluate", "net.py:net", "--data", "data", "--weights", "net.py"), "no state_dict"),
    "out is a file": (("gate", "net.py:net", "--data", "data", "--out", "net.py"), "--out net.py is a file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(place: Path, name: str) -> None:
    arguments, words = BAD[name]
    before = sorted(place.rglob("*"))
    assert words in refused(*arguments)
    assert sorted(file for file in place.rglob("*") if "__pycache__" not in str(file)) == before


def test_an_image_that_cannot_be_read_is_named(place: Path) -> None:
    (place / "data" / "dog" / "3.png").write_bytes(b"no picture")
    arguments = ("gate", "net.py:net", "--data", "data", "--size", "16", "--max-drop", "0.49", "--out", "out")
    assert re.search(r"data/dog/3\.png cannot be read as an image .*: mend it or remove it", refused(*arguments))
    assert not (place / "out").exists()
    assert [file.name for file in place.iterdir() if file.name.startswith(".")] == []


def test_a_saved_folder_of_another_version(place: Path) -> None:
    Path("old").mkdir()
    Path("old/pruner.json").write_text('{"version": 0}')
    assert "version 0" in refused("sites", "old")
    Path("fast").mkdir()
    Path("fast/accelerated.json").write_text('{"version": 0}')
    assert "another version" in refused("evaluate", "fast", "--data", "data")


def test_usage_errors_have_their_own_code() -> None:
    assert CliRunner().invoke(app, ["gate"]).exit_code == 2
    assert CliRunner().invoke(app, ["bench", "resnet18", "--batch", "0"]).exit_code == 2


def test_ctrl_c_is_one_line_and_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for step in ("calibrate", "evaluate"):
        monkeypatch.setattr(gating, step, stopped)
        said = refused("gate", "net.py:net", "--data", "data", "--size", "16", "--out", "out", code=130)
        assert said == "isw gate: stopped; nothing was written"
        assert sorted(file.name for file in place.iterdir() if file.name != "__pycache__") == ["data", "net.py"]


def test_a_signal_stops_a_command(place: Path) -> None:
    command = [sys.executable, "-c", "from isw_cli.main import app; app()", "bench", "resnet50"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    time.sleep(4)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in said


def test_help_is_quick_and_knows_no_torch() -> None:
    code = (
        "import sys\nfrom isw_cli.main import app\n"
        "app(['--help'], standalone_mode=False)\nprint('torch' in sys.modules)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    taken = time.perf_counter() - start
    assert done.stdout.splitlines()[-1] == "False"
    for command in ("sites", "gate", "evaluate", "bench", "export", "report", "build", "doctor"):
        assert command in done.stdout
    assert taken < 5  # 0.5 s on a free machine
