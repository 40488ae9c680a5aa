"""Where the walks from all layers and norms end: the maps that are sites, and why other layers have none."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from isw_plugin.sites.graph import Graph, Node
from isw_plugin.sites.readers import Readers
from isw_plugin.sites.steps import NO_TAP, Steps, Walk
from isw_plugin.sites.taps import Taps

__all__ = ["Ends", "Walks"]


@dataclass(frozen=True)
class Ends:
    """Where all walks end: value -> names of the layers, value -> channel axis, layer -> why it has no map."""

    layers: dict[int, tuple[str, ...]]
    axes: dict[int, int]
    reasons: dict[str, str]


@dataclass
class _Maps:
    """Maps so far: the names of those that end in each, its channel axis, and the input columns that all fill."""

    names: dict[int, list[str]] = field(default_factory=dict)
    axes: dict[int, int] = field(default_factory=dict)
    columns: set[tuple[str, int]] = field(default_factory=set)


class Walks:
    """Walks over one graph."""

    def __init__(self, graph: Graph, readers: Readers, taps: Taps) -> None:
        self.graph = graph
        self.readers = readers
        self.steps = Steps(graph, readers, taps)

    def ends(self, classifiers: Iterable[str]) -> Ends:
        """Values that are sites, each with the names of the layers that end in it, and reasons for the rest."""
        graph, maps = self.graph, _Maps()
        reasons = {name: graph.own.get(name, "not run in the probe") for name in graph.layers} | graph.own
        reasons |= dict.fromkeys(set(classifiers) & graph.layers.keys(), "the classifier")
        left = [node for node in graph.nodes if node.kind == "layer" and node.name not in classifiers]
        left += [node for node in graph.nodes if node.kind == "norm" and self._comes_from_a_layer(node)]
        # First the maps that are read whole: gated MLPs cut theirs in halves, and end in the product.
        for cut in (False, True):
            left = [node for node in left if not self._place(node, cut, maps, reasons)]
        for walk, names in self._past_cats([node for node in left if node.kind == "layer"]):
            if not self._add(walk, names, maps):
                reasons = {name: reason for name, reason in reasons.items() if name not in names}
        order = {name: index for index, name in enumerate(graph.modules)}
        ordered = {value: tuple(sorted(set(maps.names[value]), key=order.__getitem__)) for value in sorted(maps.names)}
        return Ends(ordered, maps.axes, reasons)

    def _place(self, node: Node, cut: bool, maps: _Maps, reasons: dict[str, str]) -> bool:
        """Whether a layer or norm has its map, or else why not."""
        walk, reason = self.steps.start(node, cut)
        if walk:
            walk, reason = self.steps.to_end(walk)
        if walk and (node.kind == "layer" or walk.value not in maps.names):
            reason = self._add(walk, [node.name], maps)
        if node.kind == "layer" and reason:
            reasons[node.name] = reason
        elif not reason:
            reasons.pop(node.name, None)
        return not reason

    def _add(self, walk: Walk, names: list[str], maps: _Maps) -> str:
        """Note a map, unless it would fill a reader's columns a second time."""
        if walk.value not in maps.names:
            channels = self.graph.shapes[walk.value][walk.axis]
            readers = self.readers.of(walk.value, walk.axis)
            columns = {(reader.layer, column) for reader in readers for column, _ in reader.columns(channels)}
            if walk.cut and columns & maps.columns:
                return f"another map fills the same input of {min(columns & maps.columns)[0]}"
            maps.columns |= columns
        maps.names.setdefault(walk.value, []).extend(names)
        maps.axes[walk.value] = walk.axis
        return ""

    def _past_cats(self, left: list[Node]) -> Iterator[tuple[Walk, list[str]]]:
        """What maps become together that no hook can touch before they are concatenated (TextCNN)."""
        stuck: dict[tuple[int, int], list[str]] = {}
        for node in left:
            walk, _ = self.steps.start(node, cut=True)
            if walk and self.steps.to_end(walk)[1] == NO_TAP:
                stuck.setdefault((walk.value, walk.axis), []).append(node.name)
        for cat in self.graph.nodes:
            if cat.kind != "cat":
                continue
            axis = (cat.args[1] if len(cat.args) > 1 else 0) % len(self.graph.shapes[cat.outputs[0]])
            parts = [(value, axis) for value in dict.fromkeys(cat.inputs)]
            if set(parts) <= stuck.keys():
                end, _ = self.steps.to_end(Walk(cat.outputs[0], axis, cut=True, joined=True))
                if end:
                    yield end, [name for part in parts for name in stuck[part]]

    def _comes_from_a_layer(self, node: Node) -> bool:
        """Whether any layer ran on the way to this node; the image itself has none."""
        values, seen = list(node.inputs), set(node.inputs)
        while values:
            producer = self.graph.producers.get(values.pop())
            if producer is None:
                continue
            if producer.kind == "layer":
                return True
            values += [value for value in producer.inputs if value not in seen]
            seen.update(producer.inputs)
        return False
