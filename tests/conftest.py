"""Tiny networks that carry their own expected answers: which sites they have, and what gating them computes."""

import os
import sys
from collections.abc import Callable, Iterator
from typing import ClassVar

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # a core each, before torch counts them: threads of two would wait
    os.sched_setaffinity(0, {CORES[int(worker.removeprefix("gw")) % len(CORES)]})

import pytest
import timm
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn
from torch.nn import functional as F

from isw_plugin.functional import channel_norm, keep_mask

# Both go by the clock, so they fail for what else runs on the machine.
settings.register_profile("isw_plugin", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("isw_plugin")

Touch = Callable[[str, Tensor], tuple[Tensor, Tensor]]  # site, map -> what readers see, what all others see


def untouched(name: str, feature: Tensor) -> tuple[Tensor, Tensor]:
    return feature, feature


class Net(nn.Module):
    """A network written once as ``run``, in which every site is handed to ``touch``.

    sites: site name -> (channels, {reader: (start, repeat)}).
    """

    image: ClassVar[tuple[int, ...]] = (3, 8, 8)
    sites: ClassVar[dict[str, tuple[int, dict[str, tuple[int, int]]]]] = {}

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, untouched)

    def run(self, x: Tensor, touch: Touch) -> Tensor:
        raise NotImplementedError

    def images(self, n: int = 4, seed: int = 0) -> Tensor:
        return torch.randn(n, *self.image, generator=torch.Generator().manual_seed(seed))

    def gated_by_hand(self, x: Tensor, alpha: float, beta: float, scope: str) -> Tensor:
        def touch(name: str, feature: Tensor) -> tuple[Tensor, Tensor]:
            axis = 1 if feature.dim() == 4 else -1
            keep = keep_mask(channel_norm(feature, axis), alpha, beta)
            keep = (
                keep[:, :, None, None] if feature.dim() == 4 else keep.view(len(keep), *[1] * (feature.dim() - 2), -1)
            )
            masked = torch.where(keep, feature, torch.zeros(()))
            return masked, masked if scope == "all" else feature

        return self.run(x, touch)

    def features(self, x: Tensor) -> dict[str, Tensor]:
        """Every site's map of the bare network, in the graph."""
        seen: dict[str, Tensor] = {}

        def touch(name: str, feature: Tensor) -> tuple[Tensor, Tensor]:
            seen[name] = feature
            return feature, feature

        self.run(x, touch)
        return seen

    def penalty_by_hand(self, x: Tensor, lambda_: float) -> Tensor:
        """Eq. 3-5, written out."""
        total = torch.zeros((), dtype=x.dtype)
        for feature in self.features(x).values():
            channels_last = feature if feature.dim() == 3 else feature.movedim(1, -1)
            for instance in channels_last.flatten(1, -2) if feature.dim() > 2 else channels_last.unsqueeze(1):
                for channel in instance.unbind(-1):
                    total = total + lambda_ * channel.square().sum().clamp_min(1e-30).sqrt()
        return total


class Plain(Net):
    """Modules all the way, global pooling: each site is the output of an activation module."""

    sites: ClassVar = {"c1": (4, {"c2": (0, 1)}), "c2": (6, {"fc": (0, 1)})}

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.bn1, self.act1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.c2, self.bn2, self.act2 = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 5)

    def run(self, x: Tensor, touch: Touch) -> Tensor:
        x, _ = touch("c1", self.act1(self.bn1(self.c1(x))))
        x, _ = touch("c2", self.act2(self.bn2(self.c2(x))))
        return self.fc(self.pool(x).flatten(1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.bn1 = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.c2, self.bn2 = nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.shortcut = nn.Identity()

    def forward(self, x: Tensor, touch: Touch = untouched) -> Tensor:
        read, other = touch("stem", x)
        read, _ = touch("block.c1", F.relu(self.bn1(self.c1(read))))
        return F.relu(self.bn2(self.c2(read)) + self.shortcut(other))


class Residual(Net):
    """Functional relu and add: most sites can only be touched where modules take them in."""

    sites: ClassVar = {
        "stem": (4, {"block.c1": (0, 1)}),
        "block.c1": (6, {"block.c2": (0, 1)}),
        "block.c2": (4, {"fc": (0, 1)}),
    }

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.block = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), Block()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 5)

    def run(self, x: Tensor, touch: Touch) -> Tensor:
        x = self.block(F.relu(self.bn(self.stem(x))), touch)
        read, _ = touch("block.c2", x)
        return self.fc(self.pool(read).flatten(1))


