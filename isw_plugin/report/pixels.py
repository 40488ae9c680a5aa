"""Any one image of a data set as pixels that can be shown."""

from typing import Any

import numpy as np
import torch

from isw_plugin.errors import SettingError

__all__ = ["pixels"]


def pixels(item: Any) -> Any:
    """What to show of an image.

    Args:
        item: A tensor or array (3, H, W), (1, H, W), (H, W, 3) or (H, W), a PIL image, or a tuple that starts with
            one. uint8 counts to 255; floats outside [0, 1] are normalised ones and stretched from their least to
            their largest value.

    Returns:
        (H, W, 3) float64 in [0, 1].

    Raises:
        SettingError: It has another shape.
    """
    image = item[0] if isinstance(item, tuple | list) else item
    array = image.detach().cpu().float().numpy() if _is_float(image) else np.asarray(image)
    return _unit(_channels_last(array))


def _is_float(image: Any) -> bool:
    return isinstance(image, torch.Tensor) and image.is_floating_point()  # bfloat16 is unknown to numpy


def _channels_last(array: Any) -> Any:
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or not {array.shape[0], array.shape[-1]} & {1, 3, 4}:
        raise SettingError(f"an image of shape {array.shape}: expected (3, H, W), (H, W, 3) or one channel")
    if array.shape[0] in (1, 3) or array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    return array.repeat(3, axis=2) if array.shape[2] == 1 else array[:, :, :3]


def _unit(array: Any) -> Any:
    if array.dtype == np.uint8:
        return array / 255
    values = array.astype(np.float64)
    low, high = values.min(), values.max()
    if low >= 0 and high <= 1:
        return values
    return (values - low) / max(high - low, 1e-12)
