"""From per-image decisions to static pruning: what may go, and that nobody notices."""

import copy

import pytest
import timm
import torch
import torch_pruning as tp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from isw_plugin import CVGate, InstanceWisePruner, MinNorm, RandomGate
from isw_plugin.errors import AttachError, SettingError, UnsupportedError
from isw_plugin.static.fewer import changed_decisions, parameters_on_rest
from tests.conftest import NETS, Concat, Net, Plain, Residual, hooks_of, made


def gated(model: nn.Module, images: Tensor) -> Tensor:
    with InstanceWisePruner.of(model).gating(), torch.no_grad():
        return model(images)


def with_dead_channels(model: nn.Module, share: float = 0.4, seed: int = 0) -> nn.Module:
    """Batch norms of which some channels come out negative everywhere, for the ReLU behind them."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.3, generator=generator)
            nn.init.normal_(module.bias, -0.1, 0.4, generator=generator)
            dead = torch.rand(module.num_features, generator=generator) < share
            dead[0] = False
            module.weight.data[dead], module.bias.data[dead] = 0.0, -0.1
    return model.eval()


def channels(pruner: InstanceWisePruner) -> dict[str, int]:
    return {site.name: site.channels for site in pruner.sites}


@pytest.mark.parametrize("scope", ["all", "consumers"])
@pytest.mark.parametrize("kind", NETS, ids=lambda kind: kind.__name__)
def test_outputs_on_the_images_seen_are_as_before(kind: type[Net], scope: str) -> None:
    net = with_dead_channels(made(kind))
    pruner = InstanceWisePruner(net, net.images(1), scope=scope, alpha=0.1, beta=0.8)
    images = net.images(8)
    before = gated(net, images)
    pruner.to_static([images])
    torch.testing.assert_close(gated(net, images), before)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "mobilenetv2_035", "regnetx_002", "test_vit"])
def test_networks_in_use(name: str) -> None:
    model = with_dead_channels(timm.create_model(name, num_classes=5))
    images = torch.randn(4, 3, *((160, 160) if "vit" in name else (64, 64)))
    pruner = InstanceWisePruner(model, images[:1])
    before, size = gated(model, images), sum(p.numel() for p in model.parameters())
    conversion = pruner.to_static([images])
    torch.testing.assert_close(gated(model, images), before, rtol=1e-4, atol=1e-5)
    smaller = sum(p.numel() for p in model.parameters()) < size
    assert smaller == bool(conversion.layers) == (name != "test_vit")


def test_a_dead_channel_goes_everywhere() -> None:
    net = made(Plain)
    net.bn1.weight.data[:] = torch.tensor([1.0, 0.0, 1.0, 0.0])
    net.bn1.bias.data[:] = torch.tensor([0.1, -1.0, 0.1, -1.0])
    pruner = InstanceWisePruner(net, net.images(1), beta=0.0)
    conversion = pruner.to_static([net.images()])
    assert conversion.layers["c1"] == (1, 3)
    assert conversion.sites["c1"] == (4, 2)
    assert (net.c1.out_channels, net.bn1.num_features, net.c2.in_channels) == (2, 2, 2)
    assert channels(pruner)["c1"] == 2
    assert (
        str(conversion)
        == f"{4 - 2 + 6 - channels(pruner)['c2']} channels of {len(conversion.sites)} sites pruned for good"
    )


def test_a_small_channel_that_is_never_kept_goes_above_threshold_0() -> None:
    net = made(Plain)
    net.bn1.weight.data[:], net.bn1.bias.data[:] = torch.tensor([1.0, 1.0, 1e-3, 1.0]), 0.0
    pruner = InstanceWisePruner(net, net.images(1), alpha=0.0, beta=0.5, layers="c1")
    assert not gated(net, net.images()).isnan().any()
    assert not pruner.keep["c1"][:, 2].any()
    assert pruner.to_static([net.images()], threshold=0.01).layers["c1"] == (2,)


def test_the_threshold_is_a_share_of_the_images() -> None:
    """A channel that one of four images uses."""
    net = made(Plain)
    nn.init.constant_(net.bn2.bias, 1.0)
    net.bn1.weight.data[3], net.bn1.bias.data[3] = 0.0, -1.0
    net.c1.weight.data[3] = 0.0
    images = net.images()

    class OnlyTheFirst(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            used = torch.ones_like(x)
            used[1:, 3:] = 0
            return super().forward(x + 2) * used[: len(x)]

    net.act1 = OnlyTheFirst()
    for threshold, left in ((0.2, 4), (0.25, 3)):
        model = copy.deepcopy(net)
        InstanceWisePruner(model, images[:1], beta=0.0).to_static([images], threshold)
        assert model.c1.out_channels == left


def test_residual_maps_lose_only_what_no_reader_uses() -> None:
    """block.c1 and fc read one map with the shortcut in it: stem's channels go with block.c2's or not at all."""
    net = made(Residual)
    net.bn.weight.data[:2], net.bn.bias.data[:2] = 0.0, -1.0
    net.block.bn2.weight.data[1:3], net.block.bn2.bias.data[1:3] = 0.0, -1.0
    pruner = InstanceWisePruner(net, net.images(1), beta=0.0)
    pruner.to_static([net.images()])
    assert channels(pruner)["stem"] == channels(pruner)["block.c2"] == 3  # only channel 1 is dead in both


def test_a_shortcut_that_sees_the_whole_map_keeps_it() -> None:
    """Under scope="consumers" a channel that readers never see still reaches others through the shortcut."""
    net = made(Residual)
    net.bn.weight.data[:], net.bn.bias.data[:] = torch.tensor([1.0, 1.0, 1.0, 0.01]), 0.0
    images = net.images(8)
    for scope, left in (("all", 3), ("consumers", 4)):
        model = copy.deepcopy(net)
        model.block.bn2.weight.data[3], model.block.bn2.bias.data[3] = 0.0, 0.0
        pruner = InstanceWisePruner(model, images[:1], scope=scope, layers="stem", alpha=0.0, beta=0.3)
        pruner.to_static([images], threshold=0.01)
        assert model.stem.out_channels == left


class SideBySide(Net):
    """Two branches joined on the channel axis, then a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 3)
        self.act, self.c, self.fc = nn.ReLU(), nn.Conv2d(9, 6, 3, stride=3), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], dim=1)
        return self.fc(self.act(self.c(joined)).flatten(1))


