"""How the channels of a map are followed through what pools it."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isw_plugin import InstanceWisePruner
from isw_plugin.sites import Consumer, Site, Tap, find_sites


def only_site(model: nn.Module) -> Site:
    (site,) = find_sites(model, torch.zeros(1, 3, 8, 8)).sites
    return site


class GeM(nn.Module):
    """The p-mean of every channel, over all pixels or over each square of four."""

    def __init__(self, clamps: bool, size: int | None = None) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([3.0]))
        self.clamps, self.size = clamps, size

    def forward(self, x: Tensor) -> Tensor:
        powers = (x.clamp(min=1e-6) if self.clamps else x).pow(self.p)
        pooled = F.avg_pool2d(powers, self.size) if self.size else powers.mean((2, 3), keepdim=True)
        return pooled.pow(1.0 / self.p)


@pytest.mark.parametrize("clamps", [True, False])
@pytest.mark.parametrize("size", [2, None])
def test_through_a_generalised_mean_the_map_is_what_it_pools(clamps: bool, size: int | None) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), GeM(clamps, size), nn.Flatten(), nn.LazyLinear(5))
    model(torch.zeros(1, 3, 8, 8))
    site = only_site(model)
    assert (site.shape, site.taps) == ((4, 8, 8), (Tap("1"),))
    assert site.consumers == (Consumer("4", 0, 16 if size else 1),)


def test_a_generalised_mean_pools_the_gated_map() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), GeM(clamps=True), nn.Flatten(), nn.Linear(8, 5)).eval()
    x = torch.randn(2, 3, 8, 8)
    pruner = InstanceWisePruner(model, x, alpha=0.0, beta=1.0)
    with torch.no_grad(), pruner.gating():
        given = model(x)
        (keep,) = pruner.keep.values()
    assert 0 < keep.sum() < keep.numel()
    with torch.no_grad():
        wanted = model[2:](model[:2](x) * keep[..., None, None])
    assert torch.equal(given, wanted)


def test_a_generalised_mean_that_no_hook_can_reach_is_the_map_itself() -> None:
    class Functional(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[2](self[1](F.relu(self[0](x))))

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 4, 1), GeM(clamps=True)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv(x)).clamp(min=1e-6).pow(3.0).mean((2, 3)).pow(1 / 3)

    direct = Functional(nn.Conv2d(3, 4, 1), GeM(clamps=True), nn.Conv2d(4, 5, 1))
    assert only_site(direct).taps == (Tap("1", 0),)
    site = only_site(nn.Sequential(Inside(), nn.Linear(4, 5)))
    assert (site.shape, site.taps) == ((4,), (Tap("0"),))
