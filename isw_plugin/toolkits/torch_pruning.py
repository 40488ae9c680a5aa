"""Beside torch-pruning: importances for its pruners, and our names in its namespace on request."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from isw_plugin.errors import SettingError, UnsupportedError
from isw_plugin.pruner import InstanceWisePruner
from isw_plugin.static import Batches, ColumnUse, reader_columns, used_columns  # says which extra is missing

# isort: split
import torch_pruning as tp
from torch_pruning.pruner.importance import BNScaleImportance, Importance

__all__ = ["InstanceFrequencyImportance", "SlimmingImportance", "install", "uninstall"]

_SAFE = 1e6  # above any gamma, and any frequency over its mean


class SlimmingImportance(BNScaleImportance):  # type: ignore[misc]  # torch-pruning ships no types
    """Rank channels by |gamma| of their batch norm over the whole network (Liu et al., ICCV 2017).

    torch-pruning's own ``BNScaleImportance()`` divides by each layer's mean, so every layer loses about
    the same share; with ``normalizer=None`` it ranks globally, but a layer that falls whole below the
    threshold is skipped and keeps all its channels. Here the ``min_channels`` largest of every layer
    are safe, and all the others compete globally.

    Args:
        min_channels: Channels that every layer keeps, >= 1.
    """

    def __init__(self, min_channels: int = 1) -> None:
        super().__init__(group_reduction="mean", normalizer=None)
        self.min_channels = _checked(min_channels)

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """Return |gamma| of one group's channels, shape (C,), far above all others where the channel is safe."""
        importance: Tensor | None = super().__call__(group)
        return importance if importance is None else _with_safe(importance, self.min_channels)


class InstanceFrequencyImportance(Importance):  # type: ignore[misc]  # torch-pruning ships no types
    """Rank channels by how often images use them, over the whole network.

    An image uses a channel where some layer reads anything but zeros from it: its gate keeps it and it is
    not dead. Among equally frequent channels, the one of larger mean norm counts more, so there are hardly
    ties. Made anew after every pruning step, since channels have other numbers then.

    Args:
        pruner: Its gates are on at their present thresholds while images are run.
        batches: Images, (images, labels) as a loader gives them, or dicts of what forward takes.
        min_channels: Channels that every layer keeps, >= 1. With none, torch-pruning would skip a layer that
            falls whole below the threshold, and it would keep all.
        normalizer: "mean" divides by the layer's mean, as torch-pruning's importances do by default. None ranks
            frequencies over the whole network: layers whose gates drop much are then emptied first.

    Raises:
        SettingError: There are no images, or another normalizer.
        ValueError: A layer needs at least 1 channel.
    """

    def __init__(
        self,
        pruner: InstanceWisePruner,
        batches: Batches,
        *,
        min_channels: int = 1,
        normalizer: Literal["mean"] | None = "mean",
    ) -> None:
        if normalizer not in ("mean", None):
            raise SettingError(f"normalizer={normalizer!r}: 'mean' or None")
        self.min_channels = _checked(min_channels)
        self.normalizer = normalizer
        with pruner.gating():
            self.columns: dict[str, ColumnUse] = used_columns(pruner.model, batches)
        self.names: dict[nn.Module, str] = {module: name for name, module in pruner.model.named_modules()}

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """Return the use of one group's channels, shape (C,).

        From 0 (never) to 1 (always, and large), over the mean if so asked; far above where a channel is safe.

        Raises:
            SettingError: The model was pruned since the images were run.
        """
        importance = torch.zeros(len(group[0].idxs), dtype=torch.float64)
        numbers = {root: number for number, root in enumerate(group[0].root_idxs)}
        readers = {name: found for name, found in reader_columns(group, self.names).items() if name in self.columns}
        for name, columns in readers.items():
            self._require_unpruned(name)
            scores = _scores(self.columns[name])
            for root, own in columns.items():
                importance[numbers[root]] = max(importance[numbers[root]].item(), scores[own].max().item())
        if not readers:
            return None
        if self.normalizer == "mean" and importance.any():
            importance /= importance.mean()
        return _with_safe(importance.float(), self.min_channels)

    def _require_unpruned(self, name: str) -> None:
        seen = len(self.columns[name].used)
        layer = next(module for module, known in self.names.items() if known == name)
        columns: Any = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        if columns != seen:
            raise SettingError(
                f"{name} has {columns} input channels and had {seen} when images were run: make the importance anew "
                "after every pruning step"
            )


def _checked(min_channels: int) -> int:
    if min_channels < 1:
        raise ValueError(f"min_channels={min_channels}: a layer needs at least 1 channel")
    return min_channels


def _with_safe(importance: Tensor, channels: int) -> Tensor:
    """Lift a group's most important channels above all that is not safe.

    Finitely: a threshold among the safe ones would else be infinite and select every channel of every layer.
    """
    safe = importance.topk(min(channels, len(importance))).indices
    return importance.index_add(0, safe, importance.new_full((len(safe),), _SAFE))


def _scores(use: ColumnUse) -> Tensor:
    """Frequency first, then relative norm, in [0, 1]: the norm never outweighs one image."""
    norms = use.relative_norm
    return (use.used + norms / (1 + norms)) / (use.rows + 1)


def install() -> None:
    """Put ours beside torch-pruning's: ``tp.pruner.InstanceWisePruner`` and two classes in ``tp.importance``.

    Raises:
        UnsupportedError: torch-pruning has something else of such a name. Nothing is changed.
    """
    for place, ours in _PLACES:
        other = getattr(place, ours.__name__, ours)
        if other is not ours:
            raise UnsupportedError(f"{place.__name__} has a {ours.__name__} already, of {other.__module__}")
    for place, ours in _PLACES:
        setattr(place, ours.__name__, ours)


def uninstall() -> None:
    """Take out what ``install`` put in; safe to call twice."""
    for place, ours in _PLACES:
        if getattr(place, ours.__name__, None) is ours:
            delattr(place, ours.__name__)


_PLACES = (
    (tp.pruner, InstanceWisePruner),
    (tp.importance, SlimmingImportance),
    (tp.importance, InstanceFrequencyImportance),
)
