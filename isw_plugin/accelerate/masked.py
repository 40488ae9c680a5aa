"""The masked model that an accelerated one was made from: what is right, and what runs where no graph is."""

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from isw_plugin.accelerate.agreement import Outcome, difference, tolerance_of
from isw_plugin.accelerate.calls import Call, autocast
from isw_plugin.errors import EngineInputError, ISWError, UnsupportedError
from isw_plugin.hooks import Memory, memory_of

__all__ = ["Masked"]


class Masked:
    """Runs it without gradients, one call at a time.

    Attributes:
        example: What it is known to take, for messages.
        devices: Of its tensors.
        kind: Of device, "cpu" for one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.example = ""
        tensors = [*model.parameters(), *model.buffers()]
        self.devices = {tensor.device for tensor in tensors}
        kinds = (device.type for device in self.devices)
        self.kind = next((kind for kind in kinds if torch.amp.is_autocast_available(kind)), "cpu")
        self.dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
        self.lock = threading.RLock()  # hooks share one memory

    @property
    def memory(self) -> Memory:
        memory = memory_of(self.model)
        if memory is None:
            raise UnsupportedError(f"{type(self.model).__name__} lost its pruner: accelerate the model anew")
        return memory

    def run(self, call: Call) -> Outcome:
        """What it gives and decides.

        Raises:
            EngineInputError: It does not take these inputs.
        """
        with self.lock, torch.no_grad():
            output = self._forward(call)
            memory = self.memory
            decided = (dict(memory.keep), dict(memory.norms)) if memory.enabled else ({}, {})
        return Outcome(self._given(output), *decided)

    def wanted(self, call: Call) -> Outcome:
        """The same for copies of the inputs, which a forward may change, as it may its buffers: they are put back."""
        before = [(module, dict(module._buffers)) for module in self.model.modules()]
        values = {id(held): held.clone() for held in self.model.buffers()}
        with self.lock:
            try:
                return self.run(call.copied())
            finally:
                for module, buffers in before:
                    module._buffers = buffers
                for held in self.model.buffers():
                    if not torch.equal(held, values[id(held)]):
                        held.copy_(values[id(held)])

    def differs(self, found: Outcome, wanted: Outcome, call: Call) -> str:
        """How what a graph gave for these inputs is not what this gave; "" where it is, to rounding."""
        inputs = [leaf.dtype for leaf in call.leaves if isinstance(leaf, Tensor)]
        tolerance = tolerance_of([*self.dtypes, *inputs, autocast(self.kind)])
        gates = self.memory.gates
        apart = difference(found, wanted, gates, tolerance)
        if apart and difference(self.wanted(call), wanted, gates, tolerance):
            return "the masked model does not give the same twice"
        return apart and f"the graph differs from the masked model: {apart}"

    def _given(self, output: Any) -> Any:
        """A caller may change what it gets. A detector gives three tensors an image, so the model is walked once."""
        held = {id(tensor) for tensor in (*self.model.parameters(), *self.model.buffers())}
        return pytree.tree_map_only(
            Tensor, lambda given: given.clone() if {id(given), id(given._base)} & held else given, output
        )

    def _forward(self, call: Call) -> Any:
        try:
            return self.model(*call.args, **call.kwargs)
        except (ISWError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            call.check(self.devices)
            known = f"; it was accelerated on {self.example}" if self.example else ""
            said = (str(error) or type(error).__name__).splitlines()[0]
            raise EngineInputError(f"{type(self.model).__name__} does not take {call}{known}: {said}") from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.RLock())