class Concat(Net):
    """Two branches side by side, one of them ungated noise; then a flatten."""

    sites: ClassVar = {
        "a": (4, {"c": (0, 1)}),
        "b": (5, {"c": (7, 1)}),
        "c": (6, {"fc": (0, 4)}),
    }

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 3)
        self.act_a, self.act_b, self.act_c = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.c, self.fc = nn.Conv2d(12, 6, 3, stride=3), nn.Linear(24, 5)

    def run(self, x: Tensor, touch: Touch) -> Tensor:
        a, _ = touch("a", self.act_a(self.a(x)))
        b, _ = touch("b", self.act_b(self.b(x)))
        c, _ = touch("c", self.act_c(self.c(torch.cat([a, x[:, :, 1:-1, 1:-1], b], dim=1))))
        return self.fc(c.flatten(1))


class Tokens(Net):
    """A transformer's MLP on (N, T, C): channels are the last axis."""

    image: ClassVar = (7, 8)
    sites: ClassVar = {"fc1": (16, {"fc2": (0, 1)})}

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.act, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def run(self, x: Tensor, touch: Touch) -> Tensor:
        hidden, _ = touch("fc1", self.act(self.fc1(self.norm(x))))
        return (x + self.fc2(hidden)).mean(1)


class SqueezeExcite(Net):
    """The layers that only compute a map's scale are no readers of that map."""

    sites: ClassVar = {"c1": (4, {"c2": (0, 1)}), "reduce": (3, {"expand": (0, 1)})}

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.act1 = nn.Conv2d(3, 4, 3), nn.ReLU()
        self.reduce, self.act, self.expand = nn.Conv2d(4, 3, 1), nn.ReLU(), nn.Conv2d(3, 4, 1)
        self.c2 = nn.Conv2d(4, 5, 3)

    def run(self, x: Tensor, touch: Touch) -> Tensor:
        read, other = touch("c1", self.act1(self.c1(x)))
        squeezed, _ = touch("reduce", self.act(self.reduce(other.mean((2, 3), keepdim=True))))
        return self.c2(read * self.expand(squeezed).sigmoid()).mean((2, 3))


class Preactivation(Net):
    """Norm and activation after the join: its output is the site, named after the norm."""

    sites: ClassVar = {"bn1": (4, {"c1": (0, 1)}), "c1": (6, {"c2": (0, 1)}), "bn3": (4, {"fc": (0, 1)})}

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.bn1, self.act1, self.c1 = nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1)
        self.bn2, self.act2, self.c2 = nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1)
        self.bn3, self.act3, self.fc = nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(4, 5)

    def run(self, x: Tensor, touch: Touch) -> Tensor:
        x = self.stem(x)
        read, _ = touch("bn1", self.act1(self.bn1(x)))
        read, _ = touch("c1", self.act2(self.bn2(self.c1(read))))
        read, _ = touch("bn3", self.act3(self.bn3(x + self.c2(read))))
        return self.fc(read.mean((2, 3)))


NETS = (Plain, Residual, Concat, Tokens, SqueezeExcite, Preactivation)


def made(kind: type[Net], seed: int = 0) -> Net:
    """A network in eval mode whose norms are not the identity, so that maps have live and dead channels."""
    torch.manual_seed(seed)
    net = kind()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.5)
            nn.init.normal_(module.bias, 0, 0.5)
            nn.init.normal_(module.running_mean, 0, 0.1)
    return net.eval()


def hooks_of(model: nn.Module) -> dict[str, tuple[tuple[object, ...], ...]]:
    """Every hook in the model, for comparison before and after."""
    return {
        name: (
            tuple(module._forward_hooks.values()),
            tuple(module._forward_pre_hooks.values()),
            tuple(module._forward_hooks_with_kwargs),
            tuple(module._forward_pre_hooks_with_kwargs),
            tuple(module._forward_hooks_always_called),
        )
        for name, module in model.named_modules()
    }


def on_meta(name: str, **options: object) -> nn.Module:
    """A model of timm's without weights, if it can be made so."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, **options)
    except RuntimeError:  # constructors of older timm compute with weights
        return timm.create_model(name, **options)


@pytest.fixture(autouse=True, scope="session")
def only_pytorch() -> Iterator[None]:
    """What forms are compared must not depend on what is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("isw_plugin.accelerate.plan.is_installed", lambda: False)
        yield


@pytest.fixture(autouse=True)
def forget_accelerate() -> Iterator[None]:
    """Accelerate keeps the precision of its first user for the whole process."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state()
        state.GradientState._reset_state()


@pytest.fixture(params=NETS, ids=lambda kind: kind.__name__)
def net(request: pytest.FixtureRequest) -> Net:
    """Each of the tiny networks in turn, in eval mode."""
    return made(request.param)


@pytest.fixture
def plain() -> Net:
    return made(Plain)


@pytest.fixture
def residual() -> Net:
    return made(Residual)
