"""FBS, channel gating and LCCL against their papers' formulas, written out."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isw_plugin import FBS, LCCL, ChannelGating, InstanceWisePruner, count_macs, evaluate
from isw_plugin.errors import GateParameterError, SettingError
from isw_plugin.gates import LearnedGate
from isw_plugin.gates.channel_gating import _step
from isw_plugin.gates.lccl import _Branch
from tests.conftest import made
from tests.predict.nets import Stack

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def gated(gate: LearnedGate, seed: int = 3) -> tuple[Stack, InstanceWisePruner]:
    """Two layers with a gate whose parameters are random; gates are on."""
    net = made(Stack)
    pruner = InstanceWisePruner(net, net.images(1), 0.0, gate=gate)
    generator = torch.Generator().manual_seed(seed)
    for parameter in pruner.gate_parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    for learned in pruner.learned.values():
        for name, buffer in learned.named_buffers():
            if name.endswith("running_mean"):
                buffer += 0.3 * torch.randn(buffer.shape, generator=generator)
    pruner.step()
    return net, pruner


def plainly(conv: nn.Module, x: Tensor) -> Tensor:
    """The layer without its hooks."""
    return F.conv2d(x, conv.weight, conv.bias)


# -- FBS -------------------------------------------------------------------------------------------


def saliencies_by_hand(learned: nn.Module, x: Tensor, density: float) -> Tensor:
    pooled = x.abs().mean((2, 3))
    saliency = (pooled @ learned.weight.T + learned.bias).clamp_min(0)
    count = math.ceil(density * saliency.shape[1])
    rows = []
    for row in saliency:
        least = row.sort(descending=True).values[count - 1]
        rows.append(torch.where(row >= least, row, torch.zeros(())))
    return torch.stack(rows)


@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
def test_fbs_boosts_the_winners_and_suppresses_the_rest(density: float) -> None:
    net, pruner = gated(FBS(density, l1=0.1))
    net.train()
    loss = net(IMAGES).square().mean()
    total, keep = pruner.regularize(net, loss), pruner.keep
    x, size = IMAGES, torch.zeros(())
    for conv, norm in ((net.c1, net.bn1), (net.c2, net.bn2)):
        name = "c1" if conv is net.c1 else "c2"
        pi = saliencies_by_hand(pruner.learned[name], x, density)
        assert torch.equal(keep[name], pi > 0)
        normed = F.batch_norm(plainly(conv, x), None, None, norm.weight, norm.bias, training=True)
        x = F.relu(pi[:, :, None, None] * normed)
        size = size + pi.abs().sum(1).mean()
    expected = net.fc(x.mean((2, 3))).square().mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(total, expected + 0.1 * size)
    parameters = pruner.gate_parameters()
    wanted = torch.autograd.grad(expected + 0.1 * size, parameters)
    total.backward()
    for parameter, gradient in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_fbs_starts_as_the_network_it_was_given_but_for_the_dropped_channels() -> None:
    net = made(Stack)
    pruner = InstanceWisePruner(net, net.images(1), 0.0, gate="fbs")
    for learned in pruner.learned.values():
        assert torch.equal(learned.bias, torch.ones_like(learned.bias))
        nn.init.zeros_(learned.weight)
    bare = net(IMAGES)
    with pruner.gating(density=1.0):
        torch.testing.assert_close(net(IMAGES), bare)


def test_a_channel_of_saliency_zero_is_no_winner_unless_it_must_be_kept() -> None:
    net, pruner = gated(FBS(0.5))
    pruner.learned["c2"].weight.data.zero_()
    pruner.learned["c2"].bias.data.copy_(torch.tensor([-1.0, 2, -1, -1, -1, -1]))
    net(IMAGES)
    assert pruner.keep["c2"].sum(1).tolist() == [1] * 6
    assert pruner.norms["c2"][0].tolist() == [0, 2, 0, 0, 0, 0]
    net = made(Stack)
    pruner = InstanceWisePruner(net, net.images(1), gate=FBS(0.1), min_keep=3)
    pruner.step()
    net(IMAGES)
    assert pruner.keep["c2"].sum(1).tolist() == [3] * 6


def test_fbs_counts_inputs_and_outputs_and_itself() -> None:
    net, pruner = gated(FBS(0.5))
    macs = count_macs(net, IMAGES)
    first, second = (pruner.keep[name].double().sum(1) for name in ("c1", "c2"))
    left = 36 * 27 * first + 16 * 9 * first * second + 5 * second + (3 * 4 + 4 * 6)
    torch.testing.assert_close(macs.gated, left)
    assert macs.dense == 36 * 27 * 4 + 16 * 9 * 4 * 6 + 5 * 6
    assert macs.gate == 0
    report = evaluate(net, [(IMAGES, torch.zeros(6, dtype=torch.int64))])
    assert report.macs == pytest.approx(left.mean().item())


# -- channel gating --------------------------------------------------------------------------------


def test_the_step_is_one_above_zero_and_has_the_gradient_of_a_sigmoid() -> None:
    above = torch.tensor([-2.0, -0.1, 0.0, 0.1, 2.0], dtype=torch.float64, requires_grad=True)
    step = _step(above)
    assert step.tolist() == [0, 0, 0, 1, 1]
    step.sum().backward()
    smooth = 1 / (1 + torch.exp(-2 * above.detach()))
    torch.testing.assert_close(above.grad, 2 * smooth * (1 - smooth))


def partially(conv: nn.Conv2d, x: Tensor, delta: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Y and d of the paper, with batch statistics."""
    partial = F.conv2d(x[:, :first], conv.weight[:, :first], conv.bias)
    mean, variance = partial.mean((0, 2, 3), keepdim=True), partial.var((0, 2, 3), keepdim=True, correction=0)
    logits = 2 * ((partial - mean) / (variance + 1e-5).sqrt() - delta.view(1, -1, 1, 1))
    smooth = logits.sigmoid()
    passes = (smooth > 0.5).float() + smooth - smooth.detach()
    return passes * plainly(conv, x) + (1 - passes) * partial, passes.detach()