def test_columns_after_a_concatenation_and_a_flatten() -> None:
    net = made(SideBySide)
    for layer, channel in ((net.a, 1), (net.b, 4), (net.c, 2)):
        layer.weight.data[channel], layer.bias.data[channel] = 0.0, -1.0
    pruner = InstanceWisePruner(net, net.images(1), alpha=0.2)
    images = net.images(8)
    before = gated(net, images)
    conversion = pruner.to_static([images])
    assert {"a", "b", "c"} <= conversion.layers.keys()
    assert net.fc.in_features == 4 * net.c.out_channels
    assert channels(pruner)["c"] == net.c.out_channels
    torch.testing.assert_close(gated(net, images), before)


def test_where_torch_prunings_graph_is_wrong_nothing_goes() -> None:
    """The image itself is a part of this join, which torch-pruning does not see."""
    net = made(Concat)
    net.a.weight.data[1], net.a.bias.data[1] = 0.0, -1.0
    net.c.weight.data[2], net.c.bias.data[2] = 0.0, -1.0
    pruner = InstanceWisePruner(net, net.images(1), beta=0.0)
    before = gated(net, net.images())
    conversion = pruner.to_static([net.images()])
    assert "c" in conversion.layers
    assert "a" not in conversion.layers
    torch.testing.assert_close(gated(net, net.images()), before)


