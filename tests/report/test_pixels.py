from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from isw_plugin.errors import SettingError
from isw_plugin.report.pixels import pixels

RAW = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SHOWN = RAW.permute(1, 2, 0).double().numpy() / 255
SAME = {
    "tensor": RAW,
    "channels last": RAW.permute(1, 2, 0),
    "array": RAW.numpy(),
    "pillow": Image.fromarray(RAW.permute(1, 2, 0).numpy()),
    "item of a data set": (RAW, 3),
    "from 0 to 1": RAW.double() / 255,
    "with alpha": torch.cat([RAW, RAW[:1]]),
}


@pytest.mark.parametrize("item", SAME.values(), ids=SAME)
def test_the_same_image_in_any_form(item: Any) -> None:
    np.testing.assert_allclose(pixels(item), SHOWN, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 4, 5), (4, 5), (4, 5, 1)])
def test_one_channel_is_grey(shape: tuple[int, ...]) -> None:
    shown = pixels(torch.full(shape, 51, dtype=torch.uint8))
    assert shown.shape == (4, 5, 3)
    np.testing.assert_allclose(shown, 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_normalised_images_are_stretched(dtype: torch.dtype) -> None:
    shown = pixels(torch.tensor([-2.0, 0.0, 2.0], dtype=dtype).view(3, 1, 1).expand(3, 4, 4))
    np.testing.assert_allclose(shown[0, 0], [0, 0.5, 1])


def test_a_constant_normalised_image_is_black() -> None:
    assert (pixels(torch.full((3, 4, 4), -1.0)) == 0).all()


@pytest.mark.parametrize("shape", [(5,), (2, 6, 7), (1, 3, 4, 4)])
def test_what_is_no_image_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SettingError, match="expected"):
        pixels(torch.zeros(shape))
