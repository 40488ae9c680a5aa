import pytest
import torch
from torch import nn

from isw_plugin import InstanceWisePruner
from isw_plugin.errors import SettingError
from isw_plugin.measure import latency_by_keep

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pruner() -> InstanceWisePruner:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 3)
    ).eval()
    return InstanceWisePruner(model, IMAGES, alpha=0.0, beta=0.5)


def test_every_setting_is_timed_beside_the_dense_form(pruner: InstanceWisePruner) -> None:
    settings = [{"beta": 0.5}, {"beta": 1.0}, {"beta": 1.5}]
    points = latency_by_keep(pruner, IMAGES, settings, rounds=2)
    assert [point.execution for point in points] == ["dense", *["accelerated"] * 3]
    assert points[0].keep_ratio == 1
    assert all(point.latency.batch == 2 and point.latency.batches == 2 for point in points)
    for point, parameters in zip(points[1:], settings, strict=True):
        with pruner.gating(**parameters), torch.no_grad():
            pruner.model(IMAGES)
        kept = torch.cat([keep.flatten() for keep in pruner.keep.values()]).double().mean().item()
        assert point.keep_ratio == pytest.approx(kept)


def test_the_pruner_is_left_as_it_was(pruner: InstanceWisePruner) -> None:
    before = pruner.gate
    latency_by_keep(pruner, IMAGES, [{"beta": 1.0}], rounds=1)
    assert pruner.gate == before
    assert not pruner.enabled


@pytest.mark.parametrize(("settings", "rounds"), [([], 3), ([{"beta": 1.0}], 0)])
def test_nothing_to_time_is_refused(pruner: InstanceWisePruner, settings: list[dict[str, float]], rounds: int) -> None:
    with pytest.raises(SettingError, match="at least one of each"):
        latency_by_keep(pruner, IMAGES, settings, rounds=rounds)
