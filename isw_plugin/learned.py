"""Parameters of gates: made for the sites of a model, as plain values and tensors, and the same on every rank."""

import warnings
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from isw_plugin.errors import SettingError, StateMismatchError
from isw_plugin.gates import Gate, LearnedGate
from isw_plugin.sites import LAYERS, Site

__all__ = [
    "average_after_backward",
    "kept_learned",
    "learned_of",
    "learned_tensors",
    "made_learned",
    "put_values",
    "restored_learned",
    "stored_learned",
]

Learned = dict[str, nn.Module]  # by site name


def made_learned(model: nn.Module, sites: Sequence[Site], gates: Mapping[str, Gate]) -> Learned:
    """New parameters for every site whose gate has some; the same ones for the same site's name, on every rank.

    Raises:
        SettingError: A gate cannot work at a site; says which, and what to exclude.
    """
    modules, made, wrong = dict(model.named_modules()), {}, {}
    for site in sites:
        gate = gates[site.name]
        if not isinstance(gate, LearnedGate):
            continue
        layers = [modules[name] for name in site.layers]
        try:
            _require_layers(site, layers)
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                torch.default_generator.manual_seed(zlib.crc32(site.name.encode()))
                made[site.name] = gate.learn(layers)
            _require_size(site, gate)
        except SettingError as error:
            wrong[site.name] = str(error)
    if wrong:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in [*wrong.items()][:3])
        raise SettingError(
            f"{next(iter(gates.values()))} cannot work at {len(wrong)} of {len(sites)} sites ({reasons}): "
            f"exclude={sorted(layer for site in sites if site.name in wrong for layer in site.layers)}"
        )
    return made


def _require_layers(site: Site, layers: Sequence[nn.Module]) -> None:
    if not all(isinstance(layer, LAYERS) for layer in layers):
        raise SettingError("a norm makes this map, and gates with parameters read what layers read")


def _require_size(site: Site, gate: LearnedGate) -> None:
    other = next((shape for shape in site.made if shape[1:] != site.shape[1:]), None)
    if gate.same_size and other is not None:
        raise SettingError(
            f"its layer makes {other} and the map is {site.shape}: {type(gate).__name__} needs a map of the size that "
            "its layer makes"
        )


def kept_learned(made: Learned, before: Mapping[str, nn.Module]) -> Learned:
    """The new parameters; the earlier ones of a site where they have the same shapes."""
    kept = {name: before[name] if name in before and _alike(before[name], new) else new for name, new in made.items()}
    if changed := [name for name in before if kept.get(name) is not before[name]]:
        warnings.warn(
            f"{', '.join(changed)}: what the gates had learned there went with the maps, which have changed. Give "
            "pruner.gate_parameters() to a new optimizer and train",
            stacklevel=4,
        )
    return kept


def _alike(one: nn.Module, other: nn.Module) -> bool:
    return _shapes(one) == _shapes(other)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def put_values(learned: Mapping[str, nn.Module], found: Mapping[str, nn.Module]) -> Learned:
    """The restored parameters, inside those that were there where these have the same shapes: optimizers hold those."""
    kept = {}
    for name, module in found.items():
        kept[name] = module
        if name in learned and _alike(learned[name], module):
            learned[name].load_state_dict(module.state_dict())
            kept[name] = learned[name]
    return kept


# -- saving ----------------------------------------------------------------------------------------


def stored_learned(learned: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Parameters as a part of a pruner's state; nothing where there are none."""
    held = {
        name: {key: tensor.detach().cpu().clone() for key, tensor in module.state_dict().items()}
        for name, module in learned.items()
    }
    return {"learned": held} if held else {}


def restored_learned(stored: Any, made: Learned) -> Learned:
    """New parameters with the values that ``stored_learned`` gave under "learned".

    Raises:
        StateMismatchError: They are of other sites, another gate, or no tensors.
    """
    if not isinstance(stored, Mapping) or stored.keys() != made.keys():
        there = ", ".join(map(str, stored)) if isinstance(stored, Mapping) else f"a {type(stored).__name__}"
        raise StateMismatchError(
            f"gates have learned at {', '.join(made) or 'no site'} here, and there at {there or 'none'}"
        )
    for name, module in made.items():
        _require_values(name, stored[name], module.state_dict())
        module.load_state_dict(dict(stored[name]))
    return made


def _require_values(site: str, stored: Any, wanted: Mapping[str, Tensor]) -> None:
    if not isinstance(stored, Mapping) or stored.keys() != wanted.keys():
        raise StateMismatchError(f"what the gate at {site} has learned is {', '.join(wanted)} here, and not there")
    for key, tensor in stored.items():
        here = wanted[key]
        if not isinstance(tensor, Tensor) or (tensor.shape, tensor.dtype) != (here.shape, here.dtype):
            what = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise StateMismatchError(
                f"{key} of the gate at {site} is {what}, and {here.dtype} {tuple(here.shape)} here"
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise StateMismatchError(f"{key} of the gate at {site} holds NaN or infinity")


def learned_tensors(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A pruner's state as plain values, with the names of what gates have learned, and those tensors by name."""
    held = state.get("learned", {})
    if not held:
        return dict(state), {}
    tensors = {f"{site}.{key}": tensor for site, of_site in held.items() for key, tensor in of_site.items()}
    return {**state, "learned": {site: list(of_site) for site, of_site in held.items()}}, tensors


def learned_of(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state of which ``learned_tensors`` made the two.

    Raises:
        StateMismatchError: Tensors are missing, or there are others.
    """
    held = state.get("learned", {})
    names = {f"{site}.{key}" for site, keys in held.items() for key in keys}
    if other := sorted(names ^ tensors.keys()):
        raise StateMismatchError(f"what gates have learned and its tensors differ: {', '.join(other[:5])}")
    if not held:
        return dict(state)
    return {**state, "learned": {site: {key: tensors[f"{site}.{key}"] for key in keys} for site, keys in held.items()}}


# -- several ranks ---------------------------------------------------------------------------------


def average_after_backward(loss: Tensor, learned: Mapping[str, nn.Module]) -> None:
    """Give gates' gradients and running statistics the mean over ranks when a backward of this loss ends.

    No DistributedDataParallel knows these parameters. The mean of a mean is the same: batches may be accumulated.
    """
    if learned and loss.requires_grad:
        modules = list(learned.values())
        hook: Any = loss.register_hook  # of torch, without types
        hook(lambda _: _engine().queue_callback(partial(_average, modules)))


def _engine() -> Any:
    return torch.autograd.Variable._execution_engine  # as DDP ends its backward


def _average(modules: Sequence[nn.Module]) -> None:
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    buffers = [buffer for module in modules for buffer in module.buffers() if buffer.is_floating_point()]
    for parameter in parameters:  # of a site that did not run on this rank
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    tensors = [*(parameter.grad for parameter in parameters if parameter.grad is not None), *buffers]
    flat = torch.cat([tensor.detach().float().flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    means = torch.split(flat, [tensor.numel() for tensor in tensors])
    for tensor, mean in zip(tensors, means, strict=True):
        tensor.detach().copy_(mean.view_as(tensor))
