"""Prune for good what images do not use, and let gates decide on the rest as before."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from isw_plugin.errors import SettingError, UnsupportedError
from isw_plugin.gates import Gate
from isw_plugin.hooks import Memory
from isw_plugin.inputs import device_of
from isw_plugin.sites import Inputs, Site
from isw_plugin.static.dependencies import remove_channels
from isw_plugin.static.fewer import changed_decisions, is_known, parameters_on_rest
from isw_plugin.static.groups import Group, Removal, bare_copy, harmless, prunable_groups
from isw_plugin.static.use import Batches, Observation, observe

__all__ = ["Conversion", "convert"]

Channel = tuple[int, int]  # index of a group, and its channel


@dataclass(frozen=True)
class Conversion:
    """What was pruned for good.

    Attributes:
        layers: Layer name -> its output channels that went (others that are tied to them went along).
        sites: Site name -> channels before and after, of the sites that lost some.
        parameters: Site name -> gate parameters that decide on the rest as the old ones did on all.
    """

    layers: dict[str, tuple[int, ...]]
    sites: dict[str, tuple[int, int]]
    parameters: dict[str, dict[str, Any]]

    def __str__(self) -> str:
        lost = sum(before - after for before, after in self.sites.values())
        return f"{lost} channels of {len(self.sites)} sites pruned for good"


def convert(
    model: nn.Module, memory: Memory, sites: Sequence[Site], inputs: Inputs, batches: Batches, threshold: float
) -> Conversion:
    """See ``InstanceWisePruner.to_static``; gates are on, sites are to be found again afterwards."""
    if not isinstance(threshold, Real) or not 0 <= threshold < 1:
        raise SettingError(f"threshold={threshold!r}: a share of the images lies in [0, 1)")
    if memory.learned:
        raise UnsupportedError(
            "gates have learned parameters of channels that would go: fine-tune the smaller model with new ones instead"
        )
    if not threshold:
        _require_known(memory.gates)
    observation = observe(model, memory, batches)
    device = device_of(model)
    inputs = tree_map_only(Tensor, lambda tensor: _two(tensor, device), inputs)
    bare = bare_copy(model)
    plan = _Plan(prunable_groups(bare, inputs), sites, observation, memory, threshold)
    plan.settle(bare, inputs)
    conversion = plan.conversion()
    remove_channels(model, plan.removals(), inputs)
    return conversion


def _two(tensor: Tensor, device: torch.device) -> Tensor:
    shape = (2, *tensor.shape[1:]) if tensor.dim() else ()
    return torch.zeros(shape, dtype=tensor.dtype, device=device)


def _require_known(gates: Mapping[str, Gate]) -> None:
    unknown = [f"{gate} at {name}" for name, gate in gates.items() if not is_known(gate)]
    if unknown:
        raise UnsupportedError(
            f"{unknown[0]}: how this gate decides on fewer channels is not known, so equal outputs cannot be promised. "
            "threshold > 0 promises none"
        )


class _Plan:
    """Which channels of which groups go."""

    def __init__(
        self, groups: list[Group], sites: Sequence[Site], seen: Observation, memory: Memory, threshold: float
    ) -> None:
        self.groups = groups
        self.sites = {site.name: site for site in sites}
        self.gates = memory.gates
        self.min_keep = memory.min_keep
        self.threshold = threshold
        self.norms = {name: torch.cat(norms) for name, norms in seen.norms.items()}
        self.chosen: set[Channel] = set()
        for index, group in enumerate(groups):
            self.chosen |= {(index, channel) for channel in _unused(group, seen, threshold)}
        self.tied = self._tied()

    def settle(self, bare: nn.Module, inputs: Inputs) -> None:
        """Give back channels until the rest can go: structurally, and at threshold 0 unnoticed by any gate."""
        while True:
            if not self.threshold:
                self._keep_decisions()
            planned = self.removals()
            good = {removal.layer for removal in harmless(bare, planned, inputs)}
            if len(good) == len(planned):
                return
            self.chosen = {(index, channel) for index, channel in self.chosen if self.groups[index].layer in good}

    def removals(self) -> list[Removal]:
        by_group: dict[int, list[int]] = defaultdict(list)
        for index, channel in sorted(self.chosen):
            by_group[index].append(channel)
        return [Removal.of(self.groups[index], channels) for index, channels in by_group.items()]

    def _keep_decisions(self) -> None:
        while changing := [name for name in self.tied if self._changes(name, self._pruned(name, self.chosen))]:
            for name in changing:
                ordered = self._by_norm(name)
                for channel in ordered[self._longest(name, ordered) :]:
                    self.chosen -= self.tied[name][channel]

    def conversion(self) -> Conversion:
        """What the removals do to layers, sites and gates."""
        pruned = {name: self._pruned(name, self.chosen) for name in self.tied}
        sizes = {name: self.sites[name].channels for name, gone in pruned.items() if gone}
        return Conversion(
            layers={removal.layer: removal.channels for removal in self.removals()},
            sites={name: (size, size - len(pruned[name])) for name, size in sizes.items()},
            parameters={
                name: parameters_on_rest(self.gates[name], self.norms[name], pruned[name])
                for name in sizes
                if name in self.norms
            },
        )

    def _tied(self) -> dict[str, dict[int, set[Channel]]]:
        """For every site, the group channels that each of its channels goes with."""
        filled: dict[str, dict[int, Channel]] = defaultdict(dict)
        for index, group in enumerate(self.groups):
            for layer, columns in (group.readers | group.passing).items():
                filled[layer] |= {column: (index, root) for root, own in columns.items() for column in own}
        tied: dict[str, dict[int, set[Channel]]] = {}
        for name, site in self.sites.items():
            channels: dict[int, set[Channel]] = defaultdict(set)
            for reader in site.consumers:
                for column, channel in reader.columns(site.channels):
                    if column in filled[reader.layer]:
                        channels[channel].add(filled[reader.layer][column])
            tied[name] = channels
        return tied

    def _pruned(self, name: str, chosen: set[Channel]) -> list[int]:
        return [channel for channel, ties in self.tied[name].items() if ties & chosen]

    def _changes(self, name: str, pruned: Sequence[int]) -> bool:
        if not pruned or name not in self.norms:
            return False
        return changed_decisions(self.gates[name], self.norms[name], pruned, self.min_keep) > 0

    def _by_norm(self, name: str) -> list[int]:
        """Channels of a site that would go, those that its gate would miss least first."""
        largest = self.norms[name].amax(0)
        return sorted(self._pruned(name, self.chosen), key=lambda channel: float(largest[channel]))

    def _longest(self, name: str, ordered: Sequence[int]) -> int:
        """How many of these may go, from the first on; bisection, so perhaps not the most."""
        low, high = 0, len(ordered)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._changes(name, ordered[:middle]) else (middle, high)
        return low


def _unused(group: Group, seen: Observation, threshold: float) -> list[int]:
    """Channels that at most this share of the images uses, anywhere; the most used one stays."""
    if not all(name in seen.columns for name in group.readers):
        return []  # a reader that did not run: nothing is known
    use = torch.zeros(group.channels, dtype=torch.float64)
    for name, columns in group.readers.items():
        frequency = seen.columns[name].frequency
        for root, own in columns.items():
            use[root] = max(use[root].item(), frequency[own].max().item())
    unused = (use <= threshold).nonzero()[:, 0].tolist()
    spared = int(use.argmax())
    return unused if len(unused) < group.channels else [channel for channel in unused if channel != spared]
