"""From every layer or norm along its map until a layer reads it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from isw_plugin.sites.operations import ACTIVATIONS, CUTS, FOLDS, JOINS, PASSES, SPLITS, VIEWS
from isw_plugin.sites.paths import Path, by_channel, follow, keeps_zeros
from isw_plugin.sites.probe import INSTANCES, Graph, Node, norms_over_channels
from isw_plugin.sites.readers import Readers
from isw_plugin.sites.taps import Taps

__all__ = ["Ends", "Walks"]

_NO_TAP = "no module's output or input is this map alone"
_WRITTEN = "written into a part of another tensor"
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
    cut: bool  # whether a layer that reads a part of the map ends it
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
        starts += [node for node in graph.nodes if node.kind == "norm" and self._comes_from_a_layer(node)]
        # First the maps that are read whole: gated MLPs cut theirs in halves, and end in the product.
        for cut in (False, True):
            left = []
            for node in starts:
                if node.name in classifiers:
                    reasons[node.name] = "the classifier"
                    continue
                walk, reason = self._walk(node, cut)
                if walk and cut and walk.value not in ends:
                    walk, reason = (None, taken) if (taken := self._taken(walk, axes)) else (walk, "")
                if walk is None:
                    left.append(node)
                    if node.kind == "layer":
                        reasons[node.name] = reason
                elif node.kind == "layer" or walk.value not in ends:
                    ends.setdefault(walk.value, []).append(node.name)
                    axes[walk.value] = walk.axis
                    reasons.pop(node.name, None)
            starts = left
        for walk, names in self._past_cats(starts):
            if not self._taken(walk, axes):
                ends[walk.value], axes[walk.value] = names, walk.axis
                reasons = {name: reason for name, reason in reasons.items() if name not in names}
        order = {name: index for index, name in enumerate(graph.modules)}
        layers = {value: tuple(sorted(set(ends[value]), key=order.__getitem__)) for value in sorted(ends)}
        return Ends(layers, axes, reasons)

    def _taken(self, walk: _Walk, axes: dict[int, int]) -> str:
        """Whose columns this map would fill a second time."""
        others = {self._columns(value, axis) for value, axis in axes.items()}
        both = self._columns(walk.value, walk.axis).intersection(*[set().union(*others)])
        return f"{min(both)[0]} reads its channels in another map" if both else ""

    def _columns(self, value: int, axis: int) -> frozenset[tuple[str, int]]:
        channels = self.graph.shapes[value][axis]
        readers = self.readers.of(value, axis)
        return frozenset((reader.layer, column) for reader in readers for column, _ in reader.columns(channels))

    def _past_cats(self, left: list[Node]) -> Iterator[tuple[_Walk, list[str]]]:
        """What maps become together that no hook can touch before they are concatenated (TextCNN)."""
        stuck: dict[int, list[str]] = {}
        for node in left:
            start, _ = self._start(node, cut=True)
            if start and self._to_end(start)[1] == _NO_TAP:
                stuck.setdefault(start.value, []).append(node.name)
        for cat in self.graph.nodes:
            if cat.kind == "cat" and set(cat.inputs) <= stuck.keys():
                axis = (cat.args[1] if len(cat.args) > 1 else 0) % len(self.graph.shapes[cat.outputs[0]])
                end, _ = self._to_end(_Walk(cat.outputs[0], axis, cut=True, joined=True))
                if end:
                    yield end, [name for value in dict.fromkeys(cat.inputs) for name in stuck[value]]

    def _start(self, node: Node, cut: bool) -> tuple[_Walk | None, str]:
        if self.readers.counts[node.name] > 1:
            return None, f"called {self.readers.counts[node.name]} times in one forward"
        if norms_over_channels(self.graph.modules[node.name]):
            return None, "a norm over channels"
        value = node.outputs[0]
        linear = isinstance(self.graph.modules[node.name], nn.Linear)
        return _Walk(value, len(self.graph.shapes[value]) - 1 if linear else 1, cut), ""

    def _walk(self, node: Node, cut: bool) -> tuple[_Walk | None, str]:
        """The map that this layer or norm ends in, or why there is none."""
        start, reason = self._start(node, cut)
        return self._to_end(start) if start else (None, reason)

    def _to_end(self, walk: _Walk) -> tuple[_Walk | None, str]:
        while True:
            if self.readers.of(walk.value, walk.axis, walk.cut):
                reason = self._unusable(walk)
                later = self._later_form(walk) if reason else None
                if later is None:
                    return (None, reason) if reason else (walk, "")
                walk.value, walk.axis = later.value, later.axis
                continue
            users = self.readers.users[walk.value]
            if len(users) == 1 and users[0].kind in SPLITS:
                return self._behind_split(users[0], walk)
            if walk.cut and len(users) == 1 and (axes := self._split_axes(users[0], walk)):
                return self._on_one_of(axes, users[0], walk)
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
        parts = (_Walk(value, walk.axis, walk.cut) for value in split.outputs if self.readers.users[value])
        ends = (self._to_end(part)[0] for part in parts)
        part = next((end for end in ends if end and end.shaped and not end.added), None)
        return part, "" if part else reason

    def _split_axes(self, view: Node, walk: _Walk) -> range:
        """The axes that a view lays the channels out on, where it is more than one."""
        before, after = self.graph.shapes[walk.value], self.graph.shapes[view.outputs[0]]
        more = len(after) - len(before) + 1  # axes for one
        same = walk.axis == 1 and more > 1 and after[0] == before[0] and after[more + 1 :] == before[2:]
        return (
            range(1, more + 1)
            if view.kind in VIEWS and same and more > 1 and 1 not in after[1 : more + 1]
            else range(0)
        )

    def _on_one_of(self, axes: range, view: Node, walk: _Walk) -> tuple[_Walk | None, str]:
        """What becomes of groups of channels (their largest; pixels unfolded from them), or of every n-th channel."""
        reason = ""
        for axis in axes:
            end, why = self._to_end(replace(walk, value=view.outputs[0], axis=axis))
            if end:
                return end, ""
            reason = reason or why
        return None, reason

    def _step(self, walk: _Walk) -> str:
        """Go on behind the user of a map, or say why not."""
        user = self._next(walk)
        if user is None:
            users = self.readers.users[walk.value]
            if len(users) == 1:
                return f"{users[0].kind} reads it first"
            return f"splits into {len(users)} before a layer reads it" if users else self._unread(walk.value)
        path, reason = self._through(user, walk)
        if path is None:
            return reason
        alone = len(self.readers.users[walk.value]) == 1
        product = self.readers.is_product(user, walk.value)
        joins = alone and user.kind in JOINS and not self._shifts(user, walk)
        walk.added |= joins and len(set(user.inputs)) > 1
        walk.joined |= joins or (alone and product)
        walk.shaped |= not alone or user.kind in ACTIVATIONS or product
        walk.value, walk.axis = path.value, path.axis
        return ""

    def _unread(self, value: int) -> str:
        maker, output = self.graph.producers.get(value), self.graph.calls[-1].output
        if maker and maker.kind == "copy":
            return _WRITTEN
        return "the model's output" if output in (None, value) else "nothing reads it"

    def _shifts(self, user: Node, walk: _Walk) -> bool:
        """Whether a node adds one number a channel (FiLM)."""
        shape = self.graph.shapes[walk.value]
        others = [self.graph.shapes[other] for other in user.inputs if other != walk.value]
        same = self.graph.shapes[user.outputs[0]] == shape
        return bool(others) and same and all(o != shape and by_channel(o, shape, walk.axis) for o in others)

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
        return node.kind in JOINS | {"mul"} and before == after

    def _through(self, user: Node, walk: _Walk) -> tuple[Path | None, str]:
        """Where a walk goes on behind a user, or why it cannot."""
        behind = Path(user.outputs[0], walk.axis, ())
        if user.kind == "norm":
            return self._through_norm(user, walk, behind)
        if user.kind == "layer":
            return None, f"{user.name} does not read it by channels"
        together = user.kind == "div" and len(self.readers.users[walk.value]) > 1  # x / (k + the mean of x * x) ** b
        if walk.value not in user.inputs or together:  # what the uses of this map come together in
            return behind, ""
        if user.kind in JOINS:
            same = all(self.graph.shapes[other] == self.graph.shapes[walk.value] for other in user.inputs)
            return (behind, "") if same or self._shifts(user, walk) else (None, "added to a map of another shape")
        if user.kind == "mul":
            return self._through_product(user, walk, behind)
        if user.kind in ACTIVATIONS | PASSES or keeps_zeros(self.graph, user, walk.value, walk.axis):
            return behind, ""
        if user.kind in VIEWS and self._keeps_last(user, walk):
            return replace(behind, axis=len(self.graph.shapes[behind.value]) - 1), ""
        path = self._moved(user, walk) if walk.cut or user.kind not in CUTS else None
        return (path, "") if path else (None, _WRITTEN if user.kind == "copy" else f"{user.kind} reads it first")

    def _moved(self, user: Node, walk: _Walk) -> Path | None:
        """Behind what moves channels, each to one place, or folds them."""
        if user.kind == "cat":
            return None
        here = Path.whole(self.graph, walk.value, walk.axis)
        paths = [path for path in follow(self.graph, user, here) if path.is_apart]
        if paths:
            return paths[0] if self._alone_until(paths[0].value, walk.value) else None
        before, after = self.graph.shapes[walk.value], self.graph.shapes[user.outputs[0]]
        others = [at for at in range(len(before)) if at != walk.axis]
        apart = len(before) == len(after) and (
            user.kind == "pixel_shuffle" or [before[at] for at in others] == [after[at] for at in others]
        )
        return here.to(user.outputs[0]) if apart and user.kind in FOLDS else None

    def _alone_until(self, value: int, start: int) -> bool:
        """Whether nothing else reads what lies between."""
        while value != start:
            value = self.graph.producers[value].inputs[0]
            if len(self.readers.users[value]) != 1:
                return False
        return True

    def _through_product(self, user: Node, walk: _Walk, behind: Path) -> tuple[Path | None, str]:
        scales = keeps_zeros(self.graph, user, walk.value, walk.axis) and not self.readers.is_gate(user, walk.value)
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
        if shape[0] != INSTANCES:
            return "instance axis folded into another"
        if walk.axis not in (1, len(shape) - 1):
            return f"its channels lie on axis {walk.axis} of {len(shape)}"
        if walk.normed and not walk.shaped:
            return f"{walk.normed} is a norm over channels"
        if not self.taps.of(walk.value, walk.axis):
            return _NO_TAP
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
        paths = follow(self.graph, users[0], Path.whole(self.graph, walk.value, walk.axis))
        whole = [path for path in paths if path.is_whole]
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
