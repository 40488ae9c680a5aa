"""The command line: what it shows, its exit codes, and one line for every bad input."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

from isw_cli import gating
from isw_cli.data import Images, images_in, keep_preparation, preparation
from isw_cli.errors import InputError
from isw_cli.main import app
from isw_plugin import InstanceWisePruner, load_accelerated, load_pretrained
from isw_plugin.accelerate import Accelerated
from isw_plugin.errors import UnsupportedError

NET = """
import torch
from torch import nn
from isw_plugin import InstanceWisePruner, MinNorm

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(8, 3))

def gated():
    pruner = InstanceWisePruner(net(), torch.zeros(1, 3, 16, 16), alpha=0.0, beta=1.0)
    return pruner

def own():
    return InstanceWisePruner(net(), torch.zeros(1, 3, 16, 16), alpha=0.1, per_site={"0": {"beta": 0.3}})

def ratio():
    return InstanceWisePruner(net(), torch.zeros(1, 3, 16, 16), gate=MinNorm(0.5))

def wide():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1000))

def fixed():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1568, 3))

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
    for model in ("net.py:net", "net.py:gated"):  # whose own gates give way
        read = json.loads(isw("evaluate", "out/gated", "--model", model, "--data", "data", "--json").stdout)
        assert read["accuracy"] == pytest.approx(found["accuracy"])
        assert read["prune_ratio"] == pytest.approx(found["prune_ratio"])
    assert "--model file.py:function" in refused("sites", "out/gated")
    assert "needs none: leave it out" in refused("sites", "out/fast", "--model", "net.py:net")
    Path("data/dog").rename("data/wolf")
    assert "was gated on other classes than data holds (dog, wolf differ)" in refused(
        "evaluate", "out/fast", "--data", "data"
    )
    Path("out/fast/images.json").write_text('{"size": 0}')
    assert "images.json is damaged" in refused("evaluate", "out/fast", "--data", "data")


