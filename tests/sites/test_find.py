from collections import Counter
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from isw_plugin.errors import NoSitesError, PatternError
from isw_plugin.sites import LAYERS, Found, Site, Tap, default_inputs, find_sites
from tests.conftest import Net, Plain, Preactivation, Residual, made


def vgg16() -> nn.Module:
    model = timm.create_model("vgg16_bn", num_classes=10)
    model.pre_logits, model.head.fc = nn.Identity(), nn.Linear(512, 10)
    return model


ZOO: dict[str, tuple[Callable[[], nn.Module], Tensor | None, int, int]] = {
    # name: (make, inputs, sites, channels)
    "vgg16_bn": (vgg16, torch.zeros(1, 3, 32, 32), 13, 4224),
    "resnet18": (lambda: timm.create_model("resnet18"), None, 17, 3904),
    "torchvision_resnet18": (torchvision.models.resnet18, torch.zeros(1, 3, 64, 64), 17, 3904),
    "mobilenetv2_100": (lambda: timm.create_model("mobilenetv2_100"), None, 52, 17056),
    "densenet121": (lambda: timm.create_model("densenet121"), None, 120, 41760),
    "inception_v3": (lambda: timm.create_model("inception_v3"), None, 94, 17216),
    "efficientnet_b0": (lambda: timm.create_model("efficientnet_b0"), None, 65, 21388),
    "resnetv2_50": (lambda: timm.create_model("resnetv2_50"), None, 49, 22720),
    "vit_tiny": (lambda: timm.create_model("vit_tiny_patch16_224"), None, 12, 12 * 768),
    "swin_tiny": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224"),
        None,
        12,
        2 * 384 + 2 * 768 + 6 * 1536 + 2 * 3072,
    ),
}


@pytest.fixture(scope="module", params=ZOO)
def zoo(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Found]:
    return (request.param, *found_in(request.param))


def found_in(name: str, scope: str = "all") -> tuple[nn.Module, Found]:
    make, inputs, *_ = ZOO[name]
    model = make()
    return model, find_sites(model, default_inputs(model) if inputs is None else inputs, scope=scope)


def by_name(found: Found) -> dict[str, Site]:
    return {site.name: site for site in found.sites}


def found(model: nn.Module, *shape: int, **settings: object) -> Found:
    return find_sites(model, torch.zeros(1, *shape), **settings)


# -- the zoo ---------------------------------------------------------------------------------------


def test_sites_and_channels_are_as_counted_by_hand(zoo: tuple[str, nn.Module, Found]) -> None:
    name, _, found = zoo
    assert (len(found.sites), sum(site.channels for site in found.sites)) == ZOO[name][2:]


def test_every_layer_is_in_one_site_or_left_out_with_a_reason(zoo: tuple[str, nn.Module, Found]) -> None:
    _, model, found = zoo
    layers = {name for name, module in model.named_modules() if isinstance(module, LAYERS)}
    placed = Counter(name for site in found.sites for name in site.layers if name in layers)
    placed.update(found.left_out.keys())
    assert placed == dict.fromkeys(layers, 1)
    assert all(found.left_out.values())


def test_consumers_lie_within_their_readers_input(zoo: tuple[str, nn.Module, Found]) -> None:
    _, model, found = zoo
    for site in found.sites:
        for consumer in site.consumers:
            layer = model.get_submodule(consumer.layer)
            columns = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
            assert consumer.start + site.channels * consumer.repeat <= columns


def test_no_input_column_is_filled_twice(zoo: tuple[str, nn.Module, Found]) -> None:
    _, _, found = zoo
    columns = Counter(
        (consumer.layer, consumer.start + c)
        for site in found.sites
        for consumer in site.consumers
        for c in range(site.channels * consumer.repeat)
    )
    assert max(columns.values()) == 1


def test_sites_are_named_after_their_first_layer(zoo: tuple[str, nn.Module, Found]) -> None:
    _, model, found = zoo
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    for site in found.sites:
        assert site.name == min(site.layers, key=order.__getitem__)


def test_the_classifier_is_left_alone() -> None:
    _, found = found_in("resnet18")
    assert found.left_out == {"fc": "the classifier"}


def test_branches_that_end_in_one_map_share_it() -> None:
    _, found = found_in("resnet18")
    shared = [site.layers for site in found.sites if len(site.layers) > 1]
    assert shared == [(f"layer{n}.0.conv2", f"layer{n}.0.downsample.0") for n in (2, 3, 4)]


