"""Detectors: lists of images, targets beside them in training, losses or boxes out."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from isw_plugin import InstanceWisePruner, MinNorm, calibrate, count_macs, evaluate, load_pretrained
from isw_plugin.errors import StateMismatchError
from tests.detectors import detector, images, targets

SITES = {"backbone.first.0": 16, "backbone.first.2": 24, "backbone.second.0": 32}


def found(pruner: InstanceWisePruner) -> dict[str, int]:
    return {site.name: site.channels for site in pruner.sites}


def boxes(outputs: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> Tensor:
    """A metric of the user's own, of every image: how many of its best three boxes have the first label."""
    return torch.tensor(
        [(one["labels"][:3] == other["labels"][0]).double().mean() for one, other in zip(outputs, wanted, strict=True)]
    )


@pytest.mark.parametrize("inputs", [images(1), (images(2), targets(2)), {"images": images(2), "targets": targets(2)}])
def test_sites_are_found_on_images_with_targets_or_without(inputs: object) -> None:
    pruner = InstanceWisePruner(detector(), inputs)
    assert found(pruner) == SITES
    pruner.update_regularizer()  # whose inputs have no values
    assert found(pruner) == SITES


def test_the_first_forward_may_be_one_of_training() -> None:
    model = detector()
    pruner = InstanceWisePruner(model, lambda_=1e-3)
    losses = model(images(2), targets(2))
    plain = sum(losses.values())
    loss = pruner.regularize(model, plain)
    assert found(pruner) == SITES
    assert loss > plain
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.backbone.first.parameters())


def test_macs_are_of_an_image_with_targets_or_without() -> None:
    pruner = InstanceWisePruner(detector().eval(), images(2), gate=MinNorm(0.5))
    pruner.step()
    with_targets, without = (count_macs(pruner.model, given) for given in ((images(3), targets(3)), images(3)))
    assert len(without.gated) == 3
    assert with_targets.dense == without.dense
    torch.testing.assert_close(with_targets.gated, without.gated)


def test_evaluate_and_calibrate_take_a_metric_of_boxes() -> None:
    pruner = InstanceWisePruner(detector().eval(), images(2))
    loader = [(images(4), targets(4)), (images(2), targets(2))]
    report = evaluate(pruner.model, loader, metric=boxes)
    outputs = [box for given, _ in loader for box in pruner.model(given)]
    assert report.instances == 6
    assert report.accuracy == pytest.approx(boxes(outputs, targets(6)).mean().item())
    assert calibrate(pruner, loader, metric=boxes, max_drop=0.49).accuracy == pytest.approx(report.accuracy)


class Lazy(nn.Module):
    """Sets what it was made without, as torchvision's RoIAlign does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale: float | None = None
        self.width = width
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        self.scale = 1 / x.shape[-1]
        return self.layers(x) * self.scale


def test_what_a_first_forward_sets_is_no_difference_of_models(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    pruner = InstanceWisePruner(Lazy(1).eval(), x)
    wanted = pruner.model(x)
    pruner.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path, Lazy(1))
    torch.testing.assert_close(again.model(x), wanted)
    with pytest.raises(StateMismatchError, match="width is 2 here and 1 there"):
        load_pretrained(tmp_path, Lazy(2))
