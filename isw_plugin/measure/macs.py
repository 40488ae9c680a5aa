"""Multiply-adds: what the dense model computes for an image, and what dropped channels save.

One multiply-add is one MAC. Convolutions and linear layers are counted, as in the paper; norms,
activations and biases are not. A dropped channel saves the work of its readers on that input channel,
so the saving is linear in the number of dropped channels. Where it is decided before the layer runs (predicted norms, a
gate with parameters that drops channels), it saves its own layers' work on it too, as far as their inputs are kept
(MACs * keep_in * keep_out is left, group by group), less what deciding takes. A gate that drops elements (channel
gating, LCCL) saves what its layers need not compute of them, less its own, and nothing in readers. Projections that are
no module of their own (``nn.MultiheadAttention``) and products of activations (attention) are not counted.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from isw_plugin.accelerate import Accelerated, LoadedModel, Record
from isw_plugin.errors import AttachError, SettingError, UnsupportedError
from isw_plugin.gates import Gate, LearnedGate
from isw_plugin.hooks import Part, column_keep, has_hooks, memory_of, reader_parts
from isw_plugin.inputs import call, instances_in, measuring
from isw_plugin.pruner import InstanceWisePruner
from isw_plugin.sites import LAYERS, Inputs, Site
from isw_plugin.wrappers import unwrapped

__all__ = [
    "DenseMacs",
    "MacReport",
    "bare",
    "count_dense",
    "count_macs",
    "decisions",
    "gated_pruner",
    "require_decided",
    "saved_by_site",
]


@dataclass
class DenseMacs:
    """MACs of one image with every channel kept.

    Attributes:
        per_layer: Layer name -> MACs, of all its calls.
        calls: Layer name -> calls in one forward.
        columns: Layer name -> input channels or features.
        groups: Layer name -> groups of its channels.
        gate: The gates' own multiply-adds: a square for every element of a site, and 4 a channel for
            mean and CV (section 3.4).
    """

    per_layer: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    columns: dict[str, int] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    gate: int = 0

    @property
    def total(self) -> int:
        return self.per_layer.total()

    def per_column(self, layer: str) -> float:
        """MACs that one input column takes in one call of a layer (the mean call, where sizes differ)."""
        return self.per_call(layer) / self.columns[layer]

    def per_call(self, layer: str) -> float:
        """MACs of the mean call of a layer."""
        return self.per_layer[layer] / max(self.calls[layer], 1)


@dataclass(frozen=True)
class MacReport:
    """MACs of a batch.

    Attributes:
        dense: Of one image with every channel kept.
        gated: Of each image with its dropped channels skipped, (N,) float64.
        per_site: Site name -> MACs saved in the readers of this map, and where it is decided before its layers run in
            these, less what deciding takes (a head's, or a gate's with parameters); (N,) float64. They add up. Where a
            site follows, its depthwise layer's are the other's, which reads that map.
        per_layer: Layer name -> dense MACs of one image.
        gate: The gates' own multiply-adds for one image, not in ``gated``.

    Example:
        >>> import torch
        >>> from isw_plugin import MacReport
        >>> MacReport(dense=100, gated=torch.tensor([50.0, 75.0]), per_site={}, per_layer={}, gate=0).saved
        tensor([0.5000, 0.2500])
    """

    dense: int
    gated: Tensor
    per_site: dict[str, Tensor]
    per_layer: dict[str, int]
    gate: int

    @property
    def saved(self) -> Tensor:
        """Share of the dense MACs that each image saves, (N,)."""
        return 1 - self.gated / max(self.dense, 1)


def count_macs(model: nn.Module, inputs: Inputs) -> MacReport:
    """Count the MACs of a batch, with the gates as they are (on or off, or no pruner at all).

    Args:
        model: A bare or an attached model, or a wrapper of one.
        inputs: What its forward takes, N images: a tensor, a tuple of arguments, a dict of them by name, or a list of
            images (C, H, W). With gates on it is run twice, the second time without.

    Raises:
        SettingError: No model, inputs without a batch, or a site that did not decide for each of them.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from isw_plugin import InstanceWisePruner, MinNorm, count_macs
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> images = torch.rand(2, 3, 8, 8)
        >>> pruner = InstanceWisePruner(model, images, gate=MinNorm(0.5))
        >>> pruner.step()
        >>> macs = count_macs(model, images)
        >>> macs.dense, macs.gated.tolist()
        (10656, [9216.0, 9216.0])
    """
    pruner = gated_pruner(model)
    keep: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    instances = instances_in(inputs)
    if pruner:
        with measuring(model), decisions(model) as decided:
            call(model, inputs)
        keep, norms = decided.keep, decided.norms
        require_decided(pruner.sites, keep, instances)
    dense = count_dense(model, inputs, call, instances)  # with gates off
    saved = saved_by_site(pruner, keep, norms, dense) if pruner else {}
    total = torch.full((instances,), float(dense.total), dtype=torch.float64)
    return MacReport(dense.total, total - sum(saved.values()), saved, dict(dense.per_layer), dense.gate)


def require_decided(sites: Sequence[Site], keep: Mapping[str, Tensor], instances: int) -> None:
    """One decision for every image at every site, or the means would be of something else."""
    for site in sites:
        decided = len(keep[site.name]) if site.name in keep else 0
        if decided != instances:
            raise SettingError(
                f"{site.name} decided for {decided} instances of a batch of {instances}: the model must run once, on "
                "the whole batch, through every site. After a module was replaced, pruner.update_regularizer() finds "
                "the sites again"
            )


def saved_by_site(
    pruner: InstanceWisePruner, keep: Mapping[str, Tensor], scores: Mapping[str, Tensor], dense: DenseMacs
) -> dict[str, Tensor]:
    """MACs that each image saves by each site (see ``MacReport.per_site``), (N,) float64 on the CPU.

    Args:
        scores: What ``keep`` was decided on.
    """
    keep = {name: mask.cpu() for name, mask in keep.items()}
    sites, heads, gates = pruner.sites, pruner.heads, _gates(pruner)
    own = _own_macs(pruner, dense) | {name: float(head.macs) for name, head in heads.items()}
    own |= dict.fromkeys(pruner.followers, 0.0)
    parts = reader_parts(sites) if own else {}
    saved = {}
    for site in sites:
        gate = gates[site.name]
        if isinstance(gate, LearnedGate) and not gate.whole_channels:
            macs = [dense.per_call(name) for name in site.layers]
            layers = [pruner.model.get_submodule(name) for name in site.layers]
            saved[site.name] = gate.saved(layers, macs, scores[site.name].cpu()) - own[site.name]
            continue
        per_channel = torch.zeros(site.channels, dtype=torch.float64)
        for reader in site.consumers:
            held = torch.tensor([channel for _, channel in reader.columns(site.channels)])
            per_channel += dense.per_column(reader.layer) * held.bincount(minlength=site.channels)
        saved[site.name] = (~keep[site.name]).double() @ per_channel
        if site.name in own:
            undone = (_undone(site, layer, parts.get(layer, ()), keep, dense) for layer in site.making.layers)
            saved[site.name] = saved[site.name] + sum(undone) - own[site.name]
    return saved


def _own_macs(pruner: InstanceWisePruner, dense: DenseMacs) -> dict[str, float]:
    """What gates with parameters take for one image, by site."""
    own, gates = {}, _gates(pruner)
    for site in pruner.sites:
        gate = gates[site.name]
        if isinstance(gate, LearnedGate):
            layers = [pruner.model.get_submodule(name) for name in site.layers]
            macs = [dense.per_call(name) for name in site.layers]
            own[site.name] = gate.macs(pruner.learned[site.name], layers, macs)
    return own


def _gates(pruner: InstanceWisePruner) -> Mapping[str, Gate]:
    """By site, with what differs there."""
    memory = memory_of(pruner.model)
    return memory.gates if memory else {}


def _undone(site: Site, layer: str, parts: Sequence[Part], keep: dict[str, Tensor], dense: DenseMacs) -> Tensor:
    """MACs of dropped output channels of a layer on its kept inputs, (N,)."""
    dropped, columns = ~keep[site.name], dense.columns[layer]
    read = column_keep(parts, keep, columns) if parts else torch.ones(len(dropped), columns, dtype=torch.bool)
    shares = [mask.double().view(len(dropped), dense.groups[layer], -1).mean(2) for mask in (read, dropped)]
    return dense.per_call(layer) * (shares[0] * shares[1]).mean(1)


@contextmanager
def decisions(model: nn.Module) -> Iterator[Record]:
    """What the gates decided in the forward inside the block; to be read after it."""
    model = unwrapped(model)
    if isinstance(model, Accelerated):
        with model.recording() as record:
            yield record
        return
    record, pruner = Record(), gated_pruner(model)
    yield record
    if pruner:
        record.add(pruner.keep, pruner.norms)


def gated_pruner(model: nn.Module) -> InstanceWisePruner | None:
    """The pruner of a model or of what it wraps, if its gates are on; of an accelerated one, if it skips.

    Raises:
        AttachError: The pruner is attached to a part of the model, or to a whole that this is part of.
        SettingError: No model.
    """
    if not isinstance(model, nn.Module):
        hint = ": pass pruner.model" if hasattr(model, "model") else ""
        raise SettingError(f"a model is measured, and this is a {type(model).__name__}{hint}")
    model = unwrapped(model)
    if isinstance(model, LoadedModel):
        raise UnsupportedError(
            "a model of load_accelerated has graphs and no layers to count: measure the one that it was made from"
        )
    if isinstance(model, Accelerated):
        return InstanceWisePruner.of(model.masked) if model.execution != "dense" else None
    memory = memory_of(model)
    if memory is None and has_hooks(model):
        raise AttachError("the pruner is attached to a part of this model: measure the module that it is attached to")
    return InstanceWisePruner.of(model) if memory is not None and memory.enabled else None


def bare(model: nn.Module) -> nn.Module:
    """The module whose layers a model's are."""
    model = unwrapped(model)  # a compiled wrapper would not call the counters
    return model.masked if isinstance(model, Accelerated) else model


