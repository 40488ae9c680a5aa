"""A whole detector of torchvision, small enough for tests: lists of images in, boxes out, losses in training."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD

__all__ = ["detector", "images", "targets"]


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(24, 32, 3, 2, 1), nn.ReLU())
        self.out_channels = [24, 32]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.first(x)
        return OrderedDict([("0", x), ("1", self.second(x))])


def detector() -> SSD:
    torch.manual_seed(0)
    anchors = DefaultBoxGenerator([[2], [2]])
    return SSD(Backbone(), anchors, (32, 32), num_classes=3, topk_candidates=20, detections_per_img=10)


def images(count: int) -> list[Tensor]:
    return list(torch.rand(count, 3, 40, 32, generator=torch.Generator().manual_seed(1)))


def targets(count: int) -> list[dict[str, Tensor]]:
    boxes = torch.tensor([[4.0, 4.0, 20.0, 20.0], [8.0, 2.0, 30.0, 30.0]])
    return [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in range(count)]
