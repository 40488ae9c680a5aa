"""What the engine's functions accept; everything else is an EngineInputError that says what to do."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from isw_plugin.errors import EngineInputError
from isw_plugin.ops.reference import ACTS, BLOCK, DTYPES, Gating, Statistics, borders

__all__ = [
    "check_conv2d",
    "check_depthwise",
    "check_expand_depthwise",
    "check_keep_mask",
    "check_linear",
    "check_map",
    "check_max_pool",
    "check_pooled",
    "check_predict",
    "check_sum_squares",
    "output_size",
    "pair",
]

_MOST = 1 << 24  # of a kernel, stride or padding, as in csrc: no size overflows


def check_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    act: str,
    gating: Gating,
    groups: int = 1,
    residual: Tensor | None = None,
    residual_gating: Gating = None,
    out_keep: Tensor | None = None,
    sums: bool = False,
    zeros: bool = True,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> None:
    """A convolution of any kind but depthwise."""
    _check_flag(sums=sums, zeros=zeros)
    check_map(x, dtypes)
    _check_packed(weight, bias, x.shape[1], x, groups)
    _check_window(x, weight.shape[2:4], stride, padding)
    _check_decided(x, x.shape[1], bias.shape[0], act, gating, out_keep)
    if residual is not None:
        size = output_size(x.shape[2:], weight.shape[2:4], stride, padding)
        _check_tensor(residual, "residual", (x.shape[0], bias.shape[0], *size), x.device, (x.dtype,))
        _check_gating(residual_gating, "residual_gating", x.shape[0], bias.shape[0], x.device)
    elif residual_gating is not None:
        raise EngineInputError("residual_gating: there is no residual; give both or neither")


def check_pooled(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], **others: Any) -> None:
    """A convolution whose output is large enough to be pooled."""
    check_conv2d(x, weight, stride=stride, padding=padding, **others)
    if min(output_size(x.shape[2:], weight.shape[2:4], stride, padding)) < 2:
        raise EngineInputError(f"x: the output of a map of {x.shape[2]}x{x.shape[3]} is too small to pool")


def check_linear(x: Tensor, weight: Tensor, bias: Tensor, act: str, gating: Gating, out_keep: Tensor | None) -> None:
    """A layer on the last axis."""
    if not isinstance(x, Tensor) or x.dim() < 2:
        raise EngineInputError("x: expected a tensor (N, ..., C_in)")
    _check_tensor(x, "x", x.shape, dtypes=DTYPES)
    _check_packed(weight, bias, x.shape[-1], x)
    if tuple(weight.shape[2:4]) != (1, 1):
        raise EngineInputError(f"weight: packed from a {tuple(weight.shape[2:4])} kernel, a linear layer has none")
    _check_decided(x, x.shape[-1], bias.shape[0], act, gating, out_keep)


def check_depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    act: str,
    gating: Gating,
    out_keep: Tensor | None,
    sums: bool,
    zeros: bool,
) -> None:
    """A convolution of every channel by itself."""
    _check_flag(sums=sums, zeros=zeros)
    check_map(x)
    _check_filters(weight, bias, "weight", "bias", x.shape[1], x)
    _check_window(x, weight.shape[2:4], stride, padding)
    _check_decided(x, x.shape[1], x.shape[1], act, gating, out_keep)


def check_expand_depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    filters: Tensor,
    filter_bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    act: str,
    filter_act: str,
    gating: Gating,
    out_keep: Tensor | None,
    sums: bool,
    zeros: bool,
) -> None:
    """A 1x1 convolution, and one of every channel of its map by itself."""
    _check_flag(sums=sums, zeros=zeros)
    check_map(x)
    _check_packed(weight, bias, x.shape[1], x)
    if tuple(weight.shape[2:4]) != (1, 1):
        raise EngineInputError(f"weight: packed from a {tuple(weight.shape[2:4])} kernel, expected 1x1")
    _check_filters(filters, filter_bias, "filters", "filter_bias", bias.shape[0], x)
    _check_window(x, filters.shape[2:4], stride, padding)
    _check_act(filter_act, "filter_act")
    _check_decided(x, x.shape[1], bias.shape[0], act, gating, out_keep)


def check_max_pool(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> None:
    """A window whose padding torch takes, too."""
    check_map(x)
    if len(padding) != 2:
        raise EngineInputError(f"padding={padding}: expected a number or two")
    _check_window(x, kernel, stride, padding)
    if any(2 * pad > k for pad, k in zip(padding, kernel, strict=True)):
        raise EngineInputError(f"padding {padding} is more than half the kernel {kernel}")


def check_keep_mask(squares: Tensor, alpha: float, beta: float) -> None:
    """What Statistics hold."""
    _check_tensor(squares, "squares", (None,) * 3)
    if squares.shape[1] == 0:
        raise EngineInputError(f"squares: no slot, shape {tuple(squares.shape)}")
    _check_thresholds(alpha, beta, "keep_mask")


def check_sum_squares(x: Tensor, sums: bool) -> None:
    """A map, and what is asked of it."""
    check_map(x)
    _check_flag(sums=sums)


def check_predict(
    weight: Tensor,
    bias: Tensor,
    statistics: Sequence[Tensor],
    keeps: Sequence[Tensor | None],
    positions: Sequence[int],
    size: int,
    alpha: float,
    beta: float,
    basis: Tensor | None = None,
) -> None:
    """A head, and what it reads."""
    _check_tensor(bias, "bias", (None,))
    lists = {"statistics": statistics, "keeps": keeps, "positions": positions}
    for name, of_maps in lists.items():
        if not isinstance(of_maps, list | tuple):
            raise EngineInputError(f"{name}: expected a list, one for each map, got {type(of_maps).__name__}")
    if not statistics or len({len(of_maps) for of_maps in lists.values()}) > 1:
        found = ", ".join(f"{len(of_maps)} {name}" for name, of_maps in lists.items())
        raise EngineInputError(f"expected as many keeps and positions as statistics, one at least, got {found}")
    features = 0
    for place, (of_map, keep) in enumerate(zip(statistics, keeps, strict=True)):
        name = f"statistics[{place}]"
        _check_tensor(of_map, name, (2, None, None, None), bias.device)
        _check_shape(of_map, name, (2, statistics[0].shape[1], None, None))
        if of_map.shape[2] == 0:
            raise EngineInputError(f"{name}: no slot, shape {tuple(of_map.shape)}")
        _check_keep(keep, f"keeps[{place}]", of_map.shape[1], of_map.shape[3], bias.device)
        features += 2 * of_map.shape[3]
    rank = features
    if basis is not None:
        _check_tensor(basis, "basis", (features, None), bias.device, DTYPES)
        rank = basis.shape[1]
        if rank == 0 or basis.dtype != weight.dtype:
            raise EngineInputError(f"basis: {tuple(basis.shape)} of {basis.dtype}, and weight is of {weight.dtype}")
    _check_tensor(weight, "weight", (rank, bias.shape[0]), bias.device, DTYPES)
    for name, number in [("size", size), *((f"positions[{i}]", number) for i, number in enumerate(positions))]:
        if not _is_whole(number) or not 1 <= number <= _MOST**2:
            raise EngineInputError(f"{name}={number!r}: expected the pixels of a map, a whole number, 1 or more")
    _check_thresholds(alpha, beta, "predict")


def check_map(x: Tensor, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """(N, C, H, W)."""
    _check_tensor(x, "x", (None,) * 4, dtypes=dtypes)


def _check_decided(x: Tensor, channels: int, outputs: int, act: str, gating: Gating, out_keep: Tensor | None) -> None:
    _check_act(act, "act")
    _check_gating(gating, "gating", x.shape[0], channels, x.device)
    _check_keep(out_keep, "out_keep", x.shape[0], outputs, x.device)


def _check_act(act: object, name: str) -> None:
    if not isinstance(act, str) or act not in ACTS:
        raise EngineInputError(f"{name}={act!r}: expected one of {', '.join(ACTS)}")


def _check_filters(filters: Tensor, bias: Tensor, name: str, bias_name: str, channels: int, x: Tensor) -> None:
    """Of every channel by itself."""
    _check_tensor(filters, name, (channels, 1, None, None), x.device, (x.dtype,))
    _check_tensor(bias, bias_name, (channels,), x.device, (torch.float32, x.dtype))


def _check_tensor(
    tensor: object,
    name: str,
    shape: Sequence[int | None],
    device: torch.device | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
) -> None:
    """A dense tensor of this shape (None: any size) and one of these types; no gradient to lose."""
    if not isinstance(tensor, Tensor):
        raise EngineInputError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        names = [str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(dtypes)]
        method = ".float()" if torch.float32 in dtypes else f".{names[0]}()"
        raise EngineInputError(f"{name}: expected {' or '.join(names)}, got {tensor.dtype}; convert it with {method}")
    _check_dense(tensor, name)
    if device is not None and tensor.device != device:
        raise EngineInputError(f"{name} is on {tensor.device} but x is on {device}; move them together")
    _check_shape(tensor, name, shape)
    if tensor.requires_grad and torch.is_grad_enabled():
        raise EngineInputError(f"{name} requires a gradient, the engine has none; run under torch.inference_mode()")
    if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
        raise EngineInputError(f"{name} carries a forward-mode tangent, the engine has no derivatives; run it without")


def _check_dense(tensor: Tensor, name: str) -> None:
    if tensor.layout != torch.strided:
        raise EngineInputError(f"{name}: expected a dense tensor, got {tensor.layout}; convert it with .to_dense()")
    if is_traceable_wrapper_subclass(tensor):
        raise EngineInputError(f"{name}: expected a plain tensor, got {type(tensor).__name__}, which holds others")


def _check_shape(tensor: Tensor, name: str, shape: Sequence[int | None]) -> None:
    if tensor.dim() == len(shape) and all(e is None or e == s for e, s in zip(shape, tensor.shape, strict=True)):
        return
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    raise EngineInputError(f"{name}: expected shape ({wanted}), got {tuple(tensor.shape)}")


def _check_packed(weight: object, bias: Tensor, channels: int, x: Tensor, groups: int = 1) -> None:
    """A bias, and weights that `pack_weight` made for it and for so many channels of x, of the type of x."""
    _check_tensor(bias, "bias", (None,), x.device, (torch.float32, x.dtype))
    if isinstance(weight, Tensor) and weight.dim() in (2, 4):
        raise EngineInputError(f"weight: shape {tuple(weight.shape)} is not packed; call pack_weight once, at set-up")
    if channels == 0 or bias.shape[0] == 0:
        raise EngineInputError(f"a layer with {channels} input and {bias.shape[0]} output channels; remove the layer")
    if not _is_whole(groups) or groups < 1 or channels % groups or bias.shape[0] % groups:
        raise EngineInputError(
            f"groups={groups!r}: does not divide {channels} input and {bias.shape[0]} output channels"
        )
    blocks = groups * -(-bias.shape[0] // groups // BLOCK)
    _check_tensor(weight, "weight", (blocks, channels // groups, None, None, BLOCK), x.device, (x.dtype,))


def _check_gating(gating: Gating, name: str, n: int, channels: int, device: torch.device) -> None:
    """Statistics of, or a keep mask for, a map of n instances and so many channels."""
    if gating is None:
        return
    if isinstance(gating, Statistics):
        _check_tensor(gating.squares, f"{name}.squares", (n, None, channels), device)
        if gating.squares.shape[1] == 0:
            raise EngineInputError(f"{name}.squares: no slot, shape {tuple(gating.squares.shape)}")
        return _check_thresholds(gating.alpha, gating.beta, name)
    _check_keep(gating, name, n, channels, device, "Statistics or a bool keep mask")


def _check_keep(
    keep: object, name: str, n: int, channels: int, device: torch.device, expected: str = "a bool keep mask"
) -> None:
    """A keep mask for a map of n instances and so many channels, or None."""
    if keep is None:
        return
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
        found = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
        raise EngineInputError(f"{name}: expected {expected}, got {found}")
    _check_dense(keep, name)
    if keep.device != device:
        raise EngineInputError(f"{name} is on {keep.device} but x is on {device}; move them together")
    _check_shape(keep, name, (n, channels))


def _check_flag(**flags: object) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise EngineInputError(f"{name}={flag!r}: expected True or False")


def _check_thresholds(alpha: object, beta: object, name: str) -> None:
    """Two numbers."""
    for key, value in (("alpha", alpha), ("beta", beta)):
        if not isinstance(value, int | float | torch.SymFloat) or isinstance(value, bool) or value != value:
            raise EngineInputError(f"{name}: expected a number as {key}, got {value!r}")


def _check_window(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> None:
    """A kernel that fits the padded map of x."""
    if min(*kernel, *stride) < 1 or min(padding) < 0 or max(*kernel, *stride, *padding) > _MOST:
        raise EngineInputError(
            f"kernel {tuple(kernel)}, stride {tuple(stride)}, padding {tuple(padding)}: "
            f"kernel and stride must be positive, padding not negative, none above {_MOST}"
        )
    if 0 in x.shape[2:]:
        raise EngineInputError(f"x: a map of {x.shape[2]}x{x.shape[3]} is empty")
    above, left, below, right = borders(padding)
    if x.shape[2] + above + below < kernel[0] or x.shape[3] + left + right < kernel[1]:
        raise EngineInputError(
            f"x: a map of {x.shape[2]}x{x.shape[3]} with padding {tuple(padding)} is smaller than "
            f"the kernel {tuple(kernel)}"
        )


def pair(value: object, name: str) -> tuple[int, ...]:
    """(vertical, horizontal) of a number or of a pair; of paddings four numbers stay as they are."""
    numbers = tuple(value) if isinstance(value, tuple | list) else (value, value)
    given = len(numbers) == 2 or (name == "padding" and len(numbers) == 4)
    if not given or not all(map(_is_whole, numbers)):
        raise EngineInputError(f"{name}={value!r}: expected a number or two, whole ones")
    return numbers


def _is_whole(value: object) -> bool:
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, int]:
    """(OH, OW) of a window that slides over a map of this (H, W)."""
    if min(stride) < 1:
        raise EngineInputError(f"stride {tuple(stride)}: must be positive")
    above, left, below, right = borders(padding)
    height = (size[0] + above + below - kernel[0]) // stride[0] + 1
    return height, (size[1] + left + right - kernel[1]) // stride[1] + 1
