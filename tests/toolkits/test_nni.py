"""A pruner of NNI whose penalty comes through NNI's evaluators, and NNI as it was beside it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isw_plugin.errors import AttachError, PatternError, SettingError, UnsupportedError
from isw_plugin.functional import channel_norm, keep_mask
from tests.conftest import Net, Plain, Residual, hooks_of, made

nni = pytest.importorskip("nni", reason="needs isw_plugin[nni]")
from nni.compression.base.compressor import Pruner  # noqa: E402
from nni.compression.pruning import L1NormPruner, SlimPruner  # noqa: E402
from nni.compression.utils import LightningEvaluator, TorchEvaluator, TransformersEvaluator  # noqa: E402

from isw_plugin.toolkits.nni import InstanceWisePruner, compact  # noqa: E402

LAMBDA = 1e-2
ALL = [{"op_types": ["Conv2d"]}]


def task_loss(output: Tensor) -> Tensor:
    return F.cross_entropy(output, torch.arange(len(output)) % output.shape[1])


def evaluator(
    net: Net,
    losses: list[Tensor],
    rate: float = 0.0,
    wrapped: Callable[[Tensor], Any] = lambda loss: loss,
    parts: int = 1,
) -> TorchEvaluator:
    """Trains on the network's own images and writes every loss down; a rate of 0 changes nothing."""

    def training_step(batch: Tensor, model: nn.Module) -> Any:
        return wrapped(task_loss(model(batch)))

    def training(model, optimizer, step, schedulers=None, max_steps=None, max_epochs=None) -> None:  # type: ignore[no-untyped-def]
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        for _ in range(max_steps or max_epochs or 1):
            out = step(net.images(), model)
            loss = out["loss"] if isinstance(out, dict) else out[0] if isinstance(out, tuple) else out
            losses.append(loss.detach())
            (loss / parts).backward()
            optimizer.step()
            optimizer.zero_grad()

    optimizer = nni.trace(torch.optim.SGD)(net.parameters(), lr=rate)
    return TorchEvaluator(training, optimizer, training_step, dummy_input=net.images(1))


# -- which maps -----------------------------------------------------------------------------------------

SELECTIONS = {
    "types": ([{"op_types": ["Conv2d"]}], ["stem", "block.c1", "block.c2"]),
    "names": ([{"op_names": ["block.c1"]}], ["block.c1"]),
    "prefix": ([{"op_names_re": [r"block\.c\d"]}], ["block.c1", "block.c2"]),  # re.match, as in NNI
    "both": ([{"op_names_re": ["block"], "op_types": ["Conv2d"]}], ["block.c1", "block.c2"]),
    "without a name": ([{"op_types": ["Conv2d"], "exclude_op_names": ["stem"]}], ["block.c1", "block.c2"]),
    "without a prefix": ([{"op_types": ["Conv2d"], "exclude_op_names_re": ["block"]}], ["stem"]),
    "without a type": ([{"op_names_re": [".*"], "exclude_op_types": ["Linear"]}], ["stem", "block.c1", "block.c2"]),
    "exclude last": ([{"op_types": ["Conv2d"]}, {"op_names": ["stem"], "exclude": True}], ["block.c1", "block.c2"]),
    "exclude first": ([{"op_names": ["stem"], "exclude": True}, {"op_types": ["Conv2d"]}], ["block.c1", "block.c2"]),
}


@pytest.mark.parametrize("case", SELECTIONS)
def test_configs_select_as_in_nni(case: str, residual: Net) -> None:
    configs, names = SELECTIONS[case]
    pruner = InstanceWisePruner(residual, configs, example_inputs=residual.images(1))
    assert isinstance(pruner, Pruner)
    assert [site.name for site in pruner.gates.sites] == names


def test_thresholds_hold_per_config(plain: Net) -> None:
    configs = [{"op_types": ["Conv2d"], "beta": 1.0}, {"op_names": ["c2"], "beta": 0.3, "alpha": 0.2}]
    pruner = InstanceWisePruner(plain, configs, alpha=0.0, example_inputs=plain.images(1))
    pruner.gates.step()
    plain(plain.images())
    for name, alpha, beta in (("c1", 0.0, 1.0), ("c2", 0.2, 0.3)):
        assert pruner.gates.keep[name].equal(keep_mask(pruner.gates.norms[name], alpha, beta))
    assert not pruner.gates.keep["c1"].all()


# -- training -------------------------------------------------------------------------------------------

OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "loss": lambda loss: loss,
    "tuple": lambda loss: (loss, "more"),
    "dict": lambda loss: {"loss": loss, "more": 1},
}


