"""From an attached model to its accelerated copy: traced, fitted, and checked against the masked model."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from tqdm import tqdm

from isw_plugin.accelerate.accelerated import Accelerated
from isw_plugin.accelerate.calls import Call, size_of
from isw_plugin.accelerate.choose import choose
from isw_plugin.accelerate.masked import Masked
from isw_plugin.accelerate.part import largest_part
from isw_plugin.accelerate.plan import Traced
from isw_plugin.copies import copy_of
from isw_plugin.errors import SettingError, UnsupportedError
from isw_plugin.gates import LearnedGate
from isw_plugin.hooks import Memory, memory_of
from isw_plugin.sites import Inputs, Site

__all__ = ["BACKENDS", "accelerate", "masked_copy"]

BACKENDS = ("auto", "gated", "dense")
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def accelerate(model: nn.Module, sites: tuple[Site, ...], inputs: Inputs, backend: str = "auto") -> Accelerated:
    """Make a gated model skip.

    Args:
        model: Attached, in any mode; copied.
        sites: What its hooks gate.
        inputs: Real inputs at the size and batch that will run.
        backend: "auto" takes the faster of the gated graph and the best dense form on these inputs, "gated" and
            "dense" one of them.

    Returns:
        The accelerated copy; where it cannot be exported, or would give something else, one that runs the masked copy,
        with every channel where "dense" was asked for, and says so.

    Raises:
        SettingError: No tensor or no instance among the inputs.
        EngineInputError: The model does not take the inputs.
        UnsupportedError: A copy of the model loses its pruner.
    """
    call = Call.of(inputs, "accelerate")
    backend = _backend(memory_of(model), backend)
    masked = Masked(masked_copy(model))
    call.check(masked.devices)
    if not call.instances:
        raise SettingError(f"accelerate: {call} has no instances to time layers on")
    fast = Accelerated(masked, sites, call).eval()
    with tqdm(total=4, desc="accelerating", unit="step", leave=False, disable=None) as progress:

        def tell(step: str) -> None:
            progress.set_postfix_str(step)
            progress.update()

        _fit(fast, call, backend, tell)
    if backend == "dense" and fast.execution == "masked":
        _keep_all(masked.memory)
    return fast


def _keep_all(memory: Memory) -> None:
    memory.clear()
    memory.enabled = False


def _fit(fast: Accelerated, call: Call, backend: str, tell: Callable[[str], None]) -> None:
    """Choose what runs; where that is not right, the masked model does."""
    tell("exporting")
    masked, plans = fast._held, fast._plans
    wanted = masked.wanted(call)  # refuses what the model does not take
    masked.example = str(call)
    fast.reason = _masked_gate(masked.memory)
    if fast.reason:
        return
    try:
        traced = Traced(masked.model, fast.sites, call, plans.weights)
    except UnsupportedError as error:
        fast.reason = str(error).splitlines()[0]
        _fit_part(fast, call, backend, tell)
        return
    flat, size = size_of(call.args, call.kwargs, masked.kind)
    with torch.inference_mode():
        chosen = choose(traced, flat, backend, tell)
    tell("checking")
    if chosen.execution == "dense":
        _keep_all(masked.memory)
        wanted = masked.wanted(call)
    fast.fitted, fast.choices = chosen.fitted, chosen.choices
    plans.by_runtime = chosen.plan.runtime is not None
    fast.reason = plans.check(chosen.plan, wanted, call)
    if fast.reason:
        masked.memory.enabled = True
        warnings.warn(f"the accelerated model runs masked, not faster: {fast.reason}", RuntimeWarning, stacklevel=4)
        return
    fast.execution = chosen.execution
    plans.take(size, call.form(masked.kind), chosen.plan)


def _fit_part(fast: Accelerated, call: Call, backend: str, tell: Callable[[str], None]) -> None:
    """The same for the largest part of a model that cannot be exported whole, and so on within it."""
    part = largest_part(fast._held, fast.sites, call)
    if part is None:
        return
    inner = Accelerated(part.masked, part.sites, part.call).eval()
    _fit(inner, part.call, backend, tell)
    if inner.execution != "masked":
        fast.run_part(part.name, inner)


def _backend(memory: Memory | None, backend: str) -> str:
    """A gate with parameters is a part of the network: there is no form without it."""
    gate = next((gate for gate in memory.gates.values() if isinstance(gate, LearnedGate)), None) if memory else None
    if gate is None:
        return backend
    if backend == "dense":
        raise SettingError(
            f"backend='dense' keeps every channel, and {gate} is a part of the network: 'auto' or 'gated'"
        )
    return "gated"


def _masked_gate(memory: Memory) -> str:
    """Why nothing can be skipped of what a gate drops, or ""."""
    for gate in memory.gates.values():
        if isinstance(gate, LearnedGate) and not gate.whole_channels:
            return f"{type(gate).__name__} drops single elements of maps, and the engine skips whole channels"
    return ""


def masked_copy(model: nn.Module) -> nn.Module:
    """In eval mode, with gates on."""
    memo: dict[int, Any] = {}
    masked = copy_of(model, memo)
    for name, module in model.named_modules():
        if isinstance(module, fx.GraphModule):  # its deepcopy leaves its hooks behind
            for hooks in _HOOKS:
                setattr(masked.get_submodule(name), hooks, copy.deepcopy(getattr(module, hooks), memo))
    memory = memory_of(masked)
    if memory is None:
        raise UnsupportedError(f"a copy of {type(model).__name__} has no pruner: its __deepcopy__ leaves hooks behind")
    memory.enabled = True
    for learned in memory.learned.values():
        learned.requires_grad_(False)
    return masked.eval().requires_grad_(False)
