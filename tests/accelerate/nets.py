"""Networks in the forms that the engine must know, and what it means that one runs as its masked model does."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from isw_plugin import CVGate, InstanceWisePruner, MinNorm, RandomGate
from isw_plugin.accelerate import choose, fit
from isw_plugin.accelerate.accelerated import Accelerated
from isw_plugin.functional import coefficient_of_variation
from isw_plugin.gates import keeps_all
from tests.conftest import Net, Preactivation, Residual, SqueezeExcite, Tokens

CLOSE = 1e-5  # of the mean norm, or of the CV: a decision that two orders of summation may make differently


class Slimmed(nn.Module):
    """Odd widths, a layer with bias and norm, strides, both activations, both pools, a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.bn1 = nn.Conv2d(3, 37, 3, padding=1, bias=False), nn.BatchNorm2d(37)
        self.c2, self.bn2 = nn.Conv2d(37, 53, 3, padding=1), nn.BatchNorm2d(53, affine=False)
        self.c3, self.c4 = nn.Conv2d(53, 129, 3, stride=2, padding=1), nn.Conv2d(129, 16, 1)
        self.fc1, self.fc2 = nn.Linear(64, 11), nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.c1(x))), 2)
        x = F.avg_pool2d(F.relu6(3 * self.bn2(self.c2(x))), 2, stride=1)
        x = F.relu(self.c4(F.hardtanh(self.c3(x), 0.0, 6.0)))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class Inverted(nn.Module):
    """Expand, depthwise, project, add: twice, the second with a stride; then a depthwise one with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.expand, self.bn1 = nn.Conv2d(8, 21, 1, bias=False), nn.BatchNorm2d(21)
        self.depth, self.bn2 = nn.Conv2d(21, 21, 3, padding=1, groups=21, bias=False), nn.BatchNorm2d(21)
        self.project, self.bn3 = nn.Conv2d(21, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.mix, self.place = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.act, self.act1, self.act2, self.act3, self.act4 = (nn.ReLU6() for _ in range(5))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.stem(x)))
        x = x + self.bn3(self.project(self.act2(self.bn2(self.depth(self.act1(self.bn1(self.expand(x))))))))
        x = self.act3(self.mix(self.down(x)))
        return self.head(self.act4(self.place(x) + x).mean((2, 3)))


class Downsampled(nn.Module):
    """Residual blocks whose shortcut is the map, and a convolution with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 9, 3, padding=1, bias=False), nn.BatchNorm2d(9)
        self.a1, self.abn1 = nn.Conv2d(9, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
        self.a2, self.abn2 = nn.Conv2d(7, 9, 3, padding=1, bias=False), nn.BatchNorm2d(9)
        self.b1, self.bbn1 = nn.Conv2d(9, 14, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(14)
        self.b2, self.bbn2 = nn.Conv2d(14, 13, 3, padding=1, bias=False), nn.BatchNorm2d(13)
        self.short, self.sbn = nn.Conv2d(9, 13, 1, stride=2, bias=False), nn.BatchNorm2d(13)
        self.relu0, self.relu1, self.relu2, self.relu3, self.relu4 = (nn.ReLU() for _ in range(5))
        self.fc = nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu0(self.bn(self.stem(x)))
        x = self.relu2(self.abn2(self.a2(self.relu1(self.abn1(self.a1(x))))) + x)
        x = self.relu4(self.bbn2(self.b2(self.relu3(self.bbn1(self.b1(x))))) + self.sbn(self.short(x)))
        return self.fc(x.mean((2, 3)))


class Unusual(nn.Module):
    """Dilation, groups, 1x3 and 5x5 kernels, "same" padding, another activation, a depthwise layer that multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 12, (1, 3), padding="same"), nn.Conv2d(12, 10, 3, padding=2, dilation=2)
        self.c3, self.c4 = nn.Conv2d(10, 16, 3, padding=1, groups=2), nn.Conv2d(16, 16, 5, padding=2, groups=8)
        self.c5, self.c6 = nn.Conv2d(16, 6, 5, stride=(1, 2), padding=2), nn.Conv2d(6, 5, 1)
        self.acts = nn.ModuleList([nn.ReLU(), nn.SiLU(), nn.ReLU(), nn.LeakyReLU(), nn.ReLU()])

    def forward(self, x: Tensor) -> Tensor:
        for layer, act in zip((self.c1, self.c2, self.c3, self.c4, self.c5), self.acts, strict=True):
            x = act(layer(x))
        return self.c6(x).mean((2, 3))


class Grown(nn.Module):
    """As in DenseNet: every layer reads the maps of all before it, joined, through a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6 + 5 * depth) for depth in range(3)])
        self.acts = nn.ModuleList([nn.ReLU() for _ in range(3)])
        self.layers = nn.ModuleList([nn.Conv2d(6 + 5 * depth, 5, 3, padding=1) for depth in range(3)])
        self.norm, self.act, self.fc = nn.BatchNorm2d(21), nn.ReLU(), nn.Linear(21, 5)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.stem(x)]
        for norm, act, layer in zip(self.norms, self.acts, self.layers, strict=True):
            maps.append(layer(act(norm(torch.cat(maps, 1)))))
        return self.fc(self.act(self.norm(torch.cat(maps, 1))).mean((2, 3)))


