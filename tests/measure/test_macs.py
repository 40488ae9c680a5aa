import pytest
import timm
import torch
from torch import nn

from isw_plugin import InstanceWisePruner, count_macs
from isw_plugin.errors import ISWError, SettingError
from isw_plugin.measure.macs import decisions, gated_pruner


def vgg16() -> nn.Module:
    model = timm.create_model("vgg16_bn", num_classes=10)
    model.pre_logits = nn.Identity()
    model.head.fc = nn.Linear(512, 10)
    return model


def two_convs() -> nn.Sequential:
    """8x8 input: 3 -> 4 channels, 3x3, 64 positions; then 4 -> 6 channels, 1x1."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 1))


FIRST, SECOND = 3 * 4 * 9 * 64, 4 * 6 * 64


def test_dense_macs_of_the_networks_on_cifar() -> None:
    assert count_macs(vgg16(), torch.zeros(1, 3, 32, 32)).dense == 313_201_664
    mobilenet = timm.create_model("mobilenetv2_100", num_classes=10)
    mobilenet.conv_stem.stride = mobilenet.blocks[1][0].conv_dw.stride = (1, 1)
    assert round(count_macs(mobilenet, torch.zeros(1, 3, 32, 32)).dense / 1e6) == 88


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 5), 25 * 6 * 2 * 9),
        (nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4), (2, 4, 6, 6), 9 * 4 * 9),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 5, 5), 25 * 4 * 6 * 4),
        (nn.Linear(7, 3), (2, 11, 7), 11 * 7 * 3),
    ],
)
def test_a_layer_counts_multiply_adds(layer: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    assert count_macs(nn.Sequential(layer), torch.zeros(shape)).dense == macs


def test_a_layer_called_twice_counts_twice() -> None:
    shared = nn.Conv2d(3, 3, 1)
    assert count_macs(nn.Sequential(shared, shared), torch.zeros(1, 3, 4, 4)).dense == 2 * 9 * 16


def test_a_layer_called_on_several_sizes_counts_each() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(3, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(x).mean() + self.head(x[:, :, ::2, ::2]).mean()
            return out

    assert count_macs(Pyramid(), torch.zeros(1, 3, 8, 8)).dense == 6 * (64 + 16)


def test_dropped_channels_save_their_readers_work() -> None:
    model = two_convs()
    pruner = InstanceWisePruner(model, torch.zeros(1, 3, 8, 8), layers="0")
    with pruner.gating(alpha=0.0, beta=1.0):
        report = count_macs(model, torch.randn(5, 3, 8, 8))
        dropped = (~pruner.keep["0"]).sum(1)
    assert report.dense == FIRST + SECOND
    assert dropped.sum() > 0
    assert torch.equal(report.per_site["0"], dropped.double() * SECOND / 4)
    assert torch.equal(report.gated, report.dense - report.per_site["0"])
    assert torch.allclose(report.saved, dropped.double() * SECOND / 4 / report.dense)


def test_the_gates_own_work_is_apart() -> None:
    model = two_convs()
    pruner = InstanceWisePruner(model, torch.zeros(1, 3, 8, 8))
    assert count_macs(model, torch.zeros(1, 3, 8, 8)).gate == 0
    with pruner.gating():
        report = count_macs(model, torch.zeros(1, 3, 8, 8))
    assert report.gate == 4 * 64 + 4 * 4
    assert report.dense == FIRST + SECOND


def test_gates_off_saves_nothing() -> None:
    model = two_convs()
    InstanceWisePruner(model, torch.zeros(1, 3, 8, 8))
    report = count_macs(model, torch.zeros(3, 3, 8, 8))
    assert report.gated.tolist() == [report.dense] * 3
    assert report.per_site == {}


def test_counting_leaves_the_model_as_it_was() -> None:
    model = vgg16().train()
    model.features[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count_macs(model, torch.randn(2, 3, 32, 32))
    assert model.training
    assert not model.features[1].training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


# -- accelerated models ----------------------------------------------------------------------------


def test_an_accelerated_model_counts_as_the_masked_one() -> None:
    model = two_convs()
    pruner = InstanceWisePruner(model, torch.zeros(1, 3, 8, 8), layers="0", alpha=0.0, beta=1.0)
    pruner.step()
    images = torch.randn(5, 3, 8, 8)
    masked = count_macs(model, images)
    fast = count_macs(pruner.accelerate(images, backend="gated"), images)
    assert masked.saved.min() > 0
    assert torch.equal(fast.gated, masked.gated)
    assert torch.equal(fast.per_site["0"], masked.per_site["0"])
    assert (fast.dense, fast.per_layer, fast.gate) == (masked.dense, masked.per_layer, masked.gate)
    dense = count_macs(pruner.accelerate(images, backend="dense"), images)
    assert dense.gated.tolist() == [masked.dense] * 5
    assert (dense.per_site, dense.gate) == ({}, 0)


def test_decisions_are_those_of_the_forward_inside() -> None:
    model = two_convs()
    pruner = InstanceWisePruner(model, torch.zeros(1, 3, 8, 8), layers="0", alpha=0.0, beta=1.0)
    images = torch.randn(5, 3, 8, 8)
    with decisions(model) as bare:
        model(images)
    assert bare.keep == {}
    assert gated_pruner(model) is None
    pruner.step()
    fast = pruner.accelerate(images, backend="gated")
    dense = pruner.accelerate(images, backend="dense")
    with decisions(model) as masked, decisions(fast) as accelerated, decisions(dense) as all_kept:
        for each in (model, fast, dense):
            each(images)
    assert masked.keep["0"].shape == (5, 4)
    assert torch.equal(masked.keep["0"], accelerated.keep["0"])
    assert masked.keep_ratio == accelerated.keep_ratio < 1
    assert all_kept.keep == {}
    of_fast = gated_pruner(fast)
    assert of_fast is not None
    assert of_fast.model is fast.masked
    assert gated_pruner(dense) is None


# -- inputs of any form ----------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.mix = two_convs(), nn.Linear(5, 6)

    def forward(self, images: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(input=images).mean((2, 3)) + self.mix(extra)
        return out


class OfLists(nn.Module):
    """Takes images as torchvision's detection does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = two_convs()

    def forward(self, images: list[torch.Tensor]) -> torch.Tensor:
        out: torch.Tensor = self.net(torch.stack(images))
        return out


