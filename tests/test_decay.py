"""reduction="relative": norms in units of what they were when training began."""

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from isw_plugin import InstanceWisePruner
from isw_plugin.decay import decay, first_norms, relative_weights
from isw_plugin.functional import channel_norm
from tests.conftest import Net, Plain, Residual, made
from tests.test_training import Checkpointed, assert_same_gradients, frozen_statistics, gradients, task_loss

LAMBDA = 0.1


def attached(net: nn.Module, **settings: object) -> InstanceWisePruner:
    return InstanceWisePruner(net, net.images(1), **{"lambda_": LAMBDA, "reduction": "relative", **settings})


def norms_of(net: Net, images: Tensor) -> dict[str, Tensor]:
    features = net.features(images).items()
    return {name: channel_norm(feature, 1 if feature.dim() == 4 else -1) for name, feature in features}


def references_of(net: Net, images: Tensor) -> dict[str, float]:
    """The mean norm of every site that lives."""
    return {name: norms.mean().item() for name, norms in norms_of(net, images).items() if norms.any()}


def by_hand(net: Net, images: Tensor, references: dict[str, float]) -> Tensor:
    norms = norms_of(net, images)
    return LAMBDA / len(norms) * sum(norms[name].mean() / reference for name, reference in references.items())


# -- value and gradient ----------------------------------------------------------------------------


def test_the_first_penalty_is_lambda_for_every_net(net: Net) -> None:
    alive = references_of(frozen_statistics(net), net.images())  # squeeze-excite has a dead map
    pruner = attached(net)
    net(net.images())
    assert pruner.penalty().item() == pytest.approx(LAMBDA * len(alive) / len(pruner.sites), rel=1e-5)


@pytest.mark.parametrize("change", [lambda x: x[:2], lambda x: torch.cat([x, x])])
def test_the_batch_size_does_not_count(residual: Net, change) -> None:
    pruner = attached(frozen_statistics(residual))
    residual(change(residual.images()))
    assert pruner.penalty().item() == pytest.approx(LAMBDA, rel=1e-5)


def test_later_penalties_are_in_units_of_the_first_batch(net: Net) -> None:
    frozen_statistics(net)
    references = references_of(net, net.images())
    pruner = attached(net)
    net(net.images())
    pruner.penalty()
    net(net.images(3, seed=1))
    penalty = pruner.penalty()
    torch.testing.assert_close(penalty, by_hand(net, net.images(3, seed=1), references))
    assert penalty.item() != pytest.approx(LAMBDA, rel=1e-4)


def test_the_gradient_is_that_of_the_formula(net: Net) -> None:
    frozen_statistics(net)
    images = net.images()
    references = references_of(net, images)
    other = copy.deepcopy(net)
    (task_loss(other(images)) + by_hand(other, images, references)).backward()
    pruner = attached(net)
    pruner.regularize(net, task_loss(net(images))).backward()
    assert_same_gradients(net, gradients(other), atol=1e-6, rtol=1e-5)


def test_a_site_of_lambda_0_is_not_among_those_averaged(residual: Net) -> None:
    pruner = attached(frozen_statistics(residual), per_site={"stem": {"lambda_": 0.0}, "block.c1": {"lambda_": 0.3}})
    residual(residual.images())
    assert pruner.penalty().item() == pytest.approx((0.3 + LAMBDA) / 2, rel=1e-5)


def test_a_dead_map_has_no_reference_until_it_lives(plain: Net) -> None:
    frozen_statistics(plain)
    bias = plain.bn1.bias.detach().clone()
    nn.init.constant_(plain.bn1.bias, -100)
    pruner = attached(plain)
    plain(plain.images())
    assert pruner.penalty().item() == pytest.approx(LAMBDA / 2, rel=1e-5)
    assert list(pruner.state_dict()["references"]) == ["c2"]
    plain.bn1.bias.data.copy_(bias)
    plain(plain.images())
    pruner.penalty()
    assert set(pruner.state_dict()["references"]) == {"c1", "c2"}


def test_norms_that_are_not_finite_are_no_reference(plain: Net) -> None:
    pruner = attached(frozen_statistics(plain))
    plain(torch.full_like(plain.images(), torch.inf))
    pruner.penalty()
    assert pruner.state_dict()["references"] == {}


# -- in every way that people train ----------------------------------------------------------------


def test_accumulated_parts_equal_the_whole_batch(residual: Net) -> None:
    frozen_statistics(residual)
    images = residual.images(8)
    pruner = attached(residual)
    residual(images)
    pruner.penalty()  # the references are of the whole batch
    pruner.regularize(residual, task_loss(residual(images))).backward()
    whole = {name: gradient.clone() for name, gradient in gradients(residual).items()}
    residual.zero_grad()
    for part in images.split(2):
        (pruner.regularize(residual, task_loss(residual(part)), accumulation_steps=4) / 4).backward()
    assert_same_gradients(residual, whole, atol=1e-6, rtol=1e-5)


