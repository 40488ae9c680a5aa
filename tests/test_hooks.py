import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isw_plugin import InstanceWisePruner
from isw_plugin.errors import SettingError, UnsupportedError
from isw_plugin.functional import keep_mask
from isw_plugin.hooks import Memory, Part, column_keep, has_hooks, memory_of, reader_parts
from tests.conftest import Concat, Net, made

KEEP = {"a": torch.tensor([[True, False], [False, True]]), "b": torch.tensor([[False], [True]])}

COLUMNS: list[tuple[list[Part], int, list[list[int]]]] = [
    ([Part("a", 0, 1)], 2, [[1, 0], [0, 1]]),
    ([Part("a", 1, 1)], 4, [[1, 1, 0, 1], [1, 0, 1, 1]]),
    ([Part("a", 0, 2)], 4, [[1, 1, 0, 0], [0, 0, 1, 1]]),
    ([Part("a", 0, 1), Part("b", 2, 1)], 3, [[1, 0, 0], [0, 1, 1]]),
    ([Part("b", 0, 1), Part("a", 2, 1)], 4, [[0, 1, 1, 0], [1, 1, 0, 1]]),
    ([Part("a", 1, 1), Part("b", 0, 1)], 3, [[0, 1, 0], [1, 0, 1]]),
    ([Part("b", 3, 2)], 6, [[1, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1]]),
]


@pytest.mark.parametrize(("parts", "columns", "expected"), COLUMNS)
def test_column_keep(parts: list[Part], columns: int, expected: list[list[int]]) -> None:
    assert column_keep(parts, KEEP, columns).int().tolist() == expected


def test_reader_parts_say_which_site_fills_which_columns() -> None:
    net = made(Concat)
    assert reader_parts(InstanceWisePruner(net, net.images(1)).sites) == {
        "c": (Part("a", 0, 1), Part("b", 7, 1)),
        "fc": (Part("c", 0, 4),),
    }


def test_a_model_knows_its_memory_and_a_part_does_not(residual: Net) -> None:
    assert memory_of(residual) is None
    assert not has_hooks(residual)
    InstanceWisePruner(residual, residual.images(1))
    assert memory_of(residual) is not None
    assert memory_of(residual.block) is None
    assert has_hooks(residual.block)


def test_memory_holds_no_tensor_in_a_pickle(plain: Net) -> None:
    pruner = InstanceWisePruner(plain, plain.images(1), lambda_=1.0)
    pruner.step()
    plain.train()(plain.images())
    memory = pickle.loads(pickle.dumps(memory_of(plain)))
    assert (memory.tape, memory.norms, memory.keep, memory.running) == ([], {}, {}, None)
    assert (memory.enabled, memory.gates) == (True, pruner._memory.gates)


def test_memory_holds_no_module(plain: Net) -> None:
    InstanceWisePruner(plain, plain.images(1))
    assert b"torch.nn.modules" not in pickle.dumps(memory_of(plain))


def test_a_hundred_forwards_without_a_penalty_are_warned_of() -> None:
    memory = Memory()
    memory.weighed = {"a": True}
    for _ in range(99):
        memory.begin(training=True)
        memory.end()
    with pytest.warns(UserWarning, match=r"100 training forwards .*pruner\.regularize"):
        memory.begin(training=True)
    memory.end()
    memory.begin(training=True)  # warns no more: once is enough
    assert len(memory.tape) == 101


def test_gates_are_out_of_place(plain: Net) -> None:
    pruner = InstanceWisePruner(plain, plain.images(1), alpha=0.0, beta=1.5)
    kept: list[Tensor] = []
    plain.bn1.register_forward_hook(lambda module, args, output: kept.append(output))
    pruner.step()
    images = plain.images()
    before = images.clone()
    plain(images)
    assert torch.equal(images, before)
    assert torch.equal(kept[0], plain.bn1(plain.c1(images)))