def test_an_activation_module_called_twice_is_no_tap() -> None:
    """torchvision's blocks use one ReLU twice: the map is touched at the next convolution's input."""
    _, found = found_in("torchvision_resnet18")
    sites = by_name(found)
    assert sites["layer1.0.conv1"].taps == (Tap("layer1.0.conv2", 0),)
    assert sites["layer1.0.conv2"].taps == (Tap("layer1.0"),)


def test_both_resnets_have_the_same_sites() -> None:
    timm_sites, other = found_in("resnet18")[1].sites, found_in("torchvision_resnet18")[1].sites
    assert [(site.layers, site.channels) for site in timm_sites] == [(site.layers, site.channels) for site in other]


TORCHVISION = ["alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "mnasnet0_5", "mobilenet_v2"]
TORCHVISION += ["mobilenet_v3_small", "regnet_y_400mf", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "vgg11"]
TORCHVISION += ["vit_b_16"]


@pytest.mark.parametrize("name", TORCHVISION)
def test_every_layer_of_torchvisions_models_has_its_place(name: str) -> None:
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # its constructor reads numbers
        model = torchvision.models.get_model(name, **options)
    result = find_sites(model, torch.zeros(1, 3, 224, 224, device="meta"))
    layers = {name for name, module in model.named_modules() if isinstance(module, LAYERS)}
    placed = Counter(name for site in result.sites for name in site.layers if name in layers)
    placed.update(result.left_out.keys() & layers)
    assert placed == dict.fromkeys(layers, 1)
    assert len(result.sites) >= 7


def test_a_projections_site_is_the_block_output_after_the_add() -> None:
    _, found = found_in("mobilenetv2_100")
    site = by_name(found)["blocks.1.1.conv_pwl"]
    assert site.taps == (Tap("blocks.1.1"),)
    assert [consumer.layer for consumer in site.consumers] == ["blocks.2.0.conv_pw"]


def test_a_norm_after_a_concatenation_names_its_site() -> None:
    _, found = found_in("densenet121")
    site = by_name(found)["features.denseblock1.denselayer2.norm1"]
    assert (site.channels, site.layers) == (96, (site.name,))
    assert [consumer.layer for consumer in site.consumers] == ["features.denseblock1.denselayer2.conv1"]


def test_a_concatenation_is_walked() -> None:
    _, found = found_in("inception_v3")
    starts = {
        site.name: consumer.start
        for site in found.sites
        for consumer in site.consumers
        if consumer.layer == "Mixed_5c.branch1x1.conv"
    }
    assert starts == {
        "Mixed_5b.branch1x1.conv": 0,
        "Mixed_5b.branch5x5_2.conv": 64,
        "Mixed_5b.branch3x3dbl_3.conv": 128,
        "Mixed_5b.branch_pool.conv": 224,
    }


def test_squeeze_excite_does_not_read_the_map_it_scales() -> None:
    _, found = found_in("efficientnet_b0")
    sites = by_name(found)
    assert [consumer.layer for consumer in sites["blocks.0.0.conv_dw"].consumers] == ["blocks.0.0.conv_pw"]
    assert [consumer.layer for consumer in sites["blocks.0.0.se.conv_reduce"].consumers] == [
        "blocks.0.0.se.conv_expand"
    ]
    assert found.left_out["blocks.0.0.se.conv_expand"] == "scales another map"


@pytest.mark.parametrize("name", ["vit_tiny", "swin_tiny"])
def test_transformers_have_their_mlps_as_sites_with_channels_last(name: str) -> None:
    _, found = found_in(name)
    assert all(site.name.endswith("mlp.fc1") and site.axis == -1 for site in found.sites)
    assert all([c.layer for c in site.consumers] == [site.name[:-1] + "2"] for site in found.sites)


def test_preactivation_sites_are_the_normed_maps() -> None:
    _, found = found_in("resnetv2_50")
    site = by_name(found)["stages.1.blocks.0.norm1"]  # after a residual add
    assert site.taps == (Tap("stages.1.blocks.0.norm1"),)
    readers = [consumer.layer for consumer in site.consumers]
    assert readers == ["stages.1.blocks.0.downsample.conv", "stages.1.blocks.0.conv1"]
    stem = by_name(found)["stem.conv"]  # a pool is no join: the walk goes on to the norm behind it
    assert stem.taps == (Tap("stages.0.blocks.0.norm1"),)


def test_an_image_that_is_normed_is_no_site() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    assert [site.name for site in find_sites(model, torch.zeros(1, 3, 4, 4)).sites] == ["1"]


def test_a_norm_behind_a_pool_makes_the_map() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    (site,) = find_sites(model, torch.zeros(1, 3, 4, 4), layers="0").sites
    assert (site.name, site.taps) == ("0", (Tap("3"),))


def test_squeeze_excite_before_a_residual_add_is_walked_through() -> None:
    model = timm.create_model("seresnet18")
    found = find_sites(model, torch.zeros(1, 3, 64, 64))
    names = {name for site in found.sites for name in site.layers}
    assert "layer1.0.conv2" in names
    assert set(found.left_out.values()) == {"scales another map", "the classifier"}


@pytest.mark.parametrize("size", [32, 224])
def test_squeeze_excite_is_told_apart_on_maps_of_one_pixel(size: int) -> None:
    found = find_sites(timm.create_model("mobilenetv3_small_100"), torch.zeros(1, 3, size, size))
    assert len(found.sites) == 44
    readers = {consumer.layer for site in found.sites for consumer in site.consumers}
    assert not any(name.endswith("se.conv_reduce") for name in readers)


# -- nets that carry their expected answers --------------------------------------------------------


@pytest.mark.parametrize("scope", ["all", "consumers"])
def test_tiny_nets_have_the_sites_they_declare(net: Net, scope: str) -> None:
    sites = find_sites(net, net.images(1), scope=scope).sites
    assert {
        site.name: (site.channels, {c.layer: (c.start, c.repeat) for c in site.consumers}) for site in sites
    } == net.sites


def test_the_shape_is_one_instances() -> None:
    assert by_name(found(made(Plain), 3, 8, 8))["c1"].shape == (4, 6, 6)


def test_sites_come_in_the_order_of_execution() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.middle, self.first = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.middle(self.first(x)))

    assert [site.name for site in found(Reversed(), 4).sites] == ["first", "middle"]