def test_inputs_of_any_form_are_counted_alike() -> None:
    images, extra = torch.randn(5, 3, 8, 8), torch.randn(5, 5)
    model = TwoInputs()
    InstanceWisePruner(model, (images, extra), alpha=0.0, beta=1.0).step()
    by_position = count_macs(model, (images, extra))
    by_name = count_macs(model, {"extra": extra, "images": images})
    assert by_position.dense == by_name.dense == FIRST + SECOND + 30
    assert torch.equal(by_position.gated, by_name.gated)
    assert by_position.saved.min() > 0
    assert count_macs(OfLists(), list(images)).gated.tolist() == [FIRST + SECOND] * 5


@pytest.mark.parametrize("enabled", [False, True])
def test_inputs_without_a_batch_are_refused(enabled: bool) -> None:
    model = two_convs()
    pruner = InstanceWisePruner(model, torch.zeros(1, 3, 8, 8))
    if enabled:
        pruner.step()
    with pytest.raises(ISWError):
        count_macs(model, torch.zeros(3, 8, 8))
    with pytest.raises(SettingError, match="no batch"):
        count_macs(model, torch.zeros(()))
    with pytest.raises(SettingError, match="no batch"):
        count_macs(model, {})
    assert pruner.enabled is enabled


def test_a_pruner_is_no_model() -> None:
    pruner = InstanceWisePruner(two_convs(), torch.zeros(1, 3, 8, 8))
    with pytest.raises(SettingError, match=r"pass pruner\.model"):
        count_macs(pruner, torch.zeros(1, 3, 8, 8))  # type: ignore[arg-type]


def test_a_replaced_module_is_named() -> None:
    images = torch.randn(2, 3, 8, 8)
    model = two_convs()
    pruner = InstanceWisePruner(model, images, layers="0")
    pruner.step()
    activation, reader = model[1], model[2]
    model[1] = nn.ReLU()
    with pytest.raises(ISWError, match=r"1 was replaced.*update_regularizer"):
        count_macs(model, images)
    model[1], model[2] = activation, nn.Sequential(reader)
    with pytest.raises(ISWError, match=r"update_regularizer"):
        count_macs(model, images)
    pruner.update_regularizer()
    assert count_macs(model, images).dense == FIRST + SECOND
