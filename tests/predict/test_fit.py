"""Fitting heads: what they become, who gets one, and what is refused before anything is changed."""

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from isw_plugin import InstanceWisePruner, MinNorm
from isw_plugin.errors import (
    AttachError,
    NonFiniteFeatureError,
    PredictionError,
    SettingError,
    StateMismatchError,
    UnsupportedError,
)
from isw_plugin.functional import channel_norm
from isw_plugin.heads import UNSEEN
from isw_plugin.predict.ridge import moments, ridge, solved
from tests.conftest import Net, Plain, Residual, made
from tests.predict.nets import Down, Inverted, Stack, predicting
from tests.processes import run_ranks


def batches(net: Net, images: int = 240, size: int = 48) -> list[Tensor]:
    return list(net.images(images).split(size))


def attached(kind: type[Net], **settings: object) -> tuple[Net, InstanceWisePruner]:
    net = made(kind)
    return net, InstanceWisePruner(net, net.images(1), **{"alpha": 0.0, "beta": 0.6, **settings})


def snapshot(pruner: InstanceWisePruner) -> str:
    """All of a pruner's state and its model's, to be compared."""
    state = pruner.state_dict()
    weights = {name: value.tolist() for name, value in pruner.model.state_dict().items()}
    modes = [module.training for module in pruner.model.modules()]
    gates = {name: repr(gate) for name, gate in pruner._memory.gates.items()}
    rest = (sorted(pruner._memory.watched), sorted(pruner._memory.heads), pruner.predicted)
    return json.dumps([state, weights, modes, gates, rest], default=lambda value: value.tolist())


# -- what is fitted --------------------------------------------------------------------------------


def test_ridge_finds_a_linear_map() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(300, 5, generator=generator) * torch.tensor([1, 10, 0.1, 1, 0])  # one never varies
    weight = torch.rand(3, 5, generator=generator)
    y = x @ weight.T + 0.5
    found, explained = ridge(x[:200], y[:200], (x[200:], y[200:]))
    assert explained > 0.9999
    assert found.basis is None
    torch.testing.assert_close(found.weight[:, :4], weight[:, :4], atol=1e-2, rtol=1e-2)
    assert not found.weight[:, 4].any()


def test_ridge_is_least_squares_where_the_penalty_is_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(100, 4, generator=generator).double(), torch.rand(100, 2, generator=generator).double()
    found, _ = ridge(x, y, (x, y), penalties=(1e-12,))
    least = torch.linalg.lstsq(torch.cat([x, torch.ones(100, 1)], 1), y).solution
    assert torch.equal(found.weight, least[:4].T.bfloat16().float())  # rounded, as the engine reads it
    torch.testing.assert_close(found.bias, (y.mean(0) - found.weight.double() @ x.mean(0)).float())
    torch.testing.assert_close(found.bias, least[4].float(), rtol=1e-2, atol=1e-2)


def test_a_map_of_small_rank_is_found_as_two_factors() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(600, 100, generator=generator)
    weight = torch.rand(80, 12, generator=generator) @ torch.rand(12, 100, generator=generator)
    y = x @ weight.T + 0.5
    (found, bias, basis), explained = ridge(x[:500], y[:500], (x[500:], y[500:]))
    assert basis is not None
    assert (found.shape, basis.shape) == ((80, 16), (16, 100))
    assert explained > 0.99
    torch.testing.assert_close(x @ basis.T @ found.T + bias, y, rtol=2e-2, atol=0)
    assert all(torch.equal(factor, factor.bfloat16().float()) for factor in (found, basis))
    torch.testing.assert_close((x[:500] @ basis.T @ found.T + bias).mean(0), y[:500].mean(0))


