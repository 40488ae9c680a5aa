"""Beside torch-pruning: its pruners with our importances, static and dynamic in both orders."""

import copy

import pytest
import timm
import torch
import torch_pruning as tp
from torch import nn

from isw_plugin import InstanceWisePruner
from isw_plugin.errors import SettingError, UnsupportedError
from isw_plugin.toolkits.torch_pruning import InstanceFrequencyImportance, SlimmingImportance, install, uninstall

WIDTH = 10


def chain(*gammas: list[float]) -> nn.Sequential:
    """Convolutions with batch norm, whose scales are given."""
    layers: list[nn.Module] = []
    channels = 3
    for gamma in gammas:
        norm = nn.BatchNorm2d(len(gamma))
        norm.weight.data = torch.tensor(gamma)
        layers += [nn.Conv2d(channels, len(gamma), 3, padding=1), norm, nn.ReLU()]
        channels = len(gamma)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)).eval()


def pruned(model: nn.Sequential, importance: tp.importance.Importance, ratio: float) -> list[list[float]]:
    """Prune globally; the gammas that are left, by layer."""
    pruner = tp.pruner.BNScalePruner(
        model,
        torch.zeros(1, 3, 8, 8),
        importance,
        pruning_ratio=ratio,
        global_pruning=True,
        ignored_layers=[model[-1]],
        max_pruning_ratio=1.0,
    )
    pruner.step()
    model(torch.zeros(1, 3, 8, 8))
    return [module.weight.tolist() for module in model if isinstance(module, nn.BatchNorm2d)]


def even(low: float, high: float) -> list[float]:
    return torch.linspace(low, high, WIDTH).tolist()


def test_the_threshold_is_global() -> None:
    """The low layer loses its channels to the high one's, whatever share that is."""
    low, high = even(0.1, 0.9), even(0.5, 1.3)
    left = pruned(chain(low, high), SlimmingImportance(), 0.5)
    smallest = sorted(low + high)[WIDTH]
    assert left == [
        pytest.approx([gamma for gamma in low if gamma >= smallest - 1e-6]),
        pytest.approx([gamma for gamma in high if gamma >= smallest - 1e-6]),
    ]


def test_the_magnitude_counts_not_the_sign() -> None:
    left = pruned(chain([-1.0, 0.1, 0.9, -0.2]), SlimmingImportance(), 0.5)
    assert left == [pytest.approx([-1.0, 0.9])]


@pytest.mark.parametrize("min_channels", [1, 3])
def test_a_layer_whole_under_the_threshold_keeps_its_largest(min_channels: int) -> None:
    low, high = even(0.01, 0.1), even(1.0, 2.0)
    left = pruned(chain(low, high), SlimmingImportance(min_channels), 0.5)
    assert left[0] == pytest.approx(low[-min_channels:])


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.67])
def test_the_share_pruned_is_the_ratio(ratio: float) -> None:
    generator = torch.Generator().manual_seed(0)
    gammas = [(torch.rand(50, generator=generator) * scale).tolist() for scale in (0.2, 1.0, 3.0)]
    left = pruned(chain(*gammas), SlimmingImportance(), ratio)
    assert sum(map(len, left)) == pytest.approx(150 * (1 - ratio), abs=2)


def test_the_safe_channels_of_a_layer_under_the_threshold_cost_others() -> None:
    """The total stays: the channel that a doomed layer keeps is taken from elsewhere."""
    left = pruned(chain(even(0.01, 0.1), even(1.0, 2.0)), SlimmingImportance(), 0.5)
    assert sum(map(len, left)) == WIDTH


def test_torch_prunings_own_default_prunes_every_layer_alike() -> None:
    """Why SlimmingImportance exists."""
    left = pruned(chain(even(0.01, 0.1), even(1.0, 2.0)), tp.importance.BNScaleImportance(), 0.5)
    assert list(map(len, left)) == pytest.approx([WIDTH / 2] * 2, abs=1)


def test_torch_prunings_own_without_a_normalizer_spares_doomed_layers() -> None:
    """Why SlimmingImportance exists."""
    left = pruned(chain(even(0.01, 0.1), even(1.0, 2.0)), tp.importance.BNScaleImportance(normalizer=None), 0.5)
    assert len(left[0]) == WIDTH


def test_a_residual_add_ranks_its_layers_together() -> None:
    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)) for _ in range(2))
            self.c = nn.Conv2d(4, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.a(x) + self.b(x))

    model = Add().eval()
    model.a[1].weight.data = torch.tensor([1.0, 0.5, 0.0, 0.2])
    model.b[1].weight.data = torch.tensor([0.0, 0.7, 0.1, 0.1])
    graph = tp.DependencyGraph().build_dependency(model, torch.zeros(1, 3, 4, 4))
    group = graph.get_pruning_group(model.a[0], tp.prune_conv_out_channels, idxs=list(range(4)))
    importance = SlimmingImportance()(group)
    assert importance.tolist() == pytest.approx([0.5, 1e6 + 0.6, 0.05, 0.15])


