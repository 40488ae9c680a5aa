"""A gated model that really skips: a copy as a graph of the engine's layers, each as fast as it was seen to be."""

import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from tqdm import tqdm

from isw_plugin.accelerate.calls import Call, instances_of, is_traced, size_of
from isw_plugin.accelerate.choose import Fitted
from isw_plugin.accelerate.masked import Masked
from isw_plugin.accelerate.part import joined
from isw_plugin.accelerate.plan import Plan
from isw_plugin.accelerate.plans import Plans
from isw_plugin.accelerate.record import Recording
from isw_plugin.accelerate.saved import save
from isw_plugin.accelerate.snapshot import Snapshot
from isw_plugin.accelerate.summary import summary, verdict
from isw_plugin.errors import UnsupportedError
from isw_plugin.sites import Inputs, Site

__all__ = ["Accelerated"]


class Accelerated(Recording, Snapshot):
    """A snapshot of a gated model that skips dropped channels. Inference only.

    ``execution`` says what a call runs: "accelerated" (dropped channels are skipped), "dense" (the best dense form,
    all channels, because gates do not gain here) or "masked" (the model as it was, its gates off where
    ``backend="dense"`` was asked for: it could not be exported, or what was exported gave something else; ``reason``
    says so). Of a model that cannot be exported whole, a detector for one,
    ``part`` names the largest part that can: that one runs so, and the rest masked, or with all channels where it is
    "dense".

    Inputs of a size not seen before are run by the masked model too: where the graph does not give the same, that
    size runs masked, and ``refused`` says why.
    """

    def __init__(self, masked: Masked, sites: tuple[Site, ...], call: Call) -> None:
        super().__init__(masked)
        self.sites = sites
        self.execution = "masked"
        self.reason = ""
        self.part = ""
        self._runs = masked
        self.fitted = Fitted(0, torch.get_num_threads())
        self.choices: dict[str, bool] = {}  # by layer: whether it skips
        self._plans = Plans(masked, sites)
        self._example = call.emptied()

    @property
    def plans(self) -> dict[Any, Plan]:
        """Graphs that are held, by what each was made for."""
        return self._plans.by_form

    @property
    def refused(self) -> dict[str, str]:
        """Inputs that run masked though the model does not, and why."""
        return self._plans.refused

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the masked model gives, to float rounding.

        Raises:
            EngineInputError: The model does not take these inputs.
            UnsupportedError: A transform of torch.func, or a tangent of forward-mode differentiation.
        """
        if torch.compiler.is_dynamo_compiling():  # is_compiling() is true while another thread exports
            return self._compiled(args, kwargs)
        if is_traced(args, kwargs):
            return self._exported(Call(args, kwargs))
        _require_no_transform(args, kwargs)
        if self.execution == "masked" or self.part:
            return self._masked(Call(args, kwargs))
        flat, size = size_of(args, kwargs, self._held.kind)
        plan = self._plans.known(size) or self._plans.first(Call(args, kwargs), size, self.execution, self.choices)
        if plan is None:
            return self._masked(Call(args, kwargs))
        plan.used = time.monotonic()
        with torch.no_grad():  # the engine's layers have no gradient, others' alone would be a wrong one
            given = plan.run(*flat)
        record = self._record()
        if record is not None:
            record.add(*plan.decided(given))
        return plan.outputs.pack(given)

    def run_part(self, name: str, fast: "Accelerated") -> None:
        """Run a part by its graph from now on, the rest masked; or all without gates, where the part's do not gain."""
        self._runs = joined(self._held, name, fast)
        self.part = f"{name}.{fast.part}" if fast.part else name
        costs = [replace(cost, layer=f"{name}.{cost.layer}") for cost in fast.fitted.costs]
        self.execution, self.fitted = fast.execution, replace(fast.fitted, costs=costs)
        self.choices = {f"{name}.{layer}": skips for layer, skips in fast.choices.items()}
        if fast.execution == "dense":
            for masked in (self._held, self._runs):
                masked.memory.clear()
                masked.memory.enabled = False

    def _masked(self, call: Call) -> Any:
        outcome = self._runs.run(call)
        record = self._record()
        if record is not None:
            record.add(outcome.keep, outcome.norms)
        return outcome.output

    def _compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Under ``torch.compile``: the graph itself, where it is known to hold."""
        flat = pytree.tree_leaves((args, kwargs))
        plan = None if self.execution == "masked" else self.plans.get(Call(args, kwargs).form(self._held.kind))
        if plan is None or plan.guards is not None or (instances_of(flat) < 2 and not plan.alone):
            outside: Any = torch.compiler.disable(self.forward)  # type: ignore[no-untyped-call]  # of torch
            return outside(*args, **kwargs)
        with torch.no_grad():
            return plan.outputs.pack(plan.graph(*flat))

    def _exported(self, call: Call) -> Any:
        """Under ``torch.export``: the graph itself, for any number of instances where it holds for any."""
        plan = None if self.execution == "masked" else self.plans.get(call.form(self._held.kind))
        if plan is None:
            why = self.reason or f"it has no graph for {call}: prepare() it first"
            raise UnsupportedError(f"an accelerated model is exported as its graph, and {why}")
        instances: Any = call.instances  # a symbol, where it is dynamic
        if plan.guards is not None and not (isinstance(instances, int) and instances in plan.right_for):
            numbers = ", ".join(map(str, sorted(plan.right_for)))
            raise UnsupportedError(f"this graph holds for {numbers} instances only: export it without dynamic shapes")
        with torch.no_grad():
            return plan.outputs.pack(plan.graph(*call.leaves))

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Save the graphs that are held and what was chosen, to be loaded by ``isw_plugin.load_accelerated``.

        safetensors and JSON, no pickle. Each graph is compared with the masked model on 1, 2, 3 and 5 instances first:
        where it is right on all, and no branch hangs on their number, it is loaded for any number, else for those that
        it was seen to be right for.

        Raises:
            SettingError: The folder is no path.
            UnsupportedError: It runs masked, on a GPU, or its graphs hold what a file cannot.
        """
        if self.execution == "masked" or self.part:
            runs = f"all but its {self.part} masked" if self.part else "masked"
            raise UnsupportedError(f"this model runs {runs} ({self.reason}), so there is no graph: save the pruner")
        chosen = {"execution": self.execution, "fitted": asdict(self.fitted), "choices": self.choices}
        save(folder, self._plans, chosen | {"parameters": self._parameters_shown}, self.fitted.threads)

    def summary(self) -> str:
        """A table of layers, what each was seen to cost and what was chosen, and the model as a whole."""
        if not self.part:
            return summary(self.execution, self.reason, self.fitted, self.choices, self.refused)
        rest = "masked" if self.execution == "accelerated" else "with all channels"
        whole = summary(f"{self.part} {self.execution}", "", self.fitted, self.choices, {})
        return f"{whole}\nthe rest runs {rest}: {self.reason}"

    def verdict(self) -> str:
        """How many times as fast as the best dense form it, or its part, was seen to be, or why it is not faster."""
        return f"{self.part} alone: {verdict(self)}" if self.part else verdict(self)

    def prepare(self, examples: Iterable[Inputs | int]) -> None:
        """Make the graphs for these inputs now, not within the first call of each, and hold them all.

        Args:
            examples: Inputs as ``accelerate`` takes them; or a number of instances, of the inputs that the model was
                accelerated on; or the shape (N, C, H, W) of its only input.

        Raises:
            SettingError: No tensor, or a shape for a model of several inputs.
            EngineInputError: The model does not take such inputs.
        """
        calls = [self._call_for(example) for example in examples]
        forms = {call.form(self._held.kind) for call in calls}
        self._plans.limit = max(self._plans.limit, len(forms | self.plans.keys()))
        for call in tqdm(calls, desc="preparing", unit="size", leave=False, disable=None):
            self(*call.args, **call.kwargs)

    def _call_for(self, example: Inputs | int) -> Call:
        if isinstance(example, int) or (isinstance(example, tuple) and all(isinstance(n, int) for n in example)):
            return self._example.like(example)
        return Call.of(example, "prepare")


def _require_no_transform(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Derivatives would be zero, and a batch of batches is no batch."""
    transforms = torch._C._functorch.peek_interpreter_stack() is not None
    if transforms or (forward_ad._current_level >= 0 and any(map(_has_tangent, pytree.tree_leaves((args, kwargs))))):
        raise UnsupportedError(
            "an accelerated model has no derivatives and takes no transform of torch.func (vmap, grad, jvp): transform "
            "the attached model with its gates on"
        )


def _has_tangent(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and forward_ad.unpack_dual(leaf).tangent is not None  # type: ignore[no-untyped-call]