def test_world_size_and_parts_are_no_factors(plain: Net) -> None:
    pruner = attached(frozen_statistics(plain))
    plain(plain.images())
    loss = pruner.regularize(plain, torch.zeros(()), world_size=3, accumulation_steps=2)
    assert loss.item() == pytest.approx(LAMBDA, rel=1e-5)


def test_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for kind in (Residual, Checkpointed):
        net = frozen_statistics(made(kind))
        pruner = attached(net)
        for seed in range(2):
            pruner.regularize(net, task_loss(net(net.images(seed=seed)))).backward()
        found.append(gradients(net))
    assert_same_gradients(net, found[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_has_the_references_and_is_its_own(plain: Net, copied) -> None:
    pruner = attached(frozen_statistics(plain))
    plain(plain.images())
    pruner.penalty()
    copy_of_it = InstanceWisePruner.of(copied(plain))
    assert copy_of_it.state_dict() == pruner.state_dict()


def test_what_a_copy_measures_is_not_the_original_s(plain: Net) -> None:
    pruner = attached(frozen_statistics(plain))
    theirs = InstanceWisePruner.of(copy.deepcopy(plain))
    theirs.model(plain.images())
    theirs.penalty()
    assert theirs.state_dict()["references"]
    assert pruner.state_dict()["references"] == {}


def test_the_references_are_saved_and_go_on(plain: Net) -> None:
    pruner = attached(frozen_statistics(plain))
    plain(plain.images())
    pruner.penalty()
    state = json.loads(json.dumps(pruner.state_dict()))
    other = frozen_statistics(made(Plain))
    again = attached(other, reduction="sum")
    again.load_state_dict(state)
    plain(plain.images(seed=1))
    other(other.images(seed=1))
    assert torch.equal(again.penalty(), pruner.penalty())


def test_a_state_from_before_there_were_references_is_taken(plain: Net) -> None:
    state = attached(plain, reduction="mean").state_dict()
    del state["references"], state["calibration"]
    pruner = attached(made(Plain))
    pruner.load_state_dict(state)
    assert pruner.state_dict()["references"] == {}


def test_sites_that_a_static_step_changed_are_measured_again(plain: Net) -> None:
    pruner = attached(frozen_statistics(plain))
    plain(plain.images())
    pruner.penalty()
    before = pruner.state_dict()["references"]
    plain.c2, plain.bn2, plain.fc = nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, 5)
    pruner.update_regularizer()
    assert pruner.state_dict()["references"] == {"c1": before["c1"]}


def test_autocast_has_a_float32_penalty(plain: Net) -> None:
    pruner = attached(frozen_statistics(plain))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain(plain.images())
        penalty = pruner.penalty()
    assert penalty.dtype == torch.float32
    assert penalty.item() == pytest.approx(LAMBDA, rel=1e-5)


# Dynamo itself reads .grad of what crosses the graph break where references are taken.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_training_step_gives_the_same_gradients(backend: str) -> None:
    torch.compiler.reset()
    found = []
    for wrap in (lambda step: step, lambda step: torch.compile(step, backend=backend)):
        net = frozen_statistics(made(Residual))
        pruner = attached(net)

        def step(images: Tensor, net: Net = net, pruner: InstanceWisePruner = pruner) -> Tensor:
            loss = pruner.regularize(net, task_loss(net(images)))
            loss.backward()
            return loss

        run = wrap(step)
        for seed in range(3):
            run(net.images(seed=seed))
        found.append(gradients(net))
    assert_same_gradients(net, found[0], atol=1e-6, rtol=1e-5)
    torch.compiler.reset()


# -- the functions ---------------------------------------------------------------------------------


@given(
    scale=st.floats(1e-3, 1e3),
    instances=st.integers(1, 5),
    channels=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_scaling_all_maps_and_their_references_changes_nothing(
    scale: float, instances: int, channels: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    norms = {str(i): [torch.rand(instances, c, generator=generator) + 0.1] for i, c in enumerate(channels)}
    lambdas = dict.fromkeys(norms, 1.0)
    widths = {name: norm.shape[1] for name, (norm,) in norms.items()}
    scaled = {name: [scale * norm] for name, (norm,) in norms.items()}
    for these in (norms, scaled):
        weights = relative_weights(lambdas, widths, first_norms(these, lambdas))
        assert decay(these, weights, "relative").item() == pytest.approx(1.0, rel=1e-4)


def test_first_norms_are_of_sites_that_ran() -> None:
    norms = {"a": [torch.ones(2, 3)], "b": [torch.full((2, 3), 2.0)], "dead": [torch.zeros(2, 3)]}
    assert first_norms(norms, ["b", "dead", "skipped"]) == {"b": 2.0}
