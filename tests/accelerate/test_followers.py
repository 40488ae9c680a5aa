"""One decision for expansion, depthwise filter and projection: one head in the graph, and results as masked ones."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from isw_plugin import InstanceWisePruner
from isw_plugin.accelerate.layers import conv, mask
from isw_plugin.accelerate.lower import lower, lower_all_kept
from isw_plugin.accelerate.simplify import simplify
from isw_plugin.accelerate.trace import trace
from tests.accelerate.nets import assert_close
from tests.accelerate.test_lower import executions, targets
from tests.conftest import Net
from tests.predict.nets import FOLLOWERS, following

isw = torch.ops.isw


def layers(graph: Any) -> dict[str, Any]:
    return {node.meta["layer"]: node for node in graph.graph.nodes if node.target is conv}


@pytest.mark.parametrize("kind", FOLLOWERS)
def test_one_decision_goes_to_all_layers_of_a_chain(kind: type[Net]) -> None:
    net, pruner = following(kind)
    graph = simplify(trace(net, pruner.sites, net.images(8)))
    found = layers(graph)
    keep = found["pw"].args[11]
    assert keep.target is isw.decide.default
    for name in FOLLOWERS[kind]:
        assert found[name].args[4] is found[name].args[11] is keep
    assert found["pwl"].args[4] is keep
    assert mask not in targets(graph)
    assert targets(graph).count(isw.decide.default) == len(pruner.sites) - len(FOLLOWERS[kind])


@pytest.mark.parametrize("kind", FOLLOWERS)
def test_a_graph_has_a_head_for_every_decision(kind: type[Net]) -> None:
    net, pruner = following(kind)
    images = net.images(8)
    graph = simplify(trace(net, pruner.sites, images))
    modules, sites = executions(graph, images, ()), [site.name for site in pruner.sites]
    lowered, decisions = lower(graph, modules, 1, sites)
    assert targets(lowered).count(isw.predict.default) == len(pruner.heads)
    assert isw.sum_squares.default not in targets(lowered)
    assert [decision.site for decision in decisions] == sites
    with torch.no_grad():
        assert_close(lowered(images)[0], net(images))
        opened = lower_all_kept(graph, modules, 1, sites)(images)[0]
        pruner.disable()
        assert_close(opened, net(images))


def small(name: str) -> tuple[nn.Module, Tensor]:
    """The first blocks of a network of timm's."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    model.blocks = model.blocks[:3]
    channels = model.blocks[2][-1].conv_pwl.out_channels
    model.conv_head, model.bn2, model.classifier = nn.Conv2d(channels, 32, 1), nn.BatchNorm2d(32), nn.Linear(32, 10)
    images = torch.randn(8, 3, 64, 64)
    model.train()
    with torch.no_grad():
        model(images)  # statistics of batch norms
    return model.eval(), images


def predicted(pruner: InstanceWisePruner, follow: bool) -> None:
    """Heads of random numbers wherever there can be one."""
    generator, sites = torch.Generator().manual_seed(0), {site.name: site for site in pruner.sites}
    can = {name: site for name, site in sites.items() if not site.making.reason}
    followers = {name: site.making.follows for name, site in can.items() if follow and site.making.follows in can}
    heads = {}
    for name, site in can.items():
        inputs = 2 * sum(sites[source].channels for source in site.making.sources)
        weight = torch.randn(site.channels, inputs, generator=generator).bfloat16().float() / inputs**0.5
        bias = torch.rand(site.channels, generator=generator) / 4
        heads[name] = {"sources": list(site.making.sources), "weight": weight, "bias": bias}
    heads = {name: head for name, head in heads.items() if name not in followers}
    pruner.load_state_dict(pruner.state_dict() | {"heads": heads, "followers": followers, "enabled": True})


@pytest.mark.parametrize("name", ["mobilenetv2_035", "tf_efficientnet_lite0"])
def test_a_network_runs_about_half_of_the_heads(name: str) -> None:
    model, images = small(name)
    pruner = InstanceWisePruner(model, images[:1], alpha=0.0, beta=0.6)
    predicted(pruner, follow=False)
    own = set(pruner.heads)
    predicted(pruner, follow=True)
    hidden = {source: name for name, source in pruner.followers.items()}
    assert own == {*pruner.heads, *pruner.followers}
    assert all(source.endswith("conv_pw") and name.endswith("conv_dw") for source, name in hidden.items())
    assert len(hidden) == sum(len(blocks) for blocks in model.blocks[1:])
    with torch.no_grad():
        expected, keep = model(images), pruner.keep
        assert 0.2 < torch.cat([keep[name].flatten() for name in hidden]).float().mean() < 0.95
        fast = pruner.accelerate(images, backend="gated")
        assert fast.execution == "accelerated", fast.reason
        with fast.recording() as record:
            assert_close(fast(images), expected)
    assert all(torch.equal(record.keep[name], decided) for name, decided in keep.items())
    assert all(torch.equal(record.keep[name], record.keep[source]) for source, name in hidden.items())
    (plan,) = fast.plans.values()
    assert targets(plan.graph).count(isw.predict.default) == len(pruner.heads)