def test_the_last_channel_of_a_layer_stays() -> None:
    net = made(Plain)
    net.bn1.weight.data[:], net.bn1.bias.data[:] = 0.0, -1.0
    pruner = InstanceWisePruner(net, net.images(1))
    before = gated(net, net.images())
    pruner.to_static([net.images()])
    assert net.c1.out_channels == 1
    torch.testing.assert_close(gated(net, net.images()), before)


def test_the_output_keeps_its_channels() -> None:
    net = made(Plain)
    net.fc.weight.data[2], net.fc.bias.data[2] = 0.0, 0.0
    InstanceWisePruner(net, net.images(1), alpha=0.0).to_static([net.images()], 0.5)
    assert net.fc.out_features == 5


@pytest.mark.parametrize("gate", [CVGate(0.2, 0.9), MinNorm(0.5)])
@pytest.mark.parametrize("min_keep", [0, 2])
def test_gates_decide_on_the_rest_as_on_all(gate, min_keep: int) -> None:
    net = with_dead_channels(made(Plain), 0.5, seed=1)
    images = net.images(16)
    pruner = InstanceWisePruner(net, images[:1], gate=gate, min_keep=min_keep)
    gated(net, images)
    kept = {name: keep.sum(1) for name, keep in pruner.keep.items()}
    dead = {name: (norms == 0).all(0) & ~pruner.keep[name].any(0) for name, norms in pruner.norms.items()}
    conversion = pruner.to_static([images])
    gated(net, images)
    assert conversion.sites
    for name, keep in pruner.keep.items():
        assert torch.equal(keep.sum(1), kept[name])
        assert keep.shape[1] == len(dead[name]) - dead[name].sum() or min_keep  # which may need a dead one


@given(
    st.integers(3, 12),
    st.integers(1, 6),
    st.floats(0, 1.5),
    st.floats(0.05, 1.9),
    st.integers(0, 2**31 - 1),
    st.booleans(),
)
@settings(max_examples=200)
def test_thresholds_on_the_rest(channels: int, dead: int, alpha: float, beta: float, seed: int, fixed: bool) -> None:
    """Pruned channels that are dead, or a fixed share of the others' mean: no decision changes, near-ties apart."""
    generator = torch.Generator().manual_seed(seed)
    norms = torch.rand(20, channels, generator=generator, dtype=torch.float64)
    share = torch.rand(1, dead, generator=generator, dtype=torch.float64) * 0.5 if fixed else torch.zeros(1, dead)
    pruned = norms.mean(1, keepdim=True) * share
    whole = torch.cat([pruned, norms], 1)
    gate = CVGate(alpha, beta)
    cv = whole.std(1, unbiased=False, keepdim=True) / whole.mean(1, keepdim=True)
    tie = (cv - alpha).abs().le(1e-6) | (norms - beta * whole.mean(1, keepdim=True)).abs().le(1e-6)
    rest = CVGate(**parameters_on_rest(gate, whole, range(dead)))
    flat = norms.std(1, unbiased=False, keepdim=True) == 0  # alpha is 0 at least
    differs = gate(whole, whole)[:, dead:] != rest(norms, norms)
    assert not (differs & ~tie & ~flat).any() or beta * (channels + dead) / channels >= 2


@given(st.integers(2, 40), st.floats(0, 0.99), st.data())
def test_min_norm_drops_as_many_of_the_rest(channels: int, ratio: float, data: st.DataObject) -> None:
    gate, norms = MinNorm(ratio), torch.rand(3, channels)
    dropped = int(ratio * channels)
    pruned = range(data.draw(st.integers(0, min(dropped, channels - 1))))
    rest = MinNorm(**parameters_on_rest(gate, norms, pruned)) if pruned else gate
    assert (~rest(norms, norms[:, len(pruned) :])).sum(1).tolist() == [dropped - len(pruned)] * 3


