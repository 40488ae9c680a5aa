"""Forwards of copies without memory: which operation reads which tensor, whatever the number of instances."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from isw_plugin.copies import copy_of, has_observers, without_process_hooks
from isw_plugin.errors import ISWError, ProbeError, UnsupportedError
from isw_plugin.inputs import device_of
from isw_plugin.sites.graph import LAYERS, Call, Graph, Node, norms_over_channels
from isw_plugin.sites.inputs import Arguments, Inputs, Resize, as_they_are, one_instance, resizes
from isw_plugin.sites.instances import INSTANCES, merged, mixing
from isw_plugin.sites.recorder import record

__all__ = [
    "INSTANCES",
    "LAYERS",
    "Call",
    "Graph",
    "Inputs",
    "Node",
    "default_inputs",
    "norms_over_channels",
    "probe",
]

_META = torch.device("meta")
_NUMBERS = (3, 6)  # of instances: odd and even; on meta they cost nothing
_SMALL_NUMBERS = (2, 3)
_FEW = 8  # instances given, whose multiples may be computed in earnest


def default_inputs(model: nn.Module) -> Tensor | None:
    """Zeros of the size that a timm model declares, in the type of its weights, or None where it declares none."""
    config = getattr(model, "pretrained_cfg", None) or {}
    if "input_size" not in config:
        return None
    channels, *size = config["input_size"]
    channels = getattr(model, "in_chans", channels)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    inputs = torch.zeros(1, channels, *(_edited_size(model) or size), dtype=dtype, device="meta")
    first = next((module for module in model.modules() if isinstance(module, _ConvNd)), None)
    if first is None or first.in_channels == channels:
        return inputs
    # A stem of the user's own, unless it folds pixels into channels before its first convolution.
    as_edited = inputs[:, :1].expand(-1, first.in_channels, *(-1 for _ in size)).contiguous()
    try:
        probe(model, as_edited)
    except ProbeError:
        return inputs
    return as_edited


def _edited_size(model: nn.Module) -> Sequence[int] | None:
    """The ``img_size`` that a timm model was built with; before timm 1.0.31 only a part of it may know."""
    known = [getattr(model, "_traits", {}).get("img_size"), *(getattr(m, "img_size", None) for m in model.modules())]
    size = next((size for size in known if size), None)
    return (size, size) if isinstance(size, int) else size


def probe(model: nn.Module, inputs: Inputs) -> Graph:
    """Run copies of the model in eval mode, on ``meta`` (no memory, no arithmetic), with two numbers of instances.

    Args:
        model: Left untouched.
        inputs: What its forward takes: a tensor, a tuple of arguments, or a dict of keyword arguments. Which of the
            tensors have instances on axis 0 is found out.

    Returns:
        What it did; in its shapes, ``INSTANCES`` stands for the number of instances.

    Raises:
        ProbeError: The forward fails on these inputs, or on another number of them.
        UnsupportedError: The model cannot be copied, or reads across its instances.
    """
    device = device_of(model)
    # Inference tensors have no versions; a forward that draws noise must not move the user's generators.
    generators = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with torch.inference_mode(False), generators, warnings.catch_warnings(action="ignore"), without_process_hooks():
        graph = _first_that_runs(model, inputs, device)
    across = mixing(graph)
    if across:
        raise UnsupportedError(
            f"{across} reads along axis 0 of the example inputs, where gates expect independent instances. Give the "
            "model its batch on axis 0 (batch_first=True), or attach to a module that takes it there"
        )
    return graph


def _first_that_runs(model: nn.Module, inputs: Inputs, device: torch.device) -> Graph:
    errors: dict[torch.device, Exception] = {}
    for on, way, numbers in _attempts(inputs, device):
        try:
            few, many = (_run(model, on, way(number, on)) for number in numbers)
            return merged(few, many, numbers)
        except ISWError:
            raise
        except Exception as error:  # whatever the forward raises
            errors.setdefault(on, error)
    raise _failure(model, inputs, errors) from errors[device]


def _attempts(inputs: Inputs, device: torch.device) -> Iterator[tuple[torch.device, Resize, tuple[int, int]]]:
    """Where, how and with which numbers of instances to run, the cheapest first.

    Code that reads values (.item(), tables kept outside buffers) cannot run on meta; some models take multiples only.
    """
    ways = resizes(inputs)
    given = next((len(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()), 1)
    for on, numbers in ((_META, _NUMBERS), (device, _SMALL_NUMBERS)):
        yield from ((on, way, numbers) for way in ways)
        if on == _META or given <= _FEW:
            yield on, ways[0], (2 * given, 4 * given)


def _failure(model: nn.Module, inputs: Inputs, errors: dict[torch.device, Exception]) -> ProbeError:
    """An error that says what is wrong with the inputs, or with the forward."""
    name, error = type(model).__name__, list(errors.values())[-1]
    shapes = [tuple(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if _runs(model, [*errors], lambda on: [as_they_are(inputs, on)]):
        batched = resizes(one_instance(inputs))[0]
        if _runs(model, [*errors], lambda on: [batched(number, on) for number in _SMALL_NUMBERS]):
            return ProbeError(
                f"example inputs of shape {shapes} are one instance of {name} without an axis of instances: pass "
                "inputs[None]"
            )
        return ProbeError(
            f"{name} runs on example inputs of shape {shapes}, but not on another number of instances on axis 0: "
            f"{error!r}. Gates need a forward that takes any number; attach to the part of the model that does"
        )
    needed = ", and make hooks that it needs callable objects: functions are left out" if has_observers(model) else ""
    return ProbeError(
        f"{name} could not be run on example inputs of shape {shapes}: {error!r} (on meta: {errors[_META]!r}). Pass "
        f"example_inputs that its forward accepts{needed}"
    )


def _runs(model: nn.Module, devices: list[torch.device], calls: Callable[[torch.device], list[Arguments]]) -> bool:
    for device in devices:
        try:
            for call in calls(device):
                _run(model, device, call)
        except Exception:  # whatever the forward raises
            continue
        return True
    return False


def _run(model: nn.Module, device: torch.device, call: Arguments) -> Graph:
    memo = _on_meta(model) if device == _META else None
    return record(model, copy_of(model, memo, observed=False), *call)


def _on_meta(model: nn.Module) -> dict[int, Any]:
    """Parameters and buffers that have shapes only, so that nothing large is copied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return memo
