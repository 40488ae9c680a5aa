"""From the probe's graph to sites: walk from every layer until a layer reads what it made."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from isw_plugin.errors import NoSitesError
from isw_plugin.sites.paths import ACTIVATIONS, JOINS, PASSES, Path, follow, is_scale
from isw_plugin.sites.patterns import Patterns, select
from isw_plugin.sites.probe import INSTANCES, Graph, Inputs, Node, probe
from isw_plugin.sites.site import Consumer, Site, Tap

__all__ = ["Found", "find_sites"]


@dataclass(frozen=True)
class Found:
    """The sites, in the order of execution, and why every other conv / linear layer has none."""

    sites: tuple[Site, ...]
    left_out: dict[str, str]


def find_sites(
    model: nn.Module, inputs: Inputs, layers: Patterns = "*", exclude: Patterns = (), scope: str = "all"
) -> Found:
    """Find the feature maps that the named layers make and a convolution or linear layer reads.

    Args:
        model: Left untouched.
        inputs: What its forward takes; only shapes are looked at.
        layers, exclude: Layer-name patterns (see ``isw_plugin.sites.patterns``).
        scope: "all" needs every user of a map to be reachable by a hook, "consumers" only its readers.

    Raises:
        ProbeError: The model cannot be run on the inputs.
        NoSitesError: There is no site, whatever the patterns.
        PatternError: A pattern that selects nothing.
    """
    graph = probe(model, inputs)
    finder = _Finder(graph, scope)
    makers, reasons = finder.maps(_classifiers(model))
    # A norm after a join makes a map of its own and can be named like a layer.
    nameable = graph.layers | {name: graph.modules[name] for names in makers.values() for name in names}
    if not makers:
        raise NoSitesError(
            f"{type(model).__name__} has {len(graph.layers)} conv / linear layers and no feature map that one of "
            f"them reads from another{_because(reasons)}"
        )
    chosen = set(select(nameable, layers, exclude))
    sites = tuple(finder.site(value, names) for value, names in makers.items() if chosen & set(names))
    for site_names in makers.values():
        if not chosen & set(site_names):
            reasons |= {name: "not selected by layers / exclude" for name in site_names if name in graph.layers}
    if not sites:
        raise NoSitesError(f"layers={layers!r} selects layers without a site{_because(reasons, chosen)}")
    return Found(sites, {name: reasons[name] for name in graph.layers if name in reasons})


def _because(reasons: dict[str, str], names: Iterable[str] | None = None) -> str:
    shown = [f"{name}: {reasons[name]}" for name in (reasons if names is None else sorted(names)) if name in reasons]
    return f" ({'; '.join(shown[:5])})" if shown else ""


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (named,) if isinstance(named, str) else tuple(named)


class _Finder:
    def __init__(self, graph: Graph, scope: str) -> None:
        self.graph = graph
        self.scope = scope
        self.users = graph.users()
        self.counts = graph.call_counts()
        self.producers = {value: node for node in graph.nodes for value in node.outputs}
        self.squeezed = set(self._squeezes())
        self.axes: dict[int, int] = {}  # the channel axis of every map that a walk came through

    # -- which maps there are ----------------------------------------------------------------------

    def maps(self, classifiers: Iterable[str]) -> tuple[dict[int, tuple[str, ...]], dict[str, str]]:
        """Values that are sites, each with the names of the layers that end in it, and reasons for the rest."""
        ends: dict[int, list[str]] = {}
        reasons = dict.fromkeys(self.graph.layers, "not run in the probe")
        starts = [node for node in self.graph.nodes if node.kind == "layer"]
        for node in starts + [node for node in self.graph.nodes if node.kind == "norm"]:
            is_layer = node.kind == "layer"
            if is_layer and node.name in classifiers:
                reasons[node.name] = "the classifier"
                continue
            value, reason = self._walk(node)
            if value is not None and (is_layer or value not in ends):
                ends.setdefault(value, []).append(node.name)
                reasons.pop(node.name, None)
            elif is_layer:
                reasons[node.name] = reason
        order = {name: index for index, name in enumerate(self.graph.modules)}
        return {value: tuple(sorted(set(ends[value]), key=order.__getitem__)) for value in sorted(ends)}, reasons

    def _walk(self, node: Node) -> tuple[int | None, str]:
        """The map that this layer or norm ends in, or why there is none."""
        if self.counts[node.name] > 1:
            return None, f"called {self.counts[node.name]} times in one forward"
        if isinstance(self.graph.modules[node.name], nn.LayerNorm | nn.RMSNorm):
            return None, "a norm over channels"
        value = node.outputs[0]
        linear = isinstance(self.graph.modules[node.name], nn.Linear)
        axis = len(self.graph.shapes[value]) - 1 if linear else 1
        joined = False
        while True:
            self.axes[value] = axis  # all that a walk goes through keeps the shape
            if self.readers(value):
                reason = self._unusable(value)
                return (None, reason) if reason else (value, "")
            users = self.users[value]
            if len(users) != 1:
                return None, f"splits into {len(users)} before a layer reads it" if users else "the model's output"
            reason = self._obstacle(users[0], value)
            if joined and users[0].kind == "norm":
                reason = f"{users[0].name} norms it after a join"
            if reason:
                return None, reason
            joined |= users[0].kind in JOINS
            value = users[0].outputs[0]

    def _obstacle(self, user: Node, value: int) -> str:
        """Why the walk cannot go on through its only user; "" where it can."""
        if user.kind == "norm":
            mixes = isinstance(self.graph.modules[user.name], nn.LayerNorm | nn.RMSNorm)
            return f"{user.name} is a norm over channels" if mixes else ""
        if user.kind == "layer":
            return f"{user.name} does not read it by channels"
        if user.kind in JOINS:
            same = all(self.graph.shapes[other] == self.graph.shapes[value] for other in user.inputs)
            return "" if same else "added to a map of another shape"
        if user.kind in ACTIVATIONS or user.kind in PASSES or is_scale(self.graph, user, value):
            return ""
        if user.kind == "mul":
            return "scales another map"
        return f"{user.kind} reads it first"

    def _unusable(self, value: int) -> str:
        """Why a map that layers read cannot be a site; "" where it can."""
        if self.graph.shapes[value][0] != INSTANCES:
            return "instance axis folded into another"
        taps = self.taps(value)
        if not taps:
            return "no module's output or input is this map alone"
        repeated = [c.layer for c in self.readers(value) if self.counts[c.layer] > 1]
        if repeated and self.scope == "consumers":
            return f"its reader {repeated[0]} is called several times"
        return ""

    def _squeezes(self) -> Iterator[tuple[str, int]]:
        """Layers whose output only scales a map that they were computed from (squeeze-excite), with that map."""
        for node in self.graph.nodes:
            if node.kind != "mul" or len(node.inputs) != 2:
                continue
            for gate, scaled in (node.inputs, node.inputs[::-1]):
                if is_scale(self.graph, node, scaled) and self.graph.shapes[gate] != self.graph.shapes[scaled]:
                    yield from ((layer, scaled) for layer in self._layers_between(gate, scaled))

    def _layers_between(self, value: int, ancestor: int) -> Iterator[str]:
        """Layers met on the way back from ``value`` that end at ``ancestor``."""
        node = self.producers.get(value)
        while node is not None and value != ancestor:
            if node.kind == "layer":
                yield node.name
            value = node.inputs[0] if node.inputs else ancestor
            node = self.producers.get(value)

    # -- what a site looks like --------------------------------------------------------------------

    def site(self, value: int, names: tuple[str, ...]) -> Site:
        axis = self.axes[value]
        shape = self.graph.shapes[value][1:]
        return Site(
            name=names[0],
            layers=names,
            channels=self.graph.shapes[value][axis],
            axis=1 if axis == 1 else -1,
            shape=shape,
            taps=self.taps(value),
            consumers=tuple(self.readers(value)),
        )

    def readers(self, value: int) -> list[Consumer]:
        """Layers that read this map by channels, directly or through operations that keep channels apart."""
        found: dict[Consumer, None] = {}
        paths = [Path(value, self.axes[value])]
        while paths:
            path = paths.pop(0)
            for user in self.users[path.value]:
                if user.kind == "layer" and (user.name, value) not in self.squeezed and self._reads(user, path):
                    found[Consumer(user.name, path.start, path.repeat)] = None
                paths += follow(self.graph, user, path)
        return list(found)

    def _reads(self, layer: Node, path: Path) -> bool:
        shape = self.graph.shapes[path.value]
        return path.axis == (len(shape) - 1 if isinstance(self.graph.modules[layer.name], nn.Linear) else 1)

    def taps(self, value: int) -> tuple[Tap, ...]:
        """One module that gives the map, or else the inputs that cover everyone who must see it gated."""
        for call in self.graph.calls:
            # An Identity gives the map too, but only to those after it.
            if call.output == value and value not in call.tensors() and self.counts[call.name] == 1:
                return (Tap(call.name),)
        taps = [self._input_tap(user, value) for user in self._needed(value)]
        return tuple(dict.fromkeys(tap for tap in taps if tap)) if all(taps) else ()

    def _needed(self, value: int) -> list[Node]:
        """Users that must be reachable: all, or under scope="consumers" one that runs no later than any reader."""
        if self.scope == "all":
            return self.users[value]
        readers = {consumer.layer for consumer in self.readers(value)}
        first = next(node for node in self.graph.nodes if node.name in readers)
        order = {id(node): index for index, node in enumerate(self.graph.nodes)}
        early = [user for user in self.users[value] if order[id(user)] <= order[id(first)]]
        return [user for user in early if self._input_tap(user, value)][:1] or early[:1]

    def _input_tap(self, user: Node, value: int) -> Tap | None:
        """The outermost module around a user that takes the map as an argument."""
        inside = {*user.callers, user.name}
        for call in reversed(self.graph.calls):
            if call.name in inside and value in call.inputs and self.counts[call.name] == 1:
                return Tap(call.name, call.inputs.index(value))
        return None