def test_a_changed_decision_is_counted() -> None:
    """Without channel 0, whose share of the mean differs between the two images."""
    norms = torch.tensor([[0.9, 0.6, 1.5], [0.0, 0.75, 1.35]])
    assert changed_decisions(CVGate(0.0, 0.99), norms, [0]) > 0
    assert changed_decisions(CVGate(0.0, 0.99), norms, []) == 0


def test_a_gate_of_which_nothing_is_known_is_refused_at_threshold_0(plain: Net) -> None:
    pruner = InstanceWisePruner(plain, plain.images(1), gate=RandomGate(0.5))
    before, hooks = copy.deepcopy(plain.state_dict()), hooks_of(plain)
    with pytest.raises(UnsupportedError, match=r"RandomGate.*threshold > 0"):
        pruner.to_static([plain.images()])
    assert hooks_of(plain) == hooks
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())
    pruner.to_static([plain.images()], threshold=0.5)
    assert plain(plain.images()).shape == (4, 5)


@pytest.mark.parametrize("threshold", [-0.1, 1.0, float("nan")])
def test_the_threshold_has_a_range(plain: Net, threshold: float) -> None:
    with pytest.raises(SettingError, match="threshold="):
        InstanceWisePruner(plain, plain.images(1)).to_static([plain.images()], threshold)


def test_no_images(plain: Net) -> None:
    with pytest.raises(SettingError, match="no images"):
        InstanceWisePruner(plain, plain.images(1)).to_static([])


def test_images_are_no_batches(plain: Net) -> None:
    with pytest.raises(SettingError, match=r"a list such as \[images\]"):
        InstanceWisePruner(plain, plain.images(1)).to_static(plain.images())


def test_a_removed_pruner(plain: Net) -> None:
    pruner = InstanceWisePruner(plain, plain.images(1))
    pruner.remove()
    with pytest.raises(AttachError):
        pruner.to_static([plain.images()])


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, torch.zeros(len(x))), lambda x: {"x": x}])
def test_what_a_loader_may_give(wrap) -> None:
    net = with_dead_channels(made(Plain))
    layers = InstanceWisePruner(net, net.images(1)).to_static([wrap(net.images())]).layers
    assert layers


def test_flags_of_the_model_stay() -> None:
    net = with_dead_channels(made(Plain)).train()
    net.bn1.eval()
    net.c1.weight.requires_grad_(False)
    pruner = InstanceWisePruner(net, net.images(1))
    assert pruner.to_static([net.images()]).layers
    assert net.training
    assert not net.bn1.training
    assert not net.c1.weight.requires_grad
    assert net.c2.weight.requires_grad
    assert not pruner.enabled


def test_thresholds_on_the_rest_are_saved_with_the_pruner() -> None:
    net = with_dead_channels(made(Plain))
    pruner = InstanceWisePruner(net, net.images(1))
    pruner.to_static([net.images()])
    other = copy.deepcopy(net)
    InstanceWisePruner.of(other).remove()
    again = InstanceWisePruner(other, net.images(1))
    again.load_state_dict(pruner.state_dict())
    torch.testing.assert_close(gated(other, net.images()), gated(net, net.images()))


def test_what_torch_pruning_cannot_trace_is_refused() -> None:
    class InferenceOnly(Plain):
        def run(self, x, touch):
            assert not torch.is_grad_enabled(), "inference only"
            return super().run(x, touch)

    net = made(InferenceOnly)
    pruner = InstanceWisePruner(net, net.images(1))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UnsupportedError, match=r"torch-pruning cannot trace InferenceOnly.*inference only"):
        pruner.to_static([net.images()])
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_channels_tied_by_something_the_graph_does_not_show_stay() -> None:
    class Fixed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.c1, self.act, self.c2 = nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 1)
            self.c3, self.fc = nn.Conv2d(6, 4, 1), nn.Linear(4, 5)
            self.offset = torch.ones(4, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.c1(x)) * self.offset
            return self.fc(self.c3(torch.relu(self.c2(x))).mean((2, 3)))

    net = made(Fixed)
    for layer in (net.c1, net.c2):
        layer.weight.data[1], layer.bias.data[1] = 0.0, -1.0
    net.c2.weight.data[1] = 0.0
    InstanceWisePruner(net, net.images(1), beta=0.0).to_static([net.images()])
    assert net.c1.out_channels == 4
    assert net.c2.out_channels < 6