def count_dense(model: nn.Module, inputs: Any, forward: Callable[[nn.Module, Any], Any], instances: int) -> DenseMacs:
    """Run the model once, with gates off, and count one image's MACs by layer.

    Args:
        forward: ``forward(model, inputs)``; ``call`` where the model is called on the inputs themselves.
        instances: In the inputs.
    """
    pruner, model = gated_pruner(model), bare(model)
    counted = DenseMacs()
    sites = pruner.sites if pruner else ()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    _require_readers(sites, layers)
    handles = []
    for name, module in layers.items():
        counted.groups[name] = module.groups if isinstance(module, _ConvNd) else 1
        counted.columns[name] = module.in_channels if isinstance(module, _ConvNd) else module.in_features
        handles.append(module.register_forward_hook(_LayerCounter(counted, name, instances), with_kwargs=True))
    squared = _squared(pruner) if pruner else ()
    undecided = {*pruner.learned, *pruner.followers} if pruner else ()
    for site in sites:
        counted.gate += 0 if site.name in undecided else 4 * site.channels
        if site.name not in squared:
            continue
        handles.append(_count_gate(model, site, counted, instances))
    try:
        if pruner:
            pruner.disable()  # the last decisions stay readable
        with measuring(model):
            forward(model, inputs)
    finally:
        if pruner:
            pruner.step()
        for handle in handles:
            handle.remove()
    return counted


