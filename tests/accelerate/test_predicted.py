"""Heads become one operator, which reads what kernels summed; decisions and norms stay those of the masked model."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from isw_plugin import InstanceWisePruner
from isw_plugin.accelerate.execution import GatedConv
from isw_plugin.accelerate.layers import mask, predict
from isw_plugin.accelerate.lower import lower, lower_all_kept
from isw_plugin.accelerate.predicted import name_heads
from isw_plugin.accelerate.simplify import simplify
from isw_plugin.accelerate.trace import trace
from isw_plugin.gates import CVGate, MinNorm
from isw_plugin.heads import Head
from tests.accelerate.test_lower import executions, targets
from tests.accelerate.test_outputs import simplified
from tests.conftest import Net
from tests.predict.nets import PREDICTED, Inverted, predicting

isw, aten = torch.ops.isw, torch.ops.aten
LEFT = {aten.addmm.default, aten.mean.dim, aten.where.ScalarOther, isw.channel_norm.default, isw.decide.default}


def lowered(kind: type[Net]) -> tuple[Net, InstanceWisePruner, Tensor, fx.GraphModule, list[Any]]:
    net, pruner, images, graph = simplified(kind)
    module, decisions = lower(graph, executions(graph, images, ()), 1, [site.name for site in pruner.sites])
    return net, pruner, images, module, decisions


@pytest.mark.parametrize("kind", PREDICTED)
def test_a_head_and_its_decision_are_one_operator(kind: type[Net]) -> None:
    _, pruner, _, graph, _ = lowered(kind)
    called = [node.target for node in graph.graph.nodes]
    assert called.count(isw.predict.default) == len(pruner.predicted)
    assert called.count(aten.addmm.default) == 0
    assert isw.decide.default not in called
    assert isw.sum_squares.default not in called  # kernels summed it all
    if kind is Inverted:  # no linear layer, and one mean of its own
        assert {each for each in called if each in LEFT} == {aten.mean.dim}
        assert called.count(aten.mean.dim) == 1


@pytest.mark.parametrize("kind", PREDICTED)
def test_norms_and_decisions_are_the_masked_model_s(kind: type[Net]) -> None:
    net, pruner, images, graph, decisions = lowered(kind)
    with torch.no_grad():
        net(images)
        given = list(graph(images))[1:]
    for decision in decisions:
        if decision.thresholds is None:
            keep, norms = given.pop(0), given.pop(0)
        else:
            squares = given.pop(0)
            keep, norms = isw.keep_mask(squares, *decision.thresholds), squares.sum(1).sqrt()
        assert torch.equal(keep, pruner.keep[decision.site])
        torch.testing.assert_close(norms, pruner.norms[decision.site], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", PREDICTED)
def test_the_copy_runs_it_again(kind: type[Net]) -> None:
    net, pruner = predicting(kind)
    images = net.images(8)
    with torch.no_grad():
        fast = pruner.accelerate(images, backend="gated")
        for _ in range(3):
            with fast.recording() as record:
                found = fast(images)
            torch.testing.assert_close(found, net(images), rtol=1e-4, atol=1e-5)
            assert all(torch.equal(record.keep[name], keep) for name, keep in pruner.keep.items())
    assert not fast.refused


def test_gates_that_keep_all_cost_the_same_operators() -> None:
    _, pruner, images, graph = simplified(Inverted)
    modules = executions(graph, images, ())
    names = [site.name for site in pruner.sites]
    opened, gated = lower_all_kept(graph, modules, 1, names), lower(graph, modules, 1, names)[0]
    assert targets(opened) == targets(gated)
    with torch.no_grad():
        found = opened(images)
    heads = [node for node in opened.graph.nodes if node.target is isw.predict.default]
    assert {node.args[7] for node in heads} == {0.0}
    assert all(each.all() for each in found if each.dtype == torch.bool)


class Pooled(nn.Module):
    """A map that is pooled before the predicted layer reads it, and one behind that."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 4, 3)
        self.act1, self.act2, self.act3 = nn.ReLU(), nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act2(self.c2(F.max_pool2d(self.act1(self.c1(x)), 2)))
        return self.act3(self.c3(F.max_pool2d(x, 2))).mean((2, 3))


def pooled(
    weight: Tensor, gate: Any = None, basis: Tensor | None = None
) -> tuple[nn.Module, InstanceWisePruner, Tensor, fx.GraphModule]:
    torch.manual_seed(0)
    net, images = Pooled().eval(), torch.randn(4, 3, 16, 16)
    pruner = InstanceWisePruner(net, images[:1], gate=gate or CVGate(0.0, 0.9), exclude="c3")
    site = pruner.sites[1]
    assert site.making.sources == (pruner.sites[0].name,)
    pruner._settings.take_heads({site.name: Head(site.making.sources, weight, torch.rand(12), basis)})
    pruner._configure()
    pruner.enable()
    return net, pruner, images, simplify(trace(net, pruner.sites, images))


