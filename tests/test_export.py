"""Files for other runtimes against the masked model in PyTorch."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from isw_plugin import CVGate, InstanceWisePruner, MinNorm, RandomGate, export
from isw_plugin.errors import AttachError, MissingExtraError, SettingError, UnsupportedError
from tests.accelerate.nets import Slimmed, attached, images_for, seeded
from tests.conftest import Plain, Tokens, made
from tests.predict.nets import Down, predicted_by_hand, predicting

pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporters about themselves


def in_onnxruntime(file: Path, images: Tensor) -> Tensor:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


def in_openvino(file: Path, images: Tensor) -> Tensor:
    runtime = pytest.importorskip("openvino")
    compiled = runtime.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled(images.numpy())[0])


RUNTIMES = {"onnx": (export.onnx, "m.onnx", in_onnxruntime), "openvino": (export.openvino, "m.xml", in_openvino)}


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> Any:
    for package in ("onnx", "onnxscript", "onnxruntime" if request.param == "onnx" else "openvino"):
        pytest.importorskip(package)
    return RUNTIMES[request.param]


@pytest.mark.parametrize(("kind", "gate"), [(Slimmed, CVGate(0.1, 0.9)), (Tokens, MinNorm(0.45))], ids=["cv", "min"])
def test_a_hundred_images_in_batches_of_any_size(runtime: Any, tmp_path: Path, kind: Any, gate: Any) -> None:
    write, name, run = runtime
    pruner = attached(seeded(kind), images_for(kind()), gate=gate)
    images = images_for(kind(), n=100)
    with torch.no_grad():
        wanted = pruner.model(images)
    pruner.disable()
    assert not torch.allclose(pruner.model(images), wanted)
    file = write(pruner, tmp_path / name)
    assert pruner.enabled is False
    for batch in (slice(0, 100), slice(0, 1), slice(1, 4)):
        torch.testing.assert_close(run(file, images[batch]), wanted[batch], atol=1e-4, rtol=1e-4)
    assert not list(tmp_path.glob(".export-*"))


def test_norms_that_are_predicted(runtime: Any, tmp_path: Path) -> None:
    write, name, run = runtime
    net, pruner = predicting(Down)
    images = net.images(100)
    wanted, _ = predicted_by_hand(made(Down), pruner, images)
    file = write(pruner, tmp_path / name)
    for batch in (slice(0, 100), slice(0, 1)):
        torch.testing.assert_close(run(file, images[batch]), wanted[batch], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_resnet18(runtime: Any, tmp_path: Path) -> None:
    write, name, run = runtime
    torch.manual_seed(0)
    pruner = InstanceWisePruner(timm.create_model("resnet18", num_classes=10).eval(), alpha=0.0, beta=1.0)
    images = torch.randn(4, 3, 64, 64)
    with pruner.gating(), torch.no_grad():
        wanted = pruner.model(images)
    file = write(pruner, tmp_path / name, torch.zeros(1, 3, 64, 64))
    torch.testing.assert_close(run(file, images), wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("write", [export.onnx, export.openvino], ids=["onnx", "openvino"])
def test_an_accelerated_model_is_refused_with_the_way_out(tmp_path: Path, write: Any) -> None:
    pytest.importorskip("openvino")
    fast = attached(seeded(Plain), Plain().images()).accelerate(Plain().images(), backend="gated")
    with pytest.raises(UnsupportedError, match=r"export the pruner that it was made from, .* save_pretrained\(\)"):
        write(fast, tmp_path / ("m.onnx" if write is export.onnx else "m.xml"))
    with pytest.raises(SettingError, match="the pruner of a model is exported, and this is a Plain"):
        write(Plain(), tmp_path / ("m.onnx" if write is export.onnx else "m.xml"))


def test_names_of_files(tmp_path: Path) -> None:
    pruner = attached(seeded(Plain), Plain().images())
    with pytest.raises(SettingError, match=r"ends in \.onnx, such as 'm\.onnx'"):
        export.onnx(pruner, tmp_path / "m.pt")
    with pytest.raises(SettingError, match="does not exist"):
        export.onnx(pruner, tmp_path / "nowhere" / "m.onnx")
    pruner.remove()
    with pytest.raises(AttachError):
        export.onnx(pruner, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", [None, "", 3, b"m.onnx", "a\0.onnx", ".", "/"])
def test_what_names_no_file(file: Any) -> None:
    with pytest.raises(SettingError, match=r"^file="):
        export.onnx(attached(seeded(Plain), Plain().images()), file)


def test_inputs_that_the_model_does_not_take(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    pruner = attached(seeded(Plain), Plain().images())
    with pytest.raises(SettingError, match=r"example_inputs: Plain does not take them: .*channels"):
        export.onnx(pruner, tmp_path / "m.onnx", torch.zeros(1, 5, 8, 8))
    with pytest.raises(SettingError, match="is a shape"):
        export.onnx(pruner, tmp_path / "m.onnx", (1, 3, 8, 8))
    unknown = InstanceWisePruner(seeded(Plain))
    with pytest.raises(AttachError, match="no sites"):
        export.onnx(unknown, tmp_path / "m.onnx", Plain().images())
    assert list(tmp_path.iterdir()) == []


def noisy(feature: Tensor, norms: Tensor) -> Tensor:
    return torch.rand_like(norms) > 0.5


def _differs(self: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
    return [torch.zeros(2, 5)]


@pytest.mark.parametrize("gate", [RandomGate(0.5), noisy], ids=["hashed", "drawn"])
def test_noise_is_refused(tmp_path: Path, gate: Any) -> None:
    pytest.importorskip("onnxscript")
    pruner = attached(seeded(Plain), Plain().images(), gate=gate)
    state = torch.get_rng_state()
    with pytest.raises(UnsupportedError, match=r"draws noise.*MinNorm"):
        export.onnx(pruner, tmp_path / "m.onnx")
    assert torch.equal(torch.get_rng_state(), state)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_gives_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    monkeypatch.setattr(torch.onnx.ONNXProgram, "__call__", _differs)
    with pytest.raises(UnsupportedError, match=r"not give what the masked model gives: .* in onnxruntime"):
        export.onnx(attached(seeded(Plain), Plain().images()), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"onnx(script)? is not installed: pip install 'isw_plugin\[onnx\]'"):
        export.onnx(attached(seeded(Plain), Plain().images()), tmp_path / "m.onnx")
