"""From a map back to the maps that its layers read."""

from collections.abc import Mapping

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from isw_plugin.sites.graph import Graph, Node
from isw_plugin.sites.operations import ACTIVATIONS, JOINS, PASSES, POOLS, VIEWS
from isw_plugin.sites.readers import Readers
from isw_plugin.sites.site import Consumer, Making

__all__ = ["Makings"]

_CHANNEL_BY_CHANNEL = ACTIVATIONS | JOINS | PASSES | POOLS | VIEWS | {"mul", "div"}


class Makings:
    """Finds how maps are made.

    Args:
        readers: Of the graph.
        sites: Value -> name of the site.
        axes: Value -> axis of its channels.
    """

    def __init__(self, readers: Readers, sites: Mapping[int, str], axes: Mapping[int, int]) -> None:
        self.graph: Graph = readers.graph
        self.readers, self.users = readers, readers.users
        self.sites = sites
        self.axes = axes

    def of(self, value: int, axis: int, layers: tuple[str, ...]) -> Making:
        """How the map ``value`` is made, whose channels lie on ``axis``, by these layers."""
        channels = self.graph.shapes[value][axis]
        makers, between, found, reason = self._back(value, layers)
        if reason:
            return Making(reason=reason)
        if {node.name for node in makers} != set(layers) or len(makers) != len(layers):
            return Making(reason="a norm makes it" if not makers else "its layers run more than once")
        for maker in makers:
            made = self.graph.shapes[maker.outputs[0]]
            if channels != made[-1 if isinstance(self.graph.modules[maker.name], nn.Linear) else 1]:
                return Making(reason=f"{maker.name} makes other channels than those of the map")
        seen = self._seen_before(value, makers, between)
        if seen:
            return Making(reason=f"{seen} sees it before the gate")
        alone = len(makers) == 1 and not found
        for maker in makers:
            read, reason = self._read(maker)
            if reason:
                return Making((), layers, reason)
            found |= read
        sources = tuple(name for name in self.sites.values() if name in found)
        follows = sources[0] if alone and len(sources) == 1 and self._is_depthwise(makers[0], sources[0]) else ""
        return Making(sources, layers, "", follows)

    def _back(self, value: int, layers: tuple[str, ...]) -> tuple[list[Node], list[Node], dict[str, None], str]:
        """The layers that make a map, what runs between them and it, and the sites that are added on the way."""
        makers: list[Node] = []
        between: list[Node] = []
        shortcuts: dict[str, None] = {}
        pending, done = [value], set()
        while pending:
            current = pending.pop()
            if current in done:
                continue
            done.add(current)
            producer = self.graph.producers.get(current)
            if current != value and current in self.sites:
                shortcuts[self.sites[current]] = None
            elif producer is None:
                return makers, between, shortcuts, "the image is added to it"
            elif producer.kind == "layer" and producer.name in layers:
                makers.append(producer)
            elif producer.kind in ("layer", "recurrent"):
                return makers, between, shortcuts, f"{producer.name} has a part in it"
            elif not self._keeps_apart(producer):
                return makers, between, shortcuts, f"{producer.name or producer.kind} may mix its channels"
            elif producer not in between:
                between.append(producer)
                pending += producer.inputs
        return makers, between, shortcuts, ""

    def _keeps_apart(self, node: Node) -> bool:
        """Whether every channel of what a node gives is made of the same channel of what it gets."""
        if node.kind == "norm":
            module = self.graph.modules[node.name]
            return isinstance(module, _NormBase) or "FrozenBatchNorm" in type(module).__name__
        return node.kind in _CHANNEL_BY_CHANNEL

    def _read(self, layer: Node) -> tuple[dict[str, None], str]:
        """The sites that a layer reads."""
        found: dict[str, None] = {}
        pending, done = list(layer.inputs[:1]), set()
        while pending:
            current = pending.pop()
            if current in done:
                continue
            done.add(current)
            producer = self.graph.producers.get(current)
            if current in self.sites:
                found[self.sites[current]] = None
            elif producer is None:
                return found, f"{layer.name} reads the image"
            elif producer.kind in ("layer", "recurrent"):
                return found, f"{layer.name} reads what {producer.name} makes, on which no gate decides"
            else:
                pending += producer.inputs
        return found, ""

    def _is_depthwise(self, layer: Node, source: str) -> bool:
        """Whether a layer makes every channel of the same channel of a site's map alone, which nothing else reads."""
        module = self.graph.modules[layer.name]
        if not (isinstance(module, _ConvNd) and module.groups == module.in_channels == module.out_channels):
            return False
        value = next(value for value, name in self.sites.items() if name == source)
        axis, current = self.axes[value], layer.inputs[0]
        while current != value:
            if len(self.users[current]) != 1:
                return False
            current = self.graph.producers[current].inputs[0]
        whole = self.graph.shapes[value][axis] == module.in_channels
        return whole and len(self.users[value]) == 1 and self.readers.of(value, axis) == [Consumer(layer.name)]

    def _seen_before(self, value: int, makers: list[Node], between: list[Node]) -> str:
        """Who else reads what lies between the layers and the map; "" where nobody does."""
        own = {id(node) for node in between}
        made = {output for node in makers for output in node.outputs}
        for node in self.graph.nodes:
            if id(node) in own and made.intersection(node.inputs):
                made.update(node.outputs)
        for node in self.graph.nodes:
            if id(node) not in own and (made - {value}).intersection(node.inputs):
                return node.name or node.kind
        return ""
