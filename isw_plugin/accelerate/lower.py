"""From the simplified graph to one that runs: a module for every layer, statistics instead of decisions.

A producer's kernel leaves the sums of squares of what it made; whoever reads the map gets those and the
thresholds, and decides inside its own kernel. Where the map comes from elsewhere, one operator sums its squares.
What predicts norms from a map is given its plain sums with them.
"""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from isw_plugin.accelerate.execution import GatedConv
from isw_plugin.accelerate.layers import conv, linear, mask, predict
from isw_plugin.ops.reference import DTYPES

__all__ = ["Decision", "lower", "lower_all_kept", "lower_dense"]

_isw, _aten = torch.ops.isw, torch.ops.aten
_LAST = torch.channels_last


@dataclass(frozen=True)
class Decision:
    """How a site's decisions lie in the outputs: statistics to compare with thresholds, or keep and norms."""

    site: str
    thresholds: tuple[float, float] | None


def lower(
    graph_module: fx.GraphModule, executions: Mapping[str, nn.Module], outputs: int, sites: list[str]
) -> tuple[fx.GraphModule, list[Decision]]:
    """The gated graph.

    Args:
        graph_module: Simplified; gives ``outputs`` outputs, then the keep masks, then the norms of the sites.
        executions: By name of a ``conv`` or ``linear`` node.

    Returns:
        A graph that gives the outputs, then one tensor or two for every site (see ``Decision``).
    """
    lowering = _Lowering(graph_module, executions)
    return lowering.gated(outputs, sites)


def lower_all_kept(
    graph_module: fx.GraphModule, executions: Mapping[str, nn.Module], outputs: int, sites: list[str]
) -> fx.GraphModule:
    """The gated graph as ``lower`` makes it, but that its gates drop nothing: the most that it takes."""
    lowering = _Lowering(graph_module, executions)
    lowering.keep_all()
    return lowering.gated(outputs, sites)[0]


def lower_dense(
    graph_module: fx.GraphModule, executions: Mapping[str, nn.Module], outputs: int, channels_last: bool
) -> fx.GraphModule:
    """The graph without its gates, and without their outputs, on images in NCHW order or channels last."""
    lowering = _Lowering(graph_module, executions)
    lowering.open_gates()
    lowering.replace_layers()
    lowering.keep_outputs(outputs)
    if channels_last:
        lowering.put_channels_last()
    return lowering.finish()


