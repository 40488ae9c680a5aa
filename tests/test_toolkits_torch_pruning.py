"""Network slimming by torch-pruning with the importance that it needs, against torch-pruning's own."""

import pytest
import torch
import torch_pruning as tp
from torch import nn

from isw_plugin.toolkits.torch_pruning import SlimmingImportance

WIDTH = 10


def chain(*gammas: list[float]) -> nn.Sequential:
    """Convolutions with batch norm, whose scales are given."""
    layers: list[nn.Module] = []
    channels = 3
    for gamma in gammas:
        norm = nn.BatchNorm2d(len(gamma))
        norm.weight.data = torch.tensor(gamma)
        layers += [nn.Conv2d(channels, len(gamma), 3, padding=1), norm, nn.ReLU()]
        channels = len(gamma)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)).eval()


def pruned(model: nn.Sequential, importance: tp.importance.Importance, ratio: float) -> list[list[float]]:
    """Prune globally; the gammas that are left, by layer."""
    pruner = tp.pruner.BNScalePruner(
        model,
        torch.zeros(1, 3, 8, 8),
        importance,
        pruning_ratio=ratio,
        global_pruning=True,
        ignored_layers=[model[-1]],
        max_pruning_ratio=1.0,
    )
    pruner.step()
    model(torch.zeros(1, 3, 8, 8))
    return [module.weight.tolist() for module in model if isinstance(module, nn.BatchNorm2d)]


def even(low: float, high: float) -> list[float]:
    return torch.linspace(low, high, WIDTH).tolist()


def test_the_threshold_is_global() -> None:
    """The low layer loses its channels to the high one's, whatever share that is."""
    low, high = even(0.1, 0.9), even(0.5, 1.3)
    left = pruned(chain(low, high), SlimmingImportance(), 0.5)
    smallest = sorted(low + high)[WIDTH]
    assert left == [
        pytest.approx([gamma for gamma in low if gamma >= smallest - 1e-6]),
        pytest.approx([gamma for gamma in high if gamma >= smallest - 1e-6]),
    ]


def test_the_magnitude_counts_not_the_sign() -> None:
    left = pruned(chain([-1.0, 0.1, 0.9, -0.2]), SlimmingImportance(), 0.5)
    assert left == [pytest.approx([-1.0, 0.9])]


@pytest.mark.parametrize("min_channels", [1, 3])
def test_a_layer_whole_under_the_threshold_keeps_its_largest(min_channels: int) -> None:
    low, high = even(0.01, 0.1), even(1.0, 2.0)
    left = pruned(chain(low, high), SlimmingImportance(min_channels), 0.5)
    assert left[0] == pytest.approx(low[-min_channels:])


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.67])
def test_the_share_pruned_is_the_ratio(ratio: float) -> None:
    generator = torch.Generator().manual_seed(0)
    gammas = [(torch.rand(50, generator=generator) * scale).tolist() for scale in (0.2, 1.0, 3.0)]
    left = pruned(chain(*gammas), SlimmingImportance(), ratio)
    assert sum(map(len, left)) == pytest.approx(150 * (1 - ratio), abs=2)


def test_the_safe_channels_of_a_layer_under_the_threshold_cost_others() -> None:
    """The total stays: the channel that a doomed layer keeps is taken from elsewhere."""
    left = pruned(chain(even(0.01, 0.1), even(1.0, 2.0)), SlimmingImportance(), 0.5)
    assert sum(map(len, left)) == WIDTH


def test_torch_prunings_own_default_prunes_every_layer_alike() -> None:
    """Why SlimmingImportance exists."""
    left = pruned(chain(even(0.01, 0.1), even(1.0, 2.0)), tp.importance.BNScaleImportance(), 0.5)
    assert list(map(len, left)) == pytest.approx([WIDTH / 2] * 2, abs=1)


def test_torch_prunings_own_without_a_normalizer_spares_doomed_layers() -> None:
    """Why SlimmingImportance exists."""
    left = pruned(chain(even(0.01, 0.1), even(1.0, 2.0)), tp.importance.BNScaleImportance(normalizer=None), 0.5)
    assert len(left[0]) == WIDTH


def test_a_residual_add_ranks_its_layers_together() -> None:
    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)) for _ in range(2))
            self.c = nn.Conv2d(4, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.a(x) + self.b(x))

    model = Add().eval()
    model.a[1].weight.data = torch.tensor([1.0, 0.5, 0.0, 0.2])
    model.b[1].weight.data = torch.tensor([0.0, 0.7, 0.1, 0.1])
    graph = tp.DependencyGraph().build_dependency(model, torch.zeros(1, 3, 4, 4))
    group = graph.get_pruning_group(model.a[0], tp.prune_conv_out_channels, idxs=list(range(4)))
    importance = SlimmingImportance()(group)
    assert importance.tolist() == pytest.approx([0.5, 1e6 + 0.6, 0.05, 0.15])


def test_a_group_without_batch_norm_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    graph = tp.DependencyGraph().build_dependency(model, torch.zeros(1, 3, 4, 4))
    group = graph.get_pruning_group(model[0], tp.prune_conv_out_channels, idxs=list(range(4)))
    assert SlimmingImportance()(group) is None


def test_equal_gammas() -> None:
    """Of a network that was not trained with L1: every channel but the safe ones lies at the threshold."""
    left = pruned(chain([1.0] * WIDTH, [1.0] * WIDTH), SlimmingImportance(), 0.5)
    assert list(map(len, left)) == [1, 1]


@pytest.mark.parametrize("min_channels", [0, -1])
def test_a_layer_needs_a_channel(min_channels: int) -> None:
    with pytest.raises(ValueError, match=f"min_channels={min_channels}"):
        SlimmingImportance(min_channels)


def test_regularize_pulls_on_gammas_alone() -> None:
    model = chain(even(0.1, 1.0), even(0.1, 1.0)).train()
    pruner = tp.pruner.BNScalePruner(
        model, torch.zeros(1, 3, 8, 8), SlimmingImportance(), reg=0.5, ignored_layers=[model[-1]]
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    pruner.regularize(model)
    pulled = {name for name, parameter in model.named_parameters() if parameter.grad.any()}
    assert pulled == {"1.weight", "4.weight"}
    assert model[1].weight.grad.tolist() == [0.5] * WIDTH


def test_asking_for_more_than_is_left_still_prunes() -> None:
    """An infinite threshold would select every channel of every layer, and torch-pruning would skip them all."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 2, 1)
    )
    for norm in (model[1], model[3]):
        nn.init.uniform_(norm.weight, 0.1, 1.0)
    tp.pruner.BNScalePruner(
        model,
        torch.zeros(1, 3, 4, 4),
        importance=SlimmingImportance(8),
        global_pruning=True,
        pruning_ratio=0.67,
        ignored_layers=[model[4]],
    ).step()
    assert model[1].num_features + model[3].num_features <= 16
