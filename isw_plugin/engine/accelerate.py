"""A gated model that really skips: a copy as a graph of the engine's layers, each as fast as it was seen to be."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from isw_plugin.copies import copy_of
from isw_plugin.engine.execution import DenseConv, DenseLinear, GatedConv, can_skip
from isw_plugin.engine.fit import Cost, fit, medians, spare
from isw_plugin.engine.layers import Layer, Linear, conv, linear
from isw_plugin.engine.lower import Decision, lower, lower_all_kept, lower_dense
from isw_plugin.engine.replay import Replayed
from isw_plugin.engine.simplify import constants_of, simplify
from isw_plugin.engine.trace import arguments, trace
from isw_plugin.errors import UnsupportedError
from isw_plugin.hooks import memory_of
from isw_plugin.sites import Inputs, Site

__all__ = ["BACKENDS", "Accelerated", "Fitted", "Plan", "Record", "accelerate"]

BACKENDS = ("auto", "gated", "dense")
_ROUNDS = 5
_SECONDS = 25e-3
_WORST = 1.15  # times the best dense form, with every channel kept


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


@dataclass
class Plan:
    """One graph, for inputs of one shape but for the instances."""

    graph: fx.GraphModule
    outputs: Any  # how the flat outputs are packed
    count: int  # of them
    decisions: list[Decision]

    def __post_init__(self) -> None:
        self.run = Replayed(self.graph)

    def decided(self, given: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Keep masks and norms by site, from what the graph gives after its outputs."""
        keep, norms, rest = {}, {}, list(given)
        for decision in self.decisions:
            if decision.thresholds is None:
                keep[decision.site], norms[decision.site] = rest.pop(0), rest.pop(0)
            else:
                squares = rest.pop(0)
                keep[decision.site] = torch.ops.isw.keep_mask(squares, *decision.thresholds)
                norms[decision.site] = squares.sum(1).sqrt()
        return keep, norms


@dataclass(frozen=True)
class Fitted:
    """What was measured when the model was accelerated, in seconds a batch.

    Attributes:
        instances: In the batch.
        threads: CPU threads of torch.
        costs: Of every convolution, in the order of execution.
        dense, gated, all_kept: Of the whole model in its best dense form, with its gates, and with gates that drop
            nothing; None: not measured.
    """

    instances: int
    threads: int
    costs: list[Cost] = field(default_factory=list)
    dense: float | None = None
    gated: float | None = None
    all_kept: float | None = None

    @property
    def wins(self) -> bool:
        """Whether gates gain, and lose little should every channel be kept."""
        if self.dense is None or self.gated is None or self.all_kept is None:
            return False
        return _gains(self.gated, self.all_kept, self.dense)


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
        plan = self.plans.get(_form(args, kwargs))
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
            form = _form(args, kwargs)
            if form not in self.plans:
                try:
                    traced = _Traced(self.masked, self.sites, kwargs if kwargs else args)
                except UnsupportedError:
                    return None
                self.plans[form] = traced.plan(self.execution, self.choices, _instances(flat))
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
        traced = _Traced(masked, sites, inputs)
    except UnsupportedError as error:
        fast.reason = str(error).splitlines()[0]
        return fast
    with torch.inference_mode():
        _choose(fast, traced, arguments(inputs), backend)
    return fast


