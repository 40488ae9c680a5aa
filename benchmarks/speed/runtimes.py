"""A dense network as runtimes prepare it, all in float32 and for the latency of single calls.

OpenVINO and onnxruntime read one ONNX file, which ``torch.onnx.export`` (by torch.export) makes of the network.
"""

import importlib.util
import io
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["RUNTIMES", "exported", "frozen", "installed", "load", "onnx_of"]

_NEEDED = ("onnx", "onnxscript")  # by the export
_Run = Callable[[], Tensor]


def _onnxruntime(model: bytes, images: Tensor, threads: int) -> _Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: images.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def _openvino(model: bytes, images: Tensor, threads: int) -> _Run:
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # or it would take bfloat16 where the processor has it
        "INFERENCE_NUM_THREADS": threads,
    }
    core: Any = openvino.Core()
    compiled = core.compile_model(core.read_model(model), "CPU", settings)
    request, inputs = compiled.create_infer_request(), images.numpy()
    return lambda: torch.from_numpy(request.infer([inputs], share_inputs=True)[0])


RUNTIMES: dict[str, Callable[[bytes, Tensor, int], _Run]] = {"openvino": _openvino, "onnxruntime": _onnxruntime}


def installed() -> list[str]:
    """Runtimes that can be compared here; those of the extra ``benchmarks``."""
    found = [name for name in RUNTIMES if importlib.util.find_spec(name)]
    return found if all(importlib.util.find_spec(name) for name in _NEEDED) else []


def onnx_of(model: nn.Module, images: Tensor) -> bytes:
    """The model on images of this size, serialised."""
    with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()):
        program: Any = torch.onnx.export(model, (images,), dynamo=True, verbose=False)
    serialized: bytes = program.model_proto.SerializeToString()
    return serialized


def exported(model: nn.Module, images: Tensor, folder: Path | None, stem: str) -> bytes:
    """``onnx_of``, kept in a folder under this name."""
    if folder is None:
        return onnx_of(model, images)
    path = folder / f"{stem}.onnx"
    if not path.exists():
        path.write_bytes(onnx_of(model, images))
    return path.read_bytes()


def load(name: str, model: bytes, images: Tensor, threads: int) -> _Run:
    """A function that runs ``model``, an ONNX file's content, on these images by one of RUNTIMES."""
    return RUNTIMES[name](model, images, threads)


def frozen(model: nn.Module, images: Tensor) -> _Run:
    """torch.compile with freezing, of a model and images in channels last."""
    import torch._inductor.config as config

    config.freezing = True
    torch.compiler.reset()
    compiled: Callable[[Tensor], Tensor] = torch.compile(model)
    with torch.no_grad():
        compiled(images)
    return lambda: compiled(images)
