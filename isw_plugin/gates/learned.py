"""What a gate with parameters is. docs/own-gates.md has one in 30 lines."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from isw_plugin.errors import PredictionError

__all__ = ["Decision", "LearnedGate"]


class Decision(NamedTuple):
    """What a gate with parameters makes of a map.

    Attributes:
        keep: (N, C) bool, True where the channel is kept.
        scores: (N, C), what that was decided on; of a gate that drops elements, the share of them that is kept.
        feature: What takes the map's place. Channels that are not kept are set to zero in it, unless the gate drops
            elements.
        loss: Added to the task loss, a scalar; None: nothing.
    """

    keep: Tensor
    scores: Tensor
    feature: Tensor
    loss: Tensor | None = None


class LearnedGate(ABC):
    """A gate whose parameters are trained with the model. It sees what the layers read that make a map.

    A frozen dataclass, whose fields are settings. Parameters are the modules that ``learn`` gives, one a site; the
    pruner holds them, moves them where maps are and puts them in the mode that the layers are in.

    Attributes:
        fixed: Names of settings on which the shapes of parameters depend: they stay as they are once attached.
        whole_channels: Whether what is dropped is whole channels. If not, ``saved`` says what that saves.
        same_size: Whether maps must be of the size that their layers make, with no pooling between.
        reference: Settings at which ``calibrate`` measures the accuracy that may be lost.
    """

    fixed: ClassVar[tuple[str, ...]] = ()
    whole_channels: ClassVar[bool] = True
    same_size: ClassVar[bool] = False
    reference: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def learn(self, layers: Sequence[nn.Module]) -> nn.Module:
        """The parameters of one site, whose map the sum of what these layers make ends in.

        Raises:
            SettingError: This gate cannot work on such layers; says on which it can.
        """

    @abstractmethod
    def at_layer(self, learned: nn.Module, number: int, layer: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        """Called when a layer of the site has run.

        Args:
            learned: What ``learn`` gave for the site.
            number: Of the layer, among those of the site.
            x, y: What the layer read and made.

        Returns:
            What takes the place of y, and a note for ``decide``.
        """

    @abstractmethod
    def decide(self, learned: nn.Module, notes: Sequence[Any], feature: Tensor, axis: int) -> Decision:
        """Called with the notes of all layers of the site, in their order, and the map, its channels on ``axis``."""

    @abstractmethod
    def macs(self, learned: nn.Module, layers: Sequence[nn.Module], macs: Sequence[float]) -> float:
        """Its own for one image, at a site whose layers take so many each."""

    def saved(self, layers: Sequence[nn.Module], macs: Sequence[float], scores: Tensor) -> Tensor:
        """MACs that dropped elements save in the layers of a site, (N,); only asked of gates that drop elements."""
        raise NotImplementedError

    def __call__(self, feature: Tensor, norms: Tensor) -> Tensor:
        raise PredictionError(f"{type(self).__name__} does not decide on norms but by parameters of its own")
