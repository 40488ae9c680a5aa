"""From the probe's graph to sites: walk from every layer until a layer reads what it made."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

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
        self.scales = dict(self._squeezes())
        self.axes: dict[int, int] = {}  # the channel axis of every map that a walk came through

    # -- which maps there are ----------------------------------------------------------------------

    def maps(self, classifiers: Iterable[str]) -> tuple[dict[int, tuple[str, ...]], dict[str, str]]:
        """Values that are sites, each with the names of the layers that end in it, and reasons for the rest."""
        ends: dict[int, list[str]] = {}
        reasons = dict.fromkeys(self.graph.layers, "not run in the probe")
        starts = [node for node in self.graph.nodes if node.kind == "layer"]
        norms = [node for node in self.graph.nodes if node.kind == "norm" and self._comes_from_a_layer(node)]
        for node in starts + norms:
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
            self.axes[value] = axis
            if self.readers(value):
                reason = self._unusable(value)
                return (None, reason) if reason else (value, "")
            user = self._next(value)
            if user is None:
                count = len(self.users[value])
                return None, f"splits into {count} before a layer reads it" if count else "the model's output"
            path, reason = self._through(user, value)
            if path is None or (joined and user.kind == "norm"):
                return None, reason or f"{user.name} norms it after a join"
            joined |= user.kind in JOINS
            value, axis = path.value, path.axis

    def _next(self, value: int) -> Node | None:
        """The only user of a map; or what scales it, if the others only compute the scale (squeeze-excite)."""
        users = self.users[value]
        if len(users) == 1:
            return users[0]
        scale, squeeze = self.scales.get(value, (None, ()))
        alone = all(user is scale or any(user is node for node in squeeze) for user in users)
        return scale if alone else None

    def _through(self, user: Node, value: int) -> tuple[Path | None, str]:
        """Where a walk goes on behind a user, or why it cannot."""
        here = Path(value, self.axes[value])
        behind = replace(here, value=user.outputs[0])
        if user.kind == "norm":
            mixes = isinstance(self.graph.modules[user.name], nn.LayerNorm | nn.RMSNorm)
            return (None, f"{user.name} is a norm over channels") if mixes else (behind, "")
        if user.kind == "layer":
            return None, f"{user.name} does not read it by channels"
        if user.kind in JOINS:
            same = all(self.graph.shapes[other] == self.graph.shapes[value] for other in user.inputs)
            return (behind, "") if same else (None, "added to a map of another shape")
        scales = is_scale(self.graph, user, value)
        if user.kind == "mul" and (self._is_gate(user, value) or not scales):
            return None, "scales another map"
        if user.kind in ACTIVATIONS or user.kind in PASSES or scales:
            return behind, ""
        whole = [path for path in follow(self.graph, user, here) if not path.start and path.repeat == 1]
        if whole and user.kind != "cat":
            return whole[0], ""
        return None, f"{user.kind} reads it first"

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

    def _squeezes(self) -> Iterator[tuple[int, tuple[Node, tuple[Node, ...]]]]:
        """Maps that are multiplied by a scale made from themselves: map, multiplication, the scale's nodes."""
        for node in self.graph.nodes:
            if node.kind != "mul" or len(node.inputs) != 2:
                continue
            for gate, scaled in (node.inputs, node.inputs[::-1]):
                squeeze = self._way_back(gate, scaled)
                if squeeze and is_scale(self.graph, node, scaled):
                    yield scaled, (node, squeeze)

    def _way_back(self, value: int, ancestor: int) -> tuple[Node, ...]:
        """The nodes between an ancestor and a value made from it; empty where it is no ancestor."""
        nodes = []
        while value != ancestor:
            node = self.producers.get(value)
            if node is None or not node.inputs:
                return ()
            nodes.append(node)
            value = node.inputs[0]
        return tuple(nodes)

    def _comes_from_a_layer(self, node: Node) -> bool:
        """Whether any layer ran on the way to this node; the image itself has none."""
        values, seen = list(node.inputs), set(node.inputs)
        while values:
            producer = self.producers.get(values.pop())
            if producer is None:
                continue
            if producer.kind == "layer":
                return True
            values += [value for value in producer.inputs if value not in seen]
            seen.update(producer.inputs)
        return False

    # -- what a site looks like --------------------------------------------------------------------

    def site(self, value: int, names: tuple[str, ...]) -> Site:
        """The map as a site of these layers."""
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
                if user.kind == "layer" and not self._squeezed(user, value) and self._reads(user, path):
                    found[Consumer(user.name, path.start, path.repeat)] = None
                if not self._is_gate(user, path.value):
                    paths += follow(self.graph, user, path)
        return list(found)

    def _squeezed(self, layer: Node, value: int) -> bool:
        """Whether a layer only helps to compute what the map is scaled by."""
        return any(layer is node for node in self.scales.get(value, (None, ()))[1])

    def _is_gate(self, scale: Node, value: int) -> bool:
        """Whether a value is what a map is scaled by; on maps of one pixel the shapes do not tell."""
        return any(self.scales.get(other, (None, ()))[0] is scale for other in scale.inputs if other != value)

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
