"""The masked model for other runtimes: ONNX and OpenVINO files with any number of instances.

Gates act in them as they do in PyTorch, by zeros: dropped channels are computed. What skips them is
``InstanceWisePruner.accelerate``, whose kernels these runtimes do not have. Where onnxruntime was seen to be faster
than skipping, the accelerated model runs by it, without gates: that form is a file, too.
"""

import inspect
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from isw_plugin.accelerate import Accelerated, LoadedModel
from isw_plugin.accelerate.acceleration import masked_copy
from isw_plugin.accelerate.agreement import Outcome, difference, tolerance_of
from isw_plugin.errors import ISWError, MissingExtraError, SettingError, UnsupportedError
from isw_plugin.folders import path_of
from isw_plugin.gates import RandomGate
from isw_plugin.hooks import memory_of
from isw_plugin.inputs import arguments, call
from isw_plugin.pruner import InstanceWisePruner
from isw_plugin.sites import Inputs
from isw_plugin.values import check_inputs

__all__ = ["onnx", "openvino"]

_INSTANCES = 2  # export takes one for a constant
_DRAWS = 3


_Source: TypeAlias = InstanceWisePruner | Accelerated | LoadedModel


def onnx(pruner: _Source, file: str | os.PathLike[str], example_inputs: Inputs | None = None) -> Path:
    """Write the masked model, gates on at their present thresholds, as ONNX.

    Args:
        pruner: Of the model; copied, not changed. Or an accelerated model that runs dense by onnxruntime: what that
            runs is written, with all channels.
        file: Ends in ``.onnx``; replaced at once.
        example_inputs: What forward takes, of the size that will run. None: that of the inputs the sites were found on.

    Returns:
        The file's path. Axis 0 of every input is any number of instances.

    Raises:
        SettingError: No pruner, no name of such a file, or inputs that the model does not take.
        UnsupportedError: The model cannot be exported, is accelerated by kernels of ours or draws noise (RandomGate);
            or the file does not give what the masked model gives for two instances of noise, which is compared where
            onnxruntime is installed, and not where it is not.
        AttachError: The pruner was removed, or its sites are not known yet.
        MissingExtraError: onnx or onnxscript is not installed (``isw_plugin[onnx]``).
    """
    path = _path(file, ".onnx")
    content = _content(pruner, example_inputs)
    with _whole(path) as draft:
        draft.write_bytes(content)
    return path


def openvino(pruner: _Source, file: str | os.PathLike[str], example_inputs: Inputs | None = None) -> Path:
    """Write the masked model, gates on at their present thresholds, for OpenVINO: ``.xml``, and ``.bin`` beside it.

    Args:
        pruner, example_inputs: As for ``onnx``.
        file: Ends in ``.xml``.

    Returns:
        The file's path. Weights keep their type.

    Raises:
        SettingError, UnsupportedError, AttachError: As ``onnx``, whose file it is made from.
        MissingExtraError: openvino, onnx or onnxscript is not installed (``isw_plugin[openvino]``).
    """
    path = _path(file, ".xml")
    runtime = _imported("openvino", "openvino")
    content = _content(pruner, example_inputs)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model.onnx").write_bytes(content)
        model = runtime.convert_model(f"{folder}/model.onnx")
    with _whole(path) as draft:
        runtime.save_model(model, str(draft), compress_to_fp16=False)
        draft.with_suffix(".bin").replace(path.with_suffix(".bin"))
    return path


def _path(file: str | os.PathLike[str], ending: str) -> Path:
    path = path_of(file, "file", f"m{ending}")
    if path.suffix != ending or path.is_dir():
        raise SettingError(f"file={str(file)!r}: a file's name that ends in {ending}, such as {path.stem + ending!r}")
    if not path.parent.is_dir():
        raise SettingError(f"file={str(file)!r}: the folder {path.parent} does not exist")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise SettingError(f"file={str(file)!r}: nothing can be written in {path.parent}: {error.strerror}") from error
    return path


def _content(source: Any, example_inputs: Inputs | None) -> bytes:
    """As ONNX."""
    if isinstance(source, Accelerated | LoadedModel):
        return _dense(source)
    written: bytes = _program(source, example_inputs).model_proto.SerializeToString()
    return written


