"""Ways to run a layer: the engine's kernel, which skips dropped channels, or oneDNN on all of them."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import isw_plugin.ops.cpu as cpu
from isw_plugin.accelerate.layers import Layer, Linear, mask
from isw_plugin.accelerate.padding import even
from isw_plugin.ops.reference import ACTS, DTYPES, pack_weight, pad

__all__ = ["DenseConv", "DenseLinear", "ExpandDepthwise", "GatedConv", "can_skip"]

_ONEDNN_ACTS: dict[str, tuple[str, list[float], str]] = {  # name, bounds, algorithm
    "none": ("none", [], ""),
    "relu": ("relu", [], ""),
    "relu6": ("hardtanh", [0.0, 6.0], ""),
    "silu": ("swish", [], ""),
    "hardswish": ("hardswish", [], ""),
    "gelu": ("gelu", [], "none"),
}


_WORTHWHILE = 1 << 19  # multiply-adds of a linear layer; a call of oneDNN takes 10 us longer than PyTorch's
_LEAST_OUTPUTS = 8  # of a group: fewer leave more than half of a vector empty


def can_skip(layer: Layer) -> bool:
    """Whether the engine has a kernel for the layer here."""
    if layer.weight.dtype not in DTYPES or layer.dilation != (1, 1):
        return False
    if layer.is_grouped and (layer.weight.dtype != torch.float32 or len(layer.weight) < _LEAST_OUTPUTS * layer.groups):
        return False
    return layer.weight.is_cpu and cpu.load()


class GatedConv(nn.Module):
    """Skips dropped channels.

    Gates come as the operators take them: statistics and thresholds, a keep mask and two zeros, or None. Outputs that
    ``out_keep`` drops are not computed, nor, without ``zeros``, written.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.depthwise, self.groups = layer.is_depthwise, layer.groups
        weight = layer.weight.contiguous() if self.depthwise else pack_weight(layer.weight, layer.groups)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", layer.bias.float().contiguous())
        self.stride, self.padding, self.act = list(layer.stride), list(layer.padding), layer.act
        self.pooled = False

    @property
    def can_pool(self) -> bool:
        """Whether the kernel can pool what it makes: 1x1, grouped and depthwise ones cannot."""
        return self.groups == 1 and tuple(self.weight.shape[2:4]) != (1, 1)

    @property
    def is_pointwise(self) -> bool:
        """Whether pixels do not see each other, nor are any left out; none is pooled."""
        alone = tuple(self.weight.shape[2:4]) == (1, 1) and self.stride == [1, 1] and not any(self.padding)
        return alone and self.groups == 1 and not self.depthwise

    def with_pool(self) -> "GatedConv":
        """The same layer, of the same weights, with 2x2 max-pooling behind it; takes no residual."""
        pooled = copy.copy(self)
        pooled.pooled = True
        return pooled

    def forward(
        self,
        x: Tensor,
        gate: Tensor | None,
        alpha: float,
        beta: float,
        residual: Tensor | None,
        residual_gate: Tensor | None,
        residual_alpha: float,
        residual_beta: float,
        out_keep: Tensor | None = None,
        sums: bool = False,
        zeros: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """y (N, C_out, OH, OW) and its partial sums of squares (N, S, C_out), those from before a pool.

        With ``sums``, (2, N, S, C_out), the latter and plain sums.
        """
        held = (self.weight, self.bias)
        settings = (self.stride, self.padding, self.act, gate, alpha, beta)
        made = (out_keep, sums, zeros)
        if self.pooled:
            outputs = torch.ops.isw.pooled_conv2d.default(x, *held, *settings, *made)
        elif self.depthwise:
            outputs = torch.ops.isw.depthwise_conv2d.default(x, *held, *settings, *made)
        elif self.groups > 1:
            outputs = torch.ops.isw.grouped_conv2d.default(x, *held, self.groups, *settings, *made)
        else:
            others = (residual, residual_gate, residual_alpha, residual_beta)
            outputs = torch.ops.isw.conv2d.default(x, *held, *settings, *others, *made)
        y, squares = outputs
        return y, squares


class ExpandDepthwise(nn.Module):
    """A pointwise layer and the depthwise one that alone reads its map, never written. Gates as GatedConv's."""

    def __init__(self, expand: GatedConv, depthwise: GatedConv) -> None:
        super().__init__()
        self.expand, self.depthwise = expand, depthwise

    def forward(
        self,
        x: Tensor,
        gate: Tensor | None,
        alpha: float,
        beta: float,
        out_keep: Tensor | None,
        sums: bool,
        zeros: bool,
    ) -> tuple[Tensor, Tensor]:
        """What ``depthwise`` gives of what ``expand`` makes."""
        one, two = self.expand, self.depthwise
        held = (one.weight, one.bias, two.weight, two.bias, two.stride, two.padding, one.act, two.act)
        y, squares = torch.ops.isw.expand_depthwise_conv2d.default(x, *held, gate, alpha, beta, out_keep, sums, zeros)
        return y, squares


class DenseConv(nn.Module):
    """Computes all channels, with weights that oneDNN reordered once where it can.

    On maps of one pixel, those of squeeze-excite, it is a linear layer, which takes a fraction of the time.
    """

    def __init__(self, layer: Layer, shape: Sequence[int]) -> None:
        """``shape`` is that of the input that oneDNN chooses the order of the weights for."""
        super().__init__()
        self.layer = layer
        self.shape = list(shape)
        one_pixel = layer.is_pointwise and self.shape[2:] == [1, 1]
        self.linear = DenseLinear(layer.as_linear(), self.shape[0]) if one_pixel else None
        self.even, self.border = even(layer)
        self.reordered = None if one_pixel else self._reordered()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"reordered": None}  # oneDNN's order cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # of torch
        self.reordered = None if self.linear else self._reordered()

    def _reordered(self) -> Any:
        shape = (
            self.shape if self.border is None else list(pad(torch.empty(self.shape, device="meta"), self.border).shape)
        )
        return _reordered(self.even, shape)

    def forward(
        self,
        x: Tensor,
        keep: Tensor | None,
        residual: Tensor | None,
        residual_keep: Tensor | None,
        out_keep: Tensor | None = None,
    ) -> Tensor:
        """y (N, C_out, OH, OW)."""
        y = self._computed(x, keep, residual, residual_keep)
        return y if out_keep is None else mask(y, out_keep, 1)

    def _computed(
        self, x: Tensor, keep: Tensor | None, residual: Tensor | None, residual_keep: Tensor | None
    ) -> Tensor:
        x = x if keep is None else mask(x, keep, 1)
        if residual is not None and residual_keep is not None:
            residual = mask(residual, residual_keep, 1)
        if self.linear is not None and residual is None and x.shape[2:] == (1, 1):
            flat: Tensor = self.linear(x.flatten(1))
            return flat[:, :, None, None]
        if self.reordered is None or _traced(x):  # a compiler fuses and reorders by itself
            return self.layer.dense(x, residual)
        layer = self.even
        x = x if self.border is None else pad(x, self.border)
        window = (list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups)
        act = _ONEDNN_ACTS[layer.act]
        run = torch.ops.mkldnn._convolution_pointwise
        if residual is None:
            y = run(x, self.reordered, layer.bias, *window, *act)
        else:
            # oneDNN takes no other activation behind a sum.
            after: tuple[Any, ...] = act if layer.act == "relu" else (None, [], "")
            y = run.binary(x, residual, self.reordered, layer.bias, *window, "add", 1.0, *after)
            y = y if layer.act == "relu" else ACTS[layer.act](y)
        result: Tensor = y
        return result


