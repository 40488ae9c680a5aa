"""Which layers read a map by channels, and which only compute what a map is scaled by."""

from collections.abc import Iterator

from torch import nn

from isw_plugin.sites.graph import Graph, Node
from isw_plugin.sites.operations import BLANKS, CUTS
from isw_plugin.sites.paths import Path, follow, is_scale
from isw_plugin.sites.site import Consumer

__all__ = ["Readers"]


class Readers:
    """The uses of every value of a graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        # What only takes a shape does not read a map.
        self.users = [[node for node in users if node.kind not in BLANKS] for users in graph.users()]
        self.counts = graph.call_counts()
        self._scales = dict(self._squeezes())

    def of(self, value: int, axis: int, cut: bool = True) -> list[Consumer]:
        """Layers that read a map by channels, directly or through operations that keep channels apart.

        Args:
            cut: Also those that read a part of it.
        """
        found: dict[Consumer, None] = {}
        paths = [Path.whole(self.graph, value, axis)]
        channels = len(paths[0].channels)
        while paths:
            path = paths.pop(0)
            for user in self.users[path.value]:
                if user.kind == "layer" and not self._squeezed(user, value) and self._reads(user, path):
                    found[Consumer.at(user.name, path.channels, channels)] = None
                if self._keeps(user, path.value) and (cut or user.kind not in CUTS):
                    paths += follow(self.graph, user, path)
        return list(found)

    def _keeps(self, user: Node, value: int) -> bool:
        return not self.is_gate(user, value) and not self.is_product(user, value)

    def scaled_by(self, value: int) -> Node | None:
        """What scales a map, if its other users only compute the scale (squeeze-excite)."""
        scale, squeeze = self._scales.get(value, (None, ()))
        alone = all(user is scale or any(user is node for node in squeeze) for user in self.users[value])
        return scale if alone else None

    def is_gate(self, scale: Node, value: int) -> bool:
        """Whether a value is what a map is scaled by; on maps of one pixel the shapes do not tell."""
        return any(self._scales.get(other, (None, ()))[0] is scale for other in scale.inputs if other != value)

    def is_product(self, node: Node, value: int) -> bool:
        """Whether a node multiplies a map by another that is neither made from it nor its maker."""
        if node.kind != "mul" or len(set(node.inputs)) != 2 or self.is_gate(node, value):
            return False
        same = len({self.graph.shapes[other] for other in node.inputs}) == 1
        return same and self._scales.get(value, (None, ()))[0] is not node

    def _squeezed(self, layer: Node, value: int) -> bool:
        """Whether a layer only helps to compute what the map is scaled by."""
        return any(layer is node for node in self._scales.get(value, (None, ()))[1])

    def _reads(self, layer: Node, path: Path) -> bool:
        shape = self.graph.shapes[path.value]
        return path.axis == (len(shape) - 1 if isinstance(self.graph.modules[layer.name], nn.Linear) else 1)

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
            node = self.graph.producers.get(value)
            if node is None or not node.inputs:
                return ()
            nodes.append(node)
            value = node.inputs[0]
        return tuple(nodes)
