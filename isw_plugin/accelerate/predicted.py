"""Heads in a traced graph: what predicts a site's norms becomes one node, which lowering hands the statistics of maps.

Whatever is not as ``isw_plugin.heads`` writes it stays the operations that it is.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from isw_plugin.accelerate.layers import mask, predict
from isw_plugin.ops.reference import DTYPES

__all__ = ["name_heads", "take_masks_in"]

_aten, _isw = torch.ops.aten, torch.ops.isw


class _Head(NamedTuple):
    """``sqrt(size) * relu(bias + phi @ basis @ weight)``; phi of maps (N, C, H, W) and of what is kept of each."""

    maps: list[Any]
    keeps: list[Any]
    weight: Any
    bias: Any
    size: int
    basis: Any  # None: there is none


def name_heads(graph_module: fx.GraphModule, constants: dict[fx.Node, Tensor]) -> None:
    """Put a ``predict`` node in the place of every head, with weights as the operator reads them."""
    graph = graph_module.graph
    for node in [node for node in graph.nodes if node.target is _aten.mul.Tensor]:
        head = _head(node, constants)
        if head is None:
            continue
        factors = [constants[factor] for factor in (head.weight, head.basis) if factor is not None]
        names = []
        for factor in _narrow(factors):
            names.append(f"head_{sum(key.startswith('head_') for key, _ in graph_module.named_buffers(recurse=False))}")
            graph_module.register_buffer(names[-1], factor.contiguous())
        with graph.inserting_before(node):
            weight, basis = (*map(graph.get_attr, names), None)[:2]
            named = graph.call_function(predict, tuple(head._replace(weight=weight, basis=basis)))
        named.meta = dict(node.meta)
        node.replace_all_uses_with(named)
    graph.eliminate_dead_code()


def take_masks_in(graph: fx.Graph) -> None:
    """Heads count dropped channels as zero themselves."""
    for node in [node for node in graph.nodes if node.target is predict]:
        maps, keeps, *others = node.args
        maps, keeps = list(maps), list(keeps)
        for place, value in enumerate(maps):
            if value.target is mask and value.args[2] == 1 and keeps[place] is None:
                maps[place], keeps[place] = value.args[:2]
        node.args = (maps, keeps, *others)
    graph.eliminate_dead_code()


def _narrow(factors: list[Tensor]) -> list[Tensor]:
    """In half of the memory where these are the same numbers."""
    narrow = [factor.bfloat16() for factor in factors]
    return narrow if all(map(torch.equal, [factor.float() for factor in narrow], factors)) else factors


def _head(node: Any, constants: dict[fx.Node, Tensor]) -> _Head | None:
    relu, scale = node.args
    linear = _argument(relu, _aten.relu.default)
    if getattr(linear, "target", None) is not _aten.addmm.default or linear.kwargs or not isinstance(scale, float):
        return None
    bias, phi, weight = linear.args
    basis = None
    if phi.target is _aten.matmul.default:
        phi, basis = phi.args
    is_known = all(each in constants for each in (bias, weight, basis) if each is not None)
    if not is_known or linear.meta["val"].dtype != torch.float32:
        return None
    parts = _argument(phi, _aten.cat.default) or []
    read = [_map_of(rms, mean) for rms, mean in zip(parts[::2], parts[1::2], strict=False)]
    if not read or len(parts) % 2 or not all(read):
        return None
    maps, keeps = zip(*[each for each in read if each], strict=True)
    return _Head(list(maps), list(keeps), weight, bias, round(scale**2), basis)


def _map_of(rms: Any, mean: Any) -> tuple[Any, Any] | None:
    """The map of which these are statistics, and what is kept of it."""
    norms, of_mean = _argument(rms, _aten.div.Tensor), _argument(mean, _aten.mean.dim)
    keep = None
    if getattr(norms, "target", None) is _aten.where.ScalarOther:
        keep, norms, _ = norms.args
    x = _argument(norms, _isw.channel_norm.default)
    seen = x
    if keep is not None and keep.target is _aten.ones_like.default:
        keep = None
    if keep is not None and of_mean is not None:
        seen, *masked = of_mean.args if of_mean.target is mask else (None,)
        x = x if seen is x and masked == [keep, 1] else None
        of_mean = seen
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    if of_mean is not x or not isinstance(value, Tensor) or value.dim() != 4 or value.dtype not in DTYPES:
        return None
    return (x, keep) if _are_over_pixels(rms, norms, mean, value) else None


def _are_over_pixels(rms: Any, norms: Any, mean: Any, value: Tensor) -> bool:
    """Whether a norm of axis 1, divided by the root of the pixels, and a mean are of a map's pixels."""
    root = math.sqrt(math.prod(map(int, value.shape[2:])))
    over = mean.args[1:] == ([2, 3],) and mean.kwargs.get("dtype") in (None, torch.float32)
    return bool(over and norms.args[1] == 1 and rms.args[1] == root)


def _argument(node: Any, target: Any) -> Any:
    """The first argument of a call of this; None: it is another."""
    return node.args[0] if getattr(node, "target", None) is target else None
