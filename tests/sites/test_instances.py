"""The instance axis is known by following their number, whatever the sizes of a model are."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isw_plugin import InstanceWisePruner
from isw_plugin.errors import NoSitesError, ProbeError, UnsupportedError
from isw_plugin.sites import Found, find_sites


class ByForward(nn.Module):
    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, part in parts.items():
            self.add_module(name, part)
        self.run = forward

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        return self.run(self, *args, **kwargs)


def names(found: Found | InstanceWisePruner) -> list[str]:
    return [site.name for site in found.sites]


def mlp(size: int = 4, **parts: nn.Module) -> dict[str, nn.Module]:
    return {"a": nn.Linear(size, 16), "b": nn.Linear(16, size), "c": nn.Linear(size, 16), "d": nn.Linear(16, 3)} | parts


def require_independent(model: nn.Module, inputs: Tensor) -> None:
    """With gates on, a batch is its instances."""
    with InstanceWisePruner(model.eval(), inputs[:1]).gating(alpha=0.0, beta=1.0), torch.no_grad():
        batch = model(inputs)
        for instance, output in zip(inputs, batch, strict=True):
            torch.testing.assert_close(model(instance[None])[0], output)


# -- an axis that is as long as a probe's batch ----------------------------------------------------


@pytest.mark.parametrize("levels", [2, 3, 5, 6])
def test_outputs_that_are_stacked_before_the_instances_are_no_instances(levels: int) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.b(F.relu(m.a(x)))
        return m.d(F.relu(m.c(torch.stack([x * level for level in range(levels)])))).mean(0)

    model = ByForward(forward, **mlp())
    found = find_sites(model, torch.zeros(1, 7, 4))
    assert (names(found), found.left_out["c"]) == (["a"], "its axis 0 is not the instance axis")
    require_independent(model, torch.randn(4, 7, 4))


@pytest.mark.parametrize("pixels", [2, 3, 5, 6])
def test_places_before_the_instances_are_no_instances(pixels: int) -> None:
    model = ByForward(lambda m, x: m.d(F.relu(m.c(m.b(F.relu(m.a(x))).transpose(0, 1)))).mean(0), **mlp())
    found = find_sites(model, torch.zeros(1, pixels, 4))
    assert names(found) == ["a"]
    require_independent(model, torch.randn(4, pixels, 4))


@pytest.mark.parametrize("size", [2, 3, 5, 6])
def test_sizes_of_a_model_may_be_those_of_a_batch(size: int) -> None:
    convs = [nn.Conv2d(size, size, 1), nn.ReLU(), nn.Conv2d(size, size, 1), nn.ReLU()]
    model = nn.Sequential(*convs, nn.Flatten(), nn.Linear(size**3, size))
    assert names(find_sites(model, torch.zeros(size, size, size, size))) == ["0", "2"]


def test_instances_that_are_folded_or_follow_twice_are_left_out() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = F.relu(m.a(x))
        x = m.b(x.flatten(0, 1)).view(-1, 5, 4)
        return m.d(F.relu(m.c(x.unsqueeze(0) + x.unsqueeze(1)))).mean((0, 2))

    with pytest.raises(NoSitesError) as caught:
        find_sites(ByForward(forward, **mlp()), torch.zeros(1, 5, 4))
    reasons = str(caught.value)
    assert "a: instance axis folded into another" in reasons
    assert "c: another axis than the instance axis follows the number of instances" in reasons


# -- inputs whose axis 0 is no axis of instances ---------------------------------------------------

RECURRENT: list[tuple[Callable[[], nn.Module], bool]] = [
    (lambda: nn.LSTM(4, 4), True),
    (lambda: nn.GRU(4, 4), True),
    (lambda: nn.LSTM(4, 4, batch_first=True), False),
]


@pytest.mark.parametrize(("make", "refused"), RECURRENT)
def test_steps_of_time_are_no_instances(make: Callable[[], nn.Module], refused: bool) -> None:
    model = ByForward(lambda m, x: m.b(F.relu(m.a(m.rnn(x)[0]))), rnn=make(), **mlp())
    if not refused:
        assert names(find_sites(model, torch.zeros(7, 3, 4))) == ["a"]
        return
    with pytest.raises(UnsupportedError, match=r"rnn \((LSTM|GRU)\) reads along axis 0 .*batch_first=True"):
        InstanceWisePruner(model, torch.zeros(7, 3, 4))


def attention(x: Tensor) -> Tensor:
    return (x @ x.transpose(-1, -2)).softmax(-1) @ x


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "mix",
    [
        lambda m, x: m.block(x),
        lambda m, x: m.heads(x, x, x)[0],
        lambda m, x: attention(x) if m.heads.batch_first else attention(x.transpose(0, 1)).transpose(0, 1),
    ],
)
def test_attention_along_axis_0_tells_that_it_is_no_axis_of_instances(mix: Callable, batch_first: bool) -> None:
    block = nn.TransformerEncoderLayer(4, 2, 8, batch_first=batch_first)
    heads = nn.MultiheadAttention(4, 2, batch_first=batch_first)
    model = ByForward(lambda m, x: m.b(F.relu(m.a(mix(m, x)))), block=block, heads=heads, **mlp())
    if batch_first:
        assert "a" in names(find_sites(model, torch.zeros(1, 7, 4)))
    else:
        with pytest.raises(UnsupportedError, match="reads along axis 0 of the example inputs"):
            InstanceWisePruner(model, torch.zeros(7, 1, 4))


FORGETTING: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "a module": lambda m, x: m.norm(x),
    "a function": lambda m, x: F.layer_norm(x, (1,), bias=m.norm.bias),
}


@pytest.mark.parametrize("norm", FORGETTING)
def test_attention_along_axis_0_to_what_is_alike_for_all_instances_is_no_mixing(norm: str) -> None:
    """As in CSATv2: a layer norm of single numbers leaves its bias, whose mean over any batch is the same."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.b(F.relu(m.a(x)))
        q, k, v = m.qkv(FORGETTING[norm](m, x.unsqueeze(-1))).unbind(-1)
        return m.d(F.relu(m.c(x + attended(q, k, v))))

    model = ByForward(forward, norm=nn.LayerNorm(1), qkv=nn.Linear(1, 3), **mlp())
    nn.init.ones_(model.norm.bias)
    assert names(find_sites(model, torch.zeros(1, 4))) == ["a", "c"]
    require_independent(model, torch.randn(4, 4))


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


