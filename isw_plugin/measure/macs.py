"""Multiply-adds: what the dense model computes for an image, and what dropped channels save.

One multiply-add is one MAC. Convolutions and linear layers are counted, as in the paper; norms,
activations and biases are not. A dropped channel saves the work of its readers on that input channel,
so the saving is linear in the number of dropped channels. Projections that are no module of their own
(``nn.MultiheadAttention``) and products of activations (attention) are not counted.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_leaves

from isw_plugin.engine.accelerate import Accelerated, Record
from isw_plugin.errors import AttachError, SettingError
from isw_plugin.hooks import has_hooks, memory_of
from isw_plugin.measure.modes import measuring
from isw_plugin.pruner import InstanceWisePruner
from isw_plugin.sites import LAYERS, Inputs, Site
from isw_plugin.wrappers import unwrapped

__all__ = ["DenseMacs", "MacReport", "count_dense", "count_macs", "decisions", "gated_pruner", "saved_by_site"]


@dataclass
class DenseMacs:
    """MACs of one image with every channel kept.

    Attributes:
        per_layer: Layer name -> MACs, of all its calls.
        calls: Layer name -> calls in one forward.
        columns: Layer name -> input channels or features.
        gate: The gates' own multiply-adds: a square for every element of a site, and 4 a channel for
            mean and CV (section 3.4).
    """

    per_layer: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    columns: dict[str, int] = field(default_factory=dict)
    gate: int = 0

    @property
    def total(self) -> int:
        return self.per_layer.total()

    def per_column(self, layer: str) -> float:
        """MACs that one input column takes in one call of a layer (the mean call, where sizes differ)."""
        return self.per_layer[layer] / self.calls[layer] / self.columns[layer]


@dataclass(frozen=True)
class MacReport:
    """MACs of a batch.

    Attributes:
        dense: Of one image with every channel kept.
        gated: Of each image with its dropped channels skipped, (N,) float64.
        per_site: Site name -> MACs saved in the readers of this map, (N,) float64; they add up.
        per_layer: Layer name -> dense MACs of one image.
        gate: The gates' own multiply-adds for one image, not in ``gated``.
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
        inputs: What its forward takes, N images; with gates on it is run twice, the second time without.
    """
    pruner = gated_pruner(model)
    keep: dict[str, Tensor] = {}
    if pruner:
        with measuring(model), decisions(model) as decided:
            _call(model, inputs)
        keep = decided.keep
    dense = count_dense(model, inputs)  # with gates off
    instances = next(len(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
    sites = pruner.sites if pruner else ()
    for site in sites:
        if site.name not in keep or len(keep[site.name]) != instances:
            rows = len(keep.get(site.name, ()))
            raise SettingError(
                f"{site.name} decided for {rows} instances of a batch of {instances}: what the gates save is known "
                "where forward runs once, on the whole batch, through every site"
            )
    saved = saved_by_site(sites, keep, dense)
    total = torch.full((instances,), float(dense.total), dtype=torch.float64)
    return MacReport(dense.total, total - sum(saved.values()), saved, dict(dense.per_layer), dense.gate)


def saved_by_site(sites: tuple[Site, ...], keep: Mapping[str, Tensor], dense: DenseMacs) -> dict[str, Tensor]:
    """MACs that each image saves in the readers of each site, (N,) float64 on the CPU."""
    saved = {}
    for site in sites:
        per_channel = sum(reader.repeat * dense.per_column(reader.layer) for reader in site.consumers)
        saved[site.name] = (~keep[site.name]).sum(1).double().cpu() * per_channel
    return saved


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
    """
    model = unwrapped(model)
    if isinstance(model, Accelerated):
        return InstanceWisePruner.of(model.masked) if model.execution != "dense" else None
    memory = memory_of(model)
    if memory is None and has_hooks(model):
        raise AttachError("the pruner is attached to a part of this model: measure the module that it is attached to")
    return InstanceWisePruner.of(model) if memory is not None and memory.enabled else None


def count_dense(model: nn.Module, inputs: Inputs, forward: Callable[[nn.Module, Any], Any] | None = None) -> DenseMacs:
    """Run the model once, with gates off, and count one image's MACs by layer.

    Args:
        forward: ``forward(model, inputs)``, where the model is not called on the inputs themselves.
    """
    model = unwrapped(model)  # a compiled wrapper would not call the counters
    pruner = gated_pruner(model)
    model = model.masked if isinstance(model, Accelerated) else model
    counted = DenseMacs()
    instances = next(len(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            counted.columns[name] = module.in_channels if isinstance(module, _ConvNd) else module.in_features
            handles.append(module.register_forward_hook(_LayerCounter(counted, name, instances)))
    for site in pruner.sites if pruner else ():
        counted.gate += 4 * site.channels
        handles.append(_count_gate(model, site, counted, instances))
    try:
        if pruner:
            pruner.disable()  # the last decisions stay readable
        with measuring(model):
            (forward or _call)(model, inputs)
    finally:
        if pruner:
            pruner.step()
        for handle in handles:
            handle.remove()
    return counted


def _call(model: nn.Module, inputs: Inputs) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*(inputs if isinstance(inputs, tuple) else (inputs,)))


class _LayerCounter:
    def __init__(self, counted: DenseMacs, name: str, instances: int) -> None:
        self.counted, self.name, self.instances = counted, name, instances

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        weight: Any = module.weight
        # A transposed convolution spreads every input element, any other layer gathers every output element.
        elements = args[0].numel() if isinstance(module, _ConvTransposeNd) else output.numel()
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
