"""What all processes of a torch.distributed group have seen, put together."""

from typing import TypeVar

import torch

__all__ = ["of_all_ranks"]

T = TypeVar("T")


def of_all_ranks(value: T) -> list[T]:
    """The value of every rank, in their order; every rank must call this. Alone: the one value.

    Args:
        value: Anything that can be pickled; tensors on the CPU.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[T] = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
