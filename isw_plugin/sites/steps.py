"""One walk: from what a layer or norm gives, operation by operation, until a layer reads the map."""

from dataclasses import dataclass, replace

from torch import nn

from isw_plugin.sites.graph import Graph, Node, norms_over_channels
from isw_plugin.sites.instances import why_not
from isw_plugin.sites.operations import ACTIVATIONS, CUTS, FOLDS, JOINS, PASSES, SPLITS, VIEWS
from isw_plugin.sites.paths import Path, by_channel, follow, keeps_zeros
from isw_plugin.sites.readers import Readers
from isw_plugin.sites.taps import Taps

__all__ = ["NO_TAP", "Steps", "Walk"]

NO_TAP = "no module's output or input is this map alone"
_FLATTENED = "only functions touch it before it is flattened: make one of them a module (nn.Flatten)"
_WRITTEN = "written into a part of another tensor"
_REGION = 40  # nodes between a map's split and where it comes together again, at most


@dataclass
class Walk:
    """A walk so far."""

    value: int
    axis: int
    cut: bool  # whether a layer that reads a part of the map ends it
    joined: bool = False  # with another map, by adding or multiplying
    added: bool = False
    shaped: bool = False  # by an activation or a product
    normed: str = ""  # the norm over channels on the way


class Steps:
    """Walks over one graph."""

    def __init__(self, graph: Graph, readers: Readers, taps: Taps) -> None:
        self.graph = graph
        self.readers = readers
        self.taps = taps
        self._order = {id(node): index for index, node in enumerate(graph.nodes)}

    def start(self, node: Node, cut: bool) -> tuple[Walk | None, str]:
        """Where the walk from a layer or norm starts, or why it does not."""
        if self.graph.more[node.name]:
            return None, "how often it is called depends on the number of instances"
        if self.readers.counts[node.name] > 1:
            return None, f"called {self.readers.counts[node.name]} times in one forward"
        if norms_over_channels(self.graph.modules[node.name]):
            return None, "a norm over channels"
        value = node.outputs[0]
        linear = isinstance(self.graph.modules[node.name], nn.Linear)
        return Walk(value, len(self.graph.shapes[value]) - 1 if linear else 1, cut), ""

    def to_end(self, walk: Walk) -> tuple[Walk | None, str]:
        """The map that a walk ends in, or why there is none; the walk given stays where it came to."""
        while True:
            if self.readers.of(walk.value, walk.axis, walk.cut):
                reason = self._unusable(walk)
                later = self._later_form(walk) if reason else None
                if later is None:
                    reason = _FLATTENED if reason == NO_TAP and self._is_flattened(walk) else reason
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

    def _behind_split(self, split: Node, walk: Walk) -> tuple[Walk | None, str]:
        """The product of halves, or else what one part becomes where others go elsewhere (attention beside an MLP)."""
        whole = replace(walk)
        reason = self._step(whole)
        end, reason = (None, reason) if reason else self.to_end(whole)
        if end or walk.shaped:
            return end, reason
        shapes, instances = self.graph.shapes, self.graph.shapes[walk.value][0]
        parts = (
            Walk(value, walk.axis, walk.cut)
            for value in split.outputs
            if self.readers.users[value] and walk.axis < len(shapes[value]) and shapes[value][0] == instances
        )
        ends = (self.to_end(part)[0] for part in parts)
        part = next((end for end in ends if end and end.shaped and not end.added), None)
        return part, "" if part else reason

    def _split_axes(self, view: Node, walk: Walk) -> range:
        """The axes that a view lays the channels out on, where it is more than one."""
        before, after = self.graph.shapes[walk.value], self.graph.shapes[view.outputs[0]]
        more = len(after) - len(before) + 1  # axes for one
        same = walk.axis == 1 and more > 1 and after[0] == before[0] and after[more + 1 :] == before[2:]
        return (
            range(1, more + 1)
            if view.kind in VIEWS and same and more > 1 and 1 not in after[1 : more + 1]
            else range(0)
        )

    def _on_one_of(self, axes: range, view: Node, walk: Walk) -> tuple[Walk | None, str]:
        """What becomes of groups of channels (their largest; pixels unfolded from them), or of every n-th channel."""
        reason = ""
        for axis in axes:
            end, why = self.to_end(replace(walk, value=view.outputs[0], axis=axis))
            if end:
                return end, ""
            reason = reason or why
        return None, reason

    def _step(self, walk: Walk) -> str:
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

    def _shifts(self, user: Node, walk: Walk) -> bool:
        """Whether a node adds one number a channel (FiLM)."""
        shape = self.graph.shapes[walk.value]
        others = [self.graph.shapes[other] for other in user.inputs if other != walk.value]
        same = self.graph.shapes[user.outputs[0]] == shape
        return bool(others) and same and all(o != shape and by_channel(o, shape, walk.axis) for o in others)

    def _next(self, walk: Walk) -> Node | None:
        """The only user of a map; what scales it (squeeze-excite); or where its uses come together again."""
        users = self.readers.users[walk.value]
        if len(users) == 1 and users[0].kind not in SPLITS:
            return users[0]
        return (self.readers.scaled_by(walk.value) if len(users) > 1 else None) or self._together(walk, users)

    def _together(self, walk: Walk, users: list[Node]) -> Node | None:
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

    def _is_whole(self, node: Node, walk: Walk, halves: bool) -> bool:
        """Whether an operation gives a map of the same shape again; of halves, their product."""
        if node.kind in ("layer", "norm", "cat") or len(node.outputs) != 1:
            return False
        before, after = list(self.graph.shapes[walk.value]), list(self.graph.shapes[node.outputs[0]])
        if not halves:
            return before == after
        before[walk.axis] //= 2
        return node.kind in JOINS | {"mul"} and before == after

    def _through(self, user: Node, walk: Walk) -> tuple[Path | None, str]:
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

    def _moved(self, user: Node, walk: Walk) -> Path | None:
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

    def _through_product(self, user: Node, walk: Walk, behind: Path) -> tuple[Path | None, str]:
        scales = keeps_zeros(self.graph, user, walk.value, walk.axis) and not self.readers.is_gate(user, walk.value)
        return (behind, "") if scales or self.readers.is_product(user, walk.value) else (None, "scales another map")

    def _through_norm(self, user: Node, walk: Walk, behind: Path) -> tuple[Path | None, str]:
        module = self.graph.modules[user.name]
        over_channels = norms_over_channels(module)
        if over_channels and walk.added:
            return None, f"{user.name} is a norm over channels"
        if walk.joined and not over_channels:
            return None, f"{user.name} norms it after a join"
        walk.shaped |= not isinstance(getattr(module, "act", None), nn.Identity | None)
        walk.normed = user.name if over_channels else walk.normed
        return behind, ""

    def _keeps_last(self, view: Node, walk: Walk) -> bool:
        """Whether a view leaves channels the last axis; it may put instances and tokens on one axis for a norm."""
        before, after = self.graph.shapes[walk.value], self.graph.shapes[view.outputs[0]]
        return walk.axis == len(before) - 1 and before[-1:] == after[-1:]

    def _unusable(self, walk: Walk) -> str:
        """Why a map that layers read cannot be a site; "" where it can."""
        shape = self.graph.shapes[walk.value]
        if reason := why_not(shape):
            return reason
        if walk.axis not in (1, len(shape) - 1):
            return f"its channels lie on axis {walk.axis} of {len(shape)}"
        if walk.normed and not walk.shaped:
            return f"{walk.normed} is a norm over channels"
        if not self.taps.of(walk.value, walk.axis):
            return NO_TAP
        counts, readers = self.readers.counts, self.readers.of(walk.value, walk.axis)
        read = {channel for reader in readers for _, channel in reader.columns(shape[walk.axis])}
        if 2 * len(read) < shape[walk.axis]:  # queries, keys and values of which a layer reads the queries
            return "layers read less than half of its channels"
        repeated = [reader.layer for reader in readers if counts[reader.layer] > 1]
        if repeated and self.taps.scope == "consumers":
            return f"its reader {repeated[0]} is called several times"
        return ""

    def _is_flattened(self, walk: Walk) -> bool:
        users = self.readers.users[walk.value]
        return len(users) == 1 and users[0].kind in VIEWS and len(self.graph.shapes[users[0].outputs[0]]) == 2

    def _later_form(self, walk: Walk) -> Path | None:
        """The same channels behind the only user of a map that no hook can touch."""
        users = self.readers.users[walk.value]
        if len(users) != 1 or users[0].kind in ("layer", "cat") or (walk.normed and not walk.shaped):
            return None
        paths = follow(self.graph, users[0], Path.whole(self.graph, walk.value, walk.axis))
        whole = [path for path in paths if path.is_whole]
        return whole[0] if len(whole) == 1 else None
