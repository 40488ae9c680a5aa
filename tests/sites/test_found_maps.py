"""Maps behind cuts, shuffles, folds and attention: found, gated as by hand, and their savings counted as by hand."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isw_plugin import InstanceWisePruner, count_macs
from isw_plugin.functional import channel_norm, keep_mask
from isw_plugin.sites import Consumer, find_sites

Touch = Callable[..., Tensor]  # site, map -> what all others see
Run = Callable[[Any, Tensor, Touch], Tensor]

READ = 3 * 9 * 64  # multiply-adds of one input column of a 3x3 layer with 3 outputs on 8x8 pixels


class Sketch(nn.Module):
    """A network written as a function of its modules, an input and ``touch``, which is handed every site's map."""

    def __init__(self, run: Run, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x, lambda name, feature, axis=1: feature)

    def gated_by_hand(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        decided: dict[str, Tensor] = {}

        def touch(name: str, feature: Tensor, axis: int = 1) -> Tensor:
            decided[name] = keep = keep_mask(channel_norm(feature, axis), 0.0, 1.0)
            shape = [len(keep)] + [1] * (feature.dim() - 1)
            shape[axis] = -1
            return torch.where(keep.view(shape), feature, 0)

        return self.run(self, x, touch), decided


def conv(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, **{"padding": size // 2} | options)


def shuffled(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def temporal(m: Any, x: Tensor, touch: Touch) -> Tensor:
    hidden = touch("c1", m.act1(m.c1(x)[:, :, :-2].contiguous()))
    behind = touch("c2", m.act2(m.c2(hidden)[:, :, :-4].contiguous() + m.down(x)))
    return m.fc(behind[:, :, -1])


def points(m: Any, x: Tensor, touch: Touch) -> Tensor:
    x = m.c2(touch("c1", m.act(m.c1(x))))
    return m.fc(torch.max(touch("c2", m.bn(x)), 2, keepdim=True)[0].view(-1, 10))


def coordinates(m: Any, x: Tensor, touch: Touch) -> Tensor:
    x = touch("expand", m.act(m.expand(x)))
    h, w = x.shape[2:]
    rows, columns = F.adaptive_avg_pool2d(x, (h, 1)), F.adaptive_avg_pool2d(x, (1, w)).permute(0, 1, 3, 2)
    rows, columns = touch("both", m.act_both(m.both(torch.cat([rows, columns], 2)))).split([h, w], 2)
    return m.project(x * m.across(columns.permute(0, 1, 3, 2)).sigmoid() * m.down(rows).sigmoid())


def film(m: Any, x: Tensor, touch: Touch) -> Tensor:
    gamma, beta = m.film(x.mean((2, 3))).chunk(2, 1)
    return m.b(touch("a", m.act(m.norm(m.a(x)) * gamma[:, :, None, None] + beta[:, :, None, None])))


def halves(m: Any, x: Tensor, touch: Touch) -> Tensor:
    passed, taken = touch("stem", m.act(m.stem(x))).chunk(2, 1)
    return m.last(shuffled(torch.cat([passed, touch("pw", m.act_pw(m.pw(taken)))], 1), 2))


def unfolded(m: Any, x: Tensor, touch: Touch) -> Tensor:
    y = m.a(x)
    n, c, h, w = y.shape
    y = y.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)
    return m.b(touch("a", m.act(y)))


def folded(m: Any, x: Tensor, touch: Touch) -> Tensor:
    y = touch("a", m.act(m.a(x)))
    n, c, h, w = y.shape
    y = y.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).contiguous()
    return m.b(y.view(n, 4 * c, h // 2, w // 2))


def maxout(m: Any, x: Tensor, touch: Touch) -> Tensor:
    x = m.a(x)
    x = touch("a", x.view(len(x), 4, 2, 8, 8).max(2)[0])
    x = m.b(x)
    return m.c(touch("b", x.view(len(x), 2, 4, 8, 8).amax(1)))


def larger_half(m: Any, x: Tensor, touch: Touch) -> Tensor:
    one, other = m.a(x).split(4, 1)
    return m.b(touch("a", torch.max(one, other)))


def slices(m: Any, x: Tensor, touch: Touch) -> Tensor:
    x = touch("a", m.act(m.a(x)))
    return m.b(x[:, :2]) + m.c(x[:, 2:])


def scales(m: Any, x: Tensor, touch: Touch) -> Tensor:
    first, second, third = touch("a", m.act(m.a(x))).split(2, 1)
    first = touch("k0", m.act0(m.k0(first)))
    second = touch("k1", m.act1(m.k1(first + second)))
    return m.c(torch.cat([first, second, third], 1))


def ghost(m: Any, x: Tensor, touch: Touch) -> Tensor:
    x = touch("a", m.act(m.a(x)))
    return m.c(torch.cat([x, touch("cheap", m.act2(m.cheap(x)))], 1)[:, :7])


def dense(m: Any, x: Tensor, touch: Touch) -> Tensor:
    a = touch("a", m.act(m.a(x)))
    both = torch.cat([a, touch("b", m.act2(m.b(a)))], 1)
    return m.c(both[:, 2:5]).mean((1, 2, 3)) + m.d(both.narrow(1, 3, 4)).mean((1, 2, 3))


def attention(m: Any, x: Tensor, touch: Touch) -> Tensor:
    x = touch("a", m.act(m.a(x)))
    return m.b(x * m.where(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid())


def canvas(m: Any, x: Tensor, touch: Touch) -> Tensor:
    x = touch("a", m.act(m.a(x)))
    around = x.new_zeros(len(x), 4, 10, 10)
    around[:, :, 1:-1, 1:-1] = x
    return m.b(around)


def sentences(m: Any, x: Tensor, touch: Touch) -> Tensor:
    pooled = [F.max_pool1d(y, y.shape[2]).squeeze(2) for y in (F.relu(m.a(x)), F.relu(m.b(x)))]
    return m.fc(touch("a", torch.cat(pooled, 1)))


def through(*between: Callable[[Tensor], Tensor]) -> Run:
    """a, activation, operations, b: the map is what the activation gives."""

    def run(m: Any, x: Tensor, touch: Touch) -> Tensor:
        x = touch("a", m.act(m.a(x)))
        for operation in between:
            x = operation(x)
        return m.b(x)

    return run


def behind(operation: Callable[[Tensor], Tensor]) -> Run:
    """a, operation, b: the map is what the operation gives."""
    return lambda m, x, touch: m.b(touch("a", operation(m.a(x))))


def pair(inputs: int = 4, **options: Any) -> dict[str, nn.Module]:
    return {"a": conv(3, 4), "act": nn.ReLU(), "b": conv(inputs, 3, **options)}


ONE = {"a": ("a",)}
IMAGE = (3, 8, 8)
Sites = dict[str, tuple[tuple[str, ...], int, list[Consumer], Any]]

CASES: dict[str, tuple[tuple[int, ...], dict[str, nn.Module], Run, Sites]] = {
    # name: (input, modules, run, site -> (its layers, channels, consumers, MACs saved by each channel or by any))
    "temporal convolutions": (
        (3, 10),
        {
            "c1": nn.Conv1d(3, 6, 3, padding=2),
            "act1": nn.ReLU(),
            "c2": nn.Conv1d(6, 6, 3, padding=4, dilation=2),
            "down": nn.Conv1d(3, 6, 1),
            "act2": nn.ReLU(),
            "fc": nn.Linear(6, 3),
        },
        temporal,
        {"c1": (("c1",), 6, [Consumer("c2")], 6 * 3 * 14), "c2": (("c2", "down"), 6, [Consumer("fc")], 3)},
    ),
    "largest of all points": (
        (3, 16),
        {
            "c1": nn.Conv1d(3, 6, 1),
            "act": nn.ReLU(),
            "c2": nn.Conv1d(6, 10, 1),
            "bn": nn.BatchNorm1d(10),
            "fc": nn.Linear(10, 4),
        },
        points,
        {"c1": (("c1",), 6, [Consumer("c2")], 10 * 16), "c2": (("c2",), 10, [Consumer("fc")], 4)},
    ),
    "coordinate attention": (
        IMAGE,
        {
            "expand": conv(3, 6, 1),
            "act": nn.ReLU(),
            "both": conv(6, 4, 1),
            "act_both": nn.Hardswish(),
            "down": conv(4, 6, 1),
            "across": conv(4, 6, 1),
            "project": conv(6, 4, 1),
        },
        coordinates,
        {
            "expand": (("expand",), 6, [Consumer("project")], 4 * 64),
            "both": (("both",), 4, [Consumer("down"), Consumer("across")], 2 * 6 * 8),
        },
    ),
    "scale and shift": (
        IMAGE,
        pair() | {"norm": nn.BatchNorm2d(4), "film": nn.Linear(3, 8)},
        film,
        {"a": (("a",), 4, [Consumer("b")], READ)},
    ),
    "shuffled halves": (
        IMAGE,
        {
            "stem": conv(3, 8),
            "act": nn.ReLU(),
            "pw": conv(4, 4, 1),
            "act_pw": nn.ReLU(),
            "last": conv(8, 5, 1),
        },
        halves,
        {
            "stem": (
                ("stem",),
                8,
                [Consumer("pw", 0, 1, (4, 5, 6, 7)), Consumer("last", 0, 1, (0, -1, 1, -1, 2, -1, 3))],
                [5 * 64] * 4 + [4 * 64] * 4,
            ),
            "pw": (("pw",), 4, [Consumer("last", 1, 1, (0, -1, 1, -1, 2, -1, 3))], 5 * 64),
        },
    ),
    "shuffled groups": (
        IMAGE,
        {"a": conv(3, 6, 1, groups=3), "act": nn.ReLU(), "b": conv(6, 4, 1, groups=2)},
        through(lambda x: F.channel_shuffle(x, 3)),
        {"a": (("a",), 6, [Consumer("b", 0, 1, (0, 2, 4, 1, 3, 5))], 2 * 64)},
    ),
    "sub-pixel": (
        IMAGE,
        {"a": conv(3, 16), "b": conv(4, 3)},
        behind(lambda x: F.pixel_shuffle(x, 2)),
        {"a": (("a",), 4, [Consumer("b")], 4 * READ)},
    ),
    "sub-pixel, written out": (
        IMAGE,
        {"a": conv(3, 16), "act": nn.ReLU(), "b": conv(4, 3)},
        unfolded,
        {"a": (("a",), 4, [Consumer("b")], 4 * READ)},
    ),
    "pixels folded into channels": (
        IMAGE,
        pair(16),
        through(lambda x: F.pixel_unshuffle(x, 2)),
        {"a": (("a",), 4, [Consumer("b", 0, 4)], READ)},
    ),
    "pixels folded into channels, written out": (
        IMAGE,
        pair(16),
        folded,
        {"a": (("a",), 4, [Consumer("b", 0, 1, (0, 1, 2, 3) * 4)], READ)},
    ),
    "response norm": (
        IMAGE,
        pair(),
        lambda m, x, touch: m.b(touch("a", F.local_response_norm(m.act(m.a(x)), 3))),
        {"a": (("a",), 4, [Consumer("b")], READ)},
    ),
    "padded in a circle": (
        IMAGE,
        pair(padding=0),
        through(lambda x: F.pad(x, (1, 1, 1, 1), mode="circular")),
        {"a": (("a",), 4, [Consumer("b")], READ)},
    ),
    "padded by reflection": (
        (3, 8),
        {"a": nn.Conv1d(3, 4, 1), "act": nn.ReLU(), "b": nn.Conv1d(4, 3, 3)},
        through(lambda x: F.pad(x, (2, 0), mode="reflect")),
        {"a": (("a",), 4, [Consumer("b")], 3 * 3 * 8)},
    ),
    "padding modes of layers": (
        IMAGE,
        pair(padding_mode="circular"),
        through(),
        {"a": (("a",), 4, [Consumer("b")], READ)},
    ),
    "maxout": (
        IMAGE,
        {"a": conv(3, 8), "b": conv(4, 8), "c": conv(4, 3)},
        maxout,
        {"a": (("a",), 4, [Consumer("b")], 8 * 9 * 64), "b": (("b",), 4, [Consumer("c")], READ)},
    ),
    "the larger half": (
        IMAGE,
        {"a": conv(3, 8), "b": conv(4, 3)},
        larger_half,
        {"a": (("a",), 4, [Consumer("b")], READ)},
    ),
    "the larger of two": (
        IMAGE,
        pair() | {"c": conv(3, 4)},
        lambda m, x, touch: m.b(touch("a", torch.maximum(m.a(x), m.c(x)))),
        {"a": (("a", "c"), 4, [Consumer("b")], READ)},
    ),
    "gated linear unit": (
        IMAGE,
        {"a": conv(3, 8), "b": conv(4, 3)},
        behind(lambda x: F.glu(x, 1)),
        {"a": (("a",), 4, [Consumer("b")], READ)},
    ),
    "slices": (
        IMAGE,
        {"a": conv(3, 6), "act": nn.ReLU(), "b": conv(2, 3), "c": conv(4, 3)},
        slices,
        {"a": (("a",), 6, [Consumer("b", 0, 1, (0, 1)), Consumer("c", 0, 1, (2, 3, 4, 5))], READ)},
    ),
    "several scales": (
        IMAGE,
        {"a": conv(3, 6), "act": nn.ReLU(), "k0": conv(2, 2), "act0": nn.ReLU()}
        | {"k1": conv(2, 2), "act1": nn.ReLU(), "c": conv(6, 4, 1)},
        scales,
        {
            "a": (
                ("a",),
                6,
                [Consumer("k0", 0, 1, (0, 1)), Consumer("c", 4, 1, (4, 5))],
                [2 * 9 * 64] * 2 + [0] * 2 + [4 * 64] * 2,
            ),
            "k0": (("k0",), 2, [Consumer("c")], 4 * 64),
            "k1": (("k1",), 2, [Consumer("c", 2)], 4 * 64),
        },
    ),
    "ghosts": (
        IMAGE,
        {"a": conv(3, 4, 1), "act": nn.ReLU(), "cheap": conv(4, 4, groups=4), "act2": nn.ReLU(), "c": conv(7, 3)},
        ghost,
        {
            "a": (("a",), 4, [Consumer("cheap"), Consumer("c")], 9 * 64 + READ),
            "cheap": (("cheap",), 4, [Consumer("c", 4, 1, (0, 1, 2))], [READ] * 3 + [0]),
        },
    ),
    "slices of a concatenation": (
        IMAGE,
        {"a": conv(3, 4), "act": nn.ReLU(), "b": conv(4, 3), "act2": nn.ReLU(), "c": conv(3, 5), "d": conv(4, 2)},
        dense,
        {
            "a": (
                ("a",),
                4,
                [Consumer("b"), Consumer("c", 0, 1, (2, 3)), Consumer("d", 0, 1, (3,))],
                [READ, READ, READ + 5 * 9 * 64, READ + 7 * 9 * 64],
            ),
            "b": (("b",), 3, [Consumer("c", 2, 1, (0,)), Consumer("d", 1)], [7 * 9 * 64, 2 * 9 * 64, 2 * 9 * 64]),
        },
    ),
    "taken by number": (
        IMAGE,
        {"a": conv(3, 4), "b": conv(3, 3)},
        behind(lambda x: x[:, [3, 1, 0]]),
        {"a": (("a",), 3, [Consumer("b")], READ)},
    ),
    "selected": (
        IMAGE,
        {"a": conv(3, 4), "b": conv(3, 3)},
        behind(lambda x: x.index_select(1, torch.tensor([3, 1, 0], device=x.device))),
        {"a": (("a",), 3, [Consumer("b")], READ)},
    ),
    "flattened with channels last": (
        (3, 4, 4),
        {"a": conv(3, 4), "act": nn.ReLU(), "b": nn.Linear(64, 3)},
        through(lambda x: x.permute(0, 2, 3, 1).flatten(1)),
        {"a": (("a",), 4, [Consumer("b", 0, 1, (0, 1, 2, 3) * 16)], 3 * 16)},
    ),
    "places as rows": (
        (5, 4),
        {"a": nn.Linear(4, 6), "act": nn.ReLU(), "b": nn.Linear(6, 3)},
        lambda m, x, touch: m.b(touch("a", m.act(m.a(x)), -1).reshape(-1, 6)).view(len(x), 5, 3),
        {"a": (("a",), 6, [Consumer("b")], 3 * 5)},
    ),
    "attention over places": (
        IMAGE,
        pair() | {"where": conv(2, 1)},
        attention,
        {"a": (("a",), 4, [Consumer("b")], READ)},
    ),
    "a shortcut that is padded with channels": (
        IMAGE,
        pair(8),
        through(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))),
        {"a": (("a",), 4, [Consumer("b", 2)], READ // 4)},
    ),
    "written into zeros": (IMAGE, pair(padding=0), canvas, {"a": (("a",), 4, [Consumer("b")], READ)}),
    "pooled by functions before a concatenation": (
        (6, 12),
        {"a": nn.Conv1d(6, 5, 3), "b": nn.Conv1d(6, 5, 4), "fc": nn.Linear(10, 3)},
        sentences,
        {"a": (("a", "b"), 10, [Consumer("fc")], 3)},
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Sketch, Tensor, Sites]:
    shape, modules, run, sites = CASES[request.param]
    torch.manual_seed(0)
    modules = deepcopy(modules)
    for module in modules.values():
        for parameter in module.parameters():
            nn.init.normal_(parameter)
    return Sketch(run, modules).eval(), torch.randn(4, *shape), sites


@pytest.mark.parametrize("scope", ["all", "consumers"])
def test_the_maps_are_found(case: tuple[Sketch, Tensor, Sites], scope: str) -> None:
    net, x, sites = case
    found = {site.name: site for site in find_sites(net, x[:1], scope=scope).sites}
    assert {name: (site.layers, site.channels, list(site.consumers)) for name, site in found.items()} == {
        name: row[:3] for name, row in sites.items()
    }


@torch.no_grad()
def test_gated_they_are_as_zeroed_by_hand(case: tuple[Sketch, Tensor, Sites]) -> None:
    net, x, sites = case
    expected, decided = net.gated_by_hand(x)
    pruner = InstanceWisePruner(net, x, alpha=0.0, beta=1.0)
    with pruner.gating():
        given = net(x)
    for name in sites:
        assert torch.equal(pruner.keep[name], decided[name])
        assert 0 < pruner.keep[name].sum() < pruner.keep[name].numel()
    torch.testing.assert_close(given, expected)


@torch.no_grad()
def test_their_savings_are_as_counted_by_hand(case: tuple[Sketch, Tensor, Sites]) -> None:
    net, x, sites = case
    pruner = InstanceWisePruner(net, x, alpha=0.0, beta=1.0)
    pruner.step()
    report = count_macs(net, x)
    for name, (_, channels, _, each) in sites.items():
        dropped = ~pruner.keep[name]
        costs = torch.tensor([each] * channels if isinstance(each, int) else each, dtype=torch.float64)
        assert torch.equal(report.per_site[name], dropped.double() @ costs)


@torch.no_grad()
def test_for_readers_only_their_columns_are_zeroed(case: tuple[Sketch, Tensor, Sites]) -> None:
    net, x, sites = case
    pruner = InstanceWisePruner(net, x, alpha=0.0, beta=1.0, scope="consumers")
    seen: dict[str, Tensor] = {}
    for name, module in net.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0]}))
    with pruner.gating():
        net(x)
    columns: dict[str, dict[int, Tensor]] = {}
    for site, (_, channels, consumers, _) in sites.items():
        for reader in consumers:
            for place in range(len(reader.channels or range(channels)) * reader.repeat):
                order = reader.channels or range(channels)
                if (channel := order[place // reader.repeat]) >= 0:
                    columns.setdefault(reader.layer, {})[reader.start + place] = pruner.keep[site][:, channel]
    for layer, kept in columns.items():
        axis = -1 if isinstance(net.get_submodule(layer), nn.Linear) else 1
        for column, keep in kept.items():
            keep = keep.repeat_interleave(len(seen[layer]) // len(keep))
            assert not seen[layer].movedim(axis, 1)[~keep, column].any()


LEFT_OUT: list[tuple[str, dict[str, nn.Module], Run, str]] = [
    # what, modules, run, reason
    (
        "ones around it, which are left of a dropped channel",
        pair(padding=0),
        lambda m, x, touch: m.b(F.pad(m.act(m.a(x)), (1, 1, 1, 1), value=1.0)),
        "constant_pad_nd reads it first",
    ),
    (
        "written over a part of another map",
        pair(6),
        lambda m, x, touch: m.b(over(torch.cat([x, x], 1), m.act(m.a(x)))),
        "written into a part of another tensor",
    ),
    (
        "mostly unread",
        pair(1),
        lambda m, x, touch: (lambda y: m.b(y[:, :1]).mean() + y[:, 1:].mean())(m.act(m.a(x))),
        "layers read less than half of its channels",
    ),
    (
        "functions until it is flattened",
        pair() | {"b": nn.Linear(64, 3)},
        lambda m, x, touch: m.b(F.max_pool2d(F.relu(m.a(x)), 2).flatten(1)),
        "only functions touch it before it is flattened: make one of them a module (nn.Flatten)",
    ),
    (
        "written over by something else",
        pair(),
        lambda m, x, touch: (m.act(m.a(x)), m.b(torch.cat([x, x[:, :1]], 1)))[1],
        "nothing reads it",
    ),
]


def over(canvas: Tensor, x: Tensor) -> Tensor:
    canvas[:, :4] = x
    return canvas


@pytest.mark.parametrize(("modules", "run", "reason"), [row[1:] for row in LEFT_OUT], ids=[row[0] for row in LEFT_OUT])
def test_what_is_no_map_is_left_out_for_the_true_reason(modules: dict[str, nn.Module], run: Run, reason: str) -> None:
    others = {"c": conv(3, 4), "d": conv(4, 3)}  # a model needs a site
    net = Sketch(lambda m, x, touch: run(m, x, touch).mean() + m.d(m.c(x)), modules | others)
    assert find_sites(net, torch.zeros(1, 3, 8, 8)).left_out["a"] == reason