def test_a_rank_is_taken_that_explains_as_much() -> None:
    """Every direction counts alike: none can be left out."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2000, 64, generator=generator)
    y = x @ torch.eye(64) + 5
    (weight, _, basis), _ = ridge(x[:1500], y[:1500], (x[1500:], y[1500:]))
    assert basis is None
    assert weight.shape == (64, 64)


@pytest.mark.parametrize("rank", [1, 7, 20])
def test_a_solution_of_a_rank_is_the_closest_there_is(rank: int) -> None:
    """Izenman 1975: the singular value decomposition of what the whole weight predicts."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(500, 30, generator=generator) @ torch.randn(30, 30, generator=generator)
    y = torch.randn(500, 20, generator=generator) + x[:, :20]
    of_rows = moments(x, y)
    whole, found = solved(of_rows, 1e-9), solved(of_rows, 1e-9, rank)
    fitted = (whole(x) - y.mean(0)).double()
    u, s, v = torch.linalg.svd(fitted, full_matrices=False)
    closest = u[:, :rank] * s[:rank] @ v[:rank]
    torch.testing.assert_close(found(x) - y.mean(0), closest.float(), rtol=0, atol=0.05 * float(fitted.abs().max()))


def test_a_site_that_is_linear_in_what_it_reads_is_predicted_exactly() -> None:
    """1x1 maps of one positive channel each: norms are the map, and so are statistics."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))
    for layer in (net[0], net[2]):
        nn.init.uniform_(layer.weight, 0.1, 1)
        nn.init.uniform_(layer.bias, 0.1, 1)
    images = torch.rand(200, 3, 1, 1)
    pruner = InstanceWisePruner(net, images[:1], alpha=0.0, beta=0.0)
    found = pruner.fit_predictors([images], max_instances=200)
    assert found.sites["2"].r_squared > 0.9999
    assert found.sites["2"].reason.startswith("its head takes 48 MACs and saves 12")  # 1x1: it does not pay
    assert "measured: its head takes" in str(found)
    assert pruner.predicted == ()


def test_heads_predict_images_that_they_were_not_fitted_on() -> None:
    net, pruner = attached(Inverted)
    found = pruner.fit_predictors(batches(net, 600))
    assert (found.fitted, found.held_out) == (480, 120)
    assert found.measured == {"stem": "stem reads the image"}
    assert set(pruner.predicted) <= {"pw", "dw", "pwl"} == found.sites.keys()
    pruner.enable(per_site={name: {"beta": 0.0} for name in ("pw", "dw", "pwl")})
    for name in pruner.predicted:
        images = net.images(100, seed=7)
        net(images)
        with torch.no_grad():
            true = channel_norm(net.features(images)[name])  # of a net whose gates drop nothing behind the stem
        predicted = pruner.norms[name]
        assert predicted.shape == true.shape
        assert found.sites[name].recall > 0.9


def test_figures_are_those_of_the_held_out_images() -> None:
    net, pruner = attached(Stack)
    images = net.images(200)
    found = pruner.fit_predictors([images])
    with pruner.gating():
        net(images)
        predicted = pruner.keep["c2"][4::5]
        pruner.drop_predictors()
        net(images)
        measured = pruner.keep["c2"][4::5]
    report = found.sites["c2"]
    assert found.predicted == ("c2",)
    assert report.density == pytest.approx(predicted.float().mean().item())
    assert report.measured == pytest.approx(measured.float().mean().item())
    assert report.recall == pytest.approx((predicted & measured).sum().item() / measured.sum().item())
    assert report.macs == 6 * 2 * 4
    assert report.saved == pytest.approx((1 - report.density) * 6 * 4 * 9 * 16)
    assert json.loads(json.dumps(found.to_dict()))["sites"]["c2"]["recall"] == report.recall


@pytest.mark.parametrize("form", ["bare", "labelled", "tuples", "dicts"])
def test_images_come_with_labels_or_without(form: str) -> None:
    net, pruner = attached(Stack)
    pruner.fit_predictors(batches(net))
    expected = pruner.heads["c2"]
    wrap: dict[str, Callable[[Tensor], Any]] = {
        "bare": lambda x: x,
        "labelled": lambda x: (x, torch.zeros(len(x))),
        "tuples": lambda x: (x,),
        "dicts": lambda x: {"x": x, "labels": torch.zeros(len(x))},
    }
    pruner.fit_predictors([wrap[form](x) for x in batches(net)])
    assert torch.equal(pruner.heads["c2"].weight, expected.weight)


def test_the_same_images_give_the_same_heads_however_they_are_batched() -> None:
    net, pruner = attached(Down)
    pruner.fit_predictors(batches(net))
    first = pruner.heads
    pruner.fit_predictors(batches(net), max_instances=240)
    assert all(torch.equal(pruner.heads[name].weight, head.weight) for name, head in first.items())
    pruner.fit_predictors(batches(net, 240, 30))
    for name, head in first.items():
        torch.testing.assert_close(pruner.heads[name].weight, head.weight, atol=1e-3, rtol=1e-3)


def test_images_of_several_sizes_are_fitted_together() -> None:
    net, pruner = attached(Stack)
    sizes = [torch.nn.functional.interpolate(x, scale_factor=2.0) for x in batches(net)]
    found = pruner.fit_predictors([*batches(net), *sizes])
    assert found.fitted + found.held_out == 480
    assert found.sites["c2"].r_squared > 0


def test_no_more_images_than_asked_for_are_used() -> None:
    net, pruner = attached(Stack)
    found = pruner.fit_predictors(batches(net), max_instances=100)
    assert found.fitted + found.held_out == 100


def test_fitting_leaves_thresholds_modes_and_weights() -> None:
    net, pruner = attached(Stack, per_site={"c2": {"beta": 0.4}})
    net.train()
    before = snapshot(pruner)
    pruner.fit_predictors(batches(net))
    pruner.drop_predictors()
    assert snapshot(pruner) == before
    assert not pruner.enabled


def test_gates_off_heads_are_of_no_matter() -> None:
    net, pruner = attached(Stack)
    expected = net(net.images())
    pruner.fit_predictors(batches(net))
    assert torch.equal(net(net.images()), expected)
    assert "c2; predicted" not in pruner.summary()
    assert "predicted from c1" in pruner.summary()
    assert "1 sites predicted" in pruner.summary()
    assert "c1 reads the image" in pruner.summary()


def test_heads_of_before_go_and_are_not_used_in_fitting() -> None:
    net, pruner = predicting(Down)
    random = pruner.heads
    pruner.fit_predictors(batches(net))
    _, other = attached(Down)
    other.fit_predictors(batches(net))
    assert pruner.heads.keys() == other.heads.keys()
    for name, head in other.heads.items():
        assert torch.equal(pruner.heads[name].weight, head.weight)
        assert not torch.equal(pruner.heads[name].weight, random[name].weight)


# -- what is refused -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ReadsMap:
    """A gate that looks at the map, one way or another."""

    how: str = "method"

    def __call__(self, feature: Tensor, norms: Tensor) -> Tensor:
        looks: dict[str, Callable[[], object]] = {
            "method": lambda: feature.mean(),
            "function": lambda: torch.amax(feature, 1),
            "arithmetic": lambda: feature * 2,
            "item": lambda: feature[0],
            "length": lambda: len(feature),
            "shape": lambda: feature.shape,
        }
        looks[self.how]()
        return norms > norms.mean(1, keepdim=True) / 2


def refused(pruner: InstanceWisePruner, given: Any, error: type[Exception], match: str, **settings: object) -> None:
    before = snapshot(pruner)
    with pytest.raises(error, match=match):
        pruner.fit_predictors(given, **settings)
    assert snapshot(pruner) == before


@pytest.mark.parametrize("how", ["method", "function", "arithmetic", "item", "length", "shape"])
def test_a_gate_that_reads_the_map_is_refused(how: str) -> None:
    net, pruner = attached(Stack, gate=ReadsMap(how), alpha=None, beta=None)
    refused(pruner, batches(net), PredictionError, "c2 cannot be predicted with .*: go on measuring, or take a gate")


def test_a_gate_that_reads_the_map_is_refused_at_loading() -> None:
    net, reading = attached(Stack, gate=ReadsMap(), alpha=None, beta=None)
    _, other = predicting(Stack)
    state = reading.state_dict() | {"heads": other.state_dict()["heads"]}
    before = snapshot(reading)
    with pytest.raises(PredictionError, match="needs more than norms"):
        reading.load_state_dict(state)
    assert snapshot(reading) == before
    assert net is reading.model


def test_what_stands_for_the_map_says_what_is_wrong() -> None:
    with pytest.raises(PredictionError, match=r"reads the map itself.*asks for \.mean"):
        _ = UNSEEN.mean
    with pytest.raises(PredictionError, match="reads the map itself"):
        torch.relu(UNSEEN)


def test_too_few_images_are_refused_with_the_number_that_is_needed() -> None:
    net, pruner = attached(Down)
    expected = "the head of c2 has 18 inputs, and 16 of 20 images .* give 24 images or more"
    refused(pruner, [net.images(20)], PredictionError, expected)
    refused(pruner, batches(net), PredictionError, expected, max_instances=20)
    pruner.fit_predictors([net.images(24)])


def test_no_images_are_refused() -> None:
    _, pruner = attached(Stack)
    refused(pruner, [], PredictionError, "0 of 0 images")


def test_one_batch_is_no_loader() -> None:
    net, pruner = attached(Stack)
    refused(pruner, net.images(100), SettingError, "one batch and not batches")


@pytest.mark.parametrize("most", [0, -1, 1.5, "many", None])
def test_the_number_of_images_is_one(most: object) -> None:
    net, pruner = attached(Stack)
    refused(pruner, batches(net), SettingError, "max_instances", max_instances=most)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_maps_that_are_not_finite_are_refused(value: float) -> None:
    net, pruner = attached(Stack)
    images = net.images(100)
    images[70, 0, 4, 4] = value
    refused(pruner, list(images.split(20)), NonFiniteFeatureError, "c1 holds NaN or infinity")


def test_a_dead_site_is_refused() -> None:
    net, pruner = attached(Stack)
    with torch.no_grad():
        net.bn2.bias.fill_(-100)
    refused(pruner, batches(net), PredictionError, "c2 is zero for all 240 images.*exclude it")


def test_maps_that_others_see_whole_are_refused() -> None:
    net, pruner = attached(Stack, scope="consumers")
    refused(pruner, batches(net), PredictionError, 'attach with scope="all"')
    heads = predicting(Stack)[1].state_dict()["heads"]
    with pytest.raises(PredictionError, match='attach with scope="all"'):
        pruner.load_state_dict(pruner.state_dict() | {"heads": heads})
    assert pruner.predicted == ()


def test_a_network_without_a_site_to_predict_is_refused() -> None:
    net, pruner = attached(Plain, layers="c1")
    refused(pruner, batches(net), PredictionError, "no site can be predicted; c1: c1 reads the image")


def test_an_error_of_the_loader_changes_nothing() -> None:
    net, pruner = predicting(Stack)
    pruner.disable()

    def broken() -> Any:
        yield net.images(100)
        raise OSError("gone")

    refused(pruner, broken(), OSError, "gone")
    assert pruner.predicted == ("c2",)


def test_a_removed_pruner_fits_nothing() -> None:
    net, pruner = attached(Stack)
    pruner.remove()
    with pytest.raises(AttachError):
        pruner.fit_predictors(batches(net))


# -- heads of another model ------------------------------------------------------------------------


def head_of(state: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = state["heads"]["c2"]
    return found


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "site": (lambda state: state["heads"].update(other=head_of(state)), "no site 'other' here"),
    "sources": (lambda state: head_of(state).update(sources=["c2"]), "reads c2, and here its layers read c1"),
    "image": (lambda state: state["heads"].update(c1=head_of(state)), "and here c1 reads the image"),
    "shape": (lambda state: head_of(state).update(weight=torch.ones(6, 7)), r"\(6, 7\), and \(6, 8\)"),
    "bias": (lambda state: head_of(state).update(bias=torch.ones(5)), r"\(5,\), and \(6,\)"),
    "type": (lambda state: head_of(state).update(weight=[[1.0]]), "a list"),
    "whole numbers": (lambda state: head_of(state).update(bias=torch.ones(6).long()), "floats"),
    "nan": (lambda state: head_of(state)["weight"].fill_(float("nan")), "NaN"),
    "missing": (lambda state: head_of(state).pop("bias"), "has no bias"),
    "no dict": (lambda state: state.update(heads=[1]), "heads are a list"),
    "no head": (lambda state: state["heads"].update(c2=3), "has no sources, weight, bias"),
    "no names": (lambda state: head_of(state).update(sources=3), "reads 3, and here"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_heads_that_do_not_fit_are_refused(damage: str) -> None:
    _, pruner = predicting(Stack)
    state = copy.deepcopy(pruner.state_dict())
    break_it, match = DAMAGES[damage]
    break_it(state)
    before = snapshot(pruner)
    with pytest.raises(StateMismatchError, match=match):
        pruner.load_state_dict(state)
    assert snapshot(pruner) == before


def test_a_state_brings_its_heads_or_none() -> None:
    net, pruner = predicting(Stack)
    expected = net(net.images())
    state = copy.deepcopy(pruner.state_dict())
    assert {"heads"} == state.keys() - attached(Stack)[1].state_dict().keys()
    pruner.drop_predictors()
    assert "heads" not in pruner.state_dict()
    pruner.load_state_dict(state)
    assert torch.equal(net(net.images()), expected)
    del state["heads"]
    pruner.load_state_dict(state)
    assert pruner.predicted == ()


def test_heads_of_changed_sites_go_with_a_warning() -> None:
    net, pruner = predicting(Residual)
    net.block.c1, net.block.bn1 = nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5)
    net.block.c2 = nn.Conv2d(5, 4, 3, padding=1)
    net.eval()
    with pytest.warns(UserWarning, match=r"^block\.c1, block\.c2: measured again.*fit_predictors") as found:
        pruner.update_regularizer()
    assert len(found) == 1
    assert pruner.predicted == ()
    net(net.images())


def test_heads_of_sites_that_stay_stay() -> None:
    net, pruner = predicting(Inverted)
    net.pwl = nn.Conv2d(8, 4, 1)
    with warnings.catch_warnings(action="error"):
        pruner.update_regularizer()
    assert pruner.predicted == ("pw", "dw", "pwl")
    net(net.images())


def test_static_pruning_by_gates_is_refused_with_heads() -> None:
    net, pruner = predicting(Stack)
    before = snapshot(pruner)
    with pytest.raises(UnsupportedError, match=r"drop_predictors\(\) first"):
        pruner.to_static([net.images()])
    assert snapshot(pruner) == before


# -- torch.distributed -----------------------------------------------------------------------------


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    try:
        net, pruner = attached(Stack)
        images = net.images(240).chunk(2)[rank]
        found = pruner.fit_predictors([images])
        error = ""
        try:
            pruner.fit_predictors([images if rank else images.fill_(float("nan"))])
        except NonFiniteFeatureError as raised:
            error = str(raised)
        torch.save((pruner.heads["c2"].weight, found.fitted, error), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
def test_all_ranks_fit_the_same_heads_from_the_images_of_all(tmp_path: Path) -> None:
    run_ranks(work, str(tmp_path))
    (first, images, error), (second, _, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    assert images == 192
    assert "NaN" in error == other
    net, pruner = attached(Stack)
    pruner.fit_predictors([net.images(240)])
    torch.testing.assert_close(pruner.heads["c2"].weight, first, atol=1e-4, rtol=1e-4)


def test_a_network_in_float64_is_fitted() -> None:
    net, pruner = attached(Stack)
    net.double()
    found = pruner.fit_predictors([x.double() for x in batches(net)])
    pruner.step()
    assert net(net.images().double()).dtype == torch.float64
    assert found.predicted == ("c2",)


def test_min_norm_is_predicted_too() -> None:
    net, pruner = attached(Stack, gate=MinNorm(0.5), alpha=None, beta=None)
    found = pruner.fit_predictors(batches(net))
    assert found.sites["c2"].density == 0.5 == found.sites["c2"].measured
