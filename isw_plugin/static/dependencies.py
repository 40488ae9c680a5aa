"""torch-pruning's dependency graph of a model, pruned by all or not at all, with its errors as ours."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_leaves

from isw_plugin.errors import MissingExtraError, UnsupportedError
from isw_plugin.inputs import call
from isw_plugin.sites import Inputs

try:
    import torch_pruning as tp
except ImportError as error:
    raise MissingExtraError(
        f"static pruning needs torch-pruning ({error}): pip install 'isw_plugin[pruning]'", name=error.name
    ) from error

__all__ = [
    "MIXING",
    "Columns",
    "close",
    "columns_of",
    "dependency_graph",
    "fits",
    "groups_of",
    "is_depthwise",
    "is_output",
    "outputs_of",
    "remove_channels",
]

Columns = dict[int, list[int]]  # a group's channel -> a layer's own channels

MIXING = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _InstanceNorm, nn.MultiheadAttention, nn.Embedding, nn.RNNBase)
_TOLERANCE = 1e-5  # of an output, relative where the largest is above 1


class _Channels(Protocol):
    @property
    def layer(self) -> str: ...
    @property
    def channels(self) -> tuple[int, ...]: ...


def dependency_graph(model: nn.Module, inputs: Inputs) -> Any:
    """torch-pruning's graph of a model in eval mode, all of whose parameters require a gradient.

    Raises:
        UnsupportedError: torch-pruning cannot trace the model; names the layer, where one is known.
    """
    # Given a tensor, torch-pruning first tries the model on its rows, which some models take.
    with torch.enable_grad(), torch.inference_mode(False), warnings.catch_warnings(action="ignore"):
        try:
            return tp.DependencyGraph().build_dependency(model, inputs, forward_fn=call, verbose=False)
        except Exception as error:  # whatever it meets
            raise UnsupportedError(
                f"torch-pruning cannot trace {type(model).__name__}{_near(model, error)}, so channels that must go "
                f"together are not known ({error!r}); the model is as it was, and takes masks and gates without being "
                "pruned"
            ) from error


def groups_of(graph: Any, model: nn.Module) -> list[Any]:
    """All groups of coupled channels.

    Raises:
        UnsupportedError: torch-pruning fails on one; names the layer.
    """
    try:
        return list(graph.get_all_groups(root_module_types=(_ConvNd, nn.Linear)))
    except Exception as error:
        raise UnsupportedError(
            f"torch-pruning cannot say which channels go together in {type(model).__name__}{_near(model, error)}: "
            f"{error!r}"
        ) from error


def remove_channels(model: nn.Module, removals: Sequence[_Channels], inputs: Inputs) -> None:
    """Prune output channels in place, with all that hangs on them; training flags and requires_grad stay.

    Raises:
        UnsupportedError: torch-pruning fails; the model is as it was.
    """
    training = {module: module.training for module in model.modules()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with _all_or_nothing(model):
        model.eval().requires_grad_(True)
        try:
            graph = dependency_graph(model, inputs)
            for removal in removals:
                _remove(graph, model.get_submodule(removal.layer), removal)
        finally:
            for module, was in training.items():
                module.training = was
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trainable[name])


def _remove(graph: Any, layer: nn.Module, removal: _Channels) -> None:
    try:
        prune = graph.get_pruner_of_module(layer).prune_out_channels
        graph.get_pruning_group(layer, prune, list(removal.channels)).prune()
    except Exception as error:
        raise UnsupportedError(
            f"torch-pruning cannot remove {len(removal.channels)} channels of {removal.layer}: {error!r}"
        ) from error


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """What fails inside leaves every module with the parameters, buffers and numbers that it had."""
    before = [(m, dict(vars(m)), dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    try:
        yield
    except BaseException:
        for module, attributes, parameters, buffers in before:
            vars(module).update(attributes)
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        raise


def _near(model: nn.Module, error: BaseException) -> str:
    """The layer at or before the operation that torch-pruning was at."""
    names = {module: name for name, module in model.named_modules()}
    found, trace = "", error.__traceback__
    while trace is not None:
        held = trace.tb_frame.f_locals
        node = next((held[name] for name in ("node", "root_node", "target") if hasattr(held.get(name), "inputs")), None)
        module = held.get("m")
        found = _name_before(node, names) or (names.get(module, "") if isinstance(module, nn.Module) else "") or found
        trace = trace.tb_next
    return f" (near {found})" if found else ""


def _name_before(node: Any, names: Mapping[nn.Module, str]) -> str:
    ways, seen = [node] if node is not None else [], set()
    while ways:
        here = ways.pop(0)
        if here.module in names:
            return names[here.module]
        seen.add(here)
        ways += [other for other in here.inputs if other not in seen]
    return ""


def columns_of(item: Any) -> Columns:
    """Which of a member's channels each channel of the group is."""
    columns: Columns = {}
    for root, own in zip(item.root_idxs, item.idxs, strict=True):
        columns.setdefault(root, []).append(own)
    return columns


def fits(columns: Columns, module: nn.Module) -> bool:
    """Whether a layer has these input columns: behind a pixel shuffle, torch-pruning names those of the map before."""
    size: Any = getattr(module, "in_features", None) or getattr(module, "in_channels", None)
    return size is None or all(column < size for own in columns.values() for column in own)


def is_depthwise(module: Any) -> bool:
    """Whether it is a convolution that hands every channel on."""
    return isinstance(module, _ConvNd) and module.groups == module.in_channels == module.out_channels > 1


def is_output(node: Any) -> bool:
    """Whether a node's map is the model's output."""
    return not node.outputs or any(user.type == tp.ops.OPTYPE.OUTPUT for user in node.outputs)


def outputs_of(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The tensors that a model in eval mode gives.

    Raises:
        UnsupportedError: It fails on them, where they stand for the inputs that it was made for.
    """
    try:
        with torch.no_grad():
            return [leaf for leaf in tree_leaves(call(model, inputs)) if isinstance(leaf, Tensor)]
    except Exception as error:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be run on noise of its example inputs' shapes, on which pruning is "
            f"tried: {error!r}"
        ) from error


def close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether outputs are the same, to 1e-5."""
    return len(found) == len(expected) and all(map(_close, found, expected))


def _close(found: Tensor, expected: Tensor) -> bool:
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    return found.shape == expected.shape and bool((found - expected).abs().le(_TOLERANCE * scale).all())