@pytest.mark.parametrize("form", OUTPUTS)
def test_the_penalty_is_in_the_evaluators_loss(plain: Net, form: str) -> None:
    losses: list[Tensor] = []
    pruner = InstanceWisePruner(plain, ALL, evaluator(plain, losses, wrapped=OUTPUTS[form]), lambda_=LAMBDA)
    model, masks = pruner.compress(max_steps=2)
    images = plain.images()
    expected = task_loss(plain(images)) + plain.penalty_by_hand(images, LAMBDA)
    assert model is plain
    assert masks == {}
    torch.testing.assert_close(torch.stack(losses), expected.expand(2))


def test_lambda_holds_per_config(plain: Net) -> None:
    losses: list[Tensor] = []
    configs = [{"op_types": ["Conv2d"], "lambda_": LAMBDA}, {"op_names": ["c2"], "lambda_": 0.0}]
    InstanceWisePruner(plain, configs, evaluator(plain, losses)).compress(max_epochs=1)
    images = plain.images()
    norms = channel_norm(plain.features(images)["c1"])
    torch.testing.assert_close(losses[0], task_loss(plain(images)) + LAMBDA * norms.sum())


def test_accumulated_parts_do_not_shrink_it(plain: Net) -> None:
    losses: list[Tensor] = []
    trained = evaluator(plain, losses, parts=4)
    InstanceWisePruner(plain, ALL, trained, lambda_=LAMBDA, accumulation_steps=4).compress(max_steps=1)
    images = plain.images()
    torch.testing.assert_close(losses[0], task_loss(plain(images)) + 4 * plain.penalty_by_hand(images, LAMBDA))


def test_it_decays_features(plain: Net) -> None:
    def size(lambda_: float) -> float:
        net = copy.deepcopy(plain)
        InstanceWisePruner(net, ALL, evaluator(net, [], rate=0.05), lambda_=lambda_).compress(max_steps=20)
        return net.penalty_by_hand(net.images(), 1.0).item()

    assert size(0.05) < 0.8 * size(0.0)


def test_compress_as_long_as_the_function_runs(plain: Net) -> None:
    losses: list[Tensor] = []
    InstanceWisePruner(plain, ALL, evaluator(plain, losses)).compress()
    assert len(losses) == 1


def test_a_failing_training_leaves_the_evaluator_unbound(plain: Net) -> None:
    trained = evaluator(plain, [])
    pruner = InstanceWisePruner(plain, ALL, trained)
    trained.training_func = lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        pruner.compress(max_steps=1)
    assert trained.model is None


def test_unwrapped_it_is_the_bare_model(plain: Net) -> None:
    keys, images = list(plain.state_dict()), plain.images()
    pruner = InstanceWisePruner(plain, ALL, evaluator(plain, [], rate=0.01), lambda_=LAMBDA)
    pruner.compress(max_steps=1)
    bare = copy.deepcopy(plain).eval()
    pruner.gates.of(bare).remove()
    pruner.gates.enable(alpha=0.0)
    gated = plain.eval()(images)
    pruner.unwrap_model()
    assert list(plain.state_dict()) == keys
    assert plain(images).equal(bare(images))
    assert not gated.equal(bare(images))
    pruner.gates.step()
    assert plain(images).equal(gated)
    pruner.gates.remove()
    assert hooks_of(plain) == hooks_of(made(Plain))


def test_only_a_wrapped_model_records(plain: Net) -> None:
    configs = [{"op_types": ["Conv2d"]}, {"op_names": ["c2"], "lambda_": 2 * LAMBDA}]
    pruner = InstanceWisePruner(plain, configs, example_inputs=plain.images(1), lambda_=LAMBDA)
    plain.train()(plain.images())
    before = pruner.gates.penalty()
    pruner.unwrap_model()
    plain(plain.images())
    assert pruner.gates.penalty() == 0
    assert pruner.gates.lambda_ == LAMBDA  # a state that is saved now keeps it
    pruner.wrap_model()
    plain(plain.images())
    torch.testing.assert_close(pruner.gates.penalty(), before)
    assert before > 0


def test_what_is_set_after_construction_holds(plain: Net) -> None:
    """Thresholds that calibration chose survive unwrapping, and a changed lambda the next compress."""
    losses: list[Tensor] = []
    pruner = InstanceWisePruner(plain, ALL, evaluator(plain, losses), lambda_=5.0)
    pruner.gates.lambda_ = LAMBDA
    pruner.compress(max_steps=1)
    images = plain.images()
    torch.testing.assert_close(losses[0], task_loss(plain(images)) + plain.penalty_by_hand(images, LAMBDA))
    pruner.gates.load_state_dict(pruner.gates.state_dict() | {"per_site": {"c2": {"alpha": 0.0, "beta": 0.25}}})
    pruner.unwrap_model()
    pruner.gates.step()
    plain(images)
    assert pruner.gates.keep["c2"].equal(keep_mask(pruner.gates.norms["c2"], 0.0, 0.25))
    pruner.wrap_model()
    plain.train()(images)
    assert pruner.gates.lambda_ == LAMBDA
    assert pruner.gates.penalty() > 0