MIXING: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "norms of two numbers": lambda m, x: attended(*3 * [F.layer_norm(x.view(-1, 2, 2), (2,)).flatten(1)]),
    "a bias of the instance": lambda m, x: attended(*3 * [F.layer_norm(x[..., None], (1,), bias=x[0, :1])[..., 0]]),
    "joined with what is not alike": lambda m, x: attended(*3 * [x + m.norm(x[..., None])[..., 0]]),
    "a root mean square": lambda m, x: attended(*3 * [m.rms(x[..., None])[..., 0]]),
    "a sum, which grows with the batch": lambda m, x: _sum_over_instances(m.norm(x[..., None])[..., 0]),
}


def _sum_over_instances(x: Tensor) -> Tensor:
    return (x @ x.transpose(0, 1)) @ x


@pytest.mark.parametrize("mix", MIXING)
def test_products_along_axis_0_of_what_hangs_on_the_instances_are_refused(mix: str) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.b(F.relu(m.a(x + MIXING[mix](m, x))))

    model = ByForward(forward, norm=nn.LayerNorm(1), rms=nn.RMSNorm(1), **mlp())
    with pytest.raises(UnsupportedError, match="reads along axis 0 of the example inputs"):
        InstanceWisePruner(model, torch.zeros(1, 4))


def test_a_convolution_over_time_on_axis_0_is_seen() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.b(F.relu(m.a(m.conv(x.permute(1, 2, 0)).permute(2, 0, 1))))

    model = ByForward(forward, conv=nn.Conv1d(4, 4, 3, padding=1), **mlp())
    with pytest.raises(UnsupportedError, match=r"conv \(Conv1d\) reads along axis 0"):
        InstanceWisePruner(model, torch.zeros(7, 2, 4))


def test_a_transformer_that_has_its_batch_second_inside_keeps_its_other_sites() -> None:
    """The batch is first outside, second in the block; where it is second, nothing is gated."""
    block = nn.TransformerEncoderLayer(4, 2, 8)
    model = ByForward(lambda m, x: m.b(F.relu(m.a(m.block(x.transpose(0, 1)).transpose(0, 1)))), block=block, **mlp())
    found = find_sites(model, torch.zeros(2, 6, 4))
    assert (names(found), found.left_out["block.linear1"]) == (["a"], "its axis 0 is not the instance axis")
    require_independent(model, torch.randn(4, 6, 4))


# -- a forward that looks at the number of instances -----------------------------------------------


def test_a_loop_over_the_instances_leaves_out_what_it_runs() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.b(F.relu(m.a(x)))
        return torch.stack([m.d(F.relu(m.c(row))) for row in x])

    found = find_sites(ByForward(forward, **mlp()), torch.zeros(1, 7, 4))
    assert names(found) == ["a"]
    assert found.left_out["c"] == "how often it is called depends on the number of instances"


