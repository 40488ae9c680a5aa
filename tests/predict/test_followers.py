"""Sites behind depthwise layers take over the decision on the map that these read."""

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from isw_plugin import InstanceWisePruner, calibrate, count_macs, evaluate, load_pretrained, steer_thresholds
from isw_plugin.errors import PredictionError, SettingError, StateMismatchError, UnsupportedError
from isw_plugin.functional import channel_norm
from tests.conftest import Net, made
from tests.predict.nets import FOLLOWERS, Inverted, Twice, following, predicted_by_hand, predicting
from tests.predict.test_fit import attached, batches, snapshot

# -- which sites ---------------------------------------------------------------------------------


class Variant(nn.Module):
    """Expansion, what lies between, projection."""

    def __init__(self, middle: Callable[[Tensor], Tensor], *modules: nn.Module, hidden: int = 8) -> None:
        super().__init__()
        self.stem, self.act, self.pw, self.act1 = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.ReLU()
        self.middle, self.dw = middle, nn.ModuleList(modules)
        self.act2, self.pwl = nn.ReLU(), nn.Conv2d(hidden, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act1(self.pw(self.act(self.stem(x))))
        return self.pwl(self.act2(self.middle(self, hidden))).mean((2, 3))


def depthwise(channels: int = 8, out: int = 8, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1, groups=channels, **settings)


def parts(net: Any, hidden: Tensor) -> Tensor:
    first, second = hidden.split(4, 1)
    return torch.cat([net.dw[0](first), net.dw[1](second)], 1)


VARIANTS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "depthwise": (lambda: Variant(lambda net, x: net.dw[0](x), depthwise()), {"dw.0": "pw"}),
    "strided": (lambda: Variant(lambda net, x: net.dw[0](x), depthwise(stride=2, bias=False)), {"dw.0": "pw"}),
    "pooled": (lambda: Variant(lambda net, x: net.dw[0](nn.functional.max_pool2d(x, 2)), depthwise()), {"dw.0": "pw"}),
    "multiplier": (lambda: Variant(lambda net, x: net.dw[0](x), depthwise(out=16), hidden=16), {}),
    "read by others": (lambda: Variant(lambda net, x: net.dw[0](x) + x.mean((2, 3), keepdim=True), depthwise()), {}),
    "two filters": (
        lambda: Variant(lambda net, x: torch.cat([net.dw[0](x), net.dw[1](x)], 1), depthwise(), depthwise(), hidden=16),
        {},
    ),
    "grouped": (lambda: Variant(lambda net, x: net.dw[0](x), nn.Conv2d(8, 8, 3, groups=4)), {}),
    "shortcut": (lambda: Variant(lambda net, x: net.dw[0](x) + x, depthwise()), {}),
    "two added": (lambda: Variant(lambda net, x: net.dw[0](x) + net.dw[1](x), depthwise(), depthwise()), {}),
    "split": (lambda: Variant(parts, depthwise(4, 4), depthwise(4, 4)), {}),
    "shuffled": (
        lambda: Variant(lambda net, x: net.dw[0](x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)), depthwise()),
        {},
    ),
    "two joined": (
        lambda: Variant(lambda net, x: net.dw[0](torch.cat([x, x], 1)), depthwise(16, 16), hidden=16),
        {},
    ),
}


@pytest.mark.parametrize("case", VARIANTS)
def test_what_can_follow(case: str) -> None:
    make, expected = VARIANTS[case]
    pruner = InstanceWisePruner(make().eval(), torch.zeros(1, 3, 12, 12))
    assert {site.name: site.making.follows for site in pruner.sites if site.making.follows} == expected


@pytest.mark.parametrize("kind", FOLLOWERS)
def test_fitting_lets_them_follow(kind: type[Net]) -> None:
    net, pruner = attached(kind)
    found = pruner.fit_predictors(batches(net))
    assert pruner.followers == FOLLOWERS[kind] == found.followers
    assert not pruner.heads.keys() & pruner.followers.keys()
    assert {"pw", *FOLLOWERS[kind]} <= set(pruner.predicted) == set(found.predicted)
    assert "follows pw" in pruner.summary()
    assert "follows pw" in str(found)
    net, other = attached(kind)
    own = other.fit_predictors(batches(net), depthwise="own")
    assert other.followers == own.followers == {}
    assert set(FOLLOWERS[kind]) <= own.sites.keys()
    assert set(pruner.heads) == set(other.heads) - set(FOLLOWERS[kind])
    assert not torch.equal(other.heads["pw"].weight, pruner.heads["pw"].weight)  # of the last map's norms


