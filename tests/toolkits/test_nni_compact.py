"""A compacted model computes what the masked one does, and has lost exactly the channels that nobody notices."""

import copy
import re

import pytest
import timm
import torch
import torch_pruning as tp
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from isw_plugin import InstanceWisePruner
from isw_plugin.errors import SettingError, UnsupportedError
from isw_plugin.toolkits.nni_compact import compact
from tests.conftest import NETS, Net, made

Masks = dict[str, dict[str, Tensor | None]]


@torch.no_grad()
def masked(model: nn.Module, masks: Masks) -> nn.Module:
    """What NNI computes: the weights times their masks."""
    model = copy.deepcopy(model).eval()
    for name, targets in masks.items():
        for key, mask in targets.items():
            if mask is not None:
                model.get_submodule(name).get_parameter(key).mul_(mask)
    return model


def rows(model: nn.Module, name: str, *channels: int) -> Masks:
    """A mask of some output channels of a layer or norm, as NNI gives it: the bias of a norm is not masked."""
    module = model.get_submodule(name)
    mask = torch.ones_like(module.weight)
    mask[list(channels)] = 0
    bias = torch.ones_like(module.bias) if module.bias is not None else None
    if bias is not None and not isinstance(module, nn.BatchNorm2d):
        bias[list(channels)] = 0
    return {name: {"weight": mask, "bias": bias}}


def random_masks(model: nn.Module, kinds: type | tuple[type, ...], seed: int, ratio: float = 0.5) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    masks: Masks = {}
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            dropped = torch.rand(len(module.weight), generator=generator) < ratio
            masks |= rows(model, name, *dropped.nonzero()[:, 0].tolist())
    return masks


def same(model: nn.Module, other: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), other.eval()(images), atol=1e-5, rtol=1e-5)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def with_norms(name: str, **arguments: object) -> nn.Module:
    """A timm model whose norms are not the identity, as after training."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **arguments)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, -0.1, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.1)
    return model.eval()


KINDS = {"norms": nn.BatchNorm2d, "layers": (nn.Conv2d, nn.Linear), "both": (nn.BatchNorm2d, nn.Conv2d, nn.Linear)}


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv2_035", "test_convnext"])
def test_it_computes_what_the_masked_model_does(name: str, kinds: str) -> None:
    model = with_norms(name)
    masks = random_masks(model, KINDS[kinds], seed=0)
    expected, before = masked(model, masks), parameters(model)
    assert compact(model, masks, torch.randn(2, 3, 64, 64)) is model
    same(model, expected, torch.randn(6, 3, 64, 64))
    has_norms = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert parameters(model) < before or (kinds == "norms" and not has_norms)


@pytest.mark.parametrize("kinds", KINDS)
def test_shuffled_channels_go_rightly_or_stay_all(kinds: str) -> None:
    """torch-pruning 1.6.1 divides by zero in ShuffleNet's reshape."""
    torch.manual_seed(0)
    model = torchvision.models.shufflenet_v2_x0_5(num_classes=5).eval()
    masks = random_masks(model, KINDS[kinds], seed=0)
    bare, expected = copy.deepcopy(model), masked(model, masks)
    refused = ""
    try:
        compact(model, masks, torch.randn(2, 3, 64, 64))
    except UnsupportedError as error:
        refused = str(error)
    said = r"^torch-pruning cannot trace ShuffleNetV2 \(near stage.* the model is as it was, and takes masks and gates"
    assert not refused or re.match(said, refused)
    same(model, bare if refused else expected, torch.randn(6, 3, 64, 64))


@settings(max_examples=60)
@given(kind=st.sampled_from(NETS), seed=st.integers(0, 10**6), ratio=st.floats(0.1, 1.0), norms=st.booleans())
def test_any_masks_on_any_network(kind: type[Net], seed: int, ratio: float, norms: bool) -> None:
    net = made(kind, seed)
    masks = random_masks(net, nn.BatchNorm2d if norms else (nn.Conv2d, nn.Linear), seed, ratio)
    expected = masked(net, masks)
    compact(net, masks, net.images(2))
    same(net, expected, net.images(5, seed=1))


