import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch
from torch import Tensor

from isw_plugin.errors import SettingError
from isw_plugin.functional import channel_norm, keep_mask
from isw_plugin.gates import CVGate, Gate, MinNorm, RandomGate, keeps_all, with_parameters

FEATURE = torch.randn(64, 10, 4, 4, generator=torch.Generator().manual_seed(0))
NORMS = channel_norm(FEATURE)


@dataclass(frozen=True)
class Above:
    """A third party's gate."""

    limit: float = 4.0

    def __call__(self, feature: Tensor, norms: Tensor) -> Tensor:
        return norms > self.limit


def above_four(feature: Tensor, norms: Tensor) -> Tensor:
    return norms > 4


def test_the_cv_gate_is_the_papers() -> None:
    assert torch.equal(CVGate(0.1, 1.1)(FEATURE, NORMS), keep_mask(NORMS, 0.1, 1.1))


@pytest.mark.parametrize("kind", [MinNorm, RandomGate])
@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.1, 0.35, 0.5, 0.999])
@pytest.mark.parametrize("channels", [1, 3, 10])
def test_fixed_ratio_gates_drop_the_floor_exactly(kind: Callable[[float], Gate], ratio: float, channels: int) -> None:
    feature = FEATURE[:, :channels]
    dropped = ~kind(ratio)(feature, channel_norm(feature))
    assert dropped.sum(1).tolist() == [math.floor(ratio * channels)] * len(feature)


def test_min_norm_drops_the_smallest() -> None:
    keep = MinNorm(0.3)(FEATURE, NORMS)
    for norms, kept in zip(NORMS, keep, strict=True):
        assert norms[~kept].max() < norms[kept].min()


def test_min_norm_breaks_ties_by_channel_order() -> None:
    norms = torch.ones(1, 4)
    assert MinNorm(0.5)(norms, norms).tolist() == [[False, False, True, True]]


def test_random_gate_draws_for_every_instance() -> None:
    assert len(set(map(tuple, RandomGate(0.5)(FEATURE, NORMS).tolist()))) > 50


def test_random_gate_gives_an_instance_the_same_alone_and_in_a_batch() -> None:
    gate = RandomGate(0.5, seed=3)
    alone = [gate(FEATURE[n : n + 1], NORMS[n : n + 1]) for n in range(len(NORMS))]
    assert torch.equal(gate(FEATURE, NORMS), torch.cat(alone))


def test_random_gate_gives_the_same_twice_and_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    assert torch.equal(RandomGate(0.5)(FEATURE, NORMS), RandomGate(0.5)(FEATURE, NORMS))
    assert torch.equal(torch.get_rng_state(), state)


def test_random_gate_does_not_follow_rounding() -> None:
    gate = RandomGate(0.5)
    same = (gate(FEATURE, NORMS) == gate(FEATURE, NORMS * (1 + 2**-23))).all(1)
    assert same.float().mean() > 0.9


@pytest.mark.parametrize("seed", [1, -1, 4096, 2**31])
def test_another_seed_is_another_draw(seed: int) -> None:
    same = (RandomGate(0.5)(FEATURE, NORMS) == RandomGate(0.5, seed=seed)(FEATURE, NORMS)).float().mean()
    assert 0.4 < same < 0.6


def test_random_gate_is_uniform_over_channels() -> None:
    norms = torch.rand(4000, 10, generator=torch.Generator().manual_seed(1))
    dropped = (~RandomGate(0.3)(norms, norms)).float().mean(0)
    assert (dropped - 0.3).abs().max() < 4 * math.sqrt(0.3 * 0.7 / 4000)


def test_random_gate_drops_channels_independently_of_their_norm() -> None:
    norms = torch.rand(4000, 10, generator=torch.Generator().manual_seed(1))
    keep = RandomGate(0.5)(norms, norms)
    assert abs(norms[keep].mean() - norms[~keep].mean()) < 0.01


BAD = [
    (CVGate, {"alpha": -0.1}, "alpha=-0.1"),
    (CVGate, {"alpha": math.nan}, "alpha=nan"),
    (CVGate, {"beta": -0.1}, "beta=-0.1"),
    (CVGate, {"beta": 2.0}, "beta=2.0"),
    (CVGate, {"beta": math.nan}, "beta=nan"),
    (CVGate, {"beta": math.inf}, "beta=inf"),
    (MinNorm, {"ratio": 1.0}, "ratio=1.0"),
    (MinNorm, {"ratio": -0.5}, "ratio=-0.5"),
    (MinNorm, {"ratio": math.nan}, "ratio=nan"),
    (RandomGate, {"ratio": 1.0}, "ratio=1.0"),
    (RandomGate, {"ratio": math.nan}, "ratio=nan"),
]


@pytest.mark.parametrize(("kind", "parameters", "named"), BAD)
def test_bad_parameters_are_named(kind: Callable[..., Gate], parameters: dict[str, float], named: str) -> None:
    with pytest.raises(SettingError, match=named):
        kind(**parameters)


@pytest.mark.parametrize(("kind", "parameters", "named"), BAD)
def test_bad_parameters_are_refused_when_changed_too(
    kind: Callable[..., Gate], parameters: dict[str, float], named: str
) -> None:
    gate = kind() if kind is CVGate else kind(0.3)
    with pytest.raises(SettingError, match=named):
        with_parameters(gate, **parameters)


def test_an_infinite_alpha_keeps_everything() -> None:
    assert CVGate(math.inf, 1.9)(FEATURE, NORMS).all()


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        (CVGate(0.0, 0.0), True),
        (CVGate(0.0, 0.1), False),
        (MinNorm(0.0), True),
        (MinNorm(0.1), False),
        (RandomGate(0.0), True),
        (RandomGate(0.1), False),
        (Above(), False),
        (above_four, False),
    ],
)
def test_a_gate_says_whether_it_keeps_all(gate: Gate, expected: bool) -> None:
    assert keeps_all(gate) is expected


@pytest.mark.parametrize("gate", [CVGate(), MinNorm(0.1), RandomGate(0.1)])
def test_gates_are_frozen(gate: Gate) -> None:
    with pytest.raises(FrozenInstanceError):
        gate.ratio = 0.5


@pytest.mark.parametrize("gate", [CVGate(), MinNorm(0.1), RandomGate(0.1), Above(), above_four])
def test_third_party_gates_are_gates_like_ours(gate: Gate) -> None:
    assert isinstance(gate, Gate)


@pytest.mark.parametrize(
    ("gate", "parameters", "expected"),
    [
        (CVGate(0.1, 1.0), {"beta": 0.5}, CVGate(0.1, 0.5)),
        (RandomGate(0.1, seed=4), {"ratio": 0.2}, RandomGate(0.2, seed=4)),
        (Above(), {"limit": 2.0}, Above(2.0)),
        (above_four, {}, above_four),
    ],
)
def test_parameters_are_replaced_by_name(gate: Gate, parameters: dict[str, float], expected: Gate) -> None:
    assert with_parameters(gate, **parameters) == expected


@pytest.mark.parametrize(("gate", "known"), [(CVGate(), "alpha.*beta"), (Above(), "limit"), (above_four, "none")])
def test_an_unknown_parameter_is_named_beside_the_known(gate: Gate, known: str) -> None:
    with pytest.raises(SettingError, match=f"gamma; it has .*{known}"):
        with_parameters(gate, gamma=1)
