"""Decisions that are made before a layer runs reach that layer, and nothing changes but the time."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from isw_plugin.accelerate.fit import _KeepRatios
from isw_plugin.accelerate.layers import conv, mask
from isw_plugin.accelerate.lower import lower, lower_all_kept, lower_dense
from isw_plugin.accelerate.outputs import skip_outputs
from isw_plugin.accelerate.simplify import simplify
from isw_plugin.accelerate.trace import trace
from isw_plugin.gates import FBS
from tests.accelerate.nets import assert_close, attached
from tests.accelerate.test_lower import executions, targets
from tests.conftest import Net
from tests.predict.nets import PREDICTED, Down, Inverted, Stack, predicting

isw = torch.ops.isw


def simplified(kind: type[Net]) -> tuple[Net, Any, Tensor, fx.GraphModule]:
    net, pruner = predicting(kind)
    images = net.images(8)
    return net, pruner, images, simplify(trace(net, pruner.sites, images))


def skipping(graph: fx.GraphModule) -> set[str]:
    return {node.meta["layer"] for node in graph.graph.nodes if node.target is conv and len(node.args) > 11}


@pytest.mark.parametrize("kind", PREDICTED)
def test_layers_of_predicted_sites_know_their_outputs(kind: type[Net]) -> None:
    net, pruner, images, graph = simplified(kind)
    layers = {name for site in pruner.sites if site.name in pruner.predicted for name in site.making.layers}
    assert skipping(graph) == {name for name in layers if isinstance(net.get_submodule(name), nn.Conv2d)}
    with torch.no_grad():
        assert_close(graph(images)[0], net(images))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("kind", PREDICTED)
def test_lowered_graphs_are_the_masked_model(kind: type[Net], dense: bool) -> None:
    net, pruner, images, graph = simplified(kind)
    sites = [site.name for site in pruner.sites]
    names = {node.meta["layer"] for node in graph.graph.nodes if node.target is conv}
    modules = executions(graph, images, tuple(names) if dense else ())
    lowered, _ = lower(graph, modules, 1, sites)
    with torch.no_grad():
        assert_close(lowered(images)[0], net(images))
        opened, plain = lower_all_kept(graph, modules, 1, sites), lower_dense(graph, modules, 1, False)
        pruner.disable()
        wanted = net(images)
        assert_close(opened(images)[0], wanted)
        if dense:
            assert_close(plain(images)[0], wanted)


def test_a_mask_that_a_layer_makes_needless_is_gone() -> None:
    graph = simplified(Stack)[3]
    assert skipping(graph) == {"c2"}
    masked = [node.args[0].meta["val"] for node in graph.graph.nodes if node.target is mask]
    assert not masked  # and the head that reads c1 drops its channels itself


def test_norms_of_a_predicted_map_are_those_that_its_kernel_summed() -> None:
    _, pruner, images, graph = simplified(Inverted)
    lowered, _ = lower(graph, executions(graph, images, ()), 1, [site.name for site in pruner.sites])
    assert isw.sum_squares.default not in targets(lowered)
    assert torch.ops.aten.pow.Tensor_Scalar not in targets(lowered)


@pytest.mark.parametrize("case", ["masked alone", "read whole", "another decision", "decided by the map"])
def test_only_what_all_readers_drop_is_left_out(case: str) -> None:
    graph = fx.Graph()
    x, weight, keep, other = (graph.placeholder(name) for name in ("x", "weight", "keep", "other"))
    layer = graph.call_function(conv, (x, weight, None, None, None, None, (1, 1), (0, 0), (1, 1), 1, "relu"))
    if case == "decided by the map":
        keep = graph.call_function(
            isw.decide.default, (graph.call_function(isw.channel_norm.default, (layer, 1)), 0, 1)
        )
    read = [graph.call_function(mask, (layer, keep, 1))]
    if case == "read whole":
        read.append(graph.call_function(torch.neg, (layer,)))
    if case == "another decision":
        read.append(graph.call_function(mask, (layer, other, 1)))
    graph.output(tuple(read))
    module, given = fx.GraphModule(nn.Module(), graph), (torch.randn(2, 3, 4, 4), torch.randn(5, 3, 1, 1))
    given = (*given, torch.rand(2, 5) < 0.5, torch.rand(2, 5) < 0.5)
    wanted = module(*given)
    skip_outputs(graph, lambda node: False)
    module.recompile()
    assert (len(layer.args) == 12) == (case == "masked alone") == (mask not in targets(module))
    for found, one in zip(module(*given), wanted, strict=True):
        assert torch.equal(found, one)


def test_layers_under_a_gate_that_decides_from_their_inputs_know_their_outputs() -> None:
    net = Stack().eval()
    pruner = attached(net, net.images(8), gate=FBS(0.5))
    images = net.images(8)
    graph = simplify(trace(net, pruner.sites, images))
    assert skipping(graph) == {site.name for site in pruner.sites}
    with torch.no_grad():
        assert_close(graph(images)[0], net(images))


def test_both_layers_of_a_residual_block_skip() -> None:
    assert {"c2", "down"} <= skipping(simplified(Down)[3])


def test_costs_tell_what_is_left_of_the_macs() -> None:
    net, pruner, images, graph = simplified(Inverted)
    ratios = _KeepRatios(graph)
    with torch.no_grad():
        ratios.run(images)
        net(images)
    kept = {ratios.layers[node]: share for node, share in ratios.kept.items()}
    keep = {name: of_site.float() for name, of_site in pruner.keep.items()}
    products = (keep["stem"].mean(1) * keep["pw"].mean(1)).mean().item()
    assert kept["pw"] == pytest.approx(products)
    assert kept["dw"] == pytest.approx((keep["pw"] * keep["dw"]).mean().item())
