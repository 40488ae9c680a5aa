"""The masked model for other runtimes: ONNX and OpenVINO files with any number of instances.

Gates act in them as they do in PyTorch, by zeros: dropped channels are computed. What skips them is
``InstanceWisePruner.accelerate``, whose kernels these runtimes do not have.
"""

import inspect
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from isw_plugin.accelerate import Accelerated, LoadedModel
from isw_plugin.accelerate.acceleration import masked_copy
from isw_plugin.errors import MissingExtraError, SettingError, UnsupportedError
from isw_plugin.inputs import arguments
from isw_plugin.pruner import InstanceWisePruner
from isw_plugin.sites import Inputs

__all__ = ["onnx", "openvino"]

_INSTANCES = 2  # export takes one for a constant


def onnx(pruner: InstanceWisePruner, file: str | os.PathLike[str], example_inputs: Inputs | None = None) -> Path:
    """Write the masked model, gates on at their present thresholds, as ONNX.

    Args:
        pruner: Of the model; copied, not changed.
        file: Ends in ``.onnx``; replaced at once.
        example_inputs: What forward takes, of the size that will run. None: that of the inputs the sites were found on.

    Returns:
        The file's path. Axis 0 of every input is any number of instances.

    Raises:
        SettingError: No pruner, or another ending.
        UnsupportedError: The model cannot be exported, or is accelerated.
        MissingExtraError: onnx or onnxscript is not installed (``isw_plugin[onnx]``).
    """
    path = _path(file, ".onnx")
    program = _program(pruner, example_inputs)
    with _whole(path) as draft:
        program.save(str(draft), external_data=False)
    return path


def openvino(pruner: InstanceWisePruner, file: str | os.PathLike[str], example_inputs: Inputs | None = None) -> Path:
    """Write the masked model, gates on at their present thresholds, for OpenVINO: ``.xml``, and ``.bin`` beside it.

    Args:
        pruner, example_inputs: As for ``onnx``.
        file: Ends in ``.xml``.

    Returns:
        The file's path. Weights keep their type.

    Raises:
        SettingError, UnsupportedError: As ``onnx``.
        MissingExtraError: openvino, onnx or onnxscript is not installed (``isw_plugin[openvino]``).
    """
    path = _path(file, ".xml")
    runtime = _imported("openvino", "openvino")
    program = _program(pruner, example_inputs)
    with tempfile.TemporaryDirectory() as folder:
        program.save(f"{folder}/model.onnx", external_data=False)
        model = runtime.convert_model(f"{folder}/model.onnx")
    with _whole(path) as draft:
        runtime.save_model(model, str(draft), compress_to_fp16=False)
        draft.with_suffix(".bin").replace(path.with_suffix(".bin"))
    return path


def _path(file: str | os.PathLike[str], ending: str) -> Path:
    path = Path(file)
    if path.suffix != ending:
        raise SettingError(
            f"file={str(file)!r}: a name that ends in {ending}, such as {path.with_suffix(ending).name!r}"
        )
    if not path.parent.is_dir():
        raise SettingError(f"file={str(file)!r}: the folder {path.parent} does not exist")
    return path


def _program(pruner: Any, example_inputs: Inputs | None) -> Any:
    """Of torch's exporter."""
    if isinstance(pruner, Accelerated | LoadedModel):
        raise UnsupportedError(
            "an accelerated model runs kernels that no other runtime has: export the pruner that it was made from, "
            "which masks; or save_pretrained() the accelerated one for load_accelerated"
        )
    if not isinstance(pruner, InstanceWisePruner):
        raise SettingError(f"the pruner of a model is exported, and this is a {type(pruner).__name__}")
    for package in ("onnx", "onnxscript"):
        _imported(package, "onnx")
    pruner._require_attached()
    inputs = example_inputs if example_inputs is not None else pruner._settings.inputs
    args, kwargs = arguments(pytree.tree_map_only(Tensor, _example, inputs))
    shapes = pytree.tree_map(_shape, (args, kwargs))
    model = masked_copy(pruner.model).cpu()
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            program = torch.export.export(model, args, kwargs, dynamic_shapes=_by_name(model.forward, *shapes))
            table: Any = {torch.ops.aten.sort.stable: _sort}
            return torch.onnx.export(program, dynamo=True, verbose=False, custom_translation_table=table)
    except Exception as error:
        raise UnsupportedError(f"{type(model).__name__} cannot be exported: {_reason(error)}") from error


def _sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """``aten.sort.stable``, which torch's exporter lacks: TopK, too, puts the first of equals first."""
    from onnxscript import opset18 as op

    everything = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
    return op.TopK(x, everything, axis=dim, largest=int(descending), sorted=1)


def _reason(error: BaseException) -> str:
    """The first line of what an error comes from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error) or type(error).__name__).splitlines()[0]


def _example(tensor: Tensor) -> Tensor:
    return torch.zeros((_INSTANCES, *tensor.shape[1:]) if tensor.dim() else (), dtype=tensor.dtype)


def _shape(leaf: object) -> dict[int, Any] | None:
    return {0: torch.export.Dim.DYNAMIC} if isinstance(leaf, Tensor) and leaf.dim() else None


def _by_name(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(inspect.signature(forward).bind(*args, **kwargs).arguments)


def _imported(package: str, extra: str) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):
            return import_module(package)
    except ImportError as error:
        raise MissingExtraError(f"{package} is not installed: pip install 'isw_plugin[{extra}]'") from error


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A draft beside the file that takes its place when all went well."""
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
        draft = Path(folder) / path.name
        yield draft
        draft.replace(path)