def test_channel_gating_sums_the_rest_where_the_first_part_is_large() -> None:
    net, pruner = gated(ChannelGating(parts=2, target=0.5, weight=0.1))
    net.train()
    loss = net(IMAGES).square().mean()
    total, keep, norms = pruner.regularize(net, loss), pruner.keep, pruner.norms
    x, own = IMAGES, torch.zeros(())
    for conv, norm, name, first in ((net.c1, net.bn1, "c1", 2), (net.c2, net.bn2, "c2", 2)):
        delta = pruner.learned[name][0].delta
        y, passes = partially(conv, x, delta, first)
        x = F.relu(F.batch_norm(y, None, None, norm.weight, norm.bias, training=True))
        own = own + (delta - 0.5).square().sum()
        assert torch.equal(keep[name], passes.amax((2, 3)) > 0)
        torch.testing.assert_close(norms[name], passes.mean((2, 3)))
    expected = net.fc(x.mean((2, 3))).square().mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(total, expected + 0.1 * own)
    parameters = [*pruner.gate_parameters(), net.c1.weight]
    wanted = torch.autograd.grad(expected + 0.1 * own, parameters)
    total.backward()
    for parameter, gradient in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert 0 < float(norms["c2"].mean()) < 1


def test_channel_gating_counts_the_first_part_always() -> None:
    net, pruner = gated(ChannelGating(parts=4))
    macs = count_macs(net, IMAGES)
    shares = {name: scores.double().mean(1) for name, scores in pruner.norms.items()}
    left = 36 * 9 * 4 * (1 + 2 * shares["c1"]) + 16 * 9 * 6 * (1 + 3 * shares["c2"]) + 30
    torch.testing.assert_close(macs.gated, left)


