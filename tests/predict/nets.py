"""Tiny networks whose maps can be predicted, with what each layer reads and makes, and heads for them."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isw_plugin import InstanceWisePruner
from isw_plugin.functional import keep_mask
from tests.conftest import Concat, Net, Plain, Residual, Touch, made

Layers = dict[str, tuple[list[str | int], str | None]]  # layer -> (sites or ungated columns it reads, its map)


class Down(Net):
    """A residual block whose shortcut is a convolution, so that both make the map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.act, self.act1, self.act2 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.c1, self.bn1 = nn.Conv2d(4, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5)
        self.c2, self.bn2 = nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.down, self.bn3 = nn.Conv2d(4, 6, 1, stride=2), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)

    def run(self, x: Tensor, touch: Touch) -> Tensor:
        x, _ = touch("stem", self.act(self.bn(self.stem(x))))
        hidden, _ = touch("c1", self.act1(self.bn1(self.c1(x))))
        x, _ = touch("c2", self.act2(self.bn2(self.c2(hidden)) + self.bn3(self.down(x))))
        return self.fc(x.mean((2, 3)))


class Inverted(Net):
    """Expansion, depthwise filter, projection, shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
        self.pw, self.bn1, self.act1 = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU6()
        self.dw, self.bn2, self.act2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6()
        self.pwl, self.bn3, self.join = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.Identity()
        self.head = nn.Conv2d(4, 6, 1)

    def run(self, x: Tensor, touch: Touch) -> Tensor:
        x, _ = touch("stem", self.act(self.stem(x)))
        hidden, _ = touch("pw", self.act1(self.bn1(self.pw(x))))
        hidden, _ = touch("dw", self.act2(self.bn2(self.dw(hidden))))
        x, _ = touch("pwl", self.join(x + self.bn3(self.pwl(hidden))))
        return self.head(x).mean((2, 3))


class Twice(Net):
    """An expansion, two depthwise filters one after the other, and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
        self.pw, self.act1 = nn.Conv2d(4, 8, 1), nn.ReLU6()
        self.dw, self.act2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6()
        self.dw2, self.bn2, self.act3 = nn.Conv2d(8, 8, 3, stride=2, groups=8), nn.BatchNorm2d(8), nn.ReLU()
        self.pwl, self.act4, self.head = nn.Conv2d(8, 5, 1), nn.ReLU(), nn.Conv2d(5, 6, 1)

    def run(self, x: Tensor, touch: Touch) -> Tensor:
        x, _ = touch("stem", self.act(self.stem(x)))
        hidden, _ = touch("pw", self.act1(self.pw(x)))
        hidden, _ = touch("dw", self.act2(self.dw(hidden)))
        hidden, _ = touch("dw2", self.act3(self.bn2(self.dw2(hidden))))
        x, _ = touch("pwl", self.act4(self.pwl(hidden)))
        return self.head(x).mean((2, 3))


class Grouped(Net):
    """Two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.act1 = nn.Conv2d(3, 6, 3), nn.ReLU()
        self.c2, self.act2 = nn.Conv2d(6, 8, 3, groups=2), nn.ReLU()
        self.c3 = nn.Conv2d(8, 5, 1)

    def run(self, x: Tensor, touch: Touch) -> Tensor:
        x, _ = touch("c1", self.act1(self.c1(x)))
        x, _ = touch("c2", self.act2(self.c2(x)))
        return self.c3(x).mean((2, 3))


class Joined(Net):
    """Two maps side by side, and one that is flattened: each of its channels fills four columns."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act_a = nn.Conv2d(3, 4, 3), nn.ReLU()
        self.b, self.act_b = nn.Conv2d(4, 5, 3, padding=1), nn.ReLU()
        self.c, self.act_c = nn.Conv2d(9, 6, 3, stride=3), nn.ReLU()
        self.fc1, self.act, self.fc2 = nn.Linear(24, 7), nn.ReLU(), nn.Linear(7, 5)

    def run(self, x: Tensor, touch: Touch) -> Tensor:
        a, _ = touch("a", self.act_a(self.a(x)))
        b, _ = touch("b", self.act_b(self.b(a)))
        c, _ = touch("c", self.act_c(self.c(torch.cat([a, b], dim=1))))
        hidden, _ = touch("fc1", self.act(self.fc1(c.flatten(1))))
        return self.fc2(hidden)