def chain(shift: float, padding: int = 1, bias: bool = False) -> nn.Sequential:
    """A masked channel of the first norm emits ``shift`` through a ReLU into the second convolution."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, padding=padding, bias=bias),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 2),
    ).eval()
    nn.init.constant_(model[1].bias, shift)
    return model


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("shift", "padding", "left"),
    [
        (-0.5, 1, 2),  # silent behind the activation
        (0.0, 1, 2),
        (0.5, 0, 2),  # the next layer's bias takes it over
        (0.5, 1, 4),  # no bias can stand for it: zero padding surrounds the constant
    ],
)
def test_a_shift_is_folded_or_keeps_its_channel(shift: float, padding: int, left: int, bias: bool) -> None:
    model = chain(shift, padding, bias)
    masks = rows(model, "1", 0, 2)
    expected = masked(model, masks)
    compact(model, masks, IMAGES)
    assert [model[0].out_channels, model[1].num_features, model[3].in_channels] == [left] * 3
    same(model, expected, IMAGES)
    folded = shift > 0 and padding == 0
    assert (model[3].bias is not None) == (bias or folded)
    if left == 4:
        assert model[1].weight[[0, 2]].eq(0).all()


def test_of_masked_channels_only_those_that_emit_nothing_go() -> None:
    """The others are told apart channel by channel: one that must stay holds back none that may go."""
    model = chain(0.5)
    model[1].bias.data[0] = -0.5
    masks = rows(model, "1", 0, 2)
    expected = masked(model, masks)
    compact(model, masks, IMAGES)
    assert [model[0].out_channels, model[1].num_features, model[3].in_channels] == [3] * 3
    assert model[1].weight.eq(0).tolist() == [False, True, False]
    same(model, expected, IMAGES)


def test_what_cannot_go_is_zeroed() -> None:
    model = chain(0.0)
    mask = torch.ones_like(model[3].weight)
    mask[:, :, 0] = 0
    compact(model, {"3": {"weight": mask, "bias": None}}, IMAGES)
    assert model[3].weight[:, :, 0].eq(0).all()
    assert model[3].weight[:, :, 1].ne(0).all()
    assert model[3].out_channels == 5


def test_the_output_and_the_last_channel_stay() -> None:
    model = chain(-1.0)
    masks = rows(model, "1", 0, 1, 2, 3) | rows(model, "7", 0)
    expected = masked(model, masks)
    compact(model, masks, IMAGES)
    assert model[0].out_channels == 1
    assert model[7].out_features == 2
    same(model, expected, IMAGES)


def test_one_masked_branch_of_a_sum_stays() -> None:
    """The other branch still fills the channel."""
    net = made(NETS[1])
    masks = rows(net, "block.bn2", 1)
    expected = masked(net, masks)
    compact(net, masks, net.images(2))
    assert net.block.c2.out_channels == 4
    same(net, expected, net.images())
    both = rows(net, "block.bn2", 1) | rows(net, "bn", 1)
    for norm in (net.bn, net.block.bn2):
        nn.init.constant_(norm.bias, -0.1)
    expected = masked(net, both)
    compact(net, both, net.images(2))
    assert net.block.c2.out_channels == net.fc.in_features == 3
    same(net, expected, net.images())


def test_grouped_convolutions_keep_their_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(216, 2))
    masks = rows(model, "0", 1)
    expected = masked(model, masks)
    compact(model, masks, IMAGES)
    assert model[0].out_channels == 4
    same(model, expected, IMAGES)


class Reshaped(nn.Module):
    """A fixed number of channels in forward, which no graph shows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        hidden = hidden.view(len(x), 4, *hidden.shape[2:])
        return self.c(self.b(hidden).relu())


def test_what_the_graph_does_not_show_is_tried() -> None:
    model = Reshaped()
    masks = rows(model, "a", 1) | rows(model, "b", 0, 1)
    expected = masked(model, masks)
    compact(model, masks, IMAGES)
    assert (model.a.out_channels, model.b.out_channels) == (4, 4)
    same(model, expected, IMAGES)


def test_dropping_shifts_removes_what_they_held() -> None:
    model = chain(0.5)
    masks = rows(model, "1", 0, 2)
    both = {"1": {"weight": masks["1"]["weight"], "bias": masks["1"]["weight"]}}
    expected = masked(model, both)
    compact(model, masks, IMAGES, drop_shifts=True)
    assert model[0].out_channels == 2
    same(model, expected, IMAGES)


def test_excluded_layers_keep_their_channels() -> None:
    model = chain(-0.5)
    compact(model, rows(model, "1", 0), IMAGES, exclude="0")
    assert model[0].out_channels == 4