def test_gates_may_be_removed_before_unwrapping(plain: Net) -> None:
    pruner = InstanceWisePruner(plain, ALL, evaluator(plain, []))
    pruner.gates.remove()
    pruner.unwrap_model()
    assert hooks_of(plain) == hooks_of(made(Plain))


# -- beside NNI's pruners -------------------------------------------------------------------------------

SLIM = [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}]


def test_slim_then_dynamic(residual: Net) -> None:
    slim = SlimPruner(residual, SLIM, evaluator(residual, [], rate=0.01), training_steps=2)
    _, found = slim.compress()
    before = residual.eval()(residual.images())
    pruner = InstanceWisePruner.from_compressor(slim, ALL, lambda_=LAMBDA)
    torch.testing.assert_close(residual.eval()(residual.images()), before)
    assert pruner.fused_compressors == [pruner]
    _, masks = pruner.compress(max_steps=2)
    assert all(masks[name]["weight"].equal(found[name]["weight"]) for name in found)
    fine_tuned = residual.eval()(residual.images())
    pruner.unwrap_model()
    compact(residual, masks, residual.images(1))  # the scaling factors are in the weights by now
    torch.testing.assert_close(residual(residual.images()), fine_tuned, atol=1e-5, rtol=1e-5)
    pruner.gates.enable(alpha=0.0)
    residual(residual.images())
    assert pruner.gates.keep["stem"].shape == (4, residual.stem.out_channels)


def test_slim_and_dynamic_at_once(residual: Net) -> None:
    losses: list[Tensor] = []
    slim = SlimPruner(residual, SLIM, evaluator(residual, losses), training_steps=1, regular_scale=0.0)
    pruner = InstanceWisePruner.from_compressor(slim, ALL, lambda_=LAMBDA)
    _, masks = pruner.compress(max_steps=2)
    assert set(masks) == {"bn", "block.bn1", "block.bn2"}
    assert sum(int(targets["weight"].eq(0).sum()) for targets in masks.values()) == 7
    images = residual.images()
    torch.testing.assert_close(
        losses[0], task_loss(made(Residual)(images)) + made(Residual).penalty_by_hand(images, LAMBDA)
    )
    assert losses[1] != losses[0]


def test_dynamic_then_slim(residual: Net) -> None:
    losses: list[Tensor] = []
    pruner = InstanceWisePruner(residual, ALL, evaluator(residual, losses), lambda_=LAMBDA)
    slim = SlimPruner.from_compressor(pruner, SLIM, training_steps=1, regular_scale=0.0)
    _, masks = slim.compress(2, None)
    assert sum(int(targets["weight"].eq(0).sum()) for targets in masks.values()) == 7
    images = residual.images()
    torch.testing.assert_close(
        losses[0], task_loss(made(Residual)(images)) + made(Residual).penalty_by_hand(images, LAMBDA)
    )
    slim.unwrap_model()
    residual.train()(images)
    assert float(pruner.gates.penalty()) == 0  # nothing is recorded outside compress


