import copy
import pickle
import warnings
import weakref

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from isw_plugin.copies import copy_of
from isw_plugin.errors import ProbeError
from isw_plugin.sites.probe import INSTANCES, default_inputs, probe
from isw_plugin.sites.recorder import _recurrent
from tests.conftest import Net, Plain, hooks_of, made, on_meta


class Custom(nn.Module):
    """A layer, and whatever a test makes its forward do."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.after = forward

    def forward(self, *args, **kwargs) -> Tensor:
        return self.after(self.layer, *args, **kwargs)


def kinds(model: nn.Module, inputs: object) -> list[str]:
    return [node.kind for node in probe(model, inputs).nodes]


def test_layers_and_norms_are_nodes_and_the_rest_its_operations() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    assert kinds(model, torch.zeros(1, 3, 1, 1)) == ["layer", "norm", "relu", "view", "layer"]


def test_a_recurrent_module_is_one_node() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.last = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.lstm(x)[0])

    graph = probe(Recurrent(), torch.zeros(1, 5, 4))
    assert [node.kind for node in graph.nodes] == ["recurrent", "layer"]
    assert graph.nodes[1].inputs == graph.nodes[0].outputs[:1]


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("shape", [(5, 3, 4), (5, 4)])
@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True}, {"bidirectional": True, "num_layers": 2}, {"proj_size": 2}], ids=str
)
def test_shapes_of_recurrent_modules_on_meta_are_those_of_a_run(kind, shape: tuple[int, ...], options: dict) -> None:
    if "proj_size" in options and kind is not nn.LSTM:
        return
    real = kind(4, 3, **options)
    on_meta = copy.deepcopy(real).to("meta")
    expected = tree_leaves(real(torch.zeros(shape)))
    found = tree_leaves(_recurrent(on_meta, on_meta.forward, torch.zeros(shape, device="meta")))
    assert [(t.shape, t.is_contiguous()) for t in found] == [(t.shape, t.is_contiguous()) for t in expected]


def test_an_operation_in_place_makes_a_new_value() -> None:
    graph = probe(Custom(lambda layer, x: F.relu_(layer(x)).add_(1)), torch.zeros(1, 4))
    assert [node.kind for node in graph.nodes] == ["layer", "relu", "add"]
    layer, relu, add = graph.nodes
    assert relu.inputs == layer.outputs != relu.outputs
    assert add.inputs == relu.outputs != add.outputs


def test_a_view_of_what_an_operation_in_place_made_is_followed() -> None:
    graph = probe(Custom(lambda layer, x: layer(x).add_(1).view(-1, 2, 2).flatten(1).relu()), torch.zeros(1, 4))
    _, add, view, flatten, relu = graph.nodes
    assert (view.inputs, flatten.inputs, relu.inputs) == (add.outputs, view.outputs, flatten.outputs)


@pytest.mark.parametrize(
    "inputs",
    [
        torch.zeros(1, 4),
        torch.zeros(7, 4),
        torch.zeros(1, 4, device="meta"),
        (torch.zeros(1, 4),),
        {"x": torch.zeros(1, 4)},
        (torch.zeros(1, 4), 2.0),
        {"x": torch.zeros(1, 4), "scale": torch.tensor(2.0)},
        {"x": torch.zeros(1, 4), "scale": None},
    ],
)
def test_inputs_may_be_a_tensor_a_tuple_or_a_dict(inputs: object) -> None:
    model = Custom(lambda layer, x, scale=None: layer(x) if scale is None else layer(x) * scale)
    assert probe(model, inputs).nodes[0].name == "layer"


def test_shapes_hold_for_any_number_of_instances() -> None:
    assert probe(made(Plain), torch.zeros(5, 3, 8, 8)).shapes[0] == (INSTANCES, 3, 8, 8)


def test_integer_inputs_keep_their_type() -> None:
    assert kinds(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), torch.zeros(1, 3, dtype=torch.long))[-1] == "layer"


def test_a_forward_that_reads_values_is_run_on_the_models_device() -> None:
    assert kinds(Custom(lambda layer, x: layer(x) * x.sum().item()), torch.zeros(1, 4))[0] == "layer"


def test_a_model_on_meta_can_be_probed() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert kinds(model, torch.zeros(1, 4)) == ["layer", "relu", "layer"]


def test_the_model_is_left_untouched(net: Net) -> None:
    net.train()
    before, hooks, state = pickle.dumps(net), hooks_of(net), copy.deepcopy(net.state_dict())
    probe(net, net.images())
    assert hooks_of(net) == hooks
    assert pickle.dumps(net) == before
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(module.training for module in net.modules())


def _fails(layer: nn.Module, x: Tensor) -> Tensor:
    raise ZeroDivisionError("inside")


@pytest.mark.parametrize(
    "forward",
    [
        lambda layer, x: layer(x) + torch.rand(4),
        lambda layer, x: layer(x + torch.rand(4)) * x.sum().item(),
    ],
)
def test_the_random_generator_is_left_untouched(forward) -> None:
    model, state = Custom(forward), torch.get_rng_state()
    probe(model, torch.zeros(1, 4))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_probe_works_under_inference_mode(plain: Net) -> None:
    with torch.inference_mode():
        assert probe(plain, plain.images()).nodes


def test_the_probe_works_under_autocast(plain: Net) -> None:
    bare = kinds(plain, plain.images())
    with torch.autocast("cpu", torch.bfloat16):
        assert kinds(plain, plain.images()) == bare


def test_a_buffer_that_the_forward_replaces_stays_alive() -> None:
    class Replacing(Custom):
        def __init__(self) -> None:
            super().__init__(lambda layer, x: layer(x))
            self.register_buffer("table", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            before = weakref.ref(self.table)
            self.table = torch.ones(4, device=x.device)
            assert before() is not None, "another tensor may get its id and be taken for it"
            return super().forward(x)

    assert [node.kind for node in probe(Replacing(), torch.zeros(1, 4)).nodes if node.name] == ["layer"]


def test_a_tensor_that_a_forward_left_in_the_model_does_no_harm() -> None:
    model = Custom(lambda layer, x: layer(x))
    model.cache = {"cpu": [model.layer.weight * 2]}
    probe(model, torch.zeros(1, 4))
    assert model.cache["cpu"][0].grad_fn is not None
    twin = copy_of(model)
    assert twin.cache["cpu"][0].is_leaf
    assert twin.cache["cpu"][0] is not model.cache["cpu"][0]
    assert torch.equal(twin.cache["cpu"][0], model.layer.weight * 2)


@pytest.mark.parametrize(
    ("inputs", "shape"),
    [
        (torch.zeros(1, 5), r"\(1, 5\)"),
        ((torch.zeros(1, 4), torch.zeros(1, 9)), r"\(1, 4\), \(1, 9\)"),
        ({"y": torch.zeros(1, 4)}, r"\(1, 4\)"),
    ],
)
def test_inputs_that_do_not_fit_are_an_error_with_their_shapes(inputs: object, shape: str) -> None:
    model = Custom(lambda layer, x: layer(x))
    hooks = hooks_of(model)
    with pytest.raises(ProbeError, match=f"Custom could not be run on example inputs of shape .*{shape}"):
        probe(model, inputs)
    assert hooks_of(model) == hooks


def test_an_error_inside_the_forward_is_the_cause() -> None:
    with pytest.raises(ProbeError, match="inside") as caught:
        probe(Custom(_fails), torch.zeros(1, 4))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_function_that_the_forward_needs_as_a_hook_is_said() -> None:
    class Swap:
        def __call__(self, module: nn.Module, args: tuple[Tensor]) -> Tensor:
            return args[0].transpose(1, 2)

    model = Custom(lambda layer, x: layer(x))
    handle = model.register_forward_pre_hook(lambda module, args: args[0].transpose(1, 2))
    with pytest.raises(ProbeError, match="make hooks that it needs callable objects"):
        probe(model, torch.zeros(1, 4, 3))
    handle.remove()
    model.register_forward_pre_hook(Swap())
    assert probe(model, torch.zeros(1, 4, 3)).nodes


# -- default inputs --------------------------------------------------------------------------------


def test_a_timm_model_declares_its_input_size() -> None:
    assert default_inputs(timm.create_model("test_resnet")).shape == (1, 3, 160, 160)


def test_the_first_convolution_says_how_many_channels_an_image_has() -> None:
    assert default_inputs(timm.create_model("test_resnet", in_chans=1)).shape[1] == 1


told = pytest.mark.skipif(not hasattr(timm.models, "get_model_traits"), reason="older timm models do not tell")
EDITED = [
    ("coat_tiny", 96),  # its patch_embed1 knows the size
    ("crossvit_tiny_240", 120),  # the model itself
    ("mixer_s32_224", 96),  # its stem
    ("test_vit", 96),  # its patch_embed
    ("tnt_s_legacy_patch16_224", 96),  # its pixel_embed
    pytest.param("gcvit_xxtiny", 96, marks=told),  # timm's record alone
]


@pytest.mark.parametrize(("name", "size"), EDITED)
def test_an_edited_image_size_counts(name: str, size: int) -> None:
    model = on_meta(name, img_size=size, in_chans=1)
    inputs = default_inputs(model)
    assert inputs.shape == (1, 1, size, size)
    assert probe(model, inputs).nodes


@told
def test_edited_channels_of_a_stem_that_folds_pixels_count() -> None:
    assert default_inputs(timm.create_model("tresnet_m", in_chans=1)).shape[1] == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_weights_say_of_which_type_an_image_is(dtype: torch.dtype) -> None:
    model = timm.create_model("test_resnet").to(dtype)
    assert probe(model, default_inputs(model)).nodes


def test_warnings_of_the_forward_are_kept_for_the_users_own() -> None:
    def warns(layer: nn.Module, x: Tensor) -> Tensor:
        warnings.warn("of the model", stacklevel=1)
        return layer(x)

    assert probe(Custom(warns), torch.zeros(1, 4)).nodes


def test_other_models_declare_nothing(plain: Net) -> None:
    assert default_inputs(plain) is None


def test_default_inputs_of_a_stem_that_folds_pixels_into_channels() -> None:
    inputs = default_inputs(timm.create_model("tresnet_m"))
    assert inputs is not None
    assert inputs.shape == (1, 3, 224, 224)