def test_a_group_without_batch_norm_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    graph = tp.DependencyGraph().build_dependency(model, torch.zeros(1, 3, 4, 4))
    group = graph.get_pruning_group(model[0], tp.prune_conv_out_channels, idxs=list(range(4)))
    assert SlimmingImportance()(group) is None


def test_equal_gammas() -> None:
    """Of a network that was not trained with L1: every channel but the safe ones lies at the threshold."""
    left = pruned(chain([1.0] * WIDTH, [1.0] * WIDTH), SlimmingImportance(), 0.5)
    assert list(map(len, left)) == [1, 1]


@pytest.mark.parametrize("min_channels", [0, -1])
def test_a_layer_needs_a_channel(min_channels: int) -> None:
    with pytest.raises(ValueError, match=f"min_channels={min_channels}"):
        SlimmingImportance(min_channels)
    pruner = InstanceWisePruner(used_network(), lit()[:1])
    with pytest.raises(ValueError, match=f"min_channels={min_channels}"):
        InstanceFrequencyImportance(pruner, [lit()], min_channels=min_channels)


def test_regularize_pulls_on_gammas_alone() -> None:
    model = chain(even(0.1, 1.0), even(0.1, 1.0)).train()
    pruner = tp.pruner.BNScalePruner(
        model, torch.zeros(1, 3, 8, 8), SlimmingImportance(), reg=0.5, ignored_layers=[model[-1]]
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    pruner.regularize(model)
    pulled = {name for name, parameter in model.named_parameters() if parameter.grad.any()}
    assert pulled == {"1.weight", "4.weight"}
    assert model[1].weight.grad.tolist() == [0.5] * WIDTH


def test_asking_for_more_than_is_left_still_prunes() -> None:
    """An infinite threshold would select every channel of every layer, and torch-pruning would skip them all."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 2, 1)
    )
    for norm in (model[1], model[3]):
        nn.init.uniform_(norm.weight, 0.1, 1.0)
    tp.pruner.BNScalePruner(
        model,
        torch.zeros(1, 3, 4, 4),
        importance=SlimmingImportance(8),
        global_pruning=True,
        pruning_ratio=0.67,
        ignored_layers=[model[4]],
    ).step()
    assert model[1].num_features + model[3].num_features <= 16


# -- static and dynamic, in both orders ------------------------------------------------------------

NETWORKS = ["vgg16", "resnet18", "resnet50", "mobilenetv2_035", "densenet", "regnetx_002", "test_vit"]


def network(name: str) -> nn.Module:
    """A network of the family, small where timm lets it be, with random batch norms."""
    torch.manual_seed(0)
    if name == "vgg16":
        return shaken(
            timm.models.vgg.VGG(
                cfg=[16, "M", 24, "M", 32, 32, "M"], num_classes=5, mlp_ratio=1 / 64, norm_layer=nn.BatchNorm2d
            )
        )
    if name == "densenet":
        return shaken(timm.models.densenet.DenseNet(growth_rate=8, block_config=(3, 3), num_classes=5))
    return shaken(timm.create_model(name, num_classes=5))


def shaken(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


def inputs_of(name: str, count: int = 2) -> torch.Tensor:
    return torch.randn(
        count, 3, *((160, 160) if "vit" in name else (64, 64)), generator=torch.Generator().manual_seed(0)
    )


def static_pruner(
    model: nn.Module, name: str, importance: tp.importance.Importance | None = None
) -> tp.pruner.BasePruner:
    """As torch-pruning's README has it; of a transformer, only the hidden layers of its MLPs."""
    hidden = (
        [module for part, module in model.named_modules() if part.endswith(("qkv", "proj", "fc2"))]
        if "vit" in name
        else []
    )
    classifier = [model.get_classifier()]
    importance = importance or tp.importance.GroupMagnitudeImportance(p=2)
    return tp.pruner.BasePruner(
        model, inputs_of(name, 1), importance, pruning_ratio=0.5, ignored_layers=hidden + classifier
    )


def widths(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def gated(pruner: InstanceWisePruner, images: torch.Tensor) -> torch.Tensor:
    with pruner.gating(alpha=0.1, beta=0.8), torch.no_grad():
        return pruner.model(images)


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
@pytest.mark.parametrize("name", NETWORKS)
def test_static_first_then_dynamic(name: str) -> None:
    model, images = network(name), inputs_of(name)
    whole = {site.name: site.channels for site in InstanceWisePruner(copy.deepcopy(model), images[:1]).sites}
    static_pruner(model, name).step()
    with torch.no_grad():
        slim = model(images)
    pruner = InstanceWisePruner(model, images[:1])
    sizes = {site.name: site.channels for site in pruner.sites}
    assert sizes.keys() == whole.keys()
    assert sum(sizes.values()) < 0.75 * sum(whole.values())
    assert torch.equal(gated(pruner, images), gated(pruner, images))
    assert not torch.equal(gated(pruner, images), slim)
    assert all(pruner.keep[name].shape == (len(images), channels) for name, channels in sizes.items())
    with torch.no_grad():
        assert torch.equal(model(images), slim)
    pruner.lambda_ = 1e-4
    pruner.regularize(model.train(), model(images).square().mean()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
@pytest.mark.parametrize("enabled", [False, True], ids=["off", "on"])
@pytest.mark.parametrize("name", NETWORKS)
def test_dynamic_first_then_static(name: str, enabled: bool) -> None:
    """The channels that go are the same as without gates, and update_regularizer finds the sites again."""
    images, bare = inputs_of(name), network(name)
    static_pruner(bare, name).step()
    model = network(name)
    pruner = InstanceWisePruner(model, images[:1])
    if enabled:
        pruner.enable(alpha=0.1, beta=0.8)
    static_pruner(model, name).step()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(model.parameters(), bare.parameters(), strict=True))
    pruner.update_regularizer()
    assert pruner.enabled == enabled
    assert pruner.sites == InstanceWisePruner(bare, images[:1]).sites
    torch.testing.assert_close(gated(pruner, images), gated(InstanceWisePruner.of(bare), images))


# -- ranking by use --------------------------------------------------------------------------------


def used_network() -> nn.Sequential:
    """A convolution whose channels 0 to 3 are used by 0, 1, 2 and 4 of the four images of ``lit``."""
    model = nn.Sequential(
        nn.Conv2d(4, 4, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(4, 3, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 2),
    )
    model[0].weight.data = torch.eye(4)[:, :, None, None]
    return model.eval()


def lit() -> torch.Tensor:
    images = torch.zeros(4, 4, 5, 5)
    for channel, count in enumerate((0, 1, 2, 4)):
        images[:count, channel] = 1.0
    return images


def importance_of(model: nn.Module, importance: InstanceFrequencyImportance, layer: nn.Module) -> torch.Tensor | None:
    graph = tp.DependencyGraph().build_dependency(model, torch.zeros(1, 4, 5, 5))
    return importance(graph.get_pruning_group(layer, tp.prune_conv_out_channels, idxs=list(range(layer.out_channels))))


def test_channels_rank_by_the_images_that_use_them() -> None:
    model = used_network()
    pruner = InstanceWisePruner(model, lit()[:1], beta=0.0)
    found = importance_of(model, InstanceFrequencyImportance(pruner, [lit()[:1], lit()[1:]], normalizer=None), model[0])
    assert found.argsort().tolist() == [0, 1, 2, 3]
    assert found[0] == 0
    assert found[:3].mul(5).floor().tolist() == [0, 1, 2]
    assert found[3] > 1e5  # the last one is safe
    assert not pruner.enabled


def test_layers_are_compared_by_their_means() -> None:
    """A layer whose gates drop more than another's loses as many channels."""
    model = used_network()
    pruner = InstanceWisePruner(model, lit()[:1], beta=0.0)
    plain, divided = (
        importance_of(model, InstanceFrequencyImportance(pruner, [lit()], normalizer=normalizer), model[0])[:3]
        for normalizer in (None, "mean")
    )
    ratio = (divided / plain)[1:]
    assert ratio.min() > 1.5
    torch.testing.assert_close(ratio, ratio[:1].expand(2))
    with pytest.raises(SettingError, match="normalizer='max'"):
        InstanceFrequencyImportance(pruner, [lit()], normalizer="max")


def test_gates_count() -> None:
    """Channel 1 is small where it is on: with gates on, no image uses it."""
    model = used_network()
    model[0].weight.data[1] *= 1e-3
    pruner = InstanceWisePruner(model, lit()[:1], alpha=0.0, beta=0.5)
    assert importance_of(model, InstanceFrequencyImportance(pruner, [lit()]), model[0])[1] == 0
    pruner.enable(beta=0.0)
    assert importance_of(model, InstanceFrequencyImportance(pruner, [lit()], normalizer=None), model[0])[1] > 0.2


def test_equal_use_ranks_by_norm() -> None:
    model = used_network()
    model[0].weight.data *= torch.tensor([2.0, 1.0, 4.0, 3.0])[:, None, None, None]
    pruner = InstanceWisePruner(model, lit()[:1], beta=0.0)
    found = importance_of(model, InstanceFrequencyImportance(pruner, [torch.ones(2, 4, 5, 5)]), model[0])
    assert found.argsort().tolist() == [1, 0, 3, 2]


def test_a_channel_counts_as_its_most_used_reader_says() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)
            self.a.weight.data = torch.eye(4)[:, :, None, None]
            self.act = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.act(self.a(x))
            return self.b(x) + self.c(torch.relu(x - 0.5 * x.new_tensor([3, 3, 0, 0]).view(1, 4, 1, 1)))

    model = Two().eval()
    pruner = InstanceWisePruner(model, lit()[:1], beta=0.0)
    found = importance_of(model, InstanceFrequencyImportance(pruner, [torch.ones(2, 4, 5, 5)]), model.a)
    assert (found > 0.6).all()


@pytest.mark.parametrize(("min_channels", "widths"), [(1, [3, 1]), (2, [2, 2])])
def test_a_layer_of_rarely_used_channels_keeps_its_most_used(min_channels: int, widths: list[int]) -> None:
    """Without safe channels it would lie whole below the threshold, be skipped, and keep all four."""
    model = nn.Sequential(
        *(nn.Conv2d(4, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)),
    ).eval()
    strengths = torch.tensor([1.0, 1.1, 1.2, 1.3])
    for layer in (model[0], model[2]):
        layer.weight.data = (torch.eye(4) * strengths)[:, :, None, None]
    nn.init.constant_(model[2].bias, -1.8)  # only the first image is bright enough
    images = torch.ones(4, 4, 5, 5)
    images[0] = 2.0
    pruner = InstanceWisePruner(model, images[:1], beta=0.0)
    importance = InstanceFrequencyImportance(pruner, [images], min_channels=min_channels, normalizer=None)
    tp.pruner.BasePruner(
        model, images[:1], importance, pruning_ratio=0.5, global_pruning=True, ignored_layers=[model[4], model[-1]]
    ).step()
    assert [model[0].out_channels, model[2].out_channels] == widths
    kept = model[2].weight.detach().flatten(1).amax(1)
    assert kept.tolist() == strengths[-widths[1] :].tolist()


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
@pytest.mark.parametrize("name", NETWORKS)
def test_it_prunes_networks_in_use(name: str) -> None:
    model, images = network(name), inputs_of(name)
    before = sum(parameter.numel() for parameter in model.parameters())
    pruner = InstanceWisePruner(model, images[:1], alpha=0.1, beta=0.8)
    static_pruner(model, name, InstanceFrequencyImportance(pruner, [images])).step()
    pruner.update_regularizer()
    assert model(images).shape == (len(images), 5)
    assert sum(parameter.numel() for parameter in model.parameters()) < 0.9 * before


def test_channels_that_nobody_reads_are_left_alone() -> None:
    model = used_network()[:3]
    pruner = InstanceWisePruner(model, lit()[:1])
    assert importance_of(model, InstanceFrequencyImportance(pruner, [lit()]), model[2]) is None


def test_a_pruned_model_must_be_seen_again() -> None:
    model = used_network()
    pruner = InstanceWisePruner(model, lit()[:1], beta=0.0)
    importance = InstanceFrequencyImportance(pruner, [lit()])
    tp.pruner.BasePruner(model, lit()[:1], importance, pruning_ratio=0.5, ignored_layers=[model[-1]]).step()
    with pytest.raises(SettingError, match=r"2 has 2 input channels and had 4 .*make the importance anew"):
        importance_of(model, importance, model[0])
    pruner.update_regularizer()
    assert len(importance_of(model, InstanceFrequencyImportance(pruner, [lit()]), model[0])) == 2


def test_no_images_no_ranking() -> None:
    model = used_network()
    with pytest.raises(SettingError, match="no images"):
        InstanceFrequencyImportance(InstanceWisePruner(model, lit()[:1]), [])


# -- our names in theirs ---------------------------------------------------------------------------


def test_install_and_uninstall() -> None:
    places = [
        (tp.pruner, "InstanceWisePruner"),
        (tp.importance, "SlimmingImportance"),
        (tp.importance, "InstanceFrequencyImportance"),
    ]
    assert not any(hasattr(*place) for place in places)
    install()
    install()
    try:
        assert tp.pruner.InstanceWisePruner is InstanceWisePruner
        assert tp.importance.SlimmingImportance is SlimmingImportance
        assert tp.importance.InstanceFrequencyImportance is InstanceFrequencyImportance
    finally:
        uninstall()
        uninstall()
    assert not any(hasattr(*place) for place in places)


def test_a_name_of_theirs_is_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tp.importance, "SlimmingImportance", int, raising=False)
    with pytest.raises(UnsupportedError, match="has a SlimmingImportance already"):
        install()
    assert not hasattr(tp.pruner, "InstanceWisePruner")
    uninstall()
    assert tp.importance.SlimmingImportance is int
