"""A fast model that came from a file: graphs and what was measured, without the model that they were made from."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isw_plugin.accelerate.calls import Call, autocast, instances_of, is_traced, size_of
from isw_plugin.accelerate.choose import Fitted
from isw_plugin.accelerate.plan import Plan
from isw_plugin.accelerate.record import Recording
from isw_plugin.accelerate.signature import Named
from isw_plugin.accelerate.summary import summary
from isw_plugin.errors import EngineInputError, UnsupportedError

__all__ = ["Form", "LoadedModel", "leaf_form", "warn_of_another_processor"]

_SIZES = 1024  # remembered


@dataclass(frozen=True)
class Form:
    """Inputs that a graph was made for and compared on.

    Attributes:
        packed: How they lie in args and kwargs.
        leaves: (shape without instances, type) of a tensor; anything else as it is.
        instances: Numbers of them; None: any.
    """

    packed: Any
    leaves: tuple[Any, ...]
    instances: tuple[int, ...] | None

    def holds(self, flat: Sequence[Any], spec: Any) -> bool:
        """Whether these inputs are of it, whatever their number."""
        return spec == self.packed and tuple(map(leaf_form, flat)) == self.leaves

    def __str__(self) -> str:
        return ", ".join(
            f"{leaf[1]} ({', '.join(map(str, ['N', *leaf[0]]))})" if isinstance(leaf, tuple) else repr(leaf)
            for leaf in self.leaves
        )


def leaf_form(leaf: Any) -> Any:
    """What a graph is made for."""
    if not isinstance(leaf, Tensor):
        return leaf
    return (tuple(leaf.shape[1:]), str(leaf.dtype).removeprefix("torch.")) if leaf.dim() else ((), "scalar")


class LoadedModel(Recording, Named):
    """What ``load_accelerated`` gives: runs the graphs of an accelerated model. Inference only, on the CPU.

    Attributes:
        execution: "accelerated" or "dense", as it was chosen.
        fitted, choices: What was measured and chosen when the model was accelerated.
        made: Where: "hardware", "threads", "isw_plugin", "torch".
    """

    def __init__(
        self,
        graphs: Sequence[tuple[Form, Plan]],
        execution: str,
        fitted: Fitted,
        choices: Mapping[str, bool],
        made: Mapping[str, Any],
        parameters: Sequence[Sequence[Any]],
    ) -> None:
        super().__init__()
        self.execution, self.fitted, self.choices, self.made = execution, fitted, dict(choices), dict(made)
        self._graphs = list(graphs)
        self._known: dict[Any, Plan] = {}  # by size
        self._show(parameters)
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model that was saved gives.

        Raises:
            EngineInputError: Inputs of a form that was not saved, or that no model takes.
        """
        if torch.compiler.is_dynamo_compiling() or is_traced(args, kwargs):
            return self._traced(args, kwargs)
        flat, size = size_of(args, kwargs, "cpu")
        plan = self._known.get(size)
        if plan is None:
            flat, plan = self._first(Call(args, kwargs), size)
        try:
            with torch.no_grad():
                given = plan.run(*flat)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:  # of an operator
            said = (str(error) or type(error).__name__).splitlines()[0]
            raise EngineInputError(f"the graph does not run on {Call(args, kwargs)}: {said}") from error
        record = self._record()
        if record is not None:
            record.add(*plan.decided(given))
        return plan.outputs.pack(given)

    def _first(self, call: Call, size: Any) -> tuple[list[Any], Plan]:
        """Contiguous inputs and their plan, which is remembered where they were contiguous."""
        call.check({torch.device("cpu")})
        if autocast("cpu") is not None:
            raise EngineInputError("a loaded model runs in the types that it was saved in: call it outside of autocast")
        plan = self._plan_for(call, call.instances)
        flat = [leaf.contiguous() if isinstance(leaf, Tensor) else leaf for leaf in call.leaves]
        if all(new is old for new, old in zip(flat, call.leaves, strict=True)) and len(self._known) < _SIZES:
            self._known[size] = plan
        return flat, plan

    def _plan_for(self, call: Call, instances: Any) -> Plan:
        flat, spec = call.flat
        fitting = [(form, plan) for form, plan in self._graphs if form.holds(flat, spec)]
        if not fitting:
            raise EngineInputError(
                f"{call} was not saved; this file holds {'; '.join(str(form) for form, _ in self._graphs)}. Accelerate "
                "the model for it, or prepare() it, and save again"
            )
        form, plan = fitting[0]
        if form.instances is not None and not isinstance(instances, int):
            raise UnsupportedError("this graph holds for some numbers of instances only: export without dynamic shapes")
        if form.instances is not None and instances not in form.instances:
            raise EngineInputError(
                f"{call} was not saved: the graph was compared on {', '.join(map(str, form.instances))} instances, and "
                f"may not hold for others. prepare([{instances}]) before save_pretrained adds this number"
            )
        return plan

    def _traced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Under ``torch.export`` and ``torch.compile``: the graph itself."""
        call = Call(args, kwargs)
        plan = self._plan_for(call, instances_of(call.leaves))
        with torch.no_grad():
            return plan.outputs.pack(plan.graph(*call.leaves))

    def summary(self) -> str:
        """What was timed and chosen, where."""
        return f"{summary(self.execution, '', self.fitted, self.choices, {})}\nmade on {_made_on(self.made)}"

    def train(self, mode: bool = True) -> "LoadedModel":
        if mode:
            raise UnsupportedError("a loaded fast model has no gradients: train the model it was made from")
        return super().train(mode)


def _made_on(made: Mapping[str, Any]) -> str:
    return f"{made['hardware']}, {made['threads']} threads, isw_plugin {made['isw_plugin']}, torch {made['torch']}"


def warn_of_another_processor(made: Mapping[str, Any], here: str) -> None:
    """Results are the same; what is fastest may not be."""
    if made["hardware"] != here:
        warnings.warn(
            f"layers were chosen on {_made_on(made)}; this is {here}. Results are the same, but another choice may be "
            "faster: accelerate the gated model here",
            RuntimeWarning,
            stacklevel=4,
        )
