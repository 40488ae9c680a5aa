"""What a site is: one feature map, where it can be touched, and who reads it."""

from dataclasses import dataclass

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

    Channel c of the map fills input columns ``start + c * repeat`` up to ``start + (c + 1) * repeat``:
    ``start`` is not 0 after a concatenation, ``repeat`` not 1 after a flatten.
    """

    layer: str
    start: int = 0
    repeat: int = 1


@dataclass(frozen=True)
class Making:
    """How a map is made, which is what its norms can be predicted from and what a dropped channel saves before it.

    Attributes:
        sources: Names of the sites that the layers read, and of those that are added to what they make (shortcuts).
        layers: Those whose output channel c is needed for channel c of the map and for nothing else.
        reason: Why channels cannot be decided on before the layers run; "" where they can.
    """

    sources: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    reason: str = "not looked for"


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