def test_dropped_channels_that_are_not_finite_become_zero() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1)).eval()
    nn.init.constant_(net[0].weight, 1e38)
    pruner = InstanceWisePruner(net, torch.zeros(1, 1, 2, 2), gate=lambda feature, norms: norms < 0)
    pruner.step()
    assert torch.equal(net(torch.full((1, 1, 2, 2), 1e38)), net[2].bias.view(1, 2, 1, 1).expand(1, 2, 2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("scope", ["all", "consumers"])
def test_masks_keep_memory_format_and_type(dtype: torch.dtype, memory_format: torch.memory_format, scope: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)).to(dtype=dtype, memory_format=memory_format).train()
    images = torch.randn(2, 3, 8, 8, dtype=dtype).to(memory_format=memory_format)
    pruner = InstanceWisePruner(model, images, alpha=0.0, scope=scope)  # type: ignore[arg-type]
    pruner.step()
    maps: list[Tensor] = []
    model[1].register_forward_pre_hook(lambda module, args: maps.append(args[0]))
    model(images)
    assert not pruner.keep["0"].all()
    assert maps[0].is_contiguous(memory_format=memory_format)
    assert maps[0].dtype is dtype


class TwoReaders(nn.Module):
    """A functional map that two convolutions read: masked at each of them, decided at the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.b(x) + self.c(x)


class PoolFirst(TwoReaders):
    """The first reader reads through a pool, the second directly."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.b(self.pool(x)) + self.c(x)


@pytest.mark.parametrize("kind", [TwoReaders, PoolFirst])
@pytest.mark.parametrize("scope", ["all", "consumers"])
def test_every_reader_sees_this_forwards_decision(kind: type[TwoReaders], scope: str) -> None:
    torch.manual_seed(0)
    net = kind().eval()
    pruner = InstanceWisePruner(net, torch.zeros(1, 3, 4, 4), alpha=0.0, beta=1.0, scope=scope)
    pruner.step()
    for images in torch.randn(2, 5, 3, 4, 4):
        output, keep = net(images), pruner.keep["a"]
        assert torch.equal(keep, keep_mask(pruner.norms["a"], 0.0, 1.0))
        assert not keep.all()
        with torch.no_grad():
            masked = F.relu(F.conv2d(images, net.a.weight, net.a.bias)) * keep[:, :, None, None]
            pooled = masked.mean((2, 3), keepdim=True) if kind is PoolFirst else masked
            expected = F.conv2d(pooled, net.b.weight, net.b.bias) + F.conv2d(masked, net.c.weight, net.c.bias)
        torch.testing.assert_close(output, expected)


def test_a_norms_memory_is_of_the_last_forward(plain: Net) -> None:
    pruner = InstanceWisePruner(plain, plain.images(1))
    pruner.step()
    plain(plain.images(4))
    plain(plain.images(2))
    assert {len(norms) for norms in pruner.norms.values()} == {2}


# -- maps that are not what the probe saw ----------------------------------------------------------


class Squeezed(nn.Module):
    """A batch of one loses its axis."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.pool = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        self.b, self.act_b, self.c = nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act_b(self.b(self.pool(self.act(self.a(x))).squeeze())))


@pytest.mark.parametrize("scope", ["all", "consumers"])
@pytest.mark.parametrize("training", [False, True])
def test_a_batch_of_one_that_loses_its_axis_is_refused(scope: str, training: bool) -> None:
    torch.manual_seed(0)
    model, images = Squeezed().train(training), torch.randn(3, 3, 8, 8)
    pruner = InstanceWisePruner(model, images, scope=scope, lambda_=1.0)
    if not training:
        pruner.step()
    assert model(images).shape == (3, 2)
    with pytest.raises(
        UnsupportedError, match=r"map of b has shape \(5,\), and \(N, 5\) when .* \(no bare \.squeeze\(\)"
    ):
        model(images[:1])


@pytest.mark.parametrize("scope", ["all", "consumers"])
def test_one_image_without_a_batch_axis_is_refused(scope: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()
    pruner = InstanceWisePruner(net, torch.zeros(1, 3, 8, 8), scope=scope)
    assert net(torch.zeros(3, 8, 8)).shape == (4, 4, 4)  # gates off: nothing is gated
    pruner.step()
    with pytest.raises(UnsupportedError, match=r"map of 0 has shape \(6, 6, 6\).*x\.unsqueeze\(0\)"):
        net(torch.zeros(3, 8, 8))


def test_tokens_where_vectors_were_probed_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    InstanceWisePruner(net, torch.zeros(2, 4)).step()
    with pytest.raises(UnsupportedError, match=r"shape \(2, 6, 6\), and \(N, 6\)"):
        net(torch.zeros(2, 6, 4))


def test_another_number_of_channels_is_refused(plain: Net) -> None:
    InstanceWisePruner(plain, plain.images(1)).step()
    plain.c1, plain.bn1, plain.c2 = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 6, 3)
    with pytest.raises(UnsupportedError, match=r"4 channels on axis 1.*pruner\.update_regularizer\(\)"):
        plain(plain.images())


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_complex_maps_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Identity(), nn.Linear(6, 2)).eval()
    InstanceWisePruner(net, torch.zeros(2, 4)).step()
    net.to(torch.complex64)
    with pytest.raises(UnsupportedError, match=r"map of 0 is torch\.complex64"):
        net(torch.zeros(2, 4, dtype=torch.complex64))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_maps_are_refused_with_the_way_out() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    net = nn.TransformerEncoder(layer, 1).eval()
    InstanceWisePruner(net, x).step()
    with torch.no_grad(), pytest.raises(UnsupportedError, match="enable_nested_tensor=False"):
        net(x, src_key_padding_mask=padding)


@pytest.mark.parametrize("sparse", [Tensor.to_sparse, lambda keep: keep.tolist()])
def test_masks_that_are_not_dense_tensors_are_refused(plain: Net, sparse) -> None:
    InstanceWisePruner(plain, plain.images(1), gate=lambda feature, norms: sparse(norms > 1)).step()
    with pytest.raises(
        SettingError, match=r"gave (torch\.bool torch\.sparse_coo of shape \(4, 4\)|list) at c1: .*dense"
    ):
        plain(plain.images())


def test_a_map_passed_by_keyword_is_refused() -> None:
    class Named(TwoReaders):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            return self.b(input=x) if self.named else self.b(x)

    net = Named().eval()
    net.named = False
    InstanceWisePruner(net, torch.zeros(1, 3, 4, 4)).step()
    net.named = True
    with pytest.raises(UnsupportedError, match="passed by keyword"):
        net(torch.zeros(1, 3, 4, 4))