def test_figures_of_a_chain_are_of_its_last_map() -> None:
    net, pruner = attached(Inverted)
    images = net.images(200)
    found = pruner.fit_predictors([images])
    with pruner.gating():
        net(images)
        kept = pruner.keep["dw"][4::5]
        pruner.drop_predictors()
        net(images)
        measured = pruner.keep["dw"][4::5]
    first, report = found.sites["pw"], found.sites["dw"]
    assert (first.recall, first.density, first.measured) == (report.recall, report.density, report.measured)
    assert (report.r_squared, report.macs, report.follows, report.reason) == (None, 0, "pw", "")
    assert report.density == pytest.approx(kept.float().mean().item())
    assert report.measured == pytest.approx(measured.float().mean().item())
    assert report.recall == pytest.approx((kept & measured).sum().item() / measured.sum().item())
    assert report.saved == pytest.approx((1 - report.density) * 8 * 9 * 64)
    assert json.loads(json.dumps(found.to_dict()))["sites"]["dw"]["r_squared"] is None


def test_a_source_that_measures_leaves_a_head_to_its_reader() -> None:
    net = made(Inverted)
    pruner = InstanceWisePruner(net, net.images(1), alpha=0.0, beta=0.6, layers=["pw", "dw", "pwl"])
    found = pruner.fit_predictors(
        batches(net), depthwise="follow"
    )  # the stem is no site, so nothing is known before the expansion
    assert "pw" in found.measured
    assert pruner.followers == {}
    assert found.sites["dw"].r_squared is not None


def test_an_expansion_pays_with_what_follows_it() -> None:
    """1x1 layers alone would take more for their head than they save."""
    net, pruner = attached(Inverted)
    found = pruner.fit_predictors([x[:, :, :1, :2] for x in batches(net)])
    head, site = found.sites["pw"], found.sites["dw"]
    assert head.saved < head.macs < head.saved + site.saved
    assert pruner.followers == {"dw": "pw"}


def test_thresholds_set_by_hand_are_not_given_up() -> None:
    net, pruner = attached(Inverted, per_site={"dw": {"beta": 0.2}})
    pruner.fit_predictors(batches(net))
    assert pruner.followers == {}
    assert pruner.per_site == {"dw": {"beta": 0.2}}
    for alike in ({"dw": {"beta": 0.6}}, {"*w": {"beta": 0.2}}, {"dw": {"lambda_": 0.5}}):
        pruner.enable(per_site=alike)
        pruner.fit_predictors(batches(net))
        assert pruner.followers == {"dw": "pw"}


@pytest.mark.parametrize("depthwise", ["follow", "own"])
def test_a_dead_map_is_refused(depthwise: Any) -> None:
    net, pruner = attached(Inverted)
    with torch.no_grad():
        net.bn2.bias.fill_(-100)
    with pytest.raises(PredictionError, match="dw is zero for all 240 images"):
        pruner.fit_predictors(batches(net), depthwise=depthwise)


@pytest.mark.parametrize("chosen", ["both", None, 1, True])
def test_another_word_is_refused(chosen: Any) -> None:
    net, pruner = predicting(Inverted)
    before = snapshot(pruner)
    with pytest.raises(SettingError, match=r"depthwise=.*: one of 'follow', 'own'"):
        pruner.fit_predictors(batches(net), depthwise=chosen)
    assert snapshot(pruner) == before


def test_a_fit_that_fails_leaves_followers() -> None:
    net, pruner = following(Inverted)
    before = snapshot(pruner)
    with pytest.raises(PredictionError, match="images or more"):
        pruner.fit_predictors([net.images(10)])
    assert snapshot(pruner) == before
    assert pruner.followers == {"dw": "pw"}


