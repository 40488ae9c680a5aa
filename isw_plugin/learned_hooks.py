"""Gates with parameters in a forward: what they are shown of layers, and that what they give is a decision."""

from typing import Any

from torch import Tensor, nn

from isw_plugin.errors import SettingError, UnsupportedError
from isw_plugin.functional import is_tracing
from isw_plugin.gates import Decision, LearnedGate
from isw_plugin.memory import Call, Memory
from isw_plugin.places import Hook
from isw_plugin.sites import Site

__all__ = ["AtLayer", "decision_of"]


class AtLayer(Hook):
    """Shows the gate of a site what one of its layers reads and makes."""

    def __init__(self, memory: Memory, site: str, number: int) -> None:
        self.memory = memory
        self.site = site
        self.number = number

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        call = self.memory.running or self.memory.outside()
        gate = call.gates[self.site] if call.gates is not None else None
        if not isinstance(gate, LearnedGate):
            return None
        if not args:
            raise UnsupportedError(f"a layer of {self.site} got its map by keyword: pass it by position, or exclude it")
        learned = self.memory.learned[self.site]
        if learned.training != module.training:
            learned.train(module.training)
        if any(parameter.device != output.device for parameter in learned.parameters()):
            learned.to(output.device)
        made, note = gate.at_layer(learned, self.number, module, args[0], output)
        call.notes.setdefault(self.site, {})[self.number] = (output.shape[0], note)
        return made


def decision_of(memory: Memory, call: Call, gate: LearnedGate, site: Site, feature: Tensor) -> Decision:
    """What a gate decides on a map; its loss is recorded.

    Raises:
        UnsupportedError: The site's layers did not run, or on other instances.
        SettingError: It gave no decision.
    """
    notes = call.notes.pop(site.name, {})
    if len(notes) != len(site.layers):
        raise UnsupportedError(
            f"{site.name} is seen without what its layers ({', '.join(site.layers)}) read, on which its gate decides: "
            "call the whole model, checkpoint whole blocks, or exclude it"
        )
    if not is_tracing() and any(instances != feature.shape[0] for instances, _ in notes.values()):
        raise UnsupportedError(
            f"the layers of {site.name} run on other instances than the {feature.shape[0]} of its map (windows, or "
            "parts of a batch), so its gate cannot decide on what they read: exclude it"
        )
    noted = [notes[number][1] for number in range(len(notes))]
    made = gate.decide(memory.learned[site.name], noted, feature, site.axis)
    _require_decision(made, gate, feature, site)
    if call.learns and made.loss is not None:
        memory.add_loss(call, made.loss)
    return made


def _require_decision(made: Any, gate: LearnedGate, feature: Tensor, site: Site) -> None:
    if is_tracing():
        return
    wanted = (feature.shape[0], site.channels)
    if not isinstance(made, Decision) or made.feature.shape != feature.shape or made.scores.shape != wanted:
        found = f"{tuple(made.scores.shape)}, {tuple(made.feature.shape)}" if isinstance(made, Decision) else made
        raise SettingError(
            f"{gate} gave {found} at {site.name}: a Decision has scores of shape {wanted} and a map of shape "
            f"{tuple(feature.shape)}"
        )
