"""What all processes of a torch.distributed group have seen, put together."""

from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["averaged", "of_all_ranks", "ranks"]

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


def ranks() -> int:
    """How many processes there are."""
    return torch.distributed.get_world_size() if _is_distributed() else 1


def averaged(tensor: Tensor) -> Tensor:
    """The mean over all ranks, which must all call this."""
    if ranks() > 1:
        torch.distributed.all_reduce(tensor := tensor / ranks())
    return tensor
