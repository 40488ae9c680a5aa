"""From the exported graph to few nodes: constants and batch norms folded, activations and residual adds fused
into layers, gates linked to the convolutions that read them.

Every step leaves an executable graph with the same results. A mask is moved only through operations that
keep channels apart and zeros zero; where no convolution takes it in, it stays: always right.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from isw_plugin.accelerate.layers import conv, linear, mask
from isw_plugin.accelerate.outputs import skip_outputs
from isw_plugin.accelerate.padding import own_padding
from isw_plugin.accelerate.predicted import name_heads, take_masks_in

__all__ = ["constants_of", "simplify"]

_aten = torch.ops.aten

_SAME = {
    _aten.detach.default,
    _aten.alias.default,
    _aten.dropout.default,
    _aten.lift_fresh.default,
    _aten.adaptive_avg_pool2d.default,
}
_CHECKS = {_aten._assert_tensor_metadata.default, _aten._assert_scalar.default, _aten.sym_constrain_range.default}
_THROUGH = {  # keep channels apart and zeros zero
    _aten.max_pool2d.default,
    _aten.avg_pool2d.default,
    _aten.adaptive_avg_pool2d.default,
    _aten.relu.default,
    _aten.silu.default,
    _aten.hardswish.default,
    _aten.gelu.default,
    _aten.mean.dim,
    _aten.mul.Tensor,
}
_ACTIVATIONS = {
    _aten.relu.default: "relu",
    _aten.relu6.default: "relu6",
    _aten.silu.default: "silu",
    _aten.hardswish.default: "hardswish",
    _aten.gelu.default: "gelu",
}


def simplify(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same function of flat inputs, with flat outputs, in fewer nodes."""
    graph = graph_module.graph
    graph.set_codegen(fx.graph.CodeGen())
    for step in (_drop_checks, _drop_same):
        step(graph)
    _fold_constants(graph_module)
    _fold_batch_norms(graph_module)
    _fold_scales(graph_module)
    _name_layers(graph)
    _fold_paddings(graph)
    _name_masks(graph)
    name_heads(graph_module, constants_of(graph_module))
    fused = _fuse_residuals, _fuse_activations, _drop_open_gates
    for step in (*fused, _link, _fold_paddings, _skip, take_masks_in):  # a mask may lie before a padding or behind it
        step(graph)
    for node in _calls(graph, _aten.view.default):
        node.target = _aten.reshape.default  # maps may come in another memory order than the traced ones
    graph.eliminate_dead_code()
    graph.lint()
    return fx.GraphModule(graph_module, graph)


def constants_of(graph_module: fx.GraphModule) -> dict[fx.Node, Tensor]:
    """The tensors behind the graph's constants."""
    return {node: _attribute(graph_module, node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}


def _attribute(root: Any, target: Any) -> Any:
    for name in target.split("."):
        root = getattr(root, name)
    return root


def _calls(graph: fx.Graph, *targets: Any) -> Iterator[Any]:  # of fx nodes, whose arguments have no narrower type
    yield from [node for node in graph.nodes if node.op == "call_function" and node.target in targets]


def _size(value: Any) -> list[Any] | None:
    """Shape of a node's value."""
    held = value.meta.get("val") if isinstance(value, fx.Node) else None
    return list(held.shape) if isinstance(held, Tensor) else None


def _only_user(node: Any) -> Any:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _replace(node: Any, by: Any) -> None:
    by.meta = node.meta | by.meta
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


# -- constants -------------------------------------------------------------------------------------


def _drop_checks(graph: fx.Graph) -> None:
    for node in _calls(graph, *_CHECKS):
        graph.erase_node(node)
    for node in list(graph.nodes):
        if node.op == "call_module" and not node.users:
            graph.erase_node(node)  # export's guards


def _drop_same(graph: fx.Graph) -> None:
    for node in _calls(graph, *_SAME):
        if node.target is _aten.dropout.default and node.args[2]:
            continue  # one that acts in eval mode too
        if node.target is _aten.adaptive_avg_pool2d.default and _size(node) != _size(node.args[0]):
            continue
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)