def test_macs_are_of_the_parts_of_the_site() -> None:
    net = made(Stack)
    pruner = InstanceWisePruner(net, net.images(1), 0.0, gate=ChannelGating(parts=4), per_site={"c2": {"parts": 2}})
    pruner.enable(margin=1e6)
    macs = count_macs(net, IMAGES)
    inputs = net.c2.in_channels
    assert macs.per_site["c2"].tolist() == [macs.per_layer["c2"] * (inputs // 2) / inputs] * 6


# -- LCCL ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branch", ["1x1", "shared"])
def test_lccl_is_the_product_of_two_relus(branch: str) -> None:
    net, pruner = gated(LCCL(branch))
    output, keep = net(IMAGES), pruner.keep
    x, left = IMAGES, torch.full((6,), 30.0, dtype=torch.float64)
    for conv, norm, name in ((net.c1, net.bn1, "c1"), (net.c2, net.bn2, "c2")):
        own = pruner.learned[name][0]
        low = F.conv2d(x if branch == "shared" else x[:, :, 1:-1, 1:-1], own.weight)
        low = (low - own.norm.running_mean.view(1, -1, 1, 1)) / (own.norm.running_var.view(1, -1, 1, 1) + 1e-5).sqrt()
        low = F.relu(low * own.norm.weight.view(1, -1, 1, 1) + own.norm.bias.view(1, -1, 1, 1))
        places, inputs = low[0, 0].numel(), x.shape[1]
        x = F.relu(norm(plainly(conv, x))) * low
        share = (low > 0).double().expand_as(x).mean((1, 2, 3))
        left += places * inputs * (9 * conv.out_channels * share + own.weight[:, 0].numel())
        assert torch.equal(keep[name], (low > 0).any(3).any(2).expand(6, conv.out_channels))
    torch.testing.assert_close(output, net.fc(x.mean((2, 3))))
    torch.testing.assert_close(count_macs(net, IMAGES).gated, left)


def test_a_pooled_map_is_refused_when_attached() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )
    with pytest.raises(SettingError, match=r"LCCL needs a map of the size that its layer makes\): exclude=\['0'\]"):
        InstanceWisePruner(net, IMAGES, gate=LCCL())
    pruner = InstanceWisePruner(net, IMAGES, gate=LCCL(), exclude="0")
    assert [site.made for site in pruner.sites] == [((4, 3, 3),)]


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("padding", "dilation"), [(0, 1), (1, 1), (2, 1), (1, 2), ("same", 1)])
def test_a_branch_of_1x1_reads_the_centre_of_the_layers_window(
    kernel: int, stride: int, padding: int | str, dilation: int
) -> None:
    if padding == "same" and (stride > 1 or kernel == 2):
        pytest.skip("torch has no such layer, or pads a copy and warns")
    layer = nn.Conv2d(3, 4, kernel, stride, padding, dilation)
    branch = _Branch(layer, shared=False).eval()
    x = torch.randn(2, 3, 12, 11)
    window = torch.zeros(4, 3, kernel, kernel)
    window[:, :, kernel // 2, kernel // 2] = branch.weight.detach()[:, :, 0, 0]
    wanted = F.conv2d(x, window, None, stride, padding, dilation)
    torch.testing.assert_close(branch(layer, x, layer(x)), branch.norm(wanted))


def test_a_margin_drops_more_and_shrinks_nothing() -> None:
    net, pruner = gated(LCCL())
    maps = []
    net.act1.register_forward_hook(lambda module, args, output: maps.append(output.detach()))
    for margin in (0.0, 0.3):
        with pruner.gating(margin=margin):
            net(IMAGES)
    kept = maps[1] != 0
    assert 0 < kept.sum() < (maps[0] != 0).sum()
    assert torch.equal(maps[1][kept], maps[0][kept])


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: FBS(0.0), "density=0"),
        (lambda: FBS(1.5), "density=1.5"),
        (lambda: FBS(l1=-1), "l1=-1"),
        (lambda: ChannelGating(parts=1), "parts"),
        (lambda: ChannelGating(target=math.nan), "target=nan"),
        (lambda: ChannelGating(weight=-1.0), "weight=-1.0"),
        (lambda: LCCL("3x3"), "branch='3x3'"),
        (lambda: LCCL(margin=-0.1), "margin=-0.1"),
    ],
)
def test_bad_settings_are_named(make: Callable[[], LearnedGate], named: str) -> None:
    with pytest.raises(SettingError, match=named):
        make()


def test_a_gate_has_its_own_settings_alone() -> None:
    with pytest.raises(SettingError, match="alpha set"):
        InstanceWisePruner(made(Stack), IMAGES, gate="fbs", alpha=0.5)
    pruner = InstanceWisePruner(made(Stack), IMAGES, gate="fbs")
    with pytest.raises(GateParameterError, match="has no parameter beta"):
        pruner.enable(beta=0.5)
