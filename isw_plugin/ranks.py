"""What all processes of a torch.distributed group have seen, put together."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["averaged", "of_all_ranks", "on_all_ranks", "ranks"]

T = TypeVar("T")


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def of_all_ranks(value: T) -> list[T]:
    """The value of every rank, in their order; every rank must call this. Alone: the one value.

    Args:
        value: Anything that can be pickled; tensors on the CPU.
    """
    if not _is_distributed():
        return [value]
    values: list[T] = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def on_all_ranks(attempt: Callable[[], T]) -> T:
    """What it gives on this rank; what it raises on one, all raise, so that none waits for another."""
    try:
        mine = attempt()
    except Exception as error:
        ours = type(error).__module__.startswith("isw_plugin.")  # others may not pickle
        of_all_ranks(error if ours else RuntimeError(f"another rank failed: {error!r}"))
        raise
    failed: list[Exception | None] = of_all_ranks(None)
    for elsewhere in failed:
        if elsewhere is not None:
            raise elsewhere
    return mine


def ranks() -> int:
    """How many processes there are."""
    return torch.distributed.get_world_size() if _is_distributed() else 1


def averaged(tensor: Tensor) -> Tensor:
    """The mean over all ranks, which must all call this."""
    if ranks() > 1:
        torch.distributed.all_reduce(tensor := tensor / ranks())
    return tensor