class Patches(nn.Module):
    """As in ViT: patches as tokens, attention, an MLP, all in residual branches."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm1, self.norm2 = nn.Conv2d(3, 8, 2, stride=2), nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.fc1, self.act, self.fc2, self.head = nn.Linear(8, 19), nn.GELU(), nn.Linear(19, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        query, key, value = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.proj(F.scaled_dot_product_attention(query, key, value))
        return self.head((x + self.fc2(self.act(self.fc1(self.norm2(x))))).mean(1))


NETS: tuple[type[nn.Module], ...] = (
    *(Slimmed, Inverted, Downsampled, Unusual, Grown, Patches),
    *(Residual, SqueezeExcite, Preactivation, Tokens),
)
SHARED = (Inverted, Downsampled, Grown, Residual, SqueezeExcite)  # others than layers see a gated map
CASES = [(kind, "all") for kind in NETS] + [(kind, "consumers") for kind in SHARED]


def seeded(kind: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """In eval mode, with norms and biases that make live and dead channels."""
    torch.manual_seed(seed)
    net = kind().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            if module.affine:
                nn.init.normal_(module.weight, 1, 0.5)
                nn.init.normal_(module.bias, 0, 0.5)
    return net


def images_for(net: nn.Module, n: int = 6, side: int = 8, seed: int = 0) -> Tensor:
    shape = net.image if isinstance(net, Net) and len(net.image) == 2 else (3, side, side)
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def above(feature: Tensor, norms: Tensor) -> Tensor:
    """A gate of a third party."""
    return norms > 1.5


def near_ties(pruner: InstanceWisePruner) -> Tensor:
    """Instances of the last gated forward with a decision that rounding may turn, (N,)."""
    return torch.stack([_near(pruner._memory.gates[s], norms, pruner) for s, norms in pruner.norms.items()]).any(0)


def _near(gate: Any, norms: Tensor, pruner: InstanceWisePruner) -> Tensor:
    if keeps_all(gate):
        return torch.zeros(len(norms), dtype=torch.bool)
    mean = norms.mean(1, keepdim=True)
    ordered = norms.sort(1).values
    near = _boundary(ordered, norms.shape[1] - pruner._memory.min_keep)
    if isinstance(gate, CVGate):
        near |= (((norms - gate.beta * mean).abs() <= CLOSE * mean) & (mean > 0)).any(1)  # an empty map is no tie
        near |= ((coefficient_of_variation(norms) - gate.alpha).abs() <= CLOSE) & (mean[:, 0] > 0)
    elif isinstance(gate, MinNorm):
        near |= _boundary(ordered, int(gate.ratio * norms.shape[1]))
    elif isinstance(gate, RandomGate):  # it rounds the mean to the 15 highest bits
        rest = mean[:, 0].view(torch.int32) & 511
        near |= ((rest < 32) | (rest > 511 - 32)) & (mean[:, 0] > 0)
    else:
        near |= ((norms - 1.5).abs() <= CLOSE * mean).any(1) & (mean[:, 0] > 0)
    return near


def _boundary(ordered: Tensor, dropped: int) -> Tensor:
    """Whether the last channel dropped and the first kept are next to equal; of two empty ones, it is the order."""
    if not 0 < dropped < ordered.shape[1]:
        return torch.zeros(len(ordered), dtype=torch.bool)
    above, below = ordered[:, dropped], ordered[:, dropped - 1]
    return (above - below <= CLOSE * ordered.mean(1)) & (above > 0)


def assert_runs_as_masked(fast: Accelerated, pruner: InstanceWisePruner, inputs: Sequence[Any]) -> Tensor:
    """Every decision equal and outputs to 1e-4, near-ties aside; returns which instances were compared, (N,)."""
    with torch.no_grad(), pruner.gating():
        wanted = pruner.model(*inputs)
        clear = ~near_ties(pruner)
    with fast.recording() as record:
        found = fast(*inputs)
    assert list(record.keep) == list(record.norms)
    assert record.keep.keys() == pruner.keep.keys()
    for site, keep in pruner.keep.items():
        assert torch.equal(record.keep[site][clear], keep[clear]), site
        assert_close(record.norms[site][clear], pruner.norms[site][clear])
    assert_close(found[clear], wanted[clear])
    return clear


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """To 1e-4 of the largest value."""
    assert found.dtype == wanted.dtype
    wanted = wanted.detach()
    scale = float(wanted.nan_to_num().abs().max()) if wanted.numel() else 1.0
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * scale, equal_nan=True)


def attached(net: nn.Module, images: Any, **settings: Any) -> InstanceWisePruner:
    """With gates on that drop some channels."""
    if "gate" not in settings:
        settings = {"alpha": 0.1, "beta": 0.9} | settings
    pruner = InstanceWisePruner(net, images, **settings)
    pruner.enable()
    return pruner


Rounds = list[list[float]]


def clock(*winners: str) -> Callable[..., list[dict[str, float]]]:
    """Instead of timing layers: runs everything once and says who is fast, one layer after another."""

    def seconds_in_place(graphs: Sequence[fx.GraphModule], inputs: Sequence[Tensor]) -> list[dict[str, float]]:
        for graph in graphs:
            graph(*inputs)
        turns, seconds = list(winners), []
        for name, _ in graphs[0].named_children():
            winner = turns.pop(0) if len(turns) > 1 else turns[0]
            seconds.append((name, 2e-3, *((5e-4, 1e-3) if winner == "gated" else (3e-3, 4e-3))))
        return [{name: taken[form] for name, *taken in seconds} for form in range(3)]

    return seconds_in_place


def whole_clock(winner: str) -> Callable[..., Rounds]:
    """Instead of timing the gated model, the same with everything kept, and the dense one in its forms."""

    def take_turns(
        runs: Sequence[Callable[[], object]], least: float, enough: Callable[[Rounds], bool], rest: float = 0.0
    ) -> Rounds:
        for run in runs:
            run()
        rounds: Rounds = []
        while not enough(rounds):
            rounds.append([*([1e-3, 2e-3] if winner == "gated" else [4e-3, 4e-3]), 3e-3, 2e-3, 3e-3][: len(runs)])
        return rounds

    return take_turns


def set_clock(monkeypatch: pytest.MonkeyPatch, *winners: str) -> None:
    """Both clocks: that of layers and that of the whole."""
    monkeypatch.setattr(fit, "seconds_in_place", clock(*winners))
    monkeypatch.setattr(choose, "take_turns", whole_clock(winners[-1]))