class DenseLinear(nn.Module):
    """A linear layer with weights that oneDNN reordered once, where it can and the layer is large."""

    def __init__(self, layer: Linear, rows: int) -> None:
        """``rows`` are those of the input that it is expected to read, N times tokens."""
        super().__init__()
        self.layer = layer
        self.rows = rows
        self.reordered = _reordered_linear(layer, rows)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"reordered": None}  # oneDNN's order cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # of torch
        self.reordered = _reordered_linear(self.layer, self.rows)

    def forward(self, x: Tensor) -> Tensor:
        """y (N, ..., C_out)."""
        if self.reordered is None or _traced(x) or not x.numel():
            return self.layer.dense(x)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.reordered, self.layer.bias, *_ONEDNN_ACTS[self.layer.act]
        )
        return y


def _traced(x: Tensor) -> bool:
    # is_compiling() is true in every thread while one exports; an export runs on a subclass of Tensor.
    return torch.compiler.is_dynamo_compiling() or type(x) is not Tensor


def _has_onednn(dtype: torch.dtype) -> bool:
    available = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    if dtype == torch.bfloat16:
        return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return available and dtype == torch.float32


def _reordered(layer: Layer, shape: list[int]) -> Any:
    if 0 in shape or not (layer.weight.is_cpu and _has_onednn(layer.weight.dtype)):
        return None
    window = (list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups)
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # stubbed without the shape
    return reorder(layer.weight.to_mkldnn(), *window, shape)


def _reordered_linear(layer: Linear, rows: int) -> Any:
    weight = layer.weight
    if rows * weight.numel() < _WORTHWHILE or not (weight.is_cpu and _has_onednn(weight.dtype)):
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)