def test_an_identity_that_passes_a_map_on_is_not_where_it_is_made() -> None:
    class Early(nn.Module):
        """The readers of relu(a) are b and, through the identity, c; b runs first."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))
            self.identity = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            return self.b(x) + self.c(self.identity(x))

    assert by_name(found(Early(), 3, 4, 4))["a"].taps == (Tap("b", 0), Tap("c", 0))


def test_under_scope_consumers_a_map_is_seen_before_its_first_reader() -> None:
    class PoolFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))
            self.pool = nn.MaxPool2d(2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            return self.b(self.pool(x)).mean() + self.c(x)

    assert by_name(found(PoolFirst(), 3, 4, 4, scope="consumers"))["a"].taps == (Tap("pool", 0),)


def test_functional_maps_are_touched_where_the_outermost_module_takes_them_in() -> None:
    """The block's identity gives the stem's map too, to the shortcut alone: it is no place for it."""
    sites = by_name(found(made(Residual), 3, 8, 8))
    assert sites["stem"].taps == (Tap("block", 0),)
    assert sites["block.c1"].taps == (Tap("block.c2", 0),)
    assert sites["block.c2"].taps == (Tap("block"),)


def test_under_scope_consumers_a_shortcut_needs_no_module() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            return self.c(F.relu(x + self.b(x)))

    assert found(Bare(), 3, 4, 4).left_out["a"] == "no module's output or input is this map alone"
    assert "a" in by_name(found(Bare(), 3, 4, 4, scope="consumers"))


class ByForward(nn.Module):
    """Three linear layers, a norm, and whatever a test makes of them."""

    def __init__(self, forward: Callable[[nn.ModuleDict, Tensor], Tensor]) -> None:
        super().__init__()
        self.m = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abcd"})
        self.m["norm"] = nn.LayerNorm(4)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.m, x)


LEFT_OUT: list[tuple[str, Callable[[nn.ModuleDict, Tensor], Tensor], str, str]] = [
    # what, forward, layer, reason
    ("output", lambda m, x: m["b"](m["a"](x)), "b", "the model's output"),
    ("called twice", lambda m, x: m["c"](m["b"](m["a"](m["a"](x)))), "a", "called 2 times in one forward"),
    ("not run", lambda m, x: m["c"](m["b"](x)), "a", "not run in the probe"),
    ("split", lambda m, x: m["c"](m["b"](x)).sum() + m["a"](x).relu() * 2 - m["a"](x), "a", "called 2 times"),
    ("norm", lambda m, x: m["b"](m["c"](m["norm"](m["a"](x)))), "a", "norm is a norm over channels"),
    ("odd operation", lambda m, x: m["c"](m["b"](m["a"](x).cumsum(1))), "a", "cumsum reads it first"),
    ("softmax", lambda m, x: m["c"](m["b"](m["a"](x).softmax(-1))), "a", "_softmax reads it first"),
    ("other shape", lambda m, x: m["d"](m["c"](x)) + m["b"](m["a"](x[:, :1]) + x), "a", "added to a map of another"),
    ("windows", lambda m, x: m["d"](m["c"](x)) + m["b"](m["a"](x.view(-1, 4))).view(-1, 3, 4), "a", "instance axis"),
    ("after a join", lambda m, x: m["d"](m["c"](F.batch_norm(m["a"](x), None, None, training=True))), "a", "batch"),
]


@pytest.mark.parametrize(("forward", "layer", "reason"), [row[1:] for row in LEFT_OUT], ids=[r[0] for r in LEFT_OUT])
def test_layers_are_left_out_for_a_reason(forward: Callable, layer: str, reason: str) -> None:
    assert reason in found(ByForward(forward), 3, 4).left_out[f"m.{layer}"]


THROUGH: list[Callable[[], nn.Module]] = [
    lambda: nn.MaxPool2d(2),
    lambda: nn.AvgPool2d(2),
    lambda: nn.AdaptiveAvgPool2d(2),
    lambda: nn.AdaptiveMaxPool2d(2),
    lambda: nn.Upsample(scale_factor=2),
    lambda: nn.ZeroPad2d(1),
    lambda: nn.Dropout2d(),
    nn.Identity,
]


@pytest.mark.parametrize("between", THROUGH, ids=lambda make: type(make()).__name__)
def test_readers_are_seen_through_what_keeps_channels_and_zeros(between: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), between(), nn.Conv2d(4, 5, 1))
    (site,) = found(model, 3, 8, 8).sites
    assert [consumer.layer for consumer in site.consumers] == ["3"]
    assert site.taps[0] in (Tap("1"), Tap("2"))


ACTIVATIONS = [nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.Sigmoid]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_map_is_what_comes_after_the_activation(activation: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), activation(), nn.Conv2d(4, 5, 1))
    (site,) = found(model, 3, 8, 8).sites
    assert site.taps == (Tap("2"),)


@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d])
def test_convolutions_of_every_kind_are_layers(layer: type[nn.Module]) -> None:
    model = nn.Sequential(layer(3, 4, 1), nn.ReLU(), layer(4, 5, 1))
    size = {nn.Conv1d: 1, nn.Conv3d: 3}.get(layer, 2)
    (site,) = found(model, 3, *[4] * size).sites
    assert (site.channels, site.axis) == (4, 1)


# -- what hides a map ------------------------------------------------------------------------------


def layers_of(sites: Found) -> dict[str, tuple[str, ...]]:
    return {site.name: site.layers for site in sites.sites}


GATED: list[tuple[str, Callable[[nn.ModuleDict, Tensor], Tensor], tuple[str, ...]]] = [
    # what, forward, layers of the only site
    ("pair", lambda m, x: m["c"](m["a"](x).sigmoid() * m["b"](x)), ("m.a", "m.b")),
    ("halves", lambda m, x: m["c"](torch.mul(*(lambda p, q: (F.silu(p), q))(*m["wide"](x).chunk(2, -1)))), ("m.wide",)),
    ("swish", lambda m, x: m["c"]((lambda y: y * torch.sigmoid(y))(m["a"](x))), ("m.a",)),
    ("quick gelu", lambda m, x: m["c"]((lambda y: y * torch.sigmoid(1.702 * y))(m["a"](x))), ("m.a",)),
    ("response norm", lambda m, x: m["c"]((lambda y: y + y * (y * y).sum((1, 2), True).sqrt())(m["a"](x))), ("m.a",)),
    ("norm behind an activation", lambda m, x: m["c"](m["norm"](m["a"](x).relu())), ("m.a",)),
    ("activation behind a norm", lambda m, x: m["c"](m["norm"](m["a"](x)).relu()), ("m.a",)),
    ("norm behind a product", lambda m, x: m["c"](m["norm"](m["a"](x) * m["b"](x))), ("m.a", "m.b")),
    ("powers", lambda m, x: m["c"](m["a"](x).relu() ** 2 * 0.5 + 0.1), ("m.a",)),
    ("difference", lambda m, x: m["c"](m["a"](x) - m["b"](x)), ("m.a", "m.b")),
    ("folded", lambda m, x: m["c"](F.relu(m["bn"](m["a"](x).flatten(0, 1)).view(-1, 3, 4))), ("m.a",)),
    (
        "beside attention",
        lambda m, x: (lambda p, q: m["c"](p.relu()) * q.softmax(1))(*m["wide"](x).split((4, 4), -1)),
        ("m.wide",),
    ),
]


@pytest.mark.parametrize(("forward", "layers"), [row[1:] for row in GATED], ids=[row[0] for row in GATED])
def test_a_map_is_found_behind_what_hides_it(forward: Callable, layers: tuple[str, ...]) -> None:
    model = ByForward(forward)
    model.m["wide"], model.m["bn"] = nn.Linear(4, 8), nn.BatchNorm1d(4)
    result = found(model, 3, 4)
    assert layers_of(result) == {layers[0]: layers}
    (site,) = result.sites
    assert (site.channels, site.axis, [c.layer for c in site.consumers]) == (4, -1, ["m.c"])


def test_a_map_that_only_functions_touch_is_taken_in_its_next_form() -> None:
    """An activation function, then a scale, in one module: the module's output is the map."""

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x) * 1.7

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Scaled(), nn.Conv2d(4, 5, 1))
    assert by_name(found(model, 3, 8, 8))["0"].taps == (Tap("1"),)