def _squared(pruner: InstanceWisePruner) -> set[str]:
    """Sites whose squares are summed: all that are measured, and those that heads read."""
    heads = pruner.heads
    read = {source for head in heads.values() for source in head.sources}
    known = {*pruner.predicted, *pruner.learned}
    return read | {site.name for site in pruner.sites if site.name not in known}


def _require_readers(sites: Sequence[Site], layers: Mapping[str, nn.Module]) -> None:
    for site in sites:
        for reader in site.consumers:
            if reader.layer not in layers:
                raise SettingError(
                    f"{reader.layer}, which reads the map of {site.name}, is gone: pruner.update_regularizer() finds "
                    "the sites again"
                )


class _LayerCounter:
    def __init__(self, counted: DenseMacs, name: str, instances: int) -> None:
        self.counted, self.name, self.instances = counted, name, instances

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        weight: Any = module.weight
        if isinstance(module, _ConvNd) and output.dim() < weight.dim():
            raise SettingError(f"{self.name} ran on a map without a batch axis: pass inputs (N, ...), such as x[None]")
        # A transposed convolution spreads every input element, any other layer gathers every output element.
        spread: Tensor = (*args, *kwargs.values())[0] if isinstance(module, _ConvTransposeNd) else output
        elements = spread.numel()
        self.counted.per_layer[self.name] += elements // self.instances * (weight.numel() // len(weight))
        self.counted.calls[self.name] += 1


def _count_gate(model: nn.Module, site: Site, counted: DenseMacs, instances: int) -> Any:
    tap = site.taps[0]
    module = model.get_submodule(tap.module)

    def add(feature: Tensor) -> None:
        counted.gate += feature.numel() // instances

    if tap.argument is None:
        return module.register_forward_hook(lambda _, args, output: add(output))
    argument = tap.argument
    return module.register_forward_pre_hook(lambda _, args: add(args[argument]))
