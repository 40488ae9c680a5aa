"""Copies of a model, whatever an earlier forward left in it."""

import copy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["copy_of"]

_Model = TypeVar("_Model", bound=nn.Module)


def copy_of(model: _Model, memo: dict[int, Any] | None = None) -> _Model:
    """A deep copy; tensors that a forward computed and kept (attention biases, in LeViT) come without their history.

    Args:
        memo: By id of a tensor: what stands for it in the copy.

    ``copy.deepcopy`` alone refuses tensors that are not leaves of the autograd graph.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for leaf in tree_leaves(vars(module)):
            if isinstance(leaf, Tensor) and not leaf.is_leaf:
                memo.setdefault(id(leaf), leaf.detach().clone())
    return copy.deepcopy(model, memo)
