"""From NNI's masks to a small model."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from isw_plugin.copies import copy_of
from isw_plugin.errors import SettingError, UnsupportedError
from isw_plugin.hooks import memory_of
from isw_plugin.inputs import device_of
from isw_plugin.pruner import InstanceWisePruner
from isw_plugin.sites import Inputs, Patterns
from isw_plugin.static.dependencies import close, dependency_graph, outputs_of, remove_channels
from isw_plugin.toolkits.silent_channels import Masks, Removal, find_removals, masked_channels, trials
from isw_plugin.wrappers import unwrapped

__all__ = ["compact"]


def compact(
    model: nn.Module,
    masks: Mapping[str, Mapping[str, Tensor | None]],
    example_inputs: Inputs,
    *,
    exclude: Patterns = (),
    drop_shifts: bool = False,
) -> nn.Module:
    """Make a masked model small: remove the channels that masks silence, zero all else that they mask.

    In eval mode, outputs are those of the masked model to 1e-5; that is tried on a copy before anything
    is changed. A channel that batch norm still gives a shift goes where the shift is 0 after the
    activation or fits into its readers' biases exactly; otherwise it stays, zeroed. A pruner that is
    attached to the model finds its sites again. Parameters are new objects: make the optimizer after this.

    Args:
        model: Unwrapped (``pruner.unwrap_model()``); changed in place.
        masks: What NNI's ``compress`` or ``get_masks`` gives: module name -> {"weight": ..., "bias": ...}.
        example_inputs: What the model's forward takes.
        exclude: Layers, by name pattern, that keep all their channels.
        drop_shifts: Mask a masked channel's batch norm shift too, as network slimming means it. More
            channels go; outputs are those of the model with these shifts masked.

    Returns:
        The model that was passed.

    Raises:
        SettingError: A mask of another model, or of another shape. Nothing is changed.
        UnsupportedError: The model is still wrapped, by NNI, DistributedDataParallel or torch.compile, a mask is of
            inputs or outputs, or torch-pruning cannot trace or prune the model. Nothing is changed.
    """
    present = _checked(model, masks)
    device = device_of(model)
    inputs = tree_map_only(Tensor, lambda tensor: tensor.detach().to(device), example_inputs)
    draft = _draft(model)
    _mask(draft, present)
    if drop_shifts:
        _mask_shifts(draft, inputs, present)
    removals = _verified(draft, find_removals(draft, inputs, present, exclude), inputs)
    _remove(draft, removals, inputs)
    _take_shape(model, draft, removals, inputs)
    if memory_of(model) is not None:
        InstanceWisePruner.of(model).update_regularizer()
    return model


def _checked(model: nn.Module, masks: Mapping[str, Mapping[str, Tensor | None]]) -> dict[str, dict[str, Tensor]]:
    if unwrapped(model) is not model:
        raise UnsupportedError(f"{type(model).__name__} keeps the old parameters: compact what is inside, then wrap it")
    if not isinstance(masks, Mapping):
        raise SettingError(
            f"masks is a {type(masks).__name__}, not a dict by module name: compress() gives model, masks"
        )
    modules = dict(model.named_modules())
    if any(hasattr(module, "_nni_wrapper") for module in modules.values()):
        raise UnsupportedError("the model is still wrapped by NNI: call unwrap_model() of its pruner first")
    present: dict[str, dict[str, Tensor]] = {}
    for name, targets in masks.items():
        if name not in modules:
            raise SettingError(f"a mask is for {name!r}, and {type(model).__name__} has no such module")
        present[name] = {
            key: _fitting(modules[name], f"{name}.{key}", mask) for key, mask in targets.items() if mask is not None
        }
    return present


def _fitting(module: nn.Module, target: str, mask: Tensor) -> Tensor:
    key = target.rpartition(".")[2]
    if key.startswith(("_input_", "_output_")):
        raise UnsupportedError(f"{target} is no weight: only masks of parameters make a model smaller")
    parameter = getattr(module, key, None)
    found = "none" if parameter is None else f"one of shape {tuple(parameter.shape)}"
    if parameter is None or parameter.shape != mask.shape:
        raise SettingError(
            f"the mask of {target} is for a parameter of shape {tuple(mask.shape)} and there is {found}: the masks are "
            "of another model, or the model is already compact"
        )
    return mask.detach().to(parameter.device)


def _draft(model: nn.Module) -> nn.Module:
    """A copy in eval mode, without hooks of ours, all of it in the autograd graph."""
    draft = copy_of(model).eval()
    if memory_of(draft) is not None:
        InstanceWisePruner.of(draft).remove()
    return draft.requires_grad_(True)


@torch.no_grad()
def _mask(model: nn.Module, masks: Masks) -> None:
    for name, targets in masks.items():
        for key, mask in targets.items():
            # Not a product: infinity times zero is not zero.
            model.get_submodule(name).get_parameter(key).masked_fill_(mask == 0, 0)


@torch.no_grad()
def _mask_shifts(model: nn.Module, inputs: Inputs, masks: Masks) -> None:
    """Mask all that batch norm makes of masked channels: its own, and those of the layer before it."""
    nodes = dependency_graph(model, inputs).module2node
    for module, channels in masked_channels(model, masks).items():
        behind = [node.module for node in nodes[module].outputs] if module in nodes else []
        for norm in [module, *behind]:
            if isinstance(norm, _BatchNorm) and norm.affine:
                norm.weight[sorted(channels)] = 0
                norm.bias[sorted(channels)] = 0


def _verified(draft: nn.Module, removals: list[Removal], inputs: Inputs) -> list[Removal]:
    """Those removals that leave the outputs of a masked model as they are."""
    expected = [outputs_of(draft, trial) for trial in trials(inputs)]
    if _harmless(draft, removals, inputs, expected):
        return removals
    # Rare: something that the graph does not show ties channels together, such as a fixed reshape.
    harmless: list[Removal] = []
    for removal in removals:
        if _harmless(draft, [*harmless, removal], inputs, expected):
            harmless.append(removal)
    return harmless


def _harmless(draft: nn.Module, removals: Sequence[Removal], inputs: Inputs, expected: list[list[Tensor]]) -> bool:
    smaller = copy_of(draft)
    try:
        _remove(smaller, removals, inputs)
        return all(close(outputs_of(smaller, trial), own) for trial, own in zip(trials(inputs), expected, strict=True))
    except UnsupportedError:  # torch-pruning fails, or the model with the shapes that it left
        return False


def _remove(draft: nn.Module, removals: Sequence[Removal], inputs: Inputs) -> None:
    for removal in removals:
        for name, bias in removal.biases.items():
            _add_bias(draft.get_submodule(name), bias)
    remove_channels(draft, removals, inputs)


def _take_shape(model: nn.Module, draft: nn.Module, removals: Sequence[Removal], inputs: Inputs) -> None:
    """Remove from the model what was removed from its draft, and then take over the draft's parameters."""
    pruner = InstanceWisePruner.of(model) if memory_of(model) is not None else None
    enabled = pruner is not None and pruner.enabled
    if pruner:
        pruner.disable()
    try:
        remove_channels(model, removals, inputs)
    finally:
        if pruner and enabled:
            pruner.enable()
    for module, source in zip(model.modules(), draft.modules(), strict=True):
        _take_parameters(module, source)


@torch.no_grad()
def _take_parameters(module: nn.Module, source: nn.Module) -> None:
    for key, parameter in source._parameters.items():
        own = module._parameters[key]
        if own is not None and parameter is not None:
            own.copy_(parameter)
        elif parameter is not None:  # a bias that the draft was given
            setattr(module, key, nn.Parameter(parameter.detach().clone()))


def _add_bias(layer: nn.Module, bias: Tensor) -> None:
    """Add to a layer's bias, which is made if there is none."""
    weight: Tensor = layer.get_parameter("weight")
    old = layer.bias.detach() if isinstance(layer.bias, Tensor) else weight.new_zeros(len(weight))
    layer.bias = nn.Parameter((old.double() + bias.to(old.device)).to(weight.dtype))