@pytest.mark.parametrize("several", [lambda n: n % 2 == 0, lambda n: n > 5])
def test_a_branch_on_the_number_of_instances_leaves_out_what_it_changes(several: Callable[[int], bool]) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.b(F.relu(m.a(x)))
        hidden = F.relu(m.c(x))
        return m.d(hidden) + (m.e(hidden) if several(len(x)) else 0)

    found = find_sites(ByForward(forward, e=nn.Linear(16, 3), **mlp()), torch.zeros(1, 7, 4))
    assert names(found) == ["a", "b"]
    assert found.left_out["c"] == "what is computed of it depends on the number of instances"


@pytest.mark.parametrize("multiple", [2, 8])
def test_models_that_take_multiples_only_are_probed_with_multiples(multiple: int) -> None:
    model = ByForward(lambda m, x: m.b(F.relu(m.a(x.view(-1, multiple, 4).flatten(1).view(-1, 4)))), **mlp())
    assert names(find_sites(model, torch.zeros(multiple, 4))) == ["a"]


def test_a_fixed_number_of_instances_is_said() -> None:
    model = ByForward(lambda m, x: m.b(F.relu(m.a(x.reshape(4, 7, 4)))), **mlp())
    with pytest.raises(ProbeError, match=r"runs on example inputs of shape \[\(4, 7, 4\)\], but not on another number"):
        InstanceWisePruner(model, torch.zeros(4, 7, 4))


# -- which inputs have instances -------------------------------------------------------------------

CONVS = {"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(4, 4, 1)}


@pytest.mark.parametrize("instances", [1, 4])
@pytest.mark.parametrize("order", [1, -1])
def test_a_table_without_instances_stays_as_it_is(instances: int, order: int) -> None:
    def forward(m: nn.Module, *args: Tensor) -> Tensor:
        x, table, mask = args[::order]
        return (m.b(F.relu(m.a(x))) + table).masked_fill(mask, 0)

    model = ByForward(forward, **CONVS)
    inputs = (torch.zeros(instances, 3, 4, 4), torch.zeros(4, 1, 1), torch.zeros(4, 4, dtype=torch.bool))[::order]
    assert names(find_sites(model, inputs)) == ["a"]
    by_name = ByForward(lambda m, x, table, mask: forward(m, *(x, table, mask)[::order]), **CONVS)
    assert names(find_sites(by_name, dict(zip(("x", "table", "mask"), inputs[::order], strict=True)))) == ["a"]


def test_values_of_a_table_are_kept_where_they_are_read() -> None:
    model = ByForward(lambda m, x, index: m.b(F.relu(m.a(x[:, :, : int(index[1])]))), **CONVS)
    assert names(find_sites(model, (torch.zeros(1, 3, 4, 4), torch.tensor([0, 2])))) == ["a"]


@pytest.mark.parametrize("count", [1, 3])
def test_a_list_of_images_has_its_instances_as_items(count: int) -> None:
    model = ByForward(lambda m, images: m.b(F.relu(m.a(torch.stack(images)))), **CONVS)
    images = [torch.zeros(3, 4, 4) for _ in range(count)]
    assert names(find_sites(model, images)) == names(find_sites(model, (images,))) == ["a"]


def test_a_list_of_levels_has_its_instances_on_axis_0() -> None:
    model = ByForward(lambda m, levels: [m.b(F.relu(m.a(level))) for level in levels[:1]], **CONVS)
    assert names(find_sites(model, ([torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 2, 2)],))) == ["a"]


def test_an_image_without_an_axis_of_instances_is_said() -> None:
    with pytest.raises(ProbeError, match=r"\(3, 4, 4\)\] are one instance of Sequential .*: pass inputs\[None\]"):
        InstanceWisePruner(nn.Sequential(*CONVS.values()), torch.zeros(3, 4, 4))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_model_with_a_scripted_part_is_probed() -> None:
    part = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), part, nn.Conv2d(4, 2, 1))
    assert "0" in names(find_sites(model, torch.zeros(1, 3, 4, 4)))


def test_weights_made_under_inference_mode_are_probed() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
        assert names(find_sites(model, torch.zeros(1, 3, 4, 4))) == ["0"]
    assert names(find_sites(model, torch.zeros(1, 3, 4, 4))) == ["0"]


def test_weights_may_lie_on_several_devices() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1, device="meta"))
    assert names(find_sites(model, torch.zeros(1, 3, 4, 4))) == ["0"]


def test_a_layer_in_two_places_is_called_twice() -> None:
    shared = nn.Conv2d(4, 4, 1)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), shared, nn.ReLU(), shared)
    assert names(find_sites(model, torch.zeros(1, 3, 4, 4))) == ["0"]