class _Lowering:
    def __init__(self, graph_module: fx.GraphModule, executions: Mapping[str, nn.Module]) -> None:
        self.root = nn.Module()
        self.executions = executions
        self.graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        result = self.graph.graph_copy(graph_module.graph, copies)
        self.graph.output(result)
        self.names = {copies[node]: node.name for node in copies}
        self.source = graph_module
        self.squares: dict[fx.Node, fx.Node] = {}  # by map
        self.statistics: dict[fx.Node, fx.Node] = {}  # the same and sums
        self.keeps: dict[fx.Node, fx.Node] = {}  # by decision

    def gated(self, outputs: int, sites: list[str]) -> tuple[fx.GraphModule, list[Decision]]:
        self.replace_layers()
        self.replace_heads()
        decisions = self.replace_outputs(outputs, sites)
        self.replace_decisions()
        self.replace_norms()
        self.replace_masks()
        self.replace_pools()
        return self.finish(), decisions

    def finish(self) -> fx.GraphModule:
        self.sweep()
        for node in self.graph.nodes:
            if node.op == "get_attr":
                tensor = _attribute(self.source, node.target)
                node.target = f"constant_{len(self.root._buffers)}"
                self.root.register_buffer(node.target, tensor)
        return fx.GraphModule(self.root, self.graph)

    def sweep(self) -> None:
        """Erase what nothing reads; no node has a side effect."""
        for node in reversed(self.graph.nodes):
            if not node.users and node.op not in ("placeholder", "output"):
                self.graph.erase_node(node)

    def _calls(self, target: object) -> list[Any]:  # of fx nodes, whose arguments have no narrower type
        return [node for node in self.graph.nodes if node.op == "call_function" and node.target is target]

    @property
    def _output(self) -> Any:
        return next(node for node in reversed(self.graph.nodes) if node.op == "output")

    # -- layers ------------------------------------------------------------------------------------

    def replace_layers(self) -> None:
        """Every ``conv`` and ``linear`` by the call of its module."""
        for node in self._calls(conv) + self._calls(linear):
            module = self.executions.get(self.names[node])
            if module is not None:
                self._replace_layer(node, module)

    def _replace_layer(self, node: Any, module: nn.Module) -> None:
        name = self.names[node]
        self.root.add_module(name, module)
        y = self._call_linear(node, name) if node.target is linear else self._call_conv(node, name, module)
        y.meta = dict(node.meta)
        node.replace_all_uses_with(y)
        self.graph.erase_node(node)

    def _call_linear(self, node: Any, name: str) -> fx.Node:
        with self.graph.inserting_before(node):
            return self.graph.call_module(name, node.args[:1])

    def _call_conv(self, node: Any, name: str, module: nn.Module) -> fx.Node:
        x, _, _, residual, keep, residual_keep = node.args[:6]
        with self.graph.inserting_before(node):
            out_keep = node.args[11] if len(node.args) > 11 else None
            if isinstance(module, GatedConv):
                predicts = any(user.target is predict for user in node.users)
                zeros = out_keep is None or not all(_leaves_out(user, node, out_keep) for user in node.users)
                args = (x, *self._gate(keep), residual, *self._gate(residual_keep), out_keep, predicts, zeros)
                call = self.graph.call_module(name, args)
                y = self.graph.call_function(operator.getitem, (call, 0))
                self.squares[y] = found = self.graph.call_function(operator.getitem, (call, 1))
                if predicts:
                    self._hold_statistics(y, found)
                return y
            return self.graph.call_module(name, (x, keep, residual, residual_keep, out_keep))

    def replace_pools(self) -> None:
        """Max-pooling into the layer before it, or by the engine's, which is the faster one on maps in NCHW order."""
        self.sweep()  # decisions that statistics replaced read the map no longer
        defaults: list[Any] = [[], [0, 0], [1, 1], False]
        for node in self._calls(_aten.max_pool2d.default):
            x, kernel, *window = list(node.args) + defaults[len(node.args) - 2 :]
            stride, padding, dilation, ceil = window
            if not _is_map(x) or list(dilation) != [1, 1] or ceil:
                continue
            halves = list(kernel) == list(stride or kernel) == [2, 2] and list(padding) == [0, 0]
            if halves and self._pool_within(x):
                node.replace_all_uses_with(x)
            else:
                with self.graph.inserting_before(node):
                    pool = self.graph.call_function(_isw.max_pool2d.default, (x, kernel, stride or kernel, padding))
                pool.meta = dict(node.meta)
                node.replace_all_uses_with(pool)
            self.graph.erase_node(node)

    def _pool_within(self, y: Any) -> bool:
        """Whether the layer that makes the map now pools it: one of the engine's whose map nothing else reads."""
        if y.target is not operator.getitem or len(y.users) > 1:
            return False
        call = y.args[0]
        module = getattr(self.root, str(call.target), None)
        if not isinstance(module, GatedConv) or not module.can_pool or call.args[4] is not None:
            return False
        self.root.add_module(call.target, module.with_pool())
        return True

    # -- heads -------------------------------------------------------------------------------------

    def replace_heads(self) -> None:
        """What predicts norms, and the CV gate that alone reads them, by one operator."""
        for node in self._calls(predict):
            maps, keeps, weight, bias, size, basis = node.args
            decides = [user for user in node.users if user.target is _isw.decide.default]
            thresholds = decides[0].args[1:] if len(decides) == 1 else (0.0, 0.0)
            statistics = [self._statistics_of(x) for x in maps]
            positions = [math.prod(map(int, x.meta["val"].shape[2:])) for x in maps]
            with self.graph.inserting_before(node):
                args = (weight, bias, statistics, keeps, positions, size, *thresholds, basis)
                call = self.graph.call_function(_isw.predict.default, args)
                norms, keep = (self.graph.call_function(operator.getitem, (call, place)) for place in (0, 1))
            norms.meta = dict(node.meta)
            if len(decides) == 1:
                decides[0].replace_all_uses_with(keep)
                self.graph.erase_node(decides[0])
            node.replace_all_uses_with(norms)
            self.graph.erase_node(node)

    def _statistics_of(self, x: Any) -> fx.Node:
        if x not in self.statistics:
            with self.graph.inserting_after(x):
                found = self.graph.call_function(_isw.sum_squares.default, (x, True))
            with self.graph.inserting_after(found):
                self._hold_statistics(x, found)
        return self.statistics[x]

    def _hold_statistics(self, x: fx.Node, found: fx.Node) -> None:
        """Squares are the first half of these."""
        alone = self.squares.get(x)
        self.statistics[x] = found
        self.squares[x] = self.graph.call_function(_aten.select.int, (found, 0, 0))
        if alone is not None and alone is not found:
            alone.replace_all_uses_with(self.squares[x])

    # -- gates -------------------------------------------------------------------------------------

    def _gate(self, keep: Any) -> tuple[Any, float, float]:
        """A decision as the engine's operators take it."""
        if keep is None or not _from_squares(keep):
            return keep, 0.0, 0.0
        norms, alpha, beta = keep.args
        return self._squares_of(norms), alpha, beta

    def _squares_of(self, norms: Any) -> fx.Node:
        x = norms.args[0]
        if x not in self.squares:
            with self.graph.inserting_after(x):
                self.squares[x] = self.graph.call_function(_isw.sum_squares.default, (x,))
        return self.squares[x]

    def replace_decisions(self) -> None:
        """What still reads a keep mask gets it from the statistics, or from those that predicted norms stand for."""
        for node in self._calls(_isw.decide.default):
            norms, alpha, beta = node.args
            if not node.users or getattr(norms.meta.get("val"), "dtype", None) != torch.float32:
                continue
            with self.graph.inserting_before(node):
                if _from_squares(node):
                    squares = self._squares_of(norms)
                else:
                    square = self.graph.call_function(_aten.mul.Tensor, (norms, norms))
                    squares = self.graph.call_function(_aten.unsqueeze.default, (square, 1))
                keep = self.graph.call_function(_isw.keep_mask.default, (squares, alpha, beta))
            node.replace_all_uses_with(keep)

    def replace_norms(self) -> None:
        """Those that are read otherwise, as by what predicts others."""
        for node in self._calls(_isw.channel_norm.default):
            if node.args[1] == 1 and _is_map(node.args[0]) and node.users:
                with self.graph.inserting_before(node):
                    total = self.graph.call_function(_aten.sum.dim_IntList, (self._squares_of(node), [1]))
                    norms = self.graph.call_function(_aten.sqrt.default, (total,))
                node.replace_all_uses_with(norms)

    def replace_masks(self) -> None:
        """Masks by the operations that they are, which pickle and compile like any other."""
        for node in self._calls(mask):
            x, keep, axis = node.args
            rank = x.meta["val"].dim()
            with self.graph.inserting_before(node):
                drop = self.graph.call_function(_aten.bitwise_not.default, (keep,))
                for dim in range(1, rank):
                    if dim != axis % rank:
                        drop = self.graph.call_function(_aten.unsqueeze.default, (drop, dim))
                masked = self.graph.call_function(_aten.masked_fill.Scalar, (x, drop, 0.0))
            masked.meta = dict(node.meta)
            node.replace_all_uses_with(masked)
            self.graph.erase_node(node)

    def keep_all(self) -> None:
        """Gates that decide and drop nothing, at the same cost."""
        for node in self._calls(_isw.decide.default):
            node.args = (*node.args[:2], 0.0)
        readers = [(node, node.args[4:6] + node.args[11:]) for node in self._calls(conv)]
        readers += [(node, node.args[1:2]) for node in self._calls(mask)]
        readers += [(node, node.args[1]) for node in self._calls(predict)]
        ones: dict[Any, Any] = {}  # one for all that read a decision, as it was
        for node, keeps in readers:
            for keep in {keep for keep in keeps if keep is not None and keep.target is not _isw.decide.default}:
                if keep not in ones:
                    with self.graph.inserting_after(keep):
                        ones[keep] = self.graph.call_function(_aten.ones_like.default, (keep,))
                node.replace_input_with(keep, ones[keep])

    def open_gates(self) -> None:
        for node in self._calls(conv):
            node.args = (*node.args[:4], None, None, *node.args[6:11])
        for node in self._calls(mask):
            node.replace_all_uses_with(node.args[0])

    def put_channels_last(self) -> None:
        for node in [node for node in self.graph.nodes if node.op == "placeholder" and _is_map(node)]:
            with self.graph.inserting_after(node):
                last = self.graph.call_function(_aten.contiguous.default, (node,), {"memory_format": _LAST})
            node.replace_all_uses_with(last, delete_user_cb=lambda user, last=last: user is not last)

    # -- outputs -----------------------------------------------------------------------------------

    def keep_outputs(self, outputs: int) -> None:
        self._output.args = (tuple(self._output.args[0][:outputs]),)

    def replace_outputs(self, outputs: int, sites: list[str]) -> list[Decision]:
        """Statistics instead of keep masks and norms, where they tell both."""
        given = list(self._output.args[0])
        kept, decisions = given[:outputs], []
        keeps, norms = given[outputs : outputs + len(sites)], given[outputs + len(sites) :]
        for site, keep, norm in zip(sites, keeps, norms, strict=True):
            if _from_squares(keep):
                kept.append(self._squares_of(keep.args[0]))
                decisions.append(Decision(site, (float(keep.args[1]), float(keep.args[2]))))
            else:
                kept += [keep, norm]
                decisions.append(Decision(site, None))
        self._output.args = (tuple(kept),)
        return decisions


def _from_squares(keep: Any) -> bool:
    """Whether a keep mask is decided from the sums of squares of a convolution's map."""
    if keep.target is not _isw.decide.default or keep.args[0].target is not _isw.channel_norm.default:
        return False
    x, axis = keep.args[0].args
    return bool(axis == 1) and _is_map(x)


def _leaves_out(user: Any, value: Any, keep: Any) -> bool:
    """Whether nothing of a map that a decision drops is read there: by a layer, or where statistics stand for it."""
    if user.target is conv:
        x, _, _, residual, *decisions = user.args[:6]
        others = user.args[1:3] + user.args[6:]
        pairs = zip((x, residual), decisions, strict=True)
        return value not in others and all(decided is keep for read, decided in pairs if read is value)
    if user.target is predict:
        return True
    return user.target is _isw.channel_norm.default and user.args[1] == 1 and _is_map(value)


def _is_map(node: object) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.dim() == 4 and value.dtype in DTYPES


def _attribute(root: object, target: str) -> Tensor:
    for name in target.split("."):
        root = getattr(root, name)
    return cast(Tensor, root)