def test_a_scale_that_was_expanded_is_no_map() -> None:
    """Efficient channel attention expands its scale to the map's shape."""
    sites = found(timm.create_model("ecaresnet26t"), 3, 64, 64)
    assert [c.layer for c in by_name(sites)["layer1.0.conv2"].consumers] == ["layer1.0.conv3"]
    assert "layer2.0.se.conv" in sites.left_out


def test_readers_are_seen_through_blurring_pools() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), timm.layers.BlurPool2d(4), nn.Conv2d(4, 5, 1))
    (site,) = found(model, 3, 8, 8).sites
    assert (site.taps, site.consumers[0].layer) == ((Tap("1"),), "3")


@pytest.mark.parametrize("norm", [timm.layers.RmsNorm, timm.layers.SimpleNorm])
def test_norms_of_other_libraries_are_norms(norm: type[nn.Module]) -> None:
    class Prenorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.fc1, self.fc2 = nn.Linear(4, 4), norm(4), nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.a(x)
            return x + self.fc2(self.fc1(self.norm(x)).relu())

    result = found(Prenorm(), 3, 4)
    assert layers_of(result) == {"fc1": ("fc1",)}


def test_a_weight_used_without_its_layer_and_a_convolution_of_ones_own_are_said() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
            self.kernel = nn.Parameter(torch.ones(4, 4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = F.conv2d(self.first(x), self.second.weight)
            return self.last(F.conv2d(self.last(x).relu().repeat(1, 2, 1, 1), self.kernel * 2))

    reasons = found(nn.Sequential(nn.Conv2d(3, 3, 1), Own()), 3, 4, 4).left_out
    assert reasons["1.second"] == "its weight is used without calling it"
    assert reasons["1"] == "computes a convolution of its own"


def test_no_two_sites_fill_a_column_where_maps_of_one_pixel_are_multiplied() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x) * self.b(x))

    assert layers_of(found(Pair(), 3, 1, 1)) == {"a": ("a", "b")}