def _fold_constants(graph_module: fx.GraphModule) -> None:
    """Evaluate what depends on weights only, such as standardised weights."""
    graph = graph_module.graph
    known: dict[fx.Node, Any] = dict(constants_of(graph_module))
    for node in list(graph.nodes):
        if node.op == "call_function" and node.all_input_nodes and all(i in known for i in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
            with torch.no_grad():
                known[node] = node.target(*args, **kwargs)
    for node in list(graph.nodes):
        folded = node.op == "call_function" and isinstance(known.get(node), Tensor)
        if folded and any(user not in known for user in node.users):
            _replace(node, _constant(graph_module, node, known[node]))


def _constant(graph_module: fx.GraphModule, before: fx.Node, tensor: Tensor) -> Any:
    name = f"folded_{sum(key.startswith('folded_') for key, _ in graph_module.named_buffers(recurse=False))}"
    graph_module.register_buffer(name, tensor.detach())
    with before.graph.inserting_before(before):
        return before.graph.get_attr(name)


# -- batch norm ------------------------------------------------------------------------------------


def _fold_batch_norms(graph_module: fx.GraphModule) -> None:
    folds: dict[Any, Callable[..., Any]] = {
        _aten.conv2d.default: fuse_conv_bn_weights,
        _aten.linear.default: fuse_linear_bn_weights,
    }
    for norm in _calls(graph_module.graph, _aten._native_batch_norm_legit_no_training.default):
        layer, weight, bias, mean, var, _, eps = norm.args
        result = _only_user(norm)
        known = constants_of(graph_module)
        statistics = [known.get(node) if node is not None else None for node in (mean, var, weight, bias)]
        if layer.target not in folds or len(layer.users) > 1 or layer.args[1] not in known or result is None:
            continue
        if layer.target is _aten.linear.default and len(_size(layer) or ()) != 2:
            continue  # of tokens: the norm's channels are not the layer's
        held = layer.args[2] if len(layer.args) > 2 else None
        kept = known[layer.args[1]]
        mean_, var_, weight_, bias_, held_ = (_wide(t) for t in (*statistics, None if held is None else known[held]))
        folded = folds[layer.target](_wide(kept), held_, mean_, var_, eps, weight_, bias_)
        new = [_constant(graph_module, layer, tensor.to(kept.dtype)) for tensor in folded]
        layer.args = (layer.args[0], *new, *layer.args[3:])
        result.replace_all_uses_with(layer)
        for node in (result, norm):
            node.graph.erase_node(node)


def _wide(tensor: Tensor | None) -> Any:
    """Half types are folded in float32 and rounded once."""
    return tensor if tensor is None else tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# -- layer scale -----------------------------------------------------------------------------------


def _fold_scales(graph_module: fx.GraphModule) -> None:
    """A layer's map times a constant of every channel: that of its weights."""
    for node in _calls(graph_module.graph, _aten.mul.Tensor):
        known = constants_of(graph_module)
        layer, scale = node.args if node.args[1] in known else node.args[::-1]
        if scale not in known or not _is_foldable(layer, known) or _only_user(layer) is not node:
            continue
        behind = 2 if layer.target is _aten.conv2d.default else 0  # axes
        weight, factors = known[layer.args[1]], known[scale]
        if factors.numel() != len(weight) or factors.shape[-1 - behind :] != (len(weight), *[1] * behind):
            continue
        factors = _wide(factors).flatten()
        tensors = [_wide(weight) * factors.view(-1, *[1] * (weight.dim() - 1))]
        if len(layer.args) > 2 and layer.args[2] is not None:
            tensors.append(_wide(known[layer.args[2]]) * factors)
        new = [_constant(graph_module, layer, tensor.to(weight.dtype)) for tensor in tensors]
        layer.args = (layer.args[0], *new, *layer.args[1 + len(new) :])
        node.replace_all_uses_with(layer)
        graph_module.graph.erase_node(node)


def _is_foldable(layer: Any, known: dict[fx.Node, Tensor]) -> bool:
    """Whether it is a layer whose weight and bias are constants."""
    if getattr(layer, "target", None) not in (_aten.conv2d.default, _aten.linear.default):
        return False
    return all(held is None or held in known for held in layer.args[1:3])


# -- layers ----------------------------------------------------------------------------------------


def _name_layers(graph: fx.Graph) -> None:
    for node in _calls(graph, _aten.conv2d.default):
        x, weight, bias, stride, padding, dilation, groups = _window_of(node)
        with graph.inserting_before(node):
            args = (x, weight, bias, None, None, None, stride, padding, dilation, groups, "none")
            layer = graph.call_function(conv, args)
        layer.meta["layer"] = _module_of(node)
        _replace(node, layer)
    for node in _calls(graph, _aten.linear.default):
        with graph.inserting_before(node):
            layer = graph.call_function(linear, (*node.args[:2], node.args[2] if len(node.args) > 2 else None, "none"))
        _replace(node, layer)


def _module_of(node: fx.Node) -> str:
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return stack[-1].removeprefix("model.") if stack else node.name


def _window_of(node: Any) -> list[Any]:
    """Arguments of a convolution, all of them."""
    defaults = [None, None, None, (1, 1), (0, 0), (1, 1), 1]
    return list(node.args) + defaults[len(node.args) :]


def _fold_paddings(graph: fx.Graph) -> None:
    for pad in _calls(graph, _aten.pad.default):
        own = own_padding(pad)
        for user in list(pad.users) if own is not None else []:
            if user.target is torch.ops.isw.channel_norm.default and user.args[1] == 1:
                user.replace_input_with(pad, pad.args[0])
            elif user.target is conv and user.args[0] is pad and not any(user.args[7]):
                user.args = (pad.args[0], *user.args[1:7], own, *user.args[8:])
    graph.eliminate_dead_code()


def _name_masks(graph: fx.Graph) -> None:
    for node in _calls(graph, torch.ops.isw.mask.default):
        x, keep, axis = node.args
        with graph.inserting_before(node):
            named = graph.call_function(mask, (x, keep, axis % len(_size(x) or ())))
        _replace(node, named)


def _fuse_residuals(graph: fx.Graph) -> None:
    for node in _calls(graph, _aten.add.Tensor):
        if node.kwargs or len(node.args) != 2 or not all(isinstance(arg, fx.Node) for arg in node.args):
            continue
        if _size(node.args[0]) != _size(node.args[1]) or _size(node) is None:
            continue
        for layer, other in (node.args, node.args[::-1]):
            if layer.target is conv and _only_user(layer) is node and _takes_residual(layer, other):
                with graph.inserting_before(node):  # behind the residual
                    fused = graph.call_function(conv, (*layer.args[:3], other, *layer.args[4:]))
                fused.meta["layer"] = layer.meta["layer"]
                _replace(node, fused)
                graph.erase_node(layer)
                break


def _takes_residual(layer: Any, other: Any) -> bool:
    same: bool = layer.meta["val"].dtype == other.meta["val"].dtype
    return _is_open(layer) and layer.args[3] is None and layer.args[9] == 1 and other is not layer and same


def _is_open(layer: Any) -> bool:
    """Whether nothing was activated in it yet."""
    return bool(layer.args[-1] == "none")


def _fuse_activations(graph: fx.Graph) -> None:
    for node in _calls(graph, *_ACTIVATIONS, _aten.hardtanh.default, _aten.clamp.default):
        layer = node.args[0]
        act = _activation(node)
        if act and layer.target in (conv, linear) and _only_user(layer) is node and _is_open(layer):
            layer.args = (*layer.args[:-1], act)
            node.replace_all_uses_with(layer)
            graph.erase_node(node)


def _activation(node: Any) -> str | None:
    if node.kwargs:
        return None  # an approximation of gelu
    return _ACTIVATIONS.get(node.target) or ("relu6" if node.args[1:3] == (0, 6) else None)


# -- gates -----------------------------------------------------------------------------------------


def _drop_open_gates(graph: fx.Graph) -> None:
    """beta = 0 keeps everything."""
    for node in _calls(graph, mask):
        keep = node.args[1]
        if keep.target is torch.ops.isw.decide.default and keep.args[2] == 0:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _link(graph: fx.Graph) -> None:
    """Hand masks to the convolutions that read them, past pools."""
    pending = list(_calls(graph, mask))
    while pending:
        masked = pending.pop(0)
        for user in list(masked.users):
            if user.target is conv:
                _gate_layer(user, masked)
            elif user.target in _THROUGH and _keeps_channels(user, masked):
                pending.append(_mask_behind(user, masked))
    graph.eliminate_dead_code()


def _skip(graph: fx.Graph) -> None:
    skip_outputs(graph, lambda user: user.target in _THROUGH and _is_of_channels(user))


def _is_of_channels(user: Any) -> bool:
    """Whether an operation through which masks go has a map's channels, each by itself."""
    if user.target is _aten.mean.dim:
        return sorted(dim % 4 for dim in user.args[1]) == [2, 3] and len(_size(user.args[0]) or ()) == 4
    return len(_size(user) or ()) == 4 and (user.target is not _aten.mul.Tensor or _size(user) == _size(user.args[0]))


def _gate_layer(layer: Any, masked: Any) -> None:
    x, keep, axis = masked.args
    if axis != 1:
        return
    args = list(layer.args)
    for value, gate in ((0, 4), (3, 5)):
        if args[value] is masked:
            args[value], args[gate] = x, keep
    layer.args = tuple(args)


def _keeps_channels(user: Any, masked: Any) -> bool:
    if user.target is _aten.mul.Tensor:
        return masked.args[2] == 1 and _size(user) == _size(masked) is not None  # scaled, by squeeze-excite for one
    if masked.args[2] != 1 or user.args[0] is not masked:
        return False
    if user.target is _aten.mean.dim:
        return sorted(dim % 4 for dim in user.args[1]) == [2, 3] and len(_size(masked) or ()) == 4
    return len(_size(masked) or ()) == 4


def _mask_behind(user: Any, masked: Any) -> Any:
    x, keep, axis = masked.args
    user.replace_input_with(masked, x)
    with user.graph.inserting_after(user):
        behind = user.graph.call_function(mask, (user, keep, axis))
    behind.meta = dict(user.meta)
    user.replace_all_uses_with(behind, delete_user_cb=lambda node: node is not behind)
    return behind