class _Traced:
    """The simplified graph of a masked model, and how its flat outputs lie."""

    def __init__(self, masked: nn.Module, sites: tuple[Site, ...], inputs: Inputs) -> None:
        exported = trace(masked, sites, inputs)
        spec: Any = exported._out_spec
        packed = spec.child(0)
        self.sites: list[str] = spec.child(1).context
        self.count = packed.num_leaves
        self.outputs = None if packed.is_leaf() else packed
        self.graph = simplify(exported)

    def gated(self, executions: dict[str, nn.Module]) -> Plan:
        graph, decisions = lower(self.graph, executions, self.count, self.sites)
        return Plan(graph, self.outputs, self.count, decisions)

    def all_kept(self, executions: dict[str, nn.Module]) -> Plan:
        return Plan(lower_all_kept(self.graph, executions, self.count, self.sites), self.outputs, self.count, [])

    def dense(self, executions: dict[str, nn.Module], channels_last: bool = True) -> Plan:
        return Plan(lower_dense(self.graph, executions, self.count, channels_last), self.outputs, self.count, [])

    def executions(self, instances: int, skips: Callable[[str], bool]) -> dict[str, nn.Module]:
        """By node, a module for every layer: one that skips where it can and ``skips`` says so of its name."""
        executions: dict[str, nn.Module] = {}
        constants = constants_of(self.graph)
        for node in self.graph.graph.nodes:
            if node.target is conv and (layer := Layer.of(node, constants)):
                shape = (instances, *node.args[0].meta["val"].shape[1:])
                gated = skips(node.meta["layer"]) and can_skip(layer)
                executions[node.name] = GatedConv(layer) if gated else DenseConv(layer, shape)
            elif node.target is linear and (flat := Linear.of(node, constants)):
                tokens = [size for size in node.args[0].meta["val"].shape[1:-1] if isinstance(size, int)]
                executions[node.name] = DenseLinear(flat, instances * math.prod(tokens))
        return executions

    def plan(self, execution: str, choices: dict[str, bool], instances: int) -> Plan:
        """Without timing anything."""
        if execution == "dense":
            return self.dense(self.executions(instances, lambda name: False))
        return self.gated(self.executions(instances, lambda name: choices.get(name, True)))


def _choose(fast: Accelerated, traced: _Traced, inputs: tuple[tuple[Any, ...], dict[str, Any]], backend: str) -> None:
    flat = pytree.tree_leaves(inputs)
    instances = _instances(flat)
    all_dense = traced.executions(instances, lambda name: False)
    dense = [traced.dense(all_dense, channels_last) for channels_last in (False, True)]
    if backend == "dense":
        seconds = medians([partial(plan.run, *flat) for plan in dense], _ROUNDS, _SECONDS)
        best, best_dense = min(zip(seconds, dense, strict=True), key=lambda timed: timed[0])
        fast.fitted = Fitted(instances, torch.get_num_threads(), dense=best)
        fast.execution, fast.plans[_form(*inputs)] = "dense", best_dense
        return
    able = {
        node: module
        for node, module in traced.executions(instances, lambda name: True).items()
        if isinstance(module, GatedConv)
    }
    forms = traced.gated(all_dense), traced.gated(all_dense | able), traced.all_kept(all_dense | able)
    costs = fit(traced.graph, forms[0].graph, forms[1].graph, forms[2].graph, flat)
    skipping = [node for node, cost in costs.items() if cost.gain >= 0]
    while True:
        executions = all_dense | {node: able[node] for node in skipping}
        gated = traced.gated(executions)
        plans = [gated, traced.all_kept(executions), *dense]
        seconds = _seconds([partial(plan.run, *flat) for plan in plans])
        best, best_dense = min(zip(seconds[2:], dense, strict=True), key=lambda timed: timed[0])
        fewer = spare(costs, skipping, seconds[1] - _WORST * best)
        if fewer == skipping:
            break
        skipping, dense = fewer, [best_dense]
    fast.choices = {cost.layer: node in skipping for node, cost in costs.items()}
    fast.fitted = Fitted(instances, torch.get_num_threads(), list(costs.values()), best, *seconds[:2])
    wins = backend == "gated" or (backend == "auto" and fast.fitted.wins)
    fast.execution = "accelerated" if wins else "dense"
    fast.plans[_form(*inputs)] = gated if wins else best_dense


def _seconds(runs: list[Callable[[], object]]) -> list[float]:
    """Of the gated model, the same with everything kept, and dense forms; the better of two times where gates lose.

    Other programs slow kernels down for a second or longer, the engine's by more than oneDNN's.
    """
    seconds = medians(runs, _ROUNDS, _SECONDS)
    gated, all_kept, *dense = seconds
    if _gains(gated, all_kept, min(dense)):
        return seconds
    return [min(pair) for pair in zip(seconds, medians(runs, _ROUNDS, _SECONDS), strict=True)]


def _gains(gated: float, all_kept: float, dense: float) -> bool:
    return gated < dense and all_kept <= _WORST * dense


def _form(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a graph is made for: the names of inputs and their shapes but for the instances."""
    flat = pytree.tree_leaves((args, kwargs))
    shapes = [(leaf.dtype, *leaf.shape[1:]) if isinstance(leaf, Tensor) else leaf for leaf in flat]
    return (len(args), *kwargs, *shapes)


def _instances(flat: Sequence[Any]) -> int:
    return next((leaf.shape[0] for leaf in flat if isinstance(leaf, Tensor) and leaf.dim()), 0)