# -- a forward -----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"beta": 0.0}, {"min_keep": 3, "beta": 1.5}])
@pytest.mark.parametrize("kind", FOLLOWERS)
def test_followers_keep_what_is_kept_before_them(kind: type[Net], settings: dict[str, Any]) -> None:
    net, pruner = following(kind, **settings)
    images = net.images(16)
    given = net(images)
    if "min_keep" not in settings:
        expected, keep = predicted_by_hand(net, pruner, images)
        torch.testing.assert_close(given, expected)
        assert all(torch.equal(pruner.keep[name], mask) for name, mask in keep.items())
    for name, source in pruner.followers.items():
        assert torch.equal(pruner.keep[name], pruner.keep[source])
        assert torch.equal(pruner.norms[name], pruner.norms[source])
        assert pruner.keep[name].all() == (settings.get("beta") == 0.0)


def test_thresholds_are_those_of_the_source() -> None:
    net, pruner = following(Inverted)
    with pruner.gating(per_site={"pw": {"beta": 0.1}}):
        net(net.images(16))
        low = pruner.keep
    with pruner.gating(per_site={"*w": {"beta": 1.2}}):
        net(net.images(16))
        high = pruner.keep
    assert torch.equal(low["dw"], low["pw"])
    assert torch.equal(high["dw"], high["pw"])
    assert high["dw"].sum() < low["dw"].sum()


@pytest.mark.parametrize("per_site", [{"dw": {"beta": 0.1}}, {"*w": {"beta": 0.1}, "pw": {"beta": 0.2}}])
def test_thresholds_of_its_own_are_refused_while_it_follows(per_site: dict[str, Any]) -> None:
    _, pruner = following(Inverted)
    before = snapshot(pruner)
    with pytest.raises(SettingError, match=r"per_site has beta=0.1 for dw, which keeps what pw keeps: set it for pw"):
        pruner.enable(per_site=per_site)
    assert snapshot(pruner) == before
    pruner.drop_predictors()
    pruner.enable(per_site=per_site)


def test_gating_puts_back_what_a_follower_held_before() -> None:
    """Calibrated before it followed: of no matter while it does, and there again when it measures."""
    net, pruner = attached(Inverted, per_site={"dw": {"beta": 0.2}})
    pruner.calibration = {"best": {"per_site": {"dw": {"beta": 0.2}}}}
    pruner.fit_predictors(batches(net))
    assert pruner.followers == {"dw": "pw"}
    assert pruner.per_site == {}
    with pruner.gating(per_site={"pw": {"beta": 0.3}}):
        assert pruner.per_site == {"pw": {"beta": 0.3}}
    pruner.drop_predictors()
    assert pruner.per_site == {"dw": {"beta": 0.2}}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_follow_alike(copied: Any) -> None:
    net, pruner = following(Twice)
    images = net.images()
    twin = copied(net)
    assert torch.equal(twin(images), net(images))
    assert InstanceWisePruner.of(twin).followers == pruner.followers


def test_an_averaged_copy_takes_followers_from_the_state() -> None:
    net, pruner = attached(Inverted)
    averaged = AveragedModel(net)
    pruner.fit_predictors(batches(net))
    InstanceWisePruner.of(averaged.module).load_state_dict(pruner.state_dict())
    assert InstanceWisePruner.of(averaged.module).followers == {"dw": "pw"}


def test_heads_learn_the_norms_of_the_last_map_in_training() -> None:
    net, pruner = following(Inverted, lambda_=0.01)
    made_by_filter: list[Tensor] = []
    net.act2.register_forward_hook(lambda _, args, output: made_by_filter.append(output.detach()), prepend=True)
    net.train()
    pruner.regularize(net, net(net.images()).square().mean()).backward()
    assert net.dw.weight.grad is not None
    lessons = pruner._memory._graded.lessons
    assert lessons.keys() == {"pw", "pwl"}
    ((known, rms),) = lessons["pw"]
    assert known.keys() == {"stem"}
    torch.testing.assert_close(rms, channel_norm(made_by_filter[0]) / 8)  # 64 pixels
    pruner.follow_predictors(decay=0.99, every=1)
    assert pruner.followers == {"dw": "pw"}
    assert pruner.heads.keys() == {"pw", "pwl"}