# -- choosing, and errors --------------------------------------------------------------------------


def test_what_is_not_selected_is_left_out() -> None:
    result = found(made(Plain), 3, 8, 8, layers="c1")
    assert [site.name for site in result.sites] == ["c1"]
    assert result.left_out["c2"] == "not selected by layers / exclude"


def test_a_site_is_selected_by_any_of_its_layers() -> None:
    model = timm.create_model("test_resnet")
    result = find_sites(model, default_inputs(model), layers="layer2.0.downsample.1")
    assert [site.name for site in result.sites] == ["layer2.0.conv2"]


def test_a_norm_after_a_join_can_be_selected() -> None:
    net = made(Preactivation)
    assert [site.name for site in find_sites(net, net.images(1), "bn3").sites] == ["bn3"]


def test_a_pattern_without_a_match_is_an_error() -> None:
    with pytest.raises(PatternError, match="c9"):
        found(made(Plain), 3, 8, 8, layers="c9")


def test_layers_without_a_site_are_an_error_with_the_reason() -> None:
    with pytest.raises(NoSitesError, match="fc: the model's output"):
        found(made(Plain), 3, 8, 8, layers="fc")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Sequential(nn.Flatten(), nn.ReLU()), "0 conv / linear layers"),
        (nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), "1 conv / linear layers .*1: the model's output"),
    ],
)
def test_a_model_without_sites_is_an_error_that_says_why(model: nn.Module, said: str) -> None:
    with pytest.raises(NoSitesError, match=said):
        found(model, 3, 4, 4)