@pytest.mark.parametrize("kind", [L1NormPruner, "slim"])
def test_nni_prunes_as_before_and_its_masks_become_a_small_model(kind: Any) -> None:
    net = made(Residual)
    if kind == "slim":
        pruner = SlimPruner(net, SLIM, evaluator(net, [], rate=0.0), training_steps=1, regular_scale=0.0)
    else:
        pruner = kind(net, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    model, masks = pruner.compress()
    assert all(set(targets) == {"weight", "bias"} for targets in masks.values())
    assert all(targets["weight"].mean() == 0.5 for targets in masks.values())
    if kind == "slim":
        for wrapper in pruner._module_wrappers.values():
            wrapper.weight_slim_factor.data.fill_(1.0)  # unwrap_model loses them, in NNI as it is
    images = net.images()
    with torch.no_grad():
        expected = model.eval()(images)
    pruner.unwrap_model()
    before = sum(parameter.numel() for parameter in net.parameters())
    compact(net, masks, images)
    assert sum(parameter.numel() for parameter in net.parameters()) < before
    torch.testing.assert_close(net(images), expected, atol=1e-5, rtol=1e-5)


# -- other evaluators -----------------------------------------------------------------------------------


def lightning_evaluator(net: Net, losses: list[Tensor], parts: int = 1) -> tuple[nn.Module, Any]:
    pl = pytest.importorskip("pytorch_lightning", reason="needs isw_plugin[trainers]")

    class Lit(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return task_loss(self(batch))

        def configure_optimizers(self) -> Any:
            return nni.trace(torch.optim.SGD)(self.parameters(), lr=0.0)

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader([image for image in net.images()], batch_size=4)  # noqa: C416

    class Watch(pl.Callback):
        def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
            losses.append(loss.detach().clone())

    trainer = nni.trace(pl.Trainer)(
        max_epochs=5,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=parts,
        callbacks=[Watch()],
    )
    model = Lit()
    for module in model.modules():
        module.training = not isinstance(module, nn.BatchNorm2d)
    return model, LightningEvaluator(trainer, nni.trace(Data)())


@pytest.mark.filterwarnings("ignore")  # of Lightning, about loaders and devices
@pytest.mark.parametrize("parts", [1, 2])
def test_the_lightning_evaluator_runs(plain: Net, parts: int) -> None:
    losses: list[Tensor] = []
    model, trained = lightning_evaluator(plain, losses, parts)
    pruner = InstanceWisePruner(model, ALL, trained, lambda_=LAMBDA, example_inputs=plain.images(1))
    pruner.compress(max_epochs=2)
    images = plain.images()
    expected = task_loss(plain(images)) + parts * plain.penalty_by_hand(images, LAMBDA)
    torch.testing.assert_close(torch.stack(losses) * parts, expected.expand(2))


@pytest.mark.filterwarnings("ignore")
def test_the_lightning_evaluator_cannot_count_steps(plain: Net) -> None:
    model, trained = lightning_evaluator(plain, [])
    pruner = InstanceWisePruner(model, ALL, trained, example_inputs=plain.images(1))
    with pytest.raises(SettingError, match="give it to the Trainer"):
        pruner.compress(max_steps=2)


def test_the_transformers_evaluator_is_refused(plain: Net) -> None:
    broken = TransformersEvaluator.__new__(TransformersEvaluator)
    with pytest.raises(UnsupportedError, match="use TorchEvaluator"):
        InstanceWisePruner(plain, ALL, broken, example_inputs=plain.images(1))
    assert hooks_of(plain) == hooks_of(made(Plain))


# -- what is wrong --------------------------------------------------------------------------------------

MISTAKES = {
    "sparse_ratio": ([{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], SettingError, "decided for every image"),
    "nothing": ([{"lambda_": 0.1}], SettingError, "chooses no layers"),
    "name": ([{"op_names": ["c3"]}], PatternError, "Close names: .*c1"),
    "type": ([{"op_types": ["Conv2D"]}], PatternError, "selects no module of Plain, which has .*, Conv2d, "),
    "norms": ([{"op_types": ["BatchNorm2d"]}], PatternError, "none of which makes a map"),
    "beta": ([{"op_types": ["Conv2d"], "beta": 3.0}], SettingError, r"\[0, 2\)"),
    "no list": ({"op_types": ["Conv2d"]}, SettingError, "a list of dicts"),
    "no config": ([], SettingError, "a list of dicts"),
    "no dict": (["Conv2d"], SettingError, "a list of dicts"),
    "a word": ([{"op_types": "Conv2d"}], SettingError, r"op_types='Conv2d': a list, \['Conv2d'\]"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_wrong_config_changes_nothing(case: str, plain: Net) -> None:
    configs, error, message = MISTAKES[case]
    with pytest.raises(error, match=message):
        InstanceWisePruner(plain, configs, example_inputs=plain.images(1))
    assert hooks_of(plain) == hooks_of(made(Plain))


def test_an_evaluator_is_one_of_nnis(plain: Net) -> None:
    with pytest.raises(SettingError, match=r"one of NNI's, such as TorchEvaluator"):
        InstanceWisePruner(plain, ALL, lambda *_: None, example_inputs=plain.images(1))
    assert hooks_of(plain) == hooks_of(made(Plain))


def test_what_is_missing_is_said(plain: Net) -> None:
    with pytest.raises(SettingError, match="pass example_inputs"):
        InstanceWisePruner(plain, ALL)
    with pytest.raises(SettingError, match="no evaluator"):
        InstanceWisePruner(plain, ALL, example_inputs=plain.images(1)).compress(max_steps=1)


def test_a_model_that_nni_wrapped_comes_by_from_compressor(plain: Net) -> None:
    L1NormPruner(plain, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    with pytest.raises(AttachError, match="from_compressor"):
        InstanceWisePruner(plain, ALL, example_inputs=plain.images(1))
