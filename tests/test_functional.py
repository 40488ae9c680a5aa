import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from isw_plugin import functional
from isw_plugin.functional import channel_norm, coefficient_of_variation, instance_penalty, keep_mask, mean_norm

SHAPES = [((2, 3, 4, 5), 1), ((2, 4, 3), -1), ((2, 4, 5, 3), -1), ((2, 3, 6), 1), ((2, 3, 2, 2, 2), 1), ((2, 3), 1)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def slow_channel_norm(feature: Tensor, axis: int) -> list[list[float]]:
    return [
        [math.sqrt(sum(v * v for v in channel.flatten().tolist())) for channel in instance.movedim(axis, 0)]
        for instance, axis in ((i, axis - 1 if axis > 0 else axis) for i in feature)
    ]


def slow_cv(norms: list[float]) -> float:
    mean = sum(norms) / len(norms)
    return math.sqrt(sum((norm - mean) ** 2 for norm in norms) / len(norms)) / mean if mean else 0.0


def slow_keep(norms: list[float], alpha: float, beta: float) -> list[bool]:
    mean = sum(norms) / len(norms)
    return [not (slow_cv(norms) > alpha and norm < beta * mean) for norm in norms]


# -- the equations, against their literal twins ----------------------------------------------------


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_channel_norm_is_eq_3(shape: tuple[int, ...], axis: int) -> None:
    feature = random(*shape, dtype=torch.float64)
    expected = torch.tensor(slow_channel_norm(feature, axis), dtype=torch.float64)
    torch.testing.assert_close(channel_norm(feature, axis), expected)


def test_instance_penalty_is_eq_4() -> None:
    norms = [random(3, 4).abs(), random(3, 7, seed=1).abs()]
    expected = [sum(norms[0][n].tolist()) + sum(norms[1][n].tolist()) for n in range(3)]
    torch.testing.assert_close(instance_penalty(norms), torch.tensor(expected))


def test_mean_norm_is_eq_7() -> None:
    norms = random(3, 5).abs()
    torch.testing.assert_close(mean_norm(norms), torch.tensor([[sum(row) / 5] for row in norms.tolist()]))


def test_coefficient_of_variation_is_eq_6_with_the_population_deviation() -> None:
    norms = random(6, 9).abs()
    expected = torch.tensor([slow_cv(row) for row in norms.tolist()])
    torch.testing.assert_close(coefficient_of_variation(norms), expected)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 0.7, math.inf])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 1.9])
def test_keep_mask_is_section_3_3(alpha: float, beta: float) -> None:
    norms = random(20, 8, seed=2, dtype=torch.float64).abs()
    expected = [slow_keep(row, alpha, beta) for row in norms.tolist()]
    assert keep_mask(norms, alpha, beta).tolist() == expected


def test_a_channel_exactly_at_the_threshold_is_kept() -> None:
    norms = torch.tensor([[1.0, 2.0, 3.0]])  # mean 2
    assert keep_mask(norms, 0.0, 1.0).tolist() == [[False, True, True]]


def test_a_map_whose_cv_equals_alpha_is_not_pruned() -> None:
    norms = torch.tensor([[0.0, 2.0]])  # CV 1
    assert keep_mask(norms, 1.0, 1.0).all()
    assert not keep_mask(norms, 0.999, 1.0).all()


# -- extremes --------------------------------------------------------------------------------------


def test_an_all_zero_map_has_cv_0_and_keeps_all() -> None:
    norms = torch.zeros(2, 4)
    assert coefficient_of_variation(norms).tolist() == [0, 0]
    assert keep_mask(norms, 0.0, 1.9).all()


