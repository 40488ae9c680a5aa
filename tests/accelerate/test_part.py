"""A model that cannot be exported whole: its largest part runs as a graph, the rest as the masked model does."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isw_plugin import InstanceWisePruner, MinNorm, evaluate
from isw_plugin.accelerate import Accelerated
from isw_plugin.errors import UnsupportedError
from tests.detectors import detector, images, targets


@pytest.fixture
def pruner() -> InstanceWisePruner:
    pruner = InstanceWisePruner(detector().eval(), images(2), gate=MinNorm(0.6))
    pruner.step()
    return pruner


def accelerated(pruner: InstanceWisePruner, backend: Any) -> Accelerated:
    return pruner.accelerate(images(4), backend=backend)


def assert_same(found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> None:
    for one, other in zip(found, wanted, strict=True):
        for name in ("boxes", "scores", "labels"):
            torch.testing.assert_close(one[name], other[name], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_backbone_of_a_detector_runs_as_a_graph_and_the_rest_masked(pruner: InstanceWisePruner) -> None:
    fast = accelerated(pruner, "gated")
    assert (fast.execution, fast.part) == ("accelerated", "backbone")
    assert fast.choices == {"backbone.first.0": True, "backbone.first.2": True, "backbone.second.0": True}
    with fast.recording() as record:
        found = fast(images(3))
    assert_same(found, pruner.model(images(3)))
    assert record.keep.keys() == pruner.keep.keys()
    for site, keep in pruner.keep.items():
        assert torch.equal(record.keep[site], keep), site
    assert fast.verdict().startswith("backbone alone: ")
    assert fast.summary().splitlines()[-1] == "the rest runs masked: SSD cannot be exported: it takes a list of images"
    assert fast.summary().splitlines()[-2].startswith("backbone accelerated: gated ")


def test_a_forward_walks_the_model_no_more_for_more_images(
    pruner: InstanceWisePruner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether an output is a tensor of the model's own is asked of all outputs at once."""
    fast, walks, named = accelerated(pruner, "dense"), [], nn.Module.named_modules
    fast(images(8))  # makes the graph of this size
    monkeypatch.setattr(nn.Module, "named_modules", lambda *given, **more: walks.append(1) or named(*given, **more))
    fast(images(4))
    few = len(walks)
    fast(images(8))
    assert len(walks) == 2 * few


def test_it_is_evaluated_as_the_masked_model(pruner: InstanceWisePruner) -> None:
    loader = [(images(4), targets(4))]

    def boxes(found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> Tensor:
        return torch.tensor([one["scores"].sum() for one in found])

    found = evaluate(accelerated(pruner, "gated"), loader, metric=boxes)
    wanted = evaluate(pruner.model, loader, metric=boxes)
    assert (found.execution, wanted.execution) == ("accelerated", "masked")
    assert (found.prune_ratio, found.macs) == (wanted.prune_ratio, wanted.macs)
    assert found.accuracy == pytest.approx(wanted.accuracy, rel=1e-4)
    assert 0.1 < found.macs_saved < 0.6


@torch.no_grad()
def test_dense_keeps_every_channel_of_the_whole(pruner: InstanceWisePruner) -> None:
    fast = accelerated(pruner, "dense")
    pruner.disable()
    assert (fast.execution, fast.part) == ("dense", "backbone")
    assert_same(fast(images(2)), pruner.model(images(2)))
    assert fast.summary().endswith("the rest runs with all channels: SSD cannot be exported: it takes a list of images")
    assert evaluate(fast, [(images(2), targets(2))], metric=lambda found, _: torch.ones(len(found))).prune_ratio == 0


@torch.no_grad()
def test_copies_run_alike(pruner: InstanceWisePruner) -> None:
    fast = accelerated(pruner, "gated")
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert other.part == "backbone"
        assert_same(other(images(2)), fast(images(2)))


def test_a_part_is_not_saved_as_the_whole(pruner: InstanceWisePruner, tmp_path: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"all but its backbone masked .* save the pruner"):
        accelerated(pruner, "gated").save_pretrained(tmp_path / "fast")
    assert not (tmp_path / "fast").exists()


class Branching(nn.Module):
    """Takes another way by values, so that only what is within can be exported."""

    def __init__(self, inner: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.inner, self.times = inner, times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.inner(x)
        return x + 1 if float(x.sum()) > 0 else x


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 3, 1))


@torch.no_grad()
@pytest.mark.parametrize("scope", ["all", "consumers"])
def test_parts_of_parts(scope: Any) -> None:
    x = torch.randn(2, 3, 12, 12)
    pruner = InstanceWisePruner(Branching(Branching(layers())).eval(), x, gate=MinNorm(0.5), scope=scope)
    fast = pruner.accelerate(x, backend="gated")
    assert (fast.execution, fast.part) == ("accelerated", "inner.inner")
    assert fast.choices == {f"inner.inner.{layer}": True for layer in (0, 2, 4)}
    pruner.step()
    torch.testing.assert_close(fast(x), pruner.model(x), atol=1e-5, rtol=1e-4)


class Twice(nn.Module):
    """A part that runs on two inputs; its sites decide twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = layers(), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.inner(x) - self.inner(-x))
        return y + 1 if float(y.sum()) > 0 else y


@torch.no_grad()
def test_a_part_that_runs_twice_stays_masked() -> None:
    x = torch.randn(2, 3, 12, 12)
    model = Twice().eval()
    pruner = InstanceWisePruner(nn.Sequential(model, nn.ReLU(), nn.Conv2d(2, 2, 1)), x, gate=MinNorm(0.5))
    fast = pruner.accelerate(x, backend="gated")
    assert (fast.execution, fast.part) == ("masked", "")
    pruner.step()
    torch.testing.assert_close(fast(x), pruner.model(x))