# -- what torch-pruning cannot do ------------------------------------------------------------------


class Shuffled(Net):
    """Behind a pixel shuffle, torch-pruning takes 12 channels for columns of a layer that has 3."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.a1, self.c2 = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1)
        self.shuffle, self.a2 = nn.PixelShuffle(2), nn.ReLU()
        self.c3, self.a3, self.c4 = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a2(self.shuffle(self.c2(self.a1(self.c1(x)))))
        return self.c4(self.a3(self.c3(x)))


def test_a_group_whose_columns_do_not_fit_stays_and_the_rest_goes() -> None:
    net = made(Shuffled)
    with torch.no_grad():
        net.c1.weight[1], net.c1.bias[1] = 0.0, -1.0
    expected = net(net.images())
    InstanceWisePruner(net, net.images(1), beta=0.0).to_static([net.images()])
    assert (net.c1.out_channels, net.c2.out_channels) == (7, 12)
    torch.testing.assert_close(net(net.images()), expected)


ERRORS = (ZeroDivisionError, IndexError, AttributeError, KeyError, AssertionError, RecursionError)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", ["_trace", "get_all_groups"])
def test_whatever_torch_pruning_raises_is_ours_and_changes_nothing(
    error: type[Exception], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self, *args: object, **kwargs: object) -> None:
        m = next(iter(getattr(self, "module2node", [None])))  # noqa: F841  # as frames of torch-pruning hold it
        raise error("theirs")

    net = with_dead_channels(made(Plain)).train()
    pruner = InstanceWisePruner(net, net.images(1))
    before, hooks, state = copy.deepcopy(net.state_dict()), hooks_of(net), pruner.state_dict()
    monkeypatch.setattr(tp.DependencyGraph, where, fail)
    with pytest.raises(UnsupportedError, match=r"torch-pruning cannot .*Plain.*theirs") as raised:
        pruner.to_static([net.images()])
    assert where == "_trace" or "(near fc)" in str(raised.value)
    assert hooks_of(net) == hooks
    assert pruner.state_dict() == state
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_a_pruning_that_fails_half_way_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    net = with_dead_channels(made(Plain)).train()
    pruner = InstanceWisePruner(net, net.images(1))
    before, parameters = copy.deepcopy(net.state_dict()), list(net.parameters())
    prune, done = tp.dependency.Group.prune, []

    def fails_in_the_model(self, *args: object, **kwargs: object) -> None:
        prune(self, *args, **kwargs)
        if self[0].dep.target.module in list(net.modules()):
            done.append(self)
            raise IndexError("theirs")

    monkeypatch.setattr(tp.dependency.Group, "prune", fails_in_the_model)
    with pytest.raises(UnsupportedError, match=r"cannot remove \d+ channels of c\d: IndexError\('theirs'\)"):
        pruner.to_static([net.images()])
    assert done
    assert all(mine is yours for mine, yours in zip(net.parameters(), parameters, strict=True))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert (net.c1.out_channels, net.c2.in_channels, net.bn1.num_features) == (4, 4, 4)
    assert net.training


def test_a_threshold_is_a_number(plain: Net) -> None:
    with pytest.raises(SettingError, match="threshold='0'"):
        InstanceWisePruner(plain, plain.images(1)).to_static([plain.images()], "0")  # type: ignore[arg-type]


def test_dicts_with_labels_are_taken() -> None:
    net = with_dead_channels(made(Plain))
    batch = {"x": net.images(), "labels": torch.zeros(4), "index": torch.zeros(4)}
    assert InstanceWisePruner(net, net.images(1)).to_static([batch]).layers
