"""Which graph runs which inputs: made and checked against the masked model when they are first seen."""

import time
import warnings
from typing import Any

import torch

from isw_plugin.accelerate.agreement import Outcome
from isw_plugin.accelerate.calls import Call
from isw_plugin.accelerate.masked import Masked
from isw_plugin.accelerate.plan import Plan, Traced
from isw_plugin.accelerate.weights import Weights
from isw_plugin.errors import UnsupportedError
from isw_plugin.sites import Site

__all__ = ["Plans"]

_PLANS = 16  # held, those used last
_SIZES = 1024  # remembered, those seen last
_NEW = object()


class Plans:
    """The plans of one accelerated model; ``size`` and form are those of ``calls.py``.

    Attributes:
        by_form: Plans that are held.
        limit: How many are, at most.
        refused: Inputs that run masked, and why.
        weights: What plans hold together.
        by_runtime: Whether dense ones run by onnxruntime where they can.
    """

    def __init__(self, masked: Masked, sites: tuple[Site, ...]) -> None:
        self.masked = masked
        self.sites = sites
        self.by_form: dict[Any, Plan] = {}
        self.limit = _PLANS
        self.refused: dict[str, str] = {}
        self._forms: dict[Any, Any] = {}  # by size; None: it runs masked
        self._without: dict[Any, None] = {}  # forms that cannot be exported
        self.weights = Weights()
        self.by_runtime = False

    def known(self, size: Any) -> Plan | None:
        return self.by_form.get(self._forms.get(size, _NEW))

    def first(self, call: Call, size: Any, execution: str, choices: dict[str, bool]) -> Plan | None:
        """The plan for inputs whose size is not known; None: they run masked.

        Raises:
            EngineInputError: The model does not take such inputs.
        """
        call.check(self.masked.devices)
        if size is None:
            return None
        with self.masked.lock:
            if self._forms.get(size, _NEW) is not None and self.known(size) is None:
                self._decide(call, size, execution, choices)
            return self.known(size)

    def _decide(self, call: Call, size: Any, execution: str, choices: dict[str, bool]) -> None:
        form = call.form(self.masked.kind)
        if form in self._without:
            _put(self._forms, size, None)
            return
        wanted = self.masked.wanted(call)  # in milliseconds, refuses what the model does not take
        plan = self.by_form.get(form)
        if plan is None:
            try:
                traced = Traced(self.masked.model, self.sites, call, self.weights)
            except UnsupportedError as error:
                _put(self._without, form, None)
                self._refuse(call, size, str(error).splitlines()[0])
                return
            plan = traced.plan(execution, choices, call.instances, self.by_runtime)
        problem = self.check(plan, wanted, call)
        if problem:
            self._refuse(call, size, problem)
            self._hold(form, plan)
        else:
            self.take(size, form, plan)

    def take(self, size: Any, form: Any, plan: Plan) -> None:
        """A plan that is right at this size."""
        self._hold(form, plan)
        _put(self._forms, size, form)

    def _hold(self, form: Any, plan: Plan) -> None:
        """In place of the one that was used longest ago."""
        while len(self.by_form) >= self.limit and form not in self.by_form:
            self.by_form.pop(min(self.by_form, key=lambda held: self.by_form[held].used))
        plan.used = time.monotonic()
        self.by_form[form] = plan

    def check(self, plan: Plan, wanted: Outcome, call: Call) -> str:
        """Why a plan does not hold for these inputs; "" where it does."""
        flat = call.leaves
        guarded = plan.guards(flat) if plan.guards is not None else ""
        if guarded:
            return f"the model takes another branch at this size ({guarded.splitlines()[0]})"
        try:
            with torch.no_grad():
                given = plan.run(*flat)
            found = Outcome(plan.outputs.pack(given), *plan.decided(given))
        except Exception as error:  # of whatever operator
            return f"the graph does not run: {(str(error) or type(error).__name__).splitlines()[0]}"
        problem = self.masked.differs(found, wanted, call)
        if not problem:
            plan.right_for.add(call.instances)
            plan.example = plan.example or call.emptied()
        return problem

    def _refuse(self, call: Call, size: Any, reason: str) -> None:
        if not self.refused:
            warnings.warn(f"{call} runs masked, not faster: {reason}", RuntimeWarning, stacklevel=2)
        _put(self._forms, size, None)
        _put(self.refused, str(call), reason)

    def __getstate__(self) -> dict[str, Any]:
        held = {form: plan for form, plan in self.by_form.items() if plan.guards is None}  # guards do not pickle
        return self.__dict__ | {"by_form": held, "_forms": {}, "weights": Weights()}


def _put(held: dict[Any, Any], key: Any, value: Any) -> None:
    while len(held) >= _SIZES:
        held.pop(next(iter(held)))
    held[key] = value
