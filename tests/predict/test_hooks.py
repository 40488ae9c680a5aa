"""Predicted sites in a forward: the definition, and everything that a forward may run in."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from isw_plugin import CVGate, InstanceWisePruner, MinNorm
from isw_plugin.errors import UnsupportedError
from isw_plugin.functional import channel_norm
from tests.conftest import Net, Residual, made
from tests.predict.nets import PREDICTED, SOURCES, Down, Stack, predicted_by_hand, predicting
from tests.test_memory import in_threads


@pytest.mark.parametrize("kind", PREDICTED)
def test_sites_are_decided_on_predicted_norms(kind: type[Net]) -> None:
    net, pruner = predicting(kind)
    images = net.images(16)
    expected, keep = predicted_by_hand(net, pruner, images)
    torch.testing.assert_close(net(images), expected)
    assert pruner.keep.keys() == keep.keys()
    for name, mask in keep.items():
        assert torch.equal(pruner.keep[name], mask), name
        assert not mask.all() or name not in SOURCES[kind]


@pytest.mark.parametrize("kind", PREDICTED)
def test_what_is_predicted_is_known_of_the_model(kind: type[Net]) -> None:
    _, pruner = predicting(kind)
    assert {site.name: site.making.sources for site in pruner.sites if not site.making.reason} == SOURCES[kind]
    assert pruner.predicted == tuple(SOURCES[kind])
    assert all(f"predicted from {', '.join(sources)}" in pruner.summary() for sources in SOURCES[kind].values())


def test_norms_are_those_that_were_decided_on() -> None:
    net, pruner = predicting(Stack)
    net(net.images(8))
    gate = pruner.gate
    assert torch.equal(pruner.keep["c2"], gate(None, pruner.norms["c2"]))
    assert not torch.allclose(pruner.norms["c2"], channel_norm(net.features(net.images(8))["c2"]))


def test_every_instance_keeps_the_channels_of_largest_predicted_norm() -> None:
    net, pruner = predicting(Stack, beta=1.9, min_keep=3)
    net(net.images(8))
    largest = pruner.norms["c2"].topk(3, dim=1).indices
    assert pruner.keep["c2"].gather(1, largest).all()


def test_another_gate_decides_on_predicted_norms() -> None:
    net, pruner = predicting(Stack, gate=MinNorm(0.5), alpha=None, beta=None)
    net(net.images(8))
    assert (pruner.keep["c2"].sum(1) == 3).all()
    smallest = pruner.norms["c2"].sort(1).indices[:, :3]
    assert not pruner.keep["c2"].gather(1, smallest).any()


@pytest.mark.parametrize("kind", PREDICTED)
def test_gates_off_nothing_changes(kind: type[Net]) -> None:
    net, pruner = predicting(kind)
    images = net.images()
    bare = made(kind)
    pruner.disable()
    assert torch.equal(net(images), bare(images))
    state = {key: value.clone() for key, value in net.state_dict().items()}
    pruner.remove()
    assert state.keys() == bare.state_dict().keys()
    assert pruner.heads == {}
    assert torch.equal(net(images), bare(images))


def test_the_penalty_is_of_measured_norms() -> None:
    net, pruner = predicting(Stack, lambda_=1.0)
    pruner.disable()
    net.train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    net(net.images())
    expected = pruner.penalty()
    pruner.step()
    pruner.enable(beta=0.0)
    net(net.images())
    torch.testing.assert_close(pruner.penalty(), expected)


def test_an_instance_decides_alone_as_in_a_batch() -> None:
    net, pruner = predicting(Down)
    images = net.images(6)
    net(images)
    together = pruner.keep
    for index in range(6):
        net(images[index : index + 1])
        assert all(torch.equal(keep[0], together[name][index]) for name, keep in pruner.keep.items())


def test_norms_grow_with_the_map() -> None:
    """Images of another size than the heads were fitted on: statistics are means, norms are not."""
    net, pruner = predicting(Stack)
    small, large = torch.ones(1, 3, 8, 8), torch.ones(1, 3, 12, 12)
    net(small)
    before = pruner.norms["c2"]
    net(large)
    torch.testing.assert_close(pruner.norms["c2"], before * 2)  # 8x8 against 4x4 places, and all alike


@pytest.mark.parametrize("kind", [Down, Residual])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_predict_alike(kind: type[Net], copied: object) -> None:
    net, _ = predicting(kind)
    images = net.images()
    expected = net(images)
    twin = copied(net)
    assert torch.equal(twin(images), expected)
    mine = InstanceWisePruner.of(twin)
    assert mine.predicted == tuple(SOURCES[kind])
    mine.drop_predictors()
    assert torch.equal(net(images), expected)


def test_an_average_predicts() -> None:
    net, _ = predicting(Stack)
    average = AveragedModel(net)
    average.update_parameters(net)
    images = net.images()
    assert torch.equal(average(images), net(images))
    assert InstanceWisePruner.of(average.module).predicted == ("c2",)


def test_autocast_predicts_in_float32() -> None:
    net, pruner = predicting(Stack)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(net.images())
    assert pruner.norms["c2"].dtype == torch.float32
    head, known = pruner.heads["c2"], pruner._memory.statistics
    assert torch.equal(pruner.norms["c2"], head.norms(known, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_predict(dtype: torch.dtype) -> None:
    net, pruner = predicting(Down)
    images = net.images(8)
    expected = net(images)
    net.to(dtype)
    torch.testing.assert_close(net(images.to(dtype)).float(), expected, atol=0.2, rtol=0.2)
    assert pruner.norms["c2"].dtype == (torch.float64 if dtype is torch.float64 else torch.float32)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_predicts(backend: str) -> None:
    net, pruner = predicting(Residual)
    images = net.images()
    expected, keep = predicted_by_hand(made(Residual), pruner, images)
    compiled = torch.compile(net, backend=backend)
    torch.testing.assert_close(compiled(images), expected)
    assert pruner.keep.keys() == keep.keys()
    assert all(torch.equal(mask, keep[name]) for name, mask in pruner.keep.items())
    pruner.drop_predictors()
    torch.testing.assert_close(compiled(images), net(images))


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_a_traced_model_predicts_for_any_number_of_instances() -> None:
    net, _ = predicting(Down)
    with torch.no_grad():
        expected = net(net.images(6))
        traced = torch.jit.trace(net, net.images(2))
    torch.testing.assert_close(traced(net.images(6)), expected)


def test_threads_predict_each_for_itself() -> None:
    net, _ = predicting(Down)
    batches = [net.images(1 + n % 4, seed=n) for n in range(32)]
    expected = [net(images) for images in batches]
    runs = [lambda part=part: [net(images) for images in batches[part::4]] for part in range(4)]
    for part, outputs in enumerate(in_threads(*runs)):
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected[part::4], strict=True))


class Checkpointed(Stack):
    """What makes the predicted map is computed again in backward; the map that it is predicted from is not."""

    again = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.c1(x)))

        def second(x: Tensor) -> Tensor:
            return self.act2(self.bn2(self.c2(x)))

        x = checkpoint(second, x, use_reentrant=False) if self.again else second(x)
        return self.fc(x.mean((2, 3)))


SOURCES[Checkpointed] = SOURCES[Stack]


def test_a_checkpoint_decides_again_as_before() -> None:
    found = []
    for again in (False, True):
        net, pruner = predicting(Checkpointed)
        net.again = again
        pruner.enable(beta=1.0)
        net(net.images()).square().sum().backward()
        assert not pruner.keep["c2"].all()
        found.append({name: parameter.grad for name, parameter in net.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_checkpoint_of_several_forwards_says_so() -> None:
    net, _ = predicting(Checkpointed)
    losses = [net(net.images(seed=seed)).square().sum() for seed in range(2)]
    with pytest.raises(UnsupportedError, match="call backward after each forward"):
        sum(losses).backward()


def test_a_part_called_alone_says_that_nothing_is_known_of_what_it_reads() -> None:
    net, _ = predicting(Residual)
    with pytest.raises(UnsupportedError, match=r"block\.c1 reads stem, .*: call the whole model"):
        net.block.c2(torch.ones(1, 6, 8, 8))


def test_a_layer_that_runs_on_some_of_the_instances_says_so() -> None:
    net, _ = predicting(Stack)
    net.c2.register_forward_pre_hook(lambda module, args: (args[0][:2],))
    with pytest.raises(UnsupportedError, match=r"c2 runs on 2 instances, and c1, .* ran on 4"):
        net(net.images(4))


def test_a_gate_may_differ_at_a_predicted_site() -> None:
    net, pruner = predicting(Stack)
    pruner.enable(per_site={"c2": {"beta": 1.5}})
    net(net.images(8))
    assert torch.equal(pruner.keep["c2"], CVGate(0.0, 1.5)(None, pruner.norms["c2"]))
