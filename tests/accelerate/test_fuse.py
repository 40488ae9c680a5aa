"""Pairs of layers in one call: where they are, where they are not, and that nothing else changes."""

from pathlib import Path

import pytest
import torch
from torch import nn

from isw_plugin import InstanceWisePruner, load_accelerated
from isw_plugin.accelerate.execution import ExpandDepthwise
from isw_plugin.accelerate.fuse import fuse
from isw_plugin.accelerate.lower import lower, lower_all_kept
from isw_plugin.accelerate.simplify import simplify
from isw_plugin.accelerate.trace import trace
from tests.accelerate.nets import assert_close, set_clock
from tests.accelerate.test_lower import executions
from tests.conftest import Net
from tests.predict.nets import FOLLOWERS, following


def pairs(graph: nn.Module) -> int:
    return sum(isinstance(module, ExpandDepthwise) for module in graph.modules())


@pytest.mark.parametrize("kind", FOLLOWERS)
def test_a_chain_of_one_decision_is_a_pair(kind: type[Net]) -> None:
    net, pruner = following(kind)
    images = net.images(4)
    graph = simplify(trace(net, pruner.sites, images))
    modules, sites = executions(graph, images), [site.name for site in pruner.sites]
    with torch.no_grad():
        for lowered in (lower(graph, modules, 1, sites)[0], lower_all_kept(graph, modules, 1, sites)):
            wanted = lowered(images)
            found = fuse(lowered)(images)
            assert pairs(lowered) == 1
            for a, b in zip(found, wanted, strict=True):
                assert_close(a.float(), b.float())


@pytest.mark.parametrize("dense", ["pw", "dw"])
def test_a_dense_layer_is_no_part_of_a_pair(dense: str) -> None:
    net, pruner = following(next(iter(FOLLOWERS)))
    images = net.images(4)
    graph = simplify(trace(net, pruner.sites, images))
    sites = [site.name for site in pruner.sites]
    lowered, _ = lower(graph, executions(graph, images, (dense,)), 1, sites)
    assert pairs(fuse(lowered)) == 0
    with torch.no_grad():
        assert_close(lowered(images)[0], net(images))


class Read(nn.Module):
    """Somebody else reads the map between, too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pw = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 1)
        self.dw, self.head = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        between = self.pw(self.stem(x).relu()).relu()
        y: torch.Tensor = self.head(self.dw(between).relu()).mean((2, 3)) + between.sum((1, 2, 3))[:, None]
        return y


def test_a_map_that_others_read_is_written() -> None:
    torch.manual_seed(0)
    net, images = Read().eval(), torch.randn(3, 3, 12, 12)
    pruner = InstanceWisePruner(net, images[:1])
    graph = simplify(trace(net, pruner.sites, images))
    lowered, _ = lower(graph, executions(graph, images), 1, [site.name for site in pruner.sites])
    assert pairs(fuse(lowered)) == 0


@pytest.mark.parametrize("kind", FOLLOWERS)
def test_a_pair_comes_back_from_a_file(tmp_path: Path, kind: type[Net], monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, "gated")
    net, pruner = following(kind)
    images = net.images(4)
    pruner.step()
    with torch.inference_mode():
        fast = pruner.accelerate(images, backend="gated")
        (plan,) = fast.plans.values()
        assert pairs(plan.graph) == 1
        fast.save_pretrained(tmp_path)
        again = load_accelerated(tmp_path)
        for batch in (images, images[:1]):
            assert torch.equal(again(batch), fast(batch))
    assert any('"expand depthwise"' in file.read_text() for file in tmp_path.glob("*.json"))