def test_a_checkpoint_takes_the_decision_again() -> None:
    """The filter is recomputed, the expansion is not."""

    def gradient(checkpointed: bool) -> Tensor:
        net, _ = following(Inverted)
        block = nn.Sequential(net.dw, net.bn2, net.act2)

        def forward(x: Tensor) -> Tensor:
            x = net.act(net.stem(x))
            hidden = net.act1(net.bn1(net.pw(x)))
            hidden = checkpoint(block, hidden, use_reentrant=False) if checkpointed else block(hidden)
            return net.head(net.join(x + net.bn3(net.pwl(hidden)))).mean((2, 3))

        net.forward = forward
        net(net.images()).square().mean().backward()
        found = net.dw.weight.grad
        assert found is not None
        return found

    torch.testing.assert_close(gradient(True), gradient(False))


def test_other_instances_than_the_source_had_are_refused() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.act, self.pw, self.act1 = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.ReLU()
            self.dw, self.act2, self.pwl = depthwise(), nn.ReLU(), nn.Conv2d(8, 4, 1)
            self.part = False

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.act1(self.pw(self.act(self.stem(x))))
            return self.pwl(self.act2(self.dw(hidden[:2] if self.part else hidden))).mean((2, 3))

    net, images = Halved().eval(), torch.rand(60, 3, 10, 10)
    pruner = InstanceWisePruner(net, images[:1], alpha=0.0, beta=0.5)
    pruner.fit_predictors([images])
    assert pruner.followers == {"dw": "pw"}
    pruner.step()
    net.part = True
    with pytest.raises(UnsupportedError, match=r"dw runs on 2 instances, and pw, by which it is predicted, ran on 60"):
        net(images)


def test_a_compiled_model_follows() -> None:
    net, pruner = following(Inverted)
    images = net.images()
    expected, _ = predicted_by_hand(made(Inverted), pruner, images)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, backend="eager")(images), expected)
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(net, (net.images(3),), dynamic_shapes=({0: batch},)).module()
        torch.testing.assert_close(program(images), expected)


# -- beside everything else ----------------------------------------------------------------------


def test_a_dropped_channel_costs_nothing_and_a_follower_no_head() -> None:
    net, pruner = following(Inverted)
    images = net.images(4)
    report = count_macs(net, images)
    kept = {name: mask.sum(1).double() for name, mask in pruner.keep.items()}
    heads = sum(head.macs for head in pruner.heads.values())
    left = 3 * 4 * 9 + kept["stem"] * kept["pw"] + 9 * kept["pw"] + kept["pw"] * kept["pwl"] + kept["pwl"] * 6
    torch.testing.assert_close(report.gated, 64 * left + heads)
    torch.testing.assert_close(report.gated, report.dense - sum(report.per_site.values()))
    _, own = predicting(Inverted)
    # No mean and no CV, and no squares for the head that is not there.
    assert count_macs(own.model, images).gate - report.gate == 8 * (4 + 64)


def labelled(net: Net, images: int = 48) -> list[tuple[Tensor, Tensor]]:
    with torch.no_grad():
        given = net.images(images)
        return [(given, made(type(net))(given).argmax(1))]


def test_sites_are_calibrated_without_followers() -> None:
    net, pruner = following(Inverted)
    with warnings.catch_warnings(action="ignore"):
        found = calibrate(pruner, labelled(net), max_drop=0.4, per_site=True)
        again = calibrate(pruner, labelled(net), max_drop=0.4, per_site=True)
    assert all("dw" not in candidate.per_site for candidate in (*found.candidates, *again.candidates))
    with pruner.gating():
        report = evaluate(net, labelled(net))
    assert report.macs == pytest.approx(again.best.macs)
    assert report.per_site["dw"].keep_ratio == report.per_site["pw"].keep_ratio


def test_a_budget_is_met_with_followers() -> None:
    net, pruner = following(Inverted, beta=0.1)
    images = net.images(64)
    for _ in range(15):
        net(images)
        steer_thresholds(pruner, macs_left=0.7, rate=0.5)
    net(images)
    assert 1 - count_macs(net, images).saved.mean().item() == pytest.approx(0.7, abs=0.03)
    assert "dw" not in pruner.per_site
    assert pruner.followers == {"dw": "pw"}
    refit = pruner.fit_predictors(batches(net))
    assert refit.followers == {"dw": "pw"}


def test_a_budget_that_moved_all_thresholds_lets_sites_follow_afterwards() -> None:
    net, pruner = attached(Inverted, beta=0.1)
    pruner.step()
    for _ in range(3):
        net(net.images(64))
        steer_thresholds(pruner, macs_left=0.8)
    assert pruner.per_site["dw"] != pruner.per_site["pw"]
    assert pruner.fit_predictors(batches(net)).followers == {"dw": "pw"}


