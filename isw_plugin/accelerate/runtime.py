"""onnxruntime as one more dense form, where the packages onnx and onnxruntime are installed (extra ``onnxruntime``)."""

import importlib.util
import threading
from typing import Any

import torch
from torch import Tensor, fx

from isw_plugin.accelerate.onnx_graph import onnx_of
from isw_plugin.errors import StateMismatchError

__all__ = ["OnnxRuntime", "is_installed", "require_own"]

_OPERATORS = {  # that onnx_of writes
    *("Add", "AveragePool", "Clip", "Concat", "Conv", "Div", "Gelu", "GlobalAveragePool", "HardSigmoid", "HardSwish"),
    *("Identity", "MatMul", "MaxPool", "Mul", "ReduceMean", "Relu", "Reshape", "Sigmoid", "Sub", "Tanh", "Transpose"),
}


def is_installed() -> bool:
    """Whether dense forms can run by onnxruntime here."""
    return all(importlib.util.find_spec(name) is not None for name in ("onnx", "onnxruntime"))


class OnnxRuntime:
    """A function of flat float32 CPU tensors, by onnxruntime with as many threads as torch has at the call.

    May be called from many threads. A copy makes a session of its own.
    """

    def __init__(self, source: fx.GraphModule | bytes) -> None:
        """``source`` is what ``onnx_of`` takes, or what it gave.

        Raises:
            UnsupportedError: It cannot be written as ONNX.
        """
        self._source = source
        self._lock = threading.Lock()
        self._threads = 0
        self._session: Any = None
        self._ready()

    def __call__(self, *inputs: Any) -> list[Tensor]:
        """The graph's outputs."""
        session = self._ready()
        names = [each.name for each in session.get_inputs()]
        arrays = [each.detach().contiguous().numpy() for each in inputs if isinstance(each, Tensor)]
        return [torch.from_numpy(given) for given in session.run(None, dict(zip(names, arrays, strict=True)))]

    def _ready(self) -> Any:
        """The session; another one where the number of threads changed."""
        threads = torch.get_num_threads()
        with self._lock:
            if self._session is None or self._threads != threads:
                self._session, self._threads = _session(self.model(), threads), threads
            return self._session

    def model(self) -> bytes:
        """As ONNX."""
        return self._source if isinstance(self._source, bytes) else onnx_of(self._source)

    def __getstate__(self) -> dict[str, Any]:
        return {"_source": self.model()}  # a pickled graph forgets sizes and types of its values

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_lock": threading.Lock(), "_threads": 0, "_session": None}


def _session(model: bytes, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def require_own(content: bytes) -> None:
    """Refuse ONNX from a file that holds what ``onnx_of`` does not write: other operators or files, functions, graphs.

    Raises:
        StateMismatchError: It does.
    """
    import onnx

    model = onnx.load_from_string(content)  # looks at no other file
    graph, nodes = model.graph, model.graph.node
    is_own = (
        _has_only(model, "ir_version opset_import graph")
        and _has_only(graph, "node name initializer input output")
        and all(_has_only(node, "input output op_type attribute") and node.op_type in _OPERATORS for node in nodes)
        and all(_has_only(each, "name type f i ints") for node in nodes for each in node.attribute)
        and all(_has_only(tensor, "dims data_type name raw_data") for tensor in graph.initializer)
    )
    if not is_own:
        raise StateMismatchError(
            "its ONNX model holds what this isw_plugin does not write: save the accelerated model anew, or load it "
            "with the version that saved it"
        )


def _has_only(message: Any, fields: str) -> bool:
    return {field.name for field, _ in message.ListFields()} <= set(fields.split())