def _dense(fast: Accelerated | LoadedModel) -> bytes:
    """What onnxruntime runs of an accelerated model."""
    plans = [*fast.plans.values()] if isinstance(fast, Accelerated) else [plan for _, plan in fast._graphs]
    found = next((plan.runtime for plan in plans if plan.runtime is not None), None)
    if found is None:
        raise UnsupportedError(
            "an accelerated model runs kernels that no other runtime has: export the pruner that it was made from, "
            "which masks; or save_pretrained() the accelerated one for load_accelerated"
        )
    return found.model()


def _program(pruner: Any, example_inputs: Inputs | None) -> Any:
    """Of torch's exporter."""
    if not isinstance(pruner, InstanceWisePruner):
        raise SettingError(f"the pruner of a model is exported, and this is a {type(pruner).__name__}")
    check_inputs(example_inputs)
    pruner._require_attached()
    pruner.sites  # noqa: B018  # raises where they are not known yet
    for package in ("onnx", "onnxscript"):
        _imported(package, "onnx")
    inputs = example_inputs if example_inputs is not None else pruner._settings.inputs
    model = masked_copy(pruner.model).cpu()
    _require_no_noise(model, inputs)
    args, kwargs = arguments(_drawn(inputs))
    program = _exported(model, args, kwargs)
    _require_same(program, model, inputs)
    return program


def _exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    shapes = pytree.tree_map(_shape, (args, kwargs))
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            program = torch.export.export(model, args, kwargs, dynamic_shapes=_by_name(model.forward, *shapes))
            table: Any = {torch.ops.aten.sort.stable: _sort}
            return torch.onnx.export(program, dynamo=True, verbose=False, custom_translation_table=table)
    except Exception as error:
        raise UnsupportedError(f"{type(model).__name__} cannot be exported: {_reason(error)}") from error


def _require_no_noise(model: nn.Module, inputs: Inputs) -> None:
    """Raise SettingError where the model does not take the inputs, UnsupportedError where its outputs are drawn."""
    memory = memory_of(model)
    drawn = memory is not None and any(isinstance(g, RandomGate) and not g.keeps_all for g in memory.gates.values())
    try:
        with torch.random.fork_rng(devices=[]):
            one, other = _outputs(model, inputs), _outputs(model, inputs)
    except ISWError:
        raise
    except Exception as error:
        raise SettingError(f"example_inputs: {type(model).__name__} does not take them: {_reason(error)}") from error
    if drawn or difference(one, other, {}, _tolerance(model)):
        raise UnsupportedError(
            "a gate or layer draws noise, of which another runtime draws its own (RandomGate by the last bits of "
            "norms): export with a gate that decides the same every time, such as MinNorm(0.5)"
        )


def _require_same(program: Any, model: nn.Module, inputs: Inputs) -> None:
    """Raise UnsupportedError where onnxruntime, if there is one, gives something else than the masked model."""
    if find_spec("onnxruntime") is None:
        return
    problems = []
    for seed in range(_DRAWS):  # rounding may turn a near-tie of one
        args, kwargs = arguments(_drawn(inputs, seed))
        try:
            with warnings.catch_warnings(action="ignore"):
                found = Outcome(list(program(*args, **kwargs)))
        except Exception as error:
            warnings.warn(f"the file was not compared: onnxruntime cannot run it ({_reason(error)})", stacklevel=4)
            return
        problems.append(difference(found, _outputs(model, inputs, seed), {}, 10 * _tolerance(model)))
        if not problems[-1]:
            return
    raise UnsupportedError(f"the file would not give what the masked model gives: {problems[-1]} in onnxruntime")


def _outputs(model: nn.Module, inputs: Inputs, seed: int = 0) -> Outcome:
    """Tensors of the masked model's outputs for two instances."""
    with torch.no_grad():
        leaves = pytree.tree_leaves(call(model, _drawn(inputs, seed)))
    return Outcome([leaf for leaf in leaves if isinstance(leaf, Tensor)])


def _tolerance(model: nn.Module) -> float:
    return tolerance_of(tensor.dtype for tensor in model.parameters())


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


def _drawn(inputs: Inputs, seed: int = 0) -> Any:
    """Inputs of this form for two instances: noise, and zeros for whole numbers."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(tensor: Tensor) -> Tensor:
        zeros = torch.zeros((_INSTANCES, *tensor.shape[1:]) if tensor.dim() else (), dtype=tensor.dtype)
        return zeros.normal_(generator=generator) if tensor.is_floating_point() else zeros

    return pytree.tree_map_only(Tensor, drawn, inputs)


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
