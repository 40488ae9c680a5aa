"""A gated model that really skips: a copy as a graph of the engine's layers, each as fast as it was seen to be."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from isw_plugin.accelerate.choose import Fitted, choose
from isw_plugin.accelerate.plan import Plan, Traced, form_of, instances_of
from isw_plugin.accelerate.trace import arguments
from isw_plugin.copies import copy_of
from isw_plugin.errors import UnsupportedError
from isw_plugin.hooks import memory_of
from isw_plugin.sites import Inputs, Site

__all__ = ["BACKENDS", "Accelerated", "Record", "accelerate"]

BACKENDS = ("auto", "gated", "dense")


class Record:
    """What calls of an accelerated model decided, joined over the calls.

    Attributes:
        keep: Site name -> bool (N, C), True where the channel was kept.
        norms: Site name -> float (N, C), the channel norms (Eq. 3).
    """

    def __init__(self) -> None:
        self.keep: dict[str, Tensor] = {}
        self.norms: dict[str, Tensor] = {}

    @property
    def keep_ratio(self) -> float:
        """Kept / all channels over all sites and instances; 1 where nothing was recorded."""
        kept = sum(int(mask.sum()) for mask in self.keep.values())
        return kept / max(1, sum(mask.numel() for mask in self.keep.values())) if self.keep else 1.0

    def add(self, keep: dict[str, Tensor], norms: dict[str, Tensor]) -> None:
        """Take in one call."""
        for held, new in ((self.keep, keep), (self.norms, norms)):
            for name, values in new.items():
                held[name] = torch.cat([held[name], values]) if name in held else values


_recording: ContextVar[tuple[tuple["Accelerated", Record], ...]] = ContextVar("isw_recording", default=())


class Accelerated(nn.Module):
    """A snapshot of a gated model that skips dropped channels. Inference only.

    ``execution`` says what a call runs: "accelerated" (dropped channels are skipped), "dense" (the best dense form,
    all channels, because gates do not gain here) or "masked" (the model as it was: it could not be exported).
    """

    def __init__(self, masked: nn.Module, sites: tuple[Site, ...]) -> None:
        super().__init__()
        self.masked = masked
        self.sites = sites
        self.plans: dict[Any, Plan] = {}
        self.execution = "masked"
        self.reason = ""
        self.fitted = Fitted(0, torch.get_num_threads())
        self.choices: dict[str, bool] = {}  # by layer: whether it skips
        self._lock = threading.Lock()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the masked model gives, to float rounding."""
        if self.execution == "masked":
            return self._masked(args, kwargs)
        flat = pytree.tree_leaves((args, kwargs))
        plan = self.plans.get(form_of(args, kwargs))
        if plan is None:
            plan = self._plan(args, kwargs, flat)
            if plan is None:
                return self._masked(args, kwargs)
        with torch.no_grad():  # the engine's layers have no gradient, others' alone would be a wrong one
            given = plan.graph(*flat) if torch.compiler.is_dynamo_compiling() else plan.run(*flat)
        if not torch.compiler.is_dynamo_compiling():  # is_compiling() is true while another thread exports
            record = self._record()
            if record is not None:
                record.add(*plan.decided(given[plan.count :]))
        return given[0] if plan.outputs is None else pytree.tree_unflatten(given[: plan.count], plan.outputs)

    @contextmanager
    def recording(self) -> Iterator[Record]:
        """Collect the decisions of this thread's calls inside the block."""
        record = Record()
        token = _recording.set((*_recording.get(), (self, record)))
        try:
            yield record
        finally:
            _recording.reset(token)

    def _record(self) -> Record | None:
        return next((record for model, record in reversed(_recording.get()) if model is self), None)

    def summary(self) -> str:
        """A table of layers, what each was seen to cost and what was chosen, and the model as a whole."""
        rows: list[tuple[str, ...]] = [("layer", "keep", "dense us", "gated us", "all kept us", "runs")]
        for cost in self.fitted.costs:
            gated = [f"{1e6 * t:.0f}" if t is not None else "-" for t in (cost.gated, cost.gated_all)]
            runs = "gated" if self.choices.get(cost.layer) else "dense"
            rows.append((cost.layer, f"{cost.keep_ratio:.2f}", f"{1e6 * cost.dense:.0f}", *gated, runs))
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, self._conclusion()])

    def _conclusion(self) -> str:
        where = f"batch {self.fitted.instances}, {self.fitted.threads} threads"
        seconds = {
            "gated": self.fitted.gated,
            "with all channels kept": self.fitted.all_kept,
            "best dense form": self.fitted.dense,
        }
        if None in seconds.values():
            return f"{self.execution}{': ' if self.reason else ''}{self.reason} ({where})"
        times = ", ".join(f"{form} {1e3 * taken:.2f} ms" for form, taken in seconds.items() if taken is not None)
        return f"{self.execution}: {times} ({where})"

    def train(self, mode: bool = True) -> Self:
        if mode:
            raise UnsupportedError("an accelerated model has no gradients: train the model it was made from")
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # of torch
        self._lock = threading.Lock()

    def _masked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        memory = memory_of(self.masked)
        assert memory is not None
        with self._lock, torch.no_grad():  # hooks share one memory
            output = self.masked(*args, **kwargs)
            record = self._record()
            if record is not None:
                record.add(dict(memory.keep), dict(memory.norms))
        return output

    def _plan(self, args: tuple[Any, ...], kwargs: dict[str, Any], flat: list[Any]) -> Plan | None:
        """A graph for a shape not seen before, with the choices of the shape that was fitted; None: masked."""
        with self._lock:
            form = form_of(args, kwargs)
            if form not in self.plans:
                try:
                    traced = Traced(self.masked, self.sites, kwargs if kwargs else args)
                except UnsupportedError:
                    return None
                self.plans[form] = traced.plan(self.execution, self.choices, instances_of(flat))
            return self.plans[form]


def accelerate(model: nn.Module, sites: tuple[Site, ...], inputs: Inputs, backend: str = "auto") -> Accelerated:
    """Make a gated model skip.

    Args:
        model: Attached, in any mode; copied.
        sites: What its hooks gate.
        inputs: Real inputs at the size and batch that will run.
        backend: "auto" takes the faster of the gated graph and the best dense form on these inputs, "gated" and
            "dense" one of them.

    Returns:
        The accelerated copy; where it cannot be exported, one that runs the masked copy and says so.
    """
    masked = copy_of(model).eval().requires_grad_(False)
    memory = memory_of(masked)
    assert memory is not None
    memory.enabled = True
    fast = Accelerated(masked, sites).eval()
    try:
        traced = Traced(masked, sites, inputs)
    except UnsupportedError as error:
        fast.reason = str(error).splitlines()[0]
        return fast
    given = arguments(inputs)
    with torch.inference_mode():
        chosen = choose(traced, pytree.tree_leaves(given), backend)
    fast.execution, fast.fitted, fast.choices = chosen.execution, chosen.fitted, chosen.choices
    fast.plans[form_of(*given)] = chosen.plan
    return fast
