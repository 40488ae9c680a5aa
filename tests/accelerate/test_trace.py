"""The exported graph against the hooks that it was made from."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isw_plugin import CVGate, InstanceWisePruner, MinNorm, RandomGate, functional
from isw_plugin.accelerate.trace import TRACED_INSTANCES, trace
from isw_plugin.errors import UnsupportedError
from isw_plugin.hooks import memory_of
from isw_plugin.inputs import arguments
from isw_plugin.ops.gating import channel_norm, decide, mask
from tests.accelerate.nets import CASES, above, attached, images_for, seeded
from tests.conftest import Net, Plain, Residual, hooks_of, made


def traced(pruner: InstanceWisePruner, inputs: Any) -> torch.fx.GraphModule:
    return trace(pruner.model, pruner.sites, inputs)


def count(graph_module: torch.fx.GraphModule, target: object) -> int:
    return sum(node.target is target for node in graph_module.graph.nodes)


DECIDE = torch.ops.isw.decide.default
NORM = torch.ops.isw.channel_norm.default
MASK = torch.ops.isw.mask.default


@pytest.mark.parametrize(("kind", "scope"), CASES[::3])
def test_the_graph_gives_what_the_hooks_give(kind: type[nn.Module], scope: str) -> None:
    net = seeded(kind)
    pruner = attached(net, images_for(net), scope=scope)
    graph = traced(pruner, images_for(net))
    for n in (1, 5):
        images = images_for(net, n, seed=n)
        with torch.no_grad():
            output, keep, norms = graph((images,), {})
            torch.testing.assert_close(output, net(images))
        assert list(keep) == list(norms) == list(pruner.keep)
        assert all(torch.equal(keep[site], mask) for site, mask in pruner.keep.items())
        assert all(torch.equal(norms[site], values) for site, values in pruner.norms.items())


def test_a_cv_gate_is_two_nodes_a_site() -> None:
    net = made(Residual)
    graph = traced(attached(net, net.images()), net.images())
    nodes = [node for node in graph.graph.nodes if node.target is DECIDE]
    assert [node.args[1:] for node in nodes] == [(0.1, 0.9)] * 3
    assert count(graph, NORM) == 3


@pytest.mark.parametrize(
    "options", [{"gate": MinNorm(0.4)}, {"gate": RandomGate(0.4)}, {"gate": above}, {"min_keep": 2}]
)
def test_other_gates_are_traced_as_they_are(options: dict[str, Any]) -> None:
    net = made(Plain)
    pruner = attached(net, net.images(), **options)
    graph = traced(pruner, net.images())
    assert count(graph, DECIDE) == 0
    with torch.no_grad():
        _, keep, _ = graph((net.images(7),), {})
        net(net.images(7))
    assert all(torch.equal(keep[site], decided) for site, decided in pruner.keep.items())
    assert not all(decided.all() for decided in keep.values())


def test_every_site_has_its_own_thresholds() -> None:
    net = made(Residual)
    pruner = attached(net, net.images(), per_site={"stem": {"beta": 0.0}, "block.c1": {"alpha": 0.7}})
    nodes = [node for node in traced(pruner, net.images()).graph.nodes if node.target is DECIDE]
    assert [node.args[1:] for node in nodes] == [(0.1, 0.0), (0.7, 0.9), (0.1, 0.9)]


def test_tracing_leaves_the_model_as_it_was() -> None:
    net = made(Residual)
    pruner = attached(net, net.images())
    pruner.disable()
    memory = memory_of(net)
    assert memory is not None
    gates, hooks, before = dict(memory.gates), hooks_of(net), copy.deepcopy(net.state_dict())
    traced(pruner, net.images())
    assert memory.gates == gates
    assert all(isinstance(gate, CVGate) for gate in memory.gates.values())
    assert not memory.enabled
    assert (memory.channel_norm, memory.mask) == (functional.channel_norm, functional.mask)
    assert (memory.keep, memory.norms, memory.tape) == ({}, {}, [])
    assert hooks_of(net) == hooks
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class Branching(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Looping(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.stack([image.mean() for image in x])[:, None]


class Counting(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Branching, "Branching cannot be exported: "),
        (Looping, "takes the number of instances for a constant"),
        (Counting, "changes the buffer calls"),
    ],
)
def test_what_a_graph_cannot_repeat_is_refused(kind: type[Net], reason: str) -> None:
    net = made(kind)
    pruner = attached(net, net.images())
    memory = memory_of(net)
    assert memory is not None
    gates = dict(memory.gates)
    calls = [buffer.clone() for buffer in net.buffers()]
    with pytest.raises(UnsupportedError, match=reason):
        traced(pruner, net.images())
    assert memory.gates == gates
    assert memory.enabled
    assert memory.keep == {}
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), calls, strict=True))


def test_no_value_and_no_batch_of_the_inputs_matters() -> None:
    net = made(Plain)
    pruner = attached(net, net.images())
    empty = traced(pruner, net.images()[:0])
    with torch.no_grad():
        assert torch.equal(empty((net.images(),), {})[0], traced(pruner, net.images() * 1e9)((net.images(),), {})[0])
    inputs = [node for node in empty.graph.nodes if node.op == "placeholder"]
    assert [int(node.meta["val"].shape[0].node.hint) for node in inputs] == [TRACED_INSTANCES]


def test_inputs_are_arguments_by_position_or_by_name() -> None:
    x, y = torch.zeros(1), torch.ones(1)
    assert arguments(x) == ((x,), {})
    assert arguments((x, y)) == ((x, y), {})
    assert arguments({"a": x, "b": y}) == ((), {"a": x, "b": y})


class Named(Plain):
    def forward(self, scale: float, x: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * scale + bias.sum()


def test_numbers_and_scalars_are_inputs_too() -> None:
    net = made(Named)
    inputs = {"scale": 2.0, "x": net.images(), "bias": torch.tensor(3.0)}
    graph = traced(attached(net, inputs), inputs)
    with torch.no_grad():
        given = {"scale": 2.0, "x": net.images(7), "bias": torch.tensor(5.0)}
        torch.testing.assert_close(graph((), given)[0], net(**given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("shape", "axis"), [((3, 5, 4, 4), 1), ((3, 7, 5), 2), ((3, 7, 5), -1), ((3, 5), 1)])
def test_norms_and_decisions_as_nodes_are_the_hooks(shape: tuple[int, ...], axis: int, dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    norms = functional.channel_norm(x, axis)
    torch.testing.assert_close(channel_norm(x, axis), norms, rtol=0, atol=0)
    torch.library.opcheck(NORM, (x, axis))
    keep = decide(norms, 0.1, 0.9)
    assert torch.equal(keep, functional.keep_mask(norms, 0.1, 0.9))
    assert not keep.all()
    torch.library.opcheck(DECIDE, (norms, 0.1, 0.9))
    assert torch.equal(mask(x, keep, axis), functional.mask(x, keep, axis))
    torch.library.opcheck(MASK, (x, keep, axis))


def test_users_hooks_do_not_see_fake_tensors() -> None:
    model, seen = made(Plain), []
    model.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    pruner = InstanceWisePruner(model, torch.zeros(1, 3, 8, 8))
    trace(model, pruner.sites, torch.zeros(2, 3, 8, 8))
    assert seen == []
