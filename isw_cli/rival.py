"""OpenVINO, where it is installed, beside a fast model: whoever exports would want to know.

onnxruntime is a dense form of `accelerate` itself.
"""

import copy
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from isw_plugin import InstanceWisePruner, ISWError, export
from isw_plugin.accelerate import Accelerated
from isw_plugin.measure import compare

__all__ = ["faster_by_openvino"]

_NEEDED = ("openvino", "onnx", "onnxscript")
_ROUNDS = 15
_SURE = 1.05  # in turns in one process, threads of the one wait for those of the other


def faster_by_openvino(pruner: InstanceWisePruner, fast: Accelerated, images: Tensor, file: Path) -> str:
    """What to say where OpenVINO runs the model without gates faster than `fast`; only there is `file` (.xml) kept."""
    if not all(map(find_spec, _NEEDED)):
        return ""
    try:
        export.openvino(_ungated(pruner, images), file, images)
    except ISWError:  # it cannot be exported: there is nothing to compare
        return ""
    runs: dict[str, Callable[[], object]] = {"ours": partial(fast, images), "openvino": _run(file, images)}
    times = compare(runs, len(images), _ROUNDS, torch.device("cpu"))
    faster = times["ours"].ms_per_image / times["openvino"].ms_per_image
    if faster > _SURE:
        return f". OpenVINO is {faster:.2f} times as fast here: {file.name} is what it runs, without gates"
    for written in (file, file.with_suffix(".bin")):
        written.unlink()
    return ""


def _ungated(pruner: InstanceWisePruner, images: Tensor) -> InstanceWisePruner:
    """Of a copy; a gate of beta 0 keeps all, so it is not in the file."""
    model = copy.deepcopy(pruner.model)
    InstanceWisePruner.of(model).remove()
    return InstanceWisePruner(model, images, beta=0.0)


def _run(file: Path, images: Tensor) -> Callable[[], object]:
    """A call as OpenVINO is advised to be used for single requests, in float32 and with torch's threads."""
    runtime = import_module("openvino")
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = runtime.Core().compile_model(str(file), "CPU", settings).create_infer_request()
    inputs = images.numpy()
    return lambda: request.infer([inputs], share_inputs=True)