def test_a_single_channel_is_never_dropped() -> None:
    assert keep_mask(torch.tensor([[3.0], [0.0]]), 0.0, 1.9).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_non_finite_instances_drop_nothing_and_do_not_touch_the_others(poison: float) -> None:
    feature = random(3, 6, 4, 4, seed=3)
    clean = keep_mask(channel_norm(feature), 0.0, 1.2)
    feature[1, 2, 0, 0] = poison
    keep = keep_mask(channel_norm(feature), 0.0, 1.2)
    assert keep[1].all()
    assert torch.equal(keep[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_norms_are_float32_or_better(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert channel_norm(random(2, 3, 4, 4, dtype=dtype)).dtype == expected
    assert channel_norm(random(2, 3, dtype=dtype)).dtype == expected


def test_float16_squares_do_not_overflow() -> None:
    feature = torch.full((1, 2, 8, 8), 6e4, dtype=torch.float16)
    torch.testing.assert_close(channel_norm(feature), torch.full((1, 2), 8 * float(feature[0, 0, 0, 0])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_lower_the_norms(dtype: torch.dtype) -> None:
    feature = random(2, 3, 4, 4)
    with torch.autocast("cpu", dtype=dtype):
        norms = channel_norm(feature)
    assert torch.equal(norms, channel_norm(feature))


# -- the gradient of Eq. 5 -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_gradient_of_the_penalty_is_lambda_f_over_norm(shape: tuple[int, ...], axis: int, dtype: torch.dtype) -> None:
    feature = random(*shape, dtype=dtype).requires_grad_()
    (0.25 * instance_penalty([channel_norm(feature, axis)]).sum()).backward()
    others = [dim for dim in range(1, len(shape)) if dim != axis % len(shape)]
    norm = feature.detach().square().sum(others, keepdim=True).sqrt() if others else feature.detach().abs()
    torch.testing.assert_close(feature.grad, 0.25 * feature.detach() / norm, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3)])
def test_gradient_on_dead_channels_is_0(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    feature = random(*shape).to(dtype)
    feature[:, 1] = 0
    feature.requires_grad_()
    channel_norm(feature).sum().backward()
    assert (feature.grad[:, 1] == 0).all()
    assert feature.grad.isfinite().all()


def test_channel_norm_passes_gradcheck() -> None:
    feature = random(2, 3, 2, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(channel_norm, (feature,))
    assert torch.autograd.gradgradcheck(channel_norm, (feature,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("instances", [0, 1, 5])
def test_norms_and_gradients_do_not_depend_on_how_many_instances_are_taken_at_a_time(
    instances: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for cached in (1, 2 * 3 * 4 * 4, 1 << 18):
        monkeypatch.setattr(functional, "_CACHED", cached)
        feature = random(instances, 3, 4, 4).to(dtype, memory_format=torch.channels_last).requires_grad_()
        norms = channel_norm(feature)
        norms.square().sum().backward()
        results.append((norms, feature.grad))
    for norms, gradient in results[1:]:
        torch.testing.assert_close(norms, results[0][0])
        torch.testing.assert_close(gradient, results[0][1])


# -- properties of masks ---------------------------------------------------------------------------

maps = st.builds(
    lambda seed, n, c: random(n, c, 3, 3, seed=seed) * torch.linspace(0, 2, c)[:, None, None],
    st.integers(0, 2**31),
    st.integers(1, 4),
    st.integers(1, 12),
)
alphas = st.floats(0, 1.5)
betas = st.just(0.0) | st.floats(1e-6, 1.999)  # times a mean, smaller ones can underflow to 0


@given(maps, alphas, betas, st.integers(-20, 20))
def test_masks_are_invariant_to_scaling_by_powers_of_two(
    feature: Tensor, alpha: float, beta: float, power: int
) -> None:
    scaled = keep_mask(channel_norm(feature * 2.0**power), alpha, beta)
    assert torch.equal(scaled, keep_mask(channel_norm(feature), alpha, beta))


@given(maps, alphas, betas, st.randoms(use_true_random=False))
def test_masks_are_equivariant_to_permuting_channels(feature: Tensor, alpha: float, beta: float, rng: object) -> None:
    order = list(range(feature.shape[1]))
    rng.shuffle(order)
    # In integers, so that no order of a sum decides a near-tie.
    norms = channel_norm(feature).double().mul(2**16).round()
    assert torch.equal(keep_mask(norms[:, order], alpha, beta), keep_mask(norms, alpha, beta)[:, order])


@given(maps, alphas, betas, betas)
def test_the_keep_set_shrinks_as_beta_grows(feature: Tensor, alpha: float, one: float, other: float) -> None:
    norms = channel_norm(feature)
    assert not (keep_mask(norms, alpha, max(one, other)) & ~keep_mask(norms, alpha, min(one, other))).any()


@given(maps, alphas, alphas, betas)
def test_the_keep_set_grows_with_alpha(feature: Tensor, one: float, other: float, beta: float) -> None:
    norms = channel_norm(feature)
    assert not (keep_mask(norms, min(one, other), beta) & ~keep_mask(norms, max(one, other), beta)).any()


@given(maps, alphas)
def test_the_largest_channel_survives_up_to_beta_1(feature: Tensor, alpha: float) -> None:
    norms = channel_norm(feature)
    assert keep_mask(norms, alpha, 1.0).gather(1, norms.argmax(1, keepdim=True)).all()


@pytest.mark.parametrize(("shape", "axis"), [((2, 3, 4, 4), 1), ((2, 5, 3), 2), ((2, 5, 3), -1), ((2, 3), 1)])
def test_a_mask_zeroes_what_is_not_kept(shape: tuple[int, ...], axis: int) -> None:
    keep = torch.tensor([[True, False, True], [False, False, True]])
    feature = torch.ones(shape)
    feature[0].select(axis % len(shape) - 1, 1).fill_(float("nan"))  # whatever it holds
    found = functional.mask(feature, keep, axis)
    for instance, channel in itertools.product(range(2), range(3)):
        assert bool((found[instance].select(axis % len(shape) - 1, channel) == float(keep[instance, channel])).all())