def test_pools_stay_within_the_layers_that_a_head_reads() -> None:
    net, pruner, images, graph = pooled(torch.randn(12, 16) / 4)
    modules = executions(graph, images, ())
    module, _ = lower(graph, modules, 1, [site.name for site in pruner.sites])
    assert [each.pooled for each in module.children() if isinstance(each, GatedConv)].count(True) == 2
    with torch.no_grad():
        torch.testing.assert_close(module(images)[0], net(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("narrow", [True, False])
def test_weights_are_narrow_where_that_changes_none(narrow: bool) -> None:
    weight = torch.randn(12, 16) / 4
    weight = weight.bfloat16().float() if narrow else weight
    graph = pooled(weight)[3]
    (node,) = [node for node in graph.graph.nodes if node.target is predict]
    held = getattr(graph, node.args[2].target)
    assert held.dtype == (torch.bfloat16 if narrow else torch.float32)
    assert held.is_contiguous()
    assert torch.equal(held.float(), weight.T)


@pytest.mark.parametrize("narrow", [True, False])
def test_two_factors_are_one_operator(narrow: bool) -> None:
    weight, basis = torch.randn(12, 5) / 4, torch.randn(5, 16) / 4
    if narrow:
        weight, basis = weight.bfloat16().float(), basis.bfloat16().float()
    net, pruner, images, graph = pooled(weight, basis=basis)
    (node,) = [node for node in graph.graph.nodes if node.target is predict]
    held = [getattr(graph, node.args[place].target) for place in (2, 5)]
    assert {factor.dtype for factor in held} == {torch.bfloat16 if narrow else torch.float32}
    module, _ = lower(graph, executions(graph, images, ()), 1, [site.name for site in pruner.sites])
    assert isw.predict.default in targets(module)
    with torch.no_grad():
        torch.testing.assert_close(module(images)[0], net(images), rtol=1e-4, atol=1e-5)


def test_another_gate_decides_on_the_norms() -> None:
    net, pruner, images, graph = pooled(torch.randn(12, 16) / 4, MinNorm(0.5))
    module, _ = lower(graph, executions(graph, images, ()), 1, [site.name for site in pruner.sites])
    assert isw.predict.default in targets(module)
    with torch.no_grad():
        torch.testing.assert_close(module(images)[0], net(images), rtol=1e-4, atol=1e-5)
    assert not pruner.keep[pruner.sites[1].name].all()


@pytest.mark.parametrize("case", ["as it is", "another mean", "another root", "another keep"])
def test_what_is_no_head_stays(case: str) -> None:
    graph, root = fx.Graph(), nn.Module()
    root.register_buffer("weight", torch.randn(8, 5))
    root.register_buffer("bias", torch.randn(5))
    x, keep, other = graph.placeholder("x"), graph.placeholder("keep"), graph.placeholder("other")
    x.meta["val"] = torch.zeros(2, 4, 3, 3)
    weight, bias = graph.get_attr("weight"), graph.get_attr("bias")
    norms = graph.call_function(isw.channel_norm.default, (x, 1))
    norms = graph.call_function(aten.where.ScalarOther, (keep, norms, 0))
    rms = graph.call_function(aten.div.Tensor, (norms, 4.0 if case == "another root" else 3.0))
    left = graph.call_function(mask, (x, other if case == "another keep" else keep, 1))
    mean = graph.call_function(aten.mean.dim, (left, [2] if case == "another mean" else [2, 3]))
    if case == "another mean":
        mean = graph.call_function(aten.amax.default, (mean, [2]))
    phi = graph.call_function(aten.cat.default, ([rms, mean], 1))
    linear = graph.call_function(aten.addmm.default, (bias, phi, weight))
    linear.meta["val"] = torch.zeros(2, 5)
    graph.output(graph.call_function(aten.mul.Tensor, (graph.call_function(aten.relu.default, (linear,)), 2.0)))
    module = fx.GraphModule(root, graph)
    given = torch.randn(2, 4, 3, 3), torch.rand(2, 4) < 0.5, torch.rand(2, 4) < 0.5
    wanted = module(*given)
    name_heads(module, {weight: root.weight, bias: root.bias})
    module.recompile()
    assert (predict in targets(module)) == (case == "as it is")
    torch.testing.assert_close(module(*given), wanted, rtol=1e-4, atol=1e-5)
