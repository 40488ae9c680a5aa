"""What a site is: one feature map, where it can be touched, and who reads it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import gcd

__all__ = ["Consumer", "Making", "Site", "Tap"]


@dataclass(frozen=True)
class Tap:
    """A place in the module tree where the map passes: a module's output, or its input ``argument``."""

    module: str
    argument: int | None = None

    def __str__(self) -> str:
        return f"output of {self.module}" if self.argument is None else f"input of {self.module}"


@dataclass(frozen=True)
class Consumer:
    """A convolution or linear layer that reads the map.

    From input column ``start`` on, every ``repeat`` columns hold one channel of the map: all in their order, or
    those that ``channels`` lists. ``start`` is not 0 after a concatenation, ``repeat`` not 1 after a flatten,
    ``channels`` not None where a map was cut or its channels shuffled; -1 there is none of this map.
    """

    layer: str
    start: int = 0
    repeat: int = 1
    channels: tuple[int, ...] | None = None

    @classmethod
    def at(cls, layer: str, columns: Sequence[int], channels: int) -> "Consumer":
        """Of the channel that each input column holds, or -1, in a map of this many channels."""
        filled = [column for column, channel in enumerate(columns) if channel >= 0]
        start, held = filled[0], columns[filled[0] : filled[-1] + 1]
        repeat = gcd(*(len(list(run)) for _, run in groupby(held)))
        order = tuple(held[::repeat])
        return cls(layer, start, repeat, None if order == tuple(range(channels)) else order)

    def columns(self, channels: int) -> list[tuple[int, int]]:
        """(input column, channel) of every column that a map of this many channels fills."""
        order = range(channels) if self.channels is None else self.channels
        runs = ((self.start + at * self.repeat, channel) for at, channel in enumerate(order) if channel >= 0)
        return [(first + column, channel) for first, channel in runs for column in range(self.repeat)]


@dataclass(frozen=True)
class Making:
    """How a map is made, which is what its norms can be predicted from and what a dropped channel saves before it.

    Attributes:
        sources: Names of the sites that the layers read, and of those that are added to what they make (shortcuts).
        layers: Those whose output channel c is needed for channel c of the map and for nothing else: what is dropped
            before they run need not be computed. None where that does not hold of all of them.
        reason: Why norms cannot be predicted before the layers run; "" where they can.
        follows: Where one depthwise layer makes it, and nothing is added, the site that this layer alone reads, whose
            channel c makes channel c; "" elsewhere.
    """

    sources: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    reason: str = "not looked for"
    follows: str = ""


@dataclass(frozen=True)
class Site:
    """One feature map that a convolution or linear layer reads.

    Attributes:
        name: First of ``layers`` in the order of named_modules.
        layers: The layers that end in this map (both branches of a residual add), or the norm after a
            join that makes it.
        channels: C.
        axis: Channel axis: 1 for maps of convolutions, -1 for token features.
        shape: Shape of one instance's map in the probe, without the instance axis.
        taps: Where the map passes, in the order of execution; the first sees it first.
        consumers: Its readers.
        overwritten: Whether a dropout in place changes the map in training.
        making: How it is made.
        made: Shape of one instance of what each of ``layers`` makes in the probe, the last time.
    """

    name: str
    layers: tuple[str, ...]
    channels: int
    axis: int
    shape: tuple[int, ...]
    taps: tuple[Tap, ...]
    consumers: tuple[Consumer, ...]
    overwritten: bool = False
    making: Making = Making()
    made: tuple[tuple[int, ...], ...] = ()
