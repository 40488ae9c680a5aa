"""Loads the CUDA kernels on first use."""

import functools
import warnings
from types import ModuleType

__all__ = ["load"]


@functools.cache
def load() -> ModuleType | None:
    """The operators in Triton; None without Triton, after one warning: PyTorch has to do."""
    try:
        import isw_plugin.engine.triton_ops as triton_ops
    except ImportError as error:
        message = (
            f"isw_plugin runs in plain PyTorch on CUDA, which does not get faster: {error}. "
            "Triton comes with PyTorch's CUDA builds for Linux; pip install triton"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=3)
        return None
    return triton_ops
