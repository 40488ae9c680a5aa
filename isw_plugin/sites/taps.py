"""Where hooks can touch a map: a module's output, or the inputs of the modules that take it."""

from isw_plugin.sites.graph import Node
from isw_plugin.sites.readers import Readers
from isw_plugin.sites.site import Tap

__all__ = ["Taps"]


class Taps:
    """Finds the taps of values; what must be reachable depends on the scope."""

    def __init__(self, readers: Readers, scope: str) -> None:
        self.readers = readers
        self.graph = readers.graph
        self.scope = scope
        self._order = {id(node): index for index, node in enumerate(self.graph.nodes)}
        self._calls = [call for call in self.graph.calls if readers.counts[call.name] == 1]
        # An Identity gives the map too, but only to those after it.
        made = [call for call in reversed(self._calls) if call.output not in (None, *call.tensors())]
        self._makers = {call.output: call.name for call in made}

    def of(self, value: int, axis: int) -> tuple[Tap, ...]:
        """One module that gives the map, or else the inputs that cover everyone who must see it gated."""
        if value in self._makers:
            return (Tap(self._makers[value]),)
        taps = [self._input_tap(user, value) for user in self._needed(value, axis)]
        return tuple(dict.fromkeys(tap for tap in taps if tap)) if all(taps) else ()

    def _needed(self, value: int, axis: int) -> list[Node]:
        """Users that must be reachable: all, or under scope="consumers" one that runs no later than any reader."""
        users = self.readers.users[value]
        if self.scope == "all":
            return users
        layers = {consumer.layer for consumer in self.readers.of(value, axis)}
        first = next(node for node in self.graph.nodes if node.name in layers)
        early = [user for user in users if self._order[id(user)] <= self._order[id(first)]]
        return [user for user in early if self._input_tap(user, value)][:1] or early[:1]

    def _input_tap(self, user: Node, value: int) -> Tap | None:
        """The outermost module around a user that takes the map as an argument."""
        inside = {*user.callers, user.name}
        for call in reversed(self._calls):
            if call.name in inside and value in call.inputs:
                return Tap(call.name, call.inputs.index(value))
        return None
