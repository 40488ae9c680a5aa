"""onnxruntime as a dense form: what it computes, when it is taken, and what is left where it cannot be."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isw_plugin import InstanceWisePruner, export, load_accelerated
from isw_plugin.accelerate import choose, plan, runtime, saved
from isw_plugin.accelerate.accelerated import Accelerated
from isw_plugin.accelerate.runtime import OnnxRuntime, is_installed, require_own
from isw_plugin.errors import StateMismatchError, UnsupportedError
from tests.accelerate.nets import assert_close

pytestmark = pytest.mark.skipif(not is_installed(), reason="onnx and onnxruntime are not installed")


@pytest.fixture(autouse=True)
def with_runtime(only_pytorch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every dense copy runs by it where it can: the last form is the fastest."""
    monkeypatch.setattr(plan, "is_installed", lambda: True)
    monkeypatch.setattr(choose, "_medians", lambda rounds: [3.0, 3.0, 2.0, 2.0, 1.0][-len(rounds[0]) :])


def dense(model: nn.Module, images: Tensor) -> Accelerated:
    torch.manual_seed(0)
    return InstanceWisePruner(model.eval(), images[:1], alpha=0.0, beta=1.0).accelerate(images, backend="dense")


class Net(nn.Module):
    """Two layers around a function of maps."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Conv2d(3, 8, 3, padding=1), nn.LazyConv2d(6, 3, stride=2), function
        self(torch.zeros(1, 3, 12, 12))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x))).mean((2, 3))


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu6": lambda x: F.relu6(x * 9),
    "silu": F.silu,
    "silu behind a sum": lambda x: F.silu(x + 1),
    "gelu": F.gelu,
    "hardswish, hardsigmoid": lambda x: F.hardswish(x) * F.hardsigmoid(x),
    "clamp": lambda x: (2 * x).clamp(-1, 2),
    "sigmoid, tanh": lambda x: x.sigmoid() * x.tanh() - x / 3,
    "max pool": lambda x: F.max_pool2d(x.relu(), 3, 2, 1),
    "average pool": lambda x: F.avg_pool2d(x.relu(), 2),
    "padded average pool": lambda x: F.avg_pool2d(x.relu(), 3, 2, 1),
    "squeeze-excite": lambda x: x * F.adaptive_avg_pool2d(x, 1).sigmoid(),
    "concatenation": lambda x: torch.cat([x, x.relu()], 1),
    "shuffle": lambda x: x.view(-1, 2, 4, 12, 12).transpose(1, 2).reshape(-1, 8, 12, 12),
    "softplus": F.softplus,
}
ELSEWHERE = ("shuffle", "softplus")  # what has no writer runs by PyTorch


@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_gives_what_the_model_does(name: str) -> None:
    model, images = Net(FUNCTIONS[name]), torch.randn(3, 3, 12, 12)
    fast = dense(model, images)
    assert (fast.execution, fast.fitted.runtime == "PyTorch") == ("dense", name in ELSEWHERE)
    for held in fast.plans.values():
        if held.runtime is not None:
            require_own(held.runtime.model())
    for batch in (images, images[:1], torch.randn(5, 3, 12, 12).to(memory_format=torch.channels_last)):
        assert_close(fast(batch), model(batch))


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "tf_efficientnet_lite0"])
def test_whole_networks(name: str) -> None:
    model, images = timm.create_model(name, num_classes=5), torch.randn(2, 3, 64, 64)
    fast = dense(model, images)
    assert fast.fitted.runtime == "onnxruntime"
    assert "best dense form, by onnxruntime," not in fast.summary()  # nothing was compared
    assert_close(fast(images), model(images))
    larger = torch.randn(1, 3, 96, 96)
    assert_close(fast(larger), model(larger))  # a graph made later runs by it too
    assert all(isinstance(held.run, OnnxRuntime) for held in fast.plans.values())
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert_close(twin(images), model(images))
        assert isinstance(next(iter(twin.plans.values())).run, OnnxRuntime)


def test_gates_that_lose_to_it_are_not_taken() -> None:
    model, images = Net(F.relu), torch.randn(3, 3, 12, 12)
    pruner = InstanceWisePruner(model.eval(), images[:1], alpha=0.0, beta=1.0)
    fast = pruner.accelerate(images)
    assert (fast.execution, fast.fitted.runtime) == ("dense", "onnxruntime")
    assert "best dense form, by onnxruntime, 1000.00 ms" in fast.summary()
    with torch.no_grad():
        assert_close(fast(images), model(images))  # gates are off in the model, too
    gated = pruner.accelerate(images, backend="gated")
    assert gated.execution == "accelerated"
    assert "onnxruntime" in gated.summary()


def test_half_types_run_by_pytorch() -> None:
    model, images = Net(F.relu).bfloat16(), torch.randn(3, 3, 12, 12).bfloat16()
    assert dense(model, images).fitted.runtime == "PyTorch"


def test_threads_follow_torch() -> None:
    fast = dense(Net(F.relu), torch.randn(3, 3, 12, 12))
    run = next(iter(fast.plans.values())).run
    assert isinstance(run, OnnxRuntime)
    held = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            fast(torch.randn(3, 3, 12, 12))
            assert run._session.get_session_options().intra_op_num_threads == threads
    finally:
        torch.set_num_threads(held)


@pytest.mark.filterwarnings("ignore:the saved model was fastest by onnxruntime")
@pytest.mark.parametrize("installed", [True, False])
def test_a_saved_model_runs_by_it_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    images = torch.randn(2, 3, 12, 12)
    fast = dense(Net(FUNCTIONS["silu"]), images)
    fast.save_pretrained(tmp_path)
    monkeypatch.setattr(saved, "is_installed", lambda: installed)
    again = load_accelerated(tmp_path)
    assert [plan.runtime is not None for _, plan in again._graphs] == [installed]
    assert_close(again(images), fast(images))


def test_a_runtime_that_is_gone_is_told_at_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense(Net(FUNCTIONS["silu"]), torch.randn(2, 3, 12, 12)).save_pretrained(tmp_path)
    monkeypatch.setattr(saved, "is_installed", lambda: False)
    with pytest.warns(RuntimeWarning, match="onnxruntime, which is not installed here"):
        load_accelerated(tmp_path)


def test_a_runtime_that_fails_is_told_at_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, images = dense(Net(FUNCTIONS["silu"]), torch.randn(2, 3, 12, 12)), torch.randn(2, 3, 12, 12)
    wanted = fast(images)
    fast.save_pretrained(tmp_path)

    def old(model: bytes, threads: int) -> None:
        raise RuntimeError("Unsupported model IR version")

    monkeypatch.setattr(runtime, "_session", old)
    with pytest.warns(RuntimeWarning, match="cannot run it here .*IR version.*: it runs by PyTorch"):
        again = load_accelerated(tmp_path)
    assert_close(again(images), wanted)


def as_custom(model: Any) -> None:
    model.graph.node[0].domain = "com.microsoft"


def as_other(model: Any) -> None:
    model.graph.node[0].op_type = "Erf"


def as_external(model: Any) -> None:
    tensor = model.graph.initializer[0]
    tensor.external_data.add(key="location", value="../weights.bin")
    tensor.data_location = tensor.EXTERNAL


def as_nested(model: Any) -> None:
    model.graph.node[0].attribute.add(name="body").g.name = "body"


def as_function(model: Any) -> None:
    model.functions.add(name="Conv")


@pytest.mark.parametrize("change", [as_custom, as_other, as_external, as_nested, as_function])
def test_onnx_that_is_not_ours_is_refused_at_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]
) -> None:
    import onnx

    def changed(self: OnnxRuntime) -> bytes:
        model = onnx.load_from_string(written(self))
        change(model)
        return bytes(model.SerializeToString())

    fast, written = dense(Net(F.relu), torch.randn(2, 3, 12, 12)), OnnxRuntime.model
    with monkeypatch.context() as patch:
        patch.setattr(OnnxRuntime, "model", changed)
        fast.save_pretrained(tmp_path)
    with pytest.raises(StateMismatchError, match="ONNX model holds what this isw_plugin does not write: save"):
        load_accelerated(tmp_path)


def test_what_it_runs_is_a_file(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    fast, x = dense(Net(FUNCTIONS["silu"]), torch.randn(2, 3, 12, 12)), torch.randn(5, 3, 12, 12)
    fast.save_pretrained(tmp_path / "fast")
    for name, source in (("fast.onnx", fast), ("loaded.onnx", load_accelerated(tmp_path / "fast"))):
        session = onnxruntime.InferenceSession(export.onnx(source, tmp_path / name))
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_close(torch.from_numpy(found), fast(x))


def test_what_our_kernels_run_is_none(tmp_path: Path) -> None:
    model, images = Net(F.relu), torch.randn(3, 3, 12, 12)
    gated = InstanceWisePruner(model.eval(), images[:1], alpha=0.0, beta=1.0).accelerate(images, backend="gated")
    with pytest.raises(UnsupportedError, match="runs kernels that no other runtime has: export the pruner"):
        export.onnx(gated, tmp_path / "gated.onnx")
    assert list(tmp_path.iterdir()) == []
