"""MACs of predicted sites against a literal loop over every multiply-add."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from isw_plugin import InstanceWisePruner, count_macs, evaluate
from tests.conftest import Concat, Net, made
from tests.predict.nets import FOLLOWERS, LAYERS, PREDICTED, Inverted, Stack, following, predicting


def columns(reads: Sequence[str | int], keep: dict[str, Tensor], width: int, image: int) -> list[bool]:
    """Which input columns of a layer hold something."""
    held = [[True] * part if isinstance(part, int) else keep[part][image].tolist() for part in reads]
    flat = [kept for part in held for kept in part]
    return [kept for kept in flat for _ in range(width // len(flat))]


def macs_by_hand(net: Net, pruner: InstanceWisePruner, images: Tensor) -> Tensor:
    """Of every image: a multiply-add for every pair of a kept input and an output that is not left undone."""
    keep, places = pruner.keep, {}
    handles = [
        net.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: places.__setitem__(name, out[0].numel() // out.shape[1])
        )
        for name in LAYERS[type(net)]
    ]
    net(images)
    for handle in handles:
        handle.remove()
    total = torch.full((len(images),), float(sum(head.weight.numel() for head in pruner.heads.values())))
    for name, (reads, makes) in LAYERS[type(net)].items():
        layer = net.get_submodule(name)
        kernel, groups = layer.weight[0, 0].numel(), getattr(layer, "groups", 1)
        outputs = len(layer.weight)
        width = layer.weight.shape[1] * groups
        for image in range(len(images)):
            kept = columns(reads, keep, width, image)
            for out in range(outputs):
                if makes in pruner.predicted and not keep[makes][image, out]:
                    continue
                group = out // (outputs // groups)
                of_group = kept[group * width // groups : (group + 1) * width // groups]
                total[image] += sum(of_group) * kernel * places[name]
    return total.double()


@pytest.mark.parametrize(
    ("kind", "attached"),
    [*((kind, predicting) for kind in (*PREDICTED, Concat)), *((kind, following) for kind in FOLLOWERS)],
)
def test_what_is_dropped_is_counted_on_both_sides(kind: type[Net], attached: Any) -> None:
    net, pruner = attached(kind)
    images = net.images(6)
    report = count_macs(net, images)
    torch.testing.assert_close(report.gated, macs_by_hand(net, pruner, images), rtol=1e-9, atol=1e-6)
    torch.testing.assert_close(report.gated, report.dense - sum(report.per_site.values()))


def test_a_dropped_hidden_channel_costs_nothing_anywhere() -> None:
    """Expansion, depthwise filter and projection of an inverted residual."""
    net, pruner = predicting(Inverted)
    images, state = net.images(2), pruner.state_dict()
    for head in state["heads"].values():
        head["weight"].zero_()
        head["bias"].fill_(1.0)
    for name in ("pw", "dw"):
        state["heads"][name]["bias"][3:] = 0.0  # three of eight are kept
    pruner.load_state_dict(state)
    pruner.enable(per_site={"stem": {"beta": 0.0}})
    heads = sum(head.macs for head in pruner.heads.values())
    dense = {"stem": 3 * 4 * 9, "pw": 4 * 3, "dw": 3 * 9, "pwl": 3 * 4, "head": 4 * 6}
    assert count_macs(net, images).gated.tolist() == [64.0 * sum(dense.values()) + heads] * 2


def test_evaluate_counts_as_count_macs_does() -> None:
    net, _ = predicting(Inverted)
    images = net.images(6)
    report = evaluate(net, [(images[:4], torch.zeros(4, dtype=torch.int64)), (images[4:], torch.zeros(2).long())])
    expected = count_macs(net, images)
    assert report.macs == pytest.approx(expected.gated.mean().item())
    for name, saved in expected.per_site.items():
        assert report.per_site[name].macs_saved == pytest.approx(saved.mean().item() / expected.dense)
    assert report.macs_saved == pytest.approx(sum(site.macs_saved for site in report.per_site.values()))
    assert report.prune_ratio > 0


def test_the_gates_own_work_is_less_where_norms_are_not_taken() -> None:
    net, pruner = predicting(Stack)
    images = net.images(2)
    predicted = count_macs(net, images).gate
    pruner.drop_predictors()
    assert count_macs(net, images).gate - predicted == 6 * 4 * 4  # the squares of a map that no head reads


def test_without_heads_all_is_as_it_was() -> None:
    net = made(Stack)
    pruner = InstanceWisePruner(net, net.images(1), alpha=0.0, beta=0.6)
    pruner.step()
    images = net.images(6)
    report = count_macs(net, images)
    dropped = {name: (~keep).sum(1).double() for name, keep in pruner.keep.items()}
    assert torch.equal(report.per_site["c1"], dropped["c1"] * 6 * 9 * 16)
    assert torch.equal(report.per_site["c2"], dropped["c2"] * 5)
