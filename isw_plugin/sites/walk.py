"""From every layer or norm along its map until a layer reads it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from isw_plugin.sites.graph import Graph, Node, norms_over_channels
from isw_plugin.sites.instances import why_not
from isw_plugin.sites.paths import ACTIVATIONS, JOINS, PASSES, SPLITS, VIEWS, Path, follow, is_scale
from isw_plugin.sites.readers import Readers
from isw_plugin.sites.taps import Taps

__all__ = ["Ends", "Walks"]

_REGION = 40  # nodes between a map's split and where it comes together again, at most


@dataclass(frozen=True)
class Ends:
    """Where all walks end: value -> names of the layers, value -> channel axis, layer -> why it has no map."""

    layers: dict[int, tuple[str, ...]]
    axes: dict[int, int]
    reasons: dict[str, str]


@dataclass
class _Walk:
    """A walk so far."""

    value: int
    axis: int
    joined: bool = False  # with another map, by adding or multiplying
    added: bool = False
    shaped: bool = False  # by an activation or a product
    normed: str = ""  # the norm over channels on the way


class Walks:
    """Walks over one graph."""

    def __init__(self, graph: Graph, readers: Readers, taps: Taps) -> None:
        self.graph = graph
        self.readers = readers
        self.taps = taps
        self._order = {id(node): index for index, node in enumerate(graph.nodes)}

    def ends(self, classifiers: Iterable[str]) -> Ends:
        """Values that are sites, each with the names of the layers that end in it, and reasons for the rest."""
        graph = self.graph
        ends: dict[int, list[str]] = {}
        axes: dict[int, int] = {}
        reasons = {name: graph.own.get(name, "not run in the probe") for name in graph.layers} | graph.own
        starts = [node for node in graph.nodes if node.kind == "layer"]
        norms = [node for node in graph.nodes if node.kind == "norm" and self._comes_from_a_layer(node)]
        for node in starts + norms:
            is_layer = node.kind == "layer"
            if is_layer and node.name in classifiers:
                reasons[node.name] = "the classifier"
                continue
            walk, reason = self._walk(node)
            if walk and (is_layer or walk.value not in ends):
                ends.setdefault(walk.value, []).append(node.name)
                axes[walk.value] = walk.axis
                reasons.pop(node.name, None)
            elif is_layer:
                reasons[node.name] = reason
        order = {name: index for index, name in enumerate(graph.modules)}
        layers = {value: tuple(sorted(set(ends[value]), key=order.__getitem__)) for value in sorted(ends)}
        return Ends(layers, axes, reasons)

    def _walk(self, node: Node) -> tuple[_Walk | None, str]:
        """The map that this layer or norm ends in, or why there is none."""
        if self.graph.more[node.name]:
            return None, "how often it is called depends on the number of instances"
        if self.readers.counts[node.name] > 1:
            return None, f"called {self.readers.counts[node.name]} times in one forward"
        if norms_over_channels(self.graph.modules[node.name]):
            return None, "a norm over channels"
        value = node.outputs[0]
        linear = isinstance(self.graph.modules[node.name], nn.Linear)
        return self._to_end(_Walk(value, len(self.graph.shapes[value]) - 1 if linear else 1))

    def _to_end(self, walk: _Walk) -> tuple[_Walk | None, str]:
        while True:
            if self.readers.of(walk.value, walk.axis):
                reason = self._unusable(walk)
                later = self._later_form(walk) if reason else None
                if later is None:
                    return (None, reason) if reason else (walk, "")
                walk.value, walk.axis = later.value, later.axis
                continue
            users = self.readers.users[walk.value]
            if len(users) == 1 and users[0].kind in SPLITS:
                return self._behind_split(users[0], walk)
            reason = self._step(walk)
            if reason:
                return None, reason

    def _behind_split(self, split: Node, walk: _Walk) -> tuple[_Walk | None, str]:
        """The product of halves, or else what one part becomes where others go elsewhere (attention beside an MLP)."""
        whole = replace(walk)
        reason = self._step(whole)
        end, reason = (None, reason) if reason else self._to_end(whole)
        if end or walk.shaped:
            return end, reason
        parts = (_Walk(value, walk.axis) for value in split.outputs if self.readers.users[value])
        ends = (self._to_end(part)[0] for part in parts)
        part = next((end for end in ends if end and end.shaped and not end.added), None)
        return part, "" if part else reason

    def _step(self, walk: _Walk) -> str:
        """Go on behind the user of a map, or say why not."""
        user = self._next(walk)
        if user is None:
            users = self.readers.users[walk.value]
            if len(users) == 1:
                return f"{users[0].kind} reads it first"
            return f"splits into {len(users)} before a layer reads it" if users else "the model's output"
        path, reason = self._through(user, walk)
        if path is None:
            return reason
        alone = len(self.readers.users[walk.value]) == 1
        product = self.readers.is_product(user, walk.value)
        walk.added |= alone and user.kind in JOINS and len(set(user.inputs)) > 1
        walk.joined |= alone and (user.kind in JOINS or product)
        walk.shaped |= not alone or user.kind in ACTIVATIONS or product
        walk.value, walk.axis = path.value, path.axis
        return ""

    def _next(self, walk: _Walk) -> Node | None:
        """The only user of a map; what scales it (squeeze-excite); or where its uses come together again."""
        users = self.readers.users[walk.value]
        if len(users) == 1 and users[0].kind not in SPLITS:
            return users[0]
        return (self.readers.scaled_by(walk.value) if len(users) > 1 else None) or self._together(walk, users)

    def _together(self, walk: _Walk, users: list[Node]) -> Node | None:
        """The operation that all uses of a map come together in: x * sigmoid(x), or a * gelu(b) of its halves."""
        halves = len(users) == 1
        pending = {self._order[id(user)]: user for user in users}
        for _ in range(_REGION):
            if not pending:
                return None
            node = pending.pop(min(pending))
            if not pending and node.kind not in SPLITS:
                return node if self._is_whole(node, walk, halves) else None
            if node.kind in ("layer", "norm", "recurrent") and not halves:
                return None
            for value in node.outputs:
                pending |= {self._order[id(user)]: user for user in self.readers.users[value]}
        return None

    def _is_whole(self, node: Node, walk: _Walk, halves: bool) -> bool:
        """Whether an operation gives a map of the same shape again; of halves, their product."""
        if node.kind in ("layer", "norm", "cat") or len(node.outputs) != 1:
            return False
        before, after = list(self.graph.shapes[walk.value]), list(self.graph.shapes[node.outputs[0]])
        if not halves:
            return before == after
        before[walk.axis] //= 2
        return node.kind == "mul" and before == after

    def _through(self, user: Node, walk: _Walk) -> tuple[Path | None, str]:
        """Where a walk goes on behind a user, or why it cannot."""
        here = Path(walk.value, walk.axis)
        behind = replace(here, value=user.outputs[0])
        if user.kind == "norm":
            return self._through_norm(user, walk, behind)
        if user.kind == "layer":
            return None, f"{user.name} does not read it by channels"
        if walk.value not in user.inputs:  # what the uses of this map come together in
            return behind, ""
        if user.kind in JOINS:
            same = all(self.graph.shapes[other] == self.graph.shapes[walk.value] for other in user.inputs)
            return (behind, "") if same else (None, "added to a map of another shape")
        if user.kind == "mul":
            return self._through_product(user, walk, behind)
        if user.kind in ACTIVATIONS or user.kind in PASSES or is_scale(self.graph, user, walk.value, walk.axis):
            return behind, ""
        if user.kind in VIEWS and self._keeps_last(user, walk):
            return replace(behind, axis=len(self.graph.shapes[behind.value]) - 1), ""
        whole = [path for path in follow(self.graph, user, here) if not path.start and path.repeat == 1]
        if whole and user.kind != "cat":
            return whole[0], ""
        return None, f"{user.kind} reads it first"

    def _through_product(self, user: Node, walk: _Walk, behind: Path) -> tuple[Path | None, str]:
        scales = is_scale(self.graph, user, walk.value, walk.axis) and not self.readers.is_gate(user, walk.value)
        return (behind, "") if scales or self.readers.is_product(user, walk.value) else (None, "scales another map")

    def _through_norm(self, user: Node, walk: _Walk, behind: Path) -> tuple[Path | None, str]:
        module = self.graph.modules[user.name]
        over_channels = norms_over_channels(module)
        if over_channels and walk.added:
            return None, f"{user.name} is a norm over channels"
        if walk.joined and not over_channels:
            return None, f"{user.name} norms it after a join"
        walk.shaped |= not isinstance(getattr(module, "act", None), nn.Identity | None)
        walk.normed = user.name if over_channels else walk.normed
        return behind, ""

    def _keeps_last(self, view: Node, walk: _Walk) -> bool:
        """Whether a view leaves channels the last axis; it may put instances and tokens on one axis for a norm."""
        before, after = self.graph.shapes[walk.value], self.graph.shapes[view.outputs[0]]
        return walk.axis == len(before) - 1 and before[-1:] == after[-1:]

    def _unusable(self, walk: _Walk) -> str:
        """Why a map that layers read cannot be a site; "" where it can."""
        shape = self.graph.shapes[walk.value]
        if why_not(shape):
            return why_not(shape)
        if walk.axis not in (1, len(shape) - 1):
            return f"its channels lie on axis {walk.axis} of {len(shape)}"
        if walk.normed and not walk.shaped:
            return f"{walk.normed} is a norm over channels"
        if not self.taps.of(walk.value, walk.axis):
            return "no module's output or input is this map alone"
        counts = self.readers.counts
        repeated = [c.layer for c in self.readers.of(walk.value, walk.axis) if counts[c.layer] > 1]
        if repeated and self.taps.scope == "consumers":
            return f"its reader {repeated[0]} is called several times"
        return ""

    def _later_form(self, walk: _Walk) -> Path | None:
        """The same channels behind the only user of a map that no hook can touch."""
        users = self.readers.users[walk.value]
        if len(users) != 1 or users[0].kind in ("layer", "cat") or (walk.normed and not walk.shaped):
            return None
        paths = follow(self.graph, users[0], Path(walk.value, walk.axis))
        whole = [path for path in paths if not path.start and path.repeat == 1]
        return whole[0] if len(whole) == 1 else None

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