def test_a_share_of_a_follower_is_refused() -> None:
    net, pruner = following(Twice)
    net(net.images())
    before = snapshot(pruner)
    with pytest.raises(
        SettingError, match=r"keep has 'dw2', which has no threshold: it keeps what dw keeps. Name 'pw'"
    ):
        steer_thresholds(pruner, {"pwl": 0.5, "dw2": 0.5})
    assert snapshot(pruner) == before
    steer_thresholds(pruner, {"pw": 0.5})


# -- saved ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FOLLOWERS)
def test_a_folder_brings_followers_back(tmp_path: Path, kind: type[Net]) -> None:
    net, pruner = following(kind)
    pruner.save_pretrained(tmp_path)
    back = load_pretrained(tmp_path, made(kind, seed=1))
    assert back.followers == pruner.followers
    assert back.predicted == pruner.predicted
    assert torch.equal(back.model(net.images()), net(net.images()))
    pruner.drop_predictors()
    assert "followers" not in pruner.state_dict()
    pruner.save_pretrained(tmp_path)
    assert "followers" not in (tmp_path / "pruner.json").read_text()  # as older folders are
    assert load_pretrained(tmp_path, made(kind, seed=1)).followers == {}


DAMAGES: dict[str, tuple[Any, str]] = {
    "no dict": ([1], "followers"),
    "no name": ({"dw": 3}, "follow"),
    "list": ({"dw": ["pw"]}, "follow"),
    "another site": ({"other": "pw"}, "no site 'other' here"),
    "another source": ({"dw": "stem"}, "dw follows 'stem', and here what can be followed is pw"),
    "itself": ({"dw": "dw"}, "dw follows 'dw', and here what can be followed is pw"),
    "no depthwise layer": ({"pwl": "dw"}, "pwl follows 'dw', and here no depthwise layer alone makes its map"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_followers_that_do_not_fit_are_refused(tmp_path: Path, damage: str) -> None:
    _, pruner = following(Inverted)
    held, match = DAMAGES[damage]
    before = snapshot(pruner)
    with pytest.raises(StateMismatchError, match=match):
        pruner.load_state_dict(pruner.state_dict() | {"followers": held})
    assert snapshot(pruner) == before
    pruner.save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "pruner.json").read_text())
    facts["pruner"]["state"]["followers"] = held
    (tmp_path / "pruner.json").write_text(json.dumps(facts))
    with pytest.raises(StateMismatchError, match=match):
        load_pretrained(tmp_path, made(Inverted, seed=1))


def test_followers_need_a_decision_that_comes_first() -> None:
    _, pruner = following(Twice)
    state = copy.deepcopy(pruner.state_dict())
    del state["heads"]["pw"]
    before = snapshot(pruner)
    with pytest.raises(StateMismatchError, match="dw follows pw: pw, which is measured, decides too late"):
        pruner.load_state_dict(state)
    own = predicting(Twice)[1].state_dict()["heads"]
    with pytest.raises(StateMismatchError, match="dw follows pw: has a head of its own"):
        pruner.load_state_dict(pruner.state_dict() | {"heads": own})
    assert snapshot(pruner) == before


def test_followers_of_changed_sites_go_with_a_warning() -> None:
    net, pruner = following(Inverted)
    net.dw = nn.Conv2d(8, 8, 3, padding=1, groups=4)  # not depthwise any more
    net.eval()
    with pytest.warns(UserWarning, match=r"^dw: measured again.*fit_predictors"):
        pruner.update_regularizer()
    assert (pruner.predicted, pruner.followers) == (("pw", "pwl"), {})
    net(net.images())


def test_followers_of_a_changed_source_go_with_it() -> None:
    net, pruner = following(Twice)
    net.stem, net.pw = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 8, 1)
    net.eval()
    with pytest.warns(UserWarning, match=r"^pw, dw, dw2: measured again"):
        pruner.update_regularizer()
    assert pruner.predicted == ("pwl",)


def test_removing_takes_followers() -> None:
    net, pruner = following(Inverted)
    pruner.remove()
    assert pruner.followers == {}
    images = net.images()
    assert torch.equal(net(images), made(Inverted)(images))
