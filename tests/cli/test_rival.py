"""OpenVINO beside a fast model: its file is written where it is faster, and left out everywhere else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isw_cli.rival as rival
from isw_cli.rival import faster_by_openvino
from isw_plugin import InstanceWisePruner
from isw_plugin.errors import UnsupportedError
from isw_plugin.measure import Latency


@pytest.fixture
def gated() -> tuple[InstanceWisePruner, Any, Tensor]:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model, images = nn.Sequential(*layers, nn.Linear(8, 3)).eval(), torch.randn(4, 3, 16, 16)
    pruner = InstanceWisePruner(model, images, alpha=0.0, beta=1.0)
    pruner.step()
    return pruner, model, images


def taking(ours: float, theirs: float) -> Callable[..., dict[str, Latency]]:
    """A clock: milliseconds of either."""
    return lambda runs, *_: {
        name: Latency(ms, ms, ms, batch=4, batches=1, hardware="none", threads=1)
        for name, ms in zip(runs, (ours, theirs), strict=True)
    }


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if OpenVINO were here."""

    def written(pruner: InstanceWisePruner, file: Path, images: Tensor) -> None:
        assert pruner.gate.keeps_all
        for part in (file, file.with_suffix(".bin")):
            part.write_text("of the model without gates")

    monkeypatch.setattr(rival, "find_spec", lambda name: True)
    monkeypatch.setattr(rival.export, "openvino", written)
    monkeypatch.setattr(rival, "_run", lambda file, images: lambda: None)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("theirs", [1.0, 1.95, 3.0])
def test_a_file_is_left_where_openvino_is_surely_faster(
    gated: Any, theirs: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruner, model, images = gated
    monkeypatch.setattr(rival, "compare", taking(2.0, theirs))
    said = faster_by_openvino(pruner, model, images, tmp_path / "dense.xml")
    found = sorted(file.name for file in tmp_path.iterdir())
    if theirs == 1.0:
        assert said == ". OpenVINO is 2.00 times as fast here: dense.xml is what it runs, without gates"
        assert found == ["dense.bin", "dense.xml"]
    else:
        assert (said, found) == ("", [])
    assert pruner.enabled


@pytest.mark.usefixtures("installed")
def test_what_cannot_be_exported_is_not_compared(gated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise UnsupportedError("it branches on values")

    monkeypatch.setattr(rival.export, "openvino", refused)
    assert faster_by_openvino(*gated, tmp_path / "dense.xml") == ""


def test_nothing_is_said_where_openvino_is_not_installed(
    gated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rival, "find_spec", lambda name: None)
    assert faster_by_openvino(*gated, tmp_path / "dense.xml") == ""


@pytest.mark.filterwarnings("ignore")  # of the exporter
def test_the_file_is_the_model_without_gates(gated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    pruner, model, images = gated
    monkeypatch.setattr(rival, "compare", lambda runs, *_: [run() for run in runs.values()] and taking(2, 1)(runs))
    assert faster_by_openvino(pruner, model, images, tmp_path / "dense.xml")
    given = runtime.Core().compile_model(str(tmp_path / "dense.xml"), "CPU")([images.numpy()])[0]
    masked = model(images)
    pruner.disable()
    torch.testing.assert_close(torch.from_numpy(given), model(images).detach(), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(masked, model(images), atol=1e-4)
