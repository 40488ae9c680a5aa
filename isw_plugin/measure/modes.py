"""Measuring leaves no trace: eval mode and no gradients, for the time of a block."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["measuring"]


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside; every module's training flag as before after it."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training