def test_flags_survive() -> None:
    model = chain(-0.5).train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    compact(model, rows(model, "1", 0), IMAGES)
    assert model[0].out_channels == 3
    assert [module.training for module in model] == [True, False, *[True] * 6]
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert not trainable.pop("0.weight")
    assert all(trainable.values())


def test_an_attached_pruner_finds_its_sites_again() -> None:
    model = chain(-0.5)
    pruner = InstanceWisePruner(model, IMAGES, alpha=0.0)
    pruner.step()
    compact(model, rows(model, "1", 0), IMAGES)
    assert pruner.enabled
    assert pruner.sites[0].channels == 3
    model(IMAGES)
    assert pruner.keep["0"].shape == (4, 3)


def test_models_that_take_dicts_and_tuples() -> None:
    for inputs in ((IMAGES,), {"input": IMAGES}):
        model = chain(-0.5)
        compact(model, rows(model, "1", 0), inputs)
        assert model[0].out_channels == 3


def wrong(model: nn.Sequential) -> dict[str, tuple[Masks, type[Exception], str]]:
    return {
        "module": ({"9": {"weight": torch.ones(1)}}, SettingError, "no such module"),
        "shape": ({"1": {"weight": torch.ones(7)}}, SettingError, r"shape \(7,\) and there is one of shape \(4,\)"),
        "target": ({"2": {"weight": torch.ones(7)}}, SettingError, "there is none"),
        "output": ({"1": {"_output_0": torch.ones(4)}}, UnsupportedError, "no weight"),
    }


@pytest.mark.parametrize("case", wrong(chain(0.0)))
def test_masks_of_another_model_change_nothing(case: str) -> None:
    model = chain(-0.5)
    before = copy.deepcopy(model.state_dict())
    masks, error, message = wrong(model)[case]
    with pytest.raises(error, match=message):
        compact(model, rows(model, "1", 0) | masks, IMAGES)
    assert all(before[name].equal(value) for name, value in model.state_dict().items())


def test_what_compress_gives_is_two_things() -> None:
    model = chain(-0.5)
    with pytest.raises(SettingError, match="masks is a tuple, not a dict by module name: compress"):
        compact(model, (model, {}), IMAGES)


def test_a_wrapped_model_is_refused() -> None:
    model = chain(-0.5)
    model[0]._nni_wrapper = nn.Identity()
    with pytest.raises(UnsupportedError, match="unwrap_model"):
        compact(model, {}, IMAGES)
    del model[0]._nni_wrapper
    with pytest.raises(UnsupportedError, match="compact what is inside"):
        compact(torch.compile(model), {}, IMAGES)


@pytest.mark.parametrize("where", ["_trace", "get_all_groups"])
def test_what_torch_pruning_cannot_trace_changes_nothing(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self, *args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("theirs")

    model = chain(-0.5)
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(tp.DependencyGraph, where, fail)
    with pytest.raises(UnsupportedError, match=r"torch-pruning cannot .*Sequential.*theirs"):
        compact(model, rows(model, "1", 0), IMAGES)
    assert all(before[name].equal(value) for name, value in model.state_dict().items())


def test_a_removal_that_fails_in_the_model_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain(-0.5)
    InstanceWisePruner(model, IMAGES).step()
    before, prune = copy.deepcopy(model.state_dict()), tp.dependency.Group.prune

    def fails_in_the_model(self, *args: object, **kwargs: object) -> None:
        prune(self, *args, **kwargs)
        if self[0].dep.target.module in list(model.modules()):
            raise IndexError("theirs")

    monkeypatch.setattr(tp.dependency.Group, "prune", fails_in_the_model)
    with pytest.raises(UnsupportedError, match="cannot remove 1 channels of 0: IndexError"):
        compact(model, rows(model, "1", 0), IMAGES)
    assert all(before[name].equal(value) for name, value in model.state_dict().items())
    assert model[0].out_channels == 4
    assert InstanceWisePruner.of(model).enabled


def test_behind_a_pixel_shuffle_channels_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    masks = rows(model, "0", 1) | rows(model, "3", 2)
    expected = masked(model, masks)
    compact(model, masks, torch.randn(2, 3, 4, 4))
    assert (model[0].out_channels, model[3].out_channels) == (12, 3)
    same(model, expected, torch.randn(5, 3, 4, 4))
