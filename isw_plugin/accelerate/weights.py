"""Tensors that several plans of one model hold, each once: plans of other sizes have the same weights."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from isw_plugin.accelerate.execution import DenseConv, DenseLinear

__all__ = ["Weights"]

_PADDING = slice(108, 112)  # of oneDNN's description, between its type and its dimensions: never written


class Weights:
    """Knows tensors as long as a plan holds them."""

    def __init__(self) -> None:
        self._known: dict[Any, list[weakref.ref[Tensor]]] = {}

    def shared(self, tensor: Tensor) -> Tensor:
        """The one that is equal to it and was seen before, or itself."""
        return self._first(tensor, (tensor.shape, tensor.stride(), tensor.dtype, tensor.device), torch.equal)

    def share(self, layers: Iterable[nn.Module]) -> None:
        """Replace what layers packed or reordered; their constants are shared already."""
        for layer in layers:
            for name, buffer in layer.named_buffers(recurse=False):
                layer.register_buffer(name, self.shared(buffer))
            linear = layer.linear if isinstance(layer, DenseConv) else None
            for dense in (layer, linear):
                if isinstance(dense, DenseConv | DenseLinear) and dense.reordered is not None:
                    key = (dense.layer.weight.data_ptr(), _order(dense.reordered))
                    dense.reordered = self._first(dense.reordered, key, lambda found, new: True)

    def _first(self, tensor: Tensor, key: Any, equal: Any) -> Tensor:
        known = self._known[key] = [ref for ref in self._known.get(key, ()) if ref() is not None]
        for held in (ref() for ref in known):
            if held is not None and (held is tensor or equal(held, tensor)):
                return held
        known.append(weakref.ref(tensor))
        return tensor


def _order(reordered: Tensor) -> bytes:
    """How oneDNN laid a tensor out."""
    description = torch.ops.mkldnn._get_mkldnn_serialized_md(reordered).tolist()
    description[_PADDING] = []
    return bytes(description)
