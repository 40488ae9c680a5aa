"""The reference against PyTorch's own layers on maps that were masked by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from isw_plugin.ops import reference
from isw_plugin.ops.reference import Statistics, pack_weight, row_slots, unpack_weight


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("out_channels", [1, 31, 32, 33, 64, 129])
def test_packing_can_be_undone(out_channels: int) -> None:
    weight = normal(out_channels, 5, 3, 2)
    packed = pack_weight(weight)
    assert packed.shape == (-(-out_channels // 32), 5, 3, 2, 32)
    assert torch.equal(unpack_weight(packed, out_channels), weight)


@pytest.mark.parametrize(("groups", "outputs"), [(2, 1), (3, 16), (2, 40)])
def test_groups_are_packed_one_by_one(groups: int, outputs: int) -> None:
    weight = normal(groups * outputs, 5, 3, 2)
    packed = pack_weight(weight, groups)
    assert torch.equal(packed, torch.cat([pack_weight(part) for part in weight.chunk(groups)]))
    assert torch.equal(unpack_weight(packed, groups * outputs, groups), weight)


def test_one_input_channel_of_a_block_is_contiguous() -> None:
    weight = normal(40, 5, 3, 3)
    assert torch.equal(pack_weight(weight)[1, 2, 0, 1, :8], weight[32:, 2, 0, 1])


@pytest.mark.parametrize(("height", "width", "slots"), [(1, 1, 1), (9, 9, 1), (32, 32, 4), (9, 90, 2), (224, 224, 16)])
def test_slots_depend_on_the_map_alone(height: int, width: int, slots: int) -> None:
    assert row_slots(height, width) == slots


def test_pooling_comes_after_the_statistics() -> None:
    x, weight, bias = normal(2, 5, 28, 27), pack_weight(normal(6, 5, 3, 3)), normal(6)
    y, squares = reference.conv2d(x, weight, bias, padding=1, act="relu")
    pooled, sums = reference.pooled_conv2d(x, weight, bias, padding=1, act="relu")
    assert torch.equal(pooled, F.max_pool2d(y, 2))
    assert sums.shape == squares.shape == (2, 2, 6)
    torch.testing.assert_close(sums.sum(1), y.square().sum((2, 3)))
    torch.testing.assert_close(sums[:, 0], y[:, :, :14].square().sum((2, 3)))


def test_conv_is_the_convolution_of_the_masked_map() -> None:
    x, weight, bias, residual = normal(2, 5, 7, 7), normal(9, 5, 3, 3), normal(9), normal(2, 9, 7, 7)
    keep, residual_keep = normal(2, 5) > 0, normal(2, 9) > 0
    y, squares = reference.conv2d(
        x, pack_weight(weight), bias, padding=1, act="relu", gating=keep, residual=residual,
        residual_gating=residual_keep,
    )  # fmt: skip
    wanted = F.conv2d(x * keep[:, :, None, None], weight, bias, padding=1) + residual * residual_keep[:, :, None, None]
    torch.testing.assert_close(y, wanted.relu())
    torch.testing.assert_close(squares.sum(1).sqrt(), torch.linalg.vector_norm(y, dim=(2, 3)))


def test_groups_are_convolutions_side_by_side() -> None:
    x, weight, bias, keep = normal(2, 6, 7, 7), normal(9, 2, 3, 3), normal(9), normal(2, 6) > 0
    y, squares = reference.grouped_conv2d(x, pack_weight(weight, 3), bias, 3, stride=2, act="relu", gating=keep)
    parts = zip(*(t.chunk(3, axis) for t, axis in ((x, 1), (weight, 0), (bias, 0), (keep, 1))), strict=True)
    alone = [reference.conv2d(a, pack_weight(w), b, stride=2, act="relu", gating=k) for a, w, b, k in parts]
    torch.testing.assert_close(y, torch.cat([part for part, _ in alone], 1))
    torch.testing.assert_close(squares, torch.cat([sums for _, sums in alone], 2))


def test_statistics_stand_for_their_mask() -> None:
    x, weight, bias = normal(2, 40, 6, 6) * normal(1, 40, 1, 1, seed=1), pack_weight(normal(9, 40, 3, 3)), normal(9)
    statistics = Statistics(reference.sum_squares(x), 0.1, 0.8)
    keep = reference.keep_mask(statistics.squares, 0.1, 0.8)
    assert 0 < keep.sum() < keep.numel()
    by_statistics = reference.conv2d(x, weight, bias, gating=statistics)
    assert torch.equal(by_statistics[0], reference.conv2d(x, weight, bias, gating=keep)[0])


def test_dropped_channels_may_hold_anything() -> None:
    x = torch.tensor([[[[float("nan")]], [[1.0]]]])
    keep = torch.tensor([[False, True]])
    assert reference._drop(x, keep).tolist() == [[[[0.0]], [[1.0]]]]


def test_depthwise_of_a_dropped_plane_is_the_bias() -> None:
    y, squares = reference.depthwise_conv2d(
        normal(1, 2, 4, 4), normal(2, 1, 3, 3), torch.tensor([3.0, 1.0]), padding=1, gating=torch.zeros(1, 2).bool()
    )
    assert y[0, 0].eq(3).all()
    assert squares[0, 0].tolist() == [9 * 16, 16]


def test_linear_masks_features_of_every_token() -> None:
    x, keep, weight, bias = normal(2, 6, 5), normal(2, 5) > 0, normal(7, 5), normal(7)
    y, squares = reference.linear(x, pack_weight(weight), bias, gating=keep)
    torch.testing.assert_close(y, F.linear(x * keep[:, None], weight, bias))
    torch.testing.assert_close(squares[:, 0], y.square().sum(1))


def test_linear_without_tokens() -> None:
    y, squares = reference.linear(normal(2, 0, 5), pack_weight(normal(7, 5)), normal(7))
    assert y.shape == (2, 0, 7)
    assert squares.eq(0).all()