def test_gate_chooses_what_runs_on_held_out_images(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, accelerate = [], InstanceWisePruner.accelerate
    monkeypatch.setattr(InstanceWisePruner, "accelerate", lambda self, x: given.append(x) or accelerate(self, x))
    isw("gate", "net.py:net", "--data", "data", "--size", "16", "--batch", "4", "--max-drop", "0.49", "--out", "out")
    held_out, reported = images_in(place / "data", preparation(torch.nn.Identity(), 16), 4, 1000)
    torch.testing.assert_close(given, [next(iter(held_out))[0]])
    assert not set(held_out.files) & set(reported.files)


def test_a_fast_model_that_cannot_be_saved_costs_nothing_else(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(self: Accelerated, folder: Path) -> None:
        raise UnsupportedError("its graph holds a Turing machine")

    monkeypatch.setattr(Accelerated, "save_pretrained", save)
    arguments = ("gate", "net.py:net", "--data", "data", "--size", "16", "--max-drop", "0.49", "--out", "out", "--json")
    found = json.loads(isw(*arguments).stdout)
    assert found["verdict"].endswith("; it was not saved: its graph holds a Turing machine")
    assert found["wrote"] == ["report/index.html", "gated"]
    assert sorted(file.name for file in Path("out").iterdir()) == ["gated", "report"]
    assert "a Turing machine" in Path("out/report/index.html").read_text()


def test_where_onnxruntime_is_the_fastest_its_file_is_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = pytest.importorskip("onnxruntime")
    accelerate = InstanceWisePruner.accelerate
    monkeypatch.setattr("isw_plugin.accelerate.plan.is_installed", lambda: True)
    monkeypatch.setattr("isw_cli.gating.faster_by_openvino", lambda *_: "")
    monkeypatch.setattr("isw_plugin.accelerate.choose._medians", lambda rounds: [3.0, 2.0, 1.0][-len(rounds[0]) :])
    monkeypatch.setattr(InstanceWisePruner, "accelerate", lambda self, x: accelerate(self, x, backend="dense"))
    arguments = ("gate", "net.py:net", "--data", "data", "--size", "16", "--max-drop", "0.49", "--out", "out", "--json")
    found = json.loads(isw(*arguments).stdout)
    assert found["verdict"].endswith(". Without gates onnxruntime is the fastest here: dense.onnx is what it runs")
    assert found["wrote"] == ["report/index.html", "gated", "fast", "dense.onnx"]
    session, x = runtime.InferenceSession("out/dense.onnx"), torch.randn(3, 3, 16, 16)
    (outputs,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(outputs), _net(place).eval()(x).detach(), atol=1e-5, rtol=1e-4)
    assert "no gates" in isw("export", "out/fast", "--to", "again.onnx").stdout
    assert Path("again.onnx").read_bytes() == Path("out/dense.onnx").read_bytes()
    monkeypatch.setattr("isw_cli.gating.faster_by_openvino", lambda *_: ". OpenVINO is the fastest")  # of both
    found = json.loads(isw(*arguments, "--force").stdout)
    assert (found["verdict"].count("fastest"), found["wrote"][-1]) == (1, "fast")


def test_where_openvino_is_the_fastest_its_file_is_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says = ". OpenVINO is 2.00 times as fast here: dense.xml is what it runs, without gates"
    monkeypatch.setattr(
        "isw_cli.gating.faster_by_openvino",
        lambda *given: [f.write_text("of it") for f in (given[-1], given[-1].with_suffix(".bin"))] and says,
    )
    arguments = ("gate", "net.py:net", "--data", "data", "--size", "16", "--max-drop", "0.49", "--out", "out", "--json")
    found = json.loads(isw(*arguments).stdout)
    assert found["verdict"].endswith(says)
    assert found["wrote"][-1] == "dense.xml"
    assert says in Path("out/report/index.html").read_text()
    isw(*arguments, "--force")


def test_images_are_prepared_as_timm_does(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet")
    picture = Image.fromarray(torch.randint(0, 256, (180, 240, 3)).byte().numpy())
    prepare = preparation(model, None)
    declared = timm.data.resolve_model_data_config(model)
    wanted = timm.data.create_transform(**declared)(picture)
    assert (declared["crop_pct"], prepare.crop_pct) == (0.95, 0.95)
    torch.testing.assert_close(prepare(picture), wanted, atol=0, rtol=0)
    keep_preparation(tmp_path, Images((), (), ("cat", "dog"), prepare, 1))
    kept = preparation(torch.nn.Identity(), None, tmp_path)
    assert kept.classes == ["cat", "dog"]
    torch.testing.assert_close(kept(picture), wanted, atol=0, rtol=0)
    facts = json.loads((tmp_path / "images.json").read_text())
    for name, value in (("crop_pct", 0), ("crop_mode", "shear"), ("interpolation", "magic")):
        (tmp_path / "images.json").write_text(json.dumps(facts | {name: value}))
        with pytest.raises(InputError, match="is damaged"):
            preparation(torch.nn.Identity(), None, tmp_path)


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


def test_bench_times_the_gates_that_were_asked_for(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(self: InstanceWisePruner, inputs: torch.Tensor) -> None:
        raise InputError(f"{self.gate} {self.per_site}")

    monkeypatch.setattr(InstanceWisePruner, "accelerate", seen)
    own = ("bench", "net.py:own", "--size", "16")
    assert refused(*own) == "isw bench: CVGate(alpha=0.1, beta=1.0) {'0': {'beta': 0.3}}"
    assert refused(*own, "--alpha", "0.4") == "isw bench: CVGate(alpha=0.4, beta=1.0) {'0': {'beta': 0.3}}"
    assert refused(*own, "--beta", "0.5") == "isw bench: CVGate(alpha=0.1, beta=0.5) {}"
    assert refused("bench", "net.py:net", "--size", "16") == "isw bench: CVGate(alpha=0.0, beta=1.0) {}"
    said = refused("bench", "net.py:ratio", "--size", "16", "--alpha", "0.1")
    assert "--alpha: the model's gates are MinNorm(ratio=0.5), which has none" in said


def test_doctor_says_what_is_here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(isw("doctor", "--json").stdout)
    assert found["torch"] == torch.__version__
    assert found["kernels"] == "loaded"
    assert re.fullmatch(r"onnx \S+, onnxruntime \S+", found["onnxruntime"])
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
    "weights in a folder": (
        ("evaluate", "net.py:net", "--data", "data", "--weights", "data"),
        "data is a folder: name",
    ),
    "weights that are none": (("evaluate", "net.py:net", "--data", "data", "--weights", "net.py"), "no state_dict"),
    "other classes": (("evaluate", "net.py:wide", "--data", "data", "--size", "16"), "1000 outputs and data 3 classes"),
    "another side": (("gate", "net.py:fixed", "--data", "data", "--size", "8"), "does not run on images of 8 x 8"),
    "an architecture for none": (("sites", "net.py:net", "--model", "net.py:net"), "--model net.py:net is for a saved"),
    "an architecture that is none": (("sites", "data", "--model", "net"), "--model net: name a function"),
    "out in a file": (("gate", "net.py:net", "--data", "data", "--out", "net.py/out"), "nothing can be written in"),
    "out where none can write": (
        ("gate", "net.py:net", "--data", "data", "--out", "/proc/out"),
        "--out /proc/out: nothing",
    ),
    "a file where none can write": (
        ("export", "net.py:gated", "--to", "/proc/m.onnx"),
        "nothing can be written in /proc",
    ),
    "out is a file": (("gate", "net.py:net", "--data", "data", "--out", "net.py"), "--out net.py is a file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(place: Path, name: str) -> None:
    arguments, words = BAD[name]
    before = sorted(place.rglob("*"))
    assert words in refused(*arguments)
    assert sorted(file for file in place.rglob("*") if "__pycache__" not in str(file)) == before


WEIGHTS = {
    "empty.pt": (lambda file: file.touch(), "the file is empty: copy or download it again"),
    "torn.pt": (lambda file: file.write_bytes(b"torn"), "damaged, or no state_dict: copy or download it again"),
    "code.pt": (
        lambda file: torch.save(_net(file.parent), file),
        "or write it by torch.save(model.state_dict(), FILE)",
    ),
    "torn.safetensors": (lambda file: file.write_bytes(b"torn"), "damaged, or no safetensors file: copy"),
    "list.pt": (lambda file: torch.save([1.0], file), "holds no state_dict: write one by torch.save"),
    "other.pt": (
        lambda file: torch.save({"0.weight": torch.zeros(2), "fc.bias": torch.zeros(2)}, file),
        "does not fit the model: it lacks 0.bias, 2.weight, 2.bias and 2 more; the model lacks fc.bias; "
        "0.weight is (2,) there and (8, 3, 3, 3) here: name the model that it was saved from",
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_cannot_be_used(place: Path, name: str) -> None:
    write, words = WEIGHTS[name]
    write(place / name)
    said = refused("evaluate", "net.py:net", "--data", "data", "--weights", name)
    assert words in said
    assert "weights_only" not in said


def test_an_image_that_cannot_be_read_is_named(place: Path) -> None:
    (place / "data" / "dog" / "3.png").write_bytes(b"no picture")
    arguments = ("gate", "net.py:net", "--data", "data", "--size", "16", "--max-drop", "0.49", "--out", "out")
    assert re.search(r"data/dog/3\.png cannot be read as an image .*: mend it or remove it", refused(*arguments))
    assert not (place / "out").exists()
    assert [file.name for file in place.iterdir() if file.name.startswith(".")] == []


def test_a_saved_folder_of_another_version(place: Path) -> None:
    Path("old").mkdir()
    Path("old/pruner.json").write_text('{"version": 0}')
    said = refused("sites", "old")
    assert "version 0" in said
    assert "--model" not in said
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


def test_what_no_memory_holds_is_one_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: InstanceWisePruner, inputs: torch.Tensor) -> None:
        torch.empty(1 << 60)

    monkeypatch.setattr(InstanceWisePruner, "accelerate", full)
    assert refused("bench", "net.py:net", "--size", "16") == (
        "isw bench: not enough memory: take a smaller --batch, --size or model"
    )


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