class Stack(Net):
    """One map behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.c2, self.bn2 = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()
        self.fc = nn.Linear(6, 5)

    def run(self, x: Tensor, touch: Touch) -> Tensor:
        x, _ = touch("c1", self.act1(self.bn1(self.c1(x))))
        x, _ = touch("c2", self.act2(self.bn2(self.c2(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


LAYERS: dict[type[Net], Layers] = {
    Plain: {"c1": ([3], "c1"), "c2": (["c1"], "c2"), "fc": (["c2"], None)},
    Stack: {"c1": ([3], "c1"), "c2": (["c1"], "c2"), "fc": (["c2"], None)},
    Residual: {
        "stem": ([3], "stem"),
        "block.c1": (["stem"], "block.c1"),
        "block.c2": (["block.c1"], "block.c2"),
        "fc": (["block.c2"], None),
    },
    Down: {
        "stem": ([3], "stem"),
        "c1": (["stem"], "c1"),
        "c2": (["c1"], "c2"),
        "down": (["stem"], "c2"),
        "fc": (["c2"], None),
    },
    Inverted: {
        "stem": ([3], "stem"),
        "pw": (["stem"], "pw"),
        "dw": (["pw"], "dw"),
        "pwl": (["dw"], "pwl"),
        "head": (["pwl"], None),
    },
    Twice: {
        "stem": ([3], "stem"),
        "pw": (["stem"], "pw"),
        "dw": (["pw"], "dw"),
        "dw2": (["dw"], "dw2"),
        "pwl": (["dw2"], "pwl"),
        "head": (["pwl"], None),
    },
    Grouped: {"c1": ([3], "c1"), "c2": (["c1"], "c2"), "c3": (["c2"], None)},
    Joined: {
        "a": ([3], "a"),
        "b": (["a"], "b"),
        "c": (["a", "b"], "c"),
        "fc1": (["c"], "fc1"),
        "fc2": (["fc1"], None),
    },
    Concat: {"a": ([3], "a"), "b": ([3], "b"), "c": (["a", 3, "b"], "c"), "fc": (["c"], None)},
}
SOURCES: dict[type[Net], dict[str, tuple[str, ...]]] = {
    Plain: {"c2": ("c1",)},
    Stack: {"c2": ("c1",)},
    Residual: {"block.c1": ("stem",), "block.c2": ("stem", "block.c1")},
    Down: {"c1": ("stem",), "c2": ("stem", "c1")},
    Inverted: {"pw": ("stem",), "dw": ("pw",), "pwl": ("stem", "dw")},
    Twice: {"pw": ("stem",), "dw": ("pw",), "dw2": ("dw",), "pwl": ("dw2",)},
    Grouped: {"c2": ("c1",)},
    Joined: {"b": ("a",), "c": ("a", "b"), "fc1": ("c",)},
    Concat: {},
}
FOLLOWERS: dict[type[Net], dict[str, str]] = {Inverted: {"dw": "pw"}, Twice: {"dw": "pw", "dw2": "dw"}}
PREDICTED = [kind for kind, sources in SOURCES.items() if sources]


def predicting(kind: type[Net], seed: int = 0, **settings: object) -> tuple[Net, InstanceWisePruner]:
    """A network of which every site that can be predicted is, by a head of random numbers; gates are on."""
    net = made(kind)
    pruner = InstanceWisePruner(net, net.images(1), **{"alpha": 0.0, "beta": 0.6, **settings})
    generator = torch.Generator().manual_seed(seed)
    sites = {site.name: site for site in pruner.sites}
    heads = {}
    for name, sources in SOURCES[kind].items():
        inputs = 2 * sum(sites[source].channels for source in sources)
        heads[name] = {
            "sources": list(sources),
            "weight": torch.randn(sites[name].channels, inputs, generator=generator) / inputs**0.5,
            "bias": torch.rand(sites[name].channels, generator=generator) / 4,
        }
    pruner.load_state_dict(pruner.state_dict() | {"heads": heads, "enabled": True})
    return net, pruner


def following(kind: type[Net], seed: int = 0, **settings: object) -> tuple[Net, InstanceWisePruner]:
    """The same, but that sites behind depthwise layers follow."""
    net, pruner = predicting(kind, seed, **settings)
    state = pruner.state_dict()
    state["heads"] = {name: head for name, head in state["heads"].items() if name not in FOLLOWERS[kind]}
    pruner.load_state_dict(state | {"followers": FOLLOWERS[kind]})
    return net, pruner


def predicted_by_hand(net: Net, pruner: InstanceWisePruner, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What docs/predicting.md says, written out: outputs and keep masks."""
    known: dict[str, tuple[Tensor, Tensor]] = {}
    kept: dict[str, Tensor] = {}

    def touch(name: str, feature: Tensor) -> tuple[Tensor, Tensor]:
        places = math.prod(feature.shape[2:])
        flat = feature.flatten(2) if feature.dim() > 2 else feature.unsqueeze(2)
        norms = flat.square().sum(2).sqrt()
        if name in pruner.heads:
            head = pruner.heads[name]
            phi = torch.cat([part for source in head.sources for part in known[source]], 1)
            norms = math.sqrt(places) * (phi @ head.weight.T + head.bias).clamp_min(0)
        gate = pruner.gate
        keep = keep_mask(norms, gate.alpha, gate.beta)
        if name in pruner.followers:
            keep = kept[pruner.followers[name]]
        kept[name] = keep
        flat = flat * keep.unsqueeze(2)
        known[name] = (flat.square().mean(2).sqrt(), flat.mean(2))
        masked = flat.reshape(feature.shape)
        return masked, masked

    return net.run(x, touch), kept
