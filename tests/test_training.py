"""The penalty in every way that people train: its value, its gradients, and what is recorded when."""

import copy
import pickle

import pytest
import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from isw_plugin import InstanceWisePruner
from isw_plugin.errors import NothingRecordedError, RecordedWithoutGradError, SettingError
from isw_plugin.functional import channel_norm
from isw_plugin.hooks import memory_of
from tests.conftest import Net, Plain, Residual, made

LAMBDA = 1e-2


def attached(net: nn.Module, **settings: object) -> InstanceWisePruner:
    return InstanceWisePruner(net, net.images(1), **{"lambda_": LAMBDA, **settings})


def task_loss(output: Tensor) -> Tensor:
    return output.square().mean()


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def assert_same_gradients(net: nn.Module, expected: dict[str, Tensor], **tolerance: float) -> None:
    found = gradients(net)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def by_hand(net: Net, *batches: Tensor, lambda_: float = LAMBDA) -> dict[str, Tensor]:
    """Gradients of task loss plus Eq. 5, without any hook."""
    net = copy.deepcopy(net)
    loss = sum(task_loss(net(images)) + net.penalty_by_hand(images, lambda_) for images in batches)
    loss.backward()
    return gradients(net)


def frozen_statistics(net: Net) -> Net:
    """In training mode, with batch norm as in eval mode, so that two forwards of one batch agree."""
    net.train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return net


# -- value and gradient ----------------------------------------------------------------------------


def test_the_penalty_is_eq_5(net: Net) -> None:
    expected = frozen_statistics(net).penalty_by_hand(net.images(), LAMBDA)
    pruner = attached(net)
    net(net.images())
    torch.testing.assert_close(pruner.penalty(), expected)


def test_the_gradient_is_that_of_eq_5(net: Net) -> None:
    expected = by_hand(frozen_statistics(net), net.images())
    pruner = attached(net)
    pruner.regularize(net, task_loss(net(net.images()))).backward()
    assert_same_gradients(net, expected, atol=1e-6, rtol=1e-5)


def test_reduction_mean_divides_by_the_batch(plain: Net) -> None:
    expected = frozen_statistics(plain).penalty_by_hand(plain.images(8), LAMBDA) / 8
    pruner = attached(plain, reduction="mean")
    plain(plain.images(8))
    torch.testing.assert_close(pruner.penalty(), expected)


def test_regularize_adds_the_penalty(plain: Net) -> None:
    pruner = attached(frozen_statistics(plain))
    plain(plain.images())
    penalty = pruner.penalty()
    output = plain(plain.images())
    assert torch.equal(pruner.regularize(plain, task_loss(output)), task_loss(output) + penalty)


def test_lambda_0_records_nothing_and_adds_nothing(plain: Net) -> None:
    pruner = attached(plain.train(), lambda_=0.0)
    loss = task_loss(plain(plain.images()))
    assert torch.equal(pruner.regularize(plain, loss), loss)


def test_decay_may_rest_without_losing_its_lambdas(plain: Net) -> None:
    pruner = InstanceWisePruner(plain, plain.images(1), LAMBDA, per_site={"c2": {"lambda_": 2 * LAMBDA}})
    saved, memory = pruner.state_dict(), memory_of(plain)
    assert memory is not None
    memory.decays = False  # as the pruner of NNI sets it outside of its compress
    plain.train()(plain.images())
    assert (len(memory.tape), pruner.penalty().item()) == (0, 0)
    assert pruner.state_dict() == saved
    pruner.lambda_ = LAMBDA
    plain(plain.images())
    assert pruner.penalty() > 0


def test_training_moves_norms_down(plain: Net) -> None:
    pruner = attached(frozen_statistics(plain), lambda_=1e-3)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    penalties = []
    for _ in range(10):
        plain(plain.images())
        penalties.append(pruner.penalty())
        penalties[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert penalties == sorted(penalties, reverse=True)


def test_a_dropout_in_place_leaves_what_was_recorded() -> None:
    """As in torchvision's MobileNetV3 and MNASNet; hard swish itself does not need its output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Hardswish(), nn.Dropout(inplace=True), nn.Linear(6, 2))
    x = torch.randn(3, 4)
    (expected,) = torch.autograd.grad(model[:2](x).abs().sum(), [model[0].weight])
    pruner = InstanceWisePruner(model, x, lambda_=1.0)
    model.train()(x)
    pruner.penalty().backward()
    torch.testing.assert_close(model[0].weight.grad, expected)


def test_dead_channels_keep_gradients_finite(plain: Net) -> None:
    nn.init.constant_(plain.bn1.weight, 0)
    nn.init.constant_(plain.bn1.bias, -1)
    pruner = attached(frozen_statistics(plain))
    pruner.regularize(plain, task_loss(plain(plain.images()))).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(plain).values())


# -- several forwards, accumulation ----------------------------------------------------------------


def test_several_forwards_before_one_backward_add_up(residual: Net) -> None:
    first, second = residual.images(4, seed=1), residual.images(3, seed=2)
    expected = by_hand(frozen_statistics(residual), first, second)
    pruner = attached(residual)
    loss = task_loss(residual(first)) + task_loss(residual(second))
    pruner.regularize(residual, loss).backward()
    assert_same_gradients(residual, expected, atol=1e-6, rtol=1e-5)


def test_taking_the_penalty_clears_it(plain: Net) -> None:
    pruner = attached(plain.train())
    plain(plain.images())
    pruner.penalty()
    with pytest.raises(NothingRecordedError):
        pruner.penalty()


def test_gradient_accumulation_equals_the_whole_batch(residual: Net) -> None:
    images = residual.images(8)
    expected = by_hand(frozen_statistics(residual), images)
    pruner = attached(residual)
    for part in images.split(2):
        loss = pruner.regularize(residual, task_loss(residual(part)), accumulation_steps=4)
        (loss / 4).backward()
    assert_same_gradients(residual, expected, atol=1e-6, rtol=1e-5)


def test_gradient_accumulation_with_reduction_mean_needs_no_factor(residual: Net) -> None:
    images = residual.images(8)
    expected = by_hand(frozen_statistics(residual), images, lambda_=LAMBDA / 8)
    pruner = attached(residual, reduction="mean")
    for part in images.split(2):
        loss = pruner.regularize(residual, task_loss(residual(part)), accumulation_steps=4)
        (loss / 4).backward()
    assert_same_gradients(residual, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("factors", [{"accumulation_steps": 0}, {"world_size": 0}, {"world_size": -2}])
def test_factors_below_one_are_refused_and_the_record_kept(plain: Net, factors: dict[str, int]) -> None:
    pruner = attached(plain.train())
    plain(plain.images())
    with pytest.raises(SettingError, match=f"{next(iter(factors))}="):
        pruner.regularize(plain, torch.zeros(()), **factors)
    assert pruner.penalty() > 0


# -- nothing recorded ------------------------------------------------------------------------------


def evaluated(net: Net) -> None:
    net.eval()(net.images())


def without_grad(net: Net) -> None:
    with torch.no_grad():
        net.train()(net.images())


def inferred(net: Net) -> None:
    with torch.inference_mode():
        net.train()(net.images())


def through_a_part(net: Net) -> None:
    net.train()
    net.act1(net.bn1(net.c1(net.images())))


@pytest.mark.parametrize("run", [lambda net: None, evaluated, without_grad, inferred, through_a_part])
def test_a_penalty_without_a_training_forward_is_an_error_that_names_the_causes(plain: Net, run) -> None:
    pruner = attached(plain)
    run(plain)
    with pytest.raises(NothingRecordedError, match="eval mode, under no_grad, through a submodule, or was compiled"):
        pruner.penalty()


@pytest.mark.parametrize("run", [evaluated, without_grad, through_a_part])
def test_other_forwards_add_nothing(plain: Net, run) -> None:
    pruner = attached(plain)
    plain.train()(plain.images())
    expected = pruner.penalty()
    plain.train()(plain.images())
    run(plain)
    assert torch.equal(pruner.penalty(), expected)


@pytest.mark.parametrize("between", ["nothing", "another forward", "the penalty"])
def test_a_forward_that_raises_leaves_no_record(plain: Net, between: str) -> None:
    pruner = attached(frozen_statistics(plain))
    plain(plain.images())
    expected = pruner.penalty()
    with pytest.raises(RuntimeError):
        plain.run(plain.images(), lambda name, feature: (feature[:, :1] if name == "c2" else feature,) * 2)
    handle = plain.bn2.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plain(plain.images(seed=5))
    handle.remove()
    if between == "the penalty":
        with pytest.raises(NothingRecordedError):
            pruner.penalty()
    if between == "another forward":
        plain.eval()(plain.images())
        frozen_statistics(plain)
    plain(plain.images())
    assert torch.equal(pruner.penalty(), expected)


# -- modules that run several times in one forward, or not -----------------------------------------


class Views(nn.Module):
    """One view in eval mode, which the probe sees; in training the encoder runs on each of several before the loss."""

    def __init__(self, encoder: Net) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        outputs = [self.encoder(view) for view in ((x, *others) if self.training else (x,))]
        return torch.stack([output.mean(0) for output in outputs])


def views(net: Net, count: int) -> list[Tensor]:
    return [net.images(2 + n, seed=n) for n in range(count)]


@pytest.mark.parametrize("kind", [Plain, Residual])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_call_of_an_encoder_counts(kind: type[Net], count: int) -> None:
    model = Views(frozen_statistics(made(kind)))
    batches = views(model.encoder, count)
    (task_loss(model(*batches)) + sum(model.encoder.penalty_by_hand(x, LAMBDA) for x in batches)).backward()
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    pruner = InstanceWisePruner(model, batches[0], LAMBDA)
    pruner.regularize(model, task_loss(model(*batches))).backward()
    assert_same_gradients(model, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "relative"])
def test_means_are_over_all_instances_of_all_calls(reduction: str) -> None:
    model = Views(frozen_statistics(made(Plain)))
    batches = views(model.encoder, 3)
    pruner = InstanceWisePruner(model, batches[0], LAMBDA, reduction=reduction)
    model(*batches)
    found = pruner.penalty()
    together = model.encoder.penalty_by_hand(torch.cat(batches), LAMBDA) / sum(map(len, batches))
    torch.testing.assert_close(found, together if reduction == "mean" else torch.tensor(LAMBDA))


class Halves(nn.Module):
    """Sites that only a second call reaches, and one that no training forward does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act_a = nn.Linear(4, 6), nn.ReLU()
        self.b, self.act_b = nn.Linear(6, 5), nn.ReLU()
        self.c, self.act_c, self.head = nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2)
        self.short = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.head(self.act_c(self.c(self.act_b(self.b(self.act_a(self.a(x)))))))
        self.act_a(self.a(x[:2]))
        return self.short(self.act_b(self.b(self.act_a(self.a(x)))))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_penalty_is_of_what_ran(reduction: str) -> None:
    torch.manual_seed(0)
    model, x = Halves(), torch.randn(3, 4)
    pruner = InstanceWisePruner(model.eval(), x, LAMBDA, reduction=reduction)
    assert [site.name for site in pruner.sites] == ["a", "b", "c"]
    hidden = model.act_a(model.a(torch.cat([x, x[:2]])))
    deeper = model.act_b(model.b(hidden[:3]))
    model.train()(x)
    expected = [hidden.sum() / (5 if reduction == "mean" else 1), deeper.sum() / (3 if reduction == "mean" else 1)]
    torch.testing.assert_close(pruner.penalty(), LAMBDA * sum(expected))


class ViewsRecomputed(Views):
    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        given = (x, *others) if self.training else (x,)
        return torch.stack([checkpoint(self.encoder, view, use_reentrant=False).mean(0) for view in given])


def test_what_a_checkpoint_recomputes_of_several_calls_counts_once() -> None:
    found = []
    for kind in (Views, ViewsRecomputed):
        model = kind(frozen_statistics(made(Residual)))
        batches = views(model.encoder, 2)
        pruner = InstanceWisePruner(model, batches[0], LAMBDA)
        pruner.regularize(model, task_loss(model(*batches))).backward()
        found.append(gradients(model))
        with pytest.raises(NothingRecordedError):
            pruner.penalty()
    assert_same_gradients(model, found[0], atol=1e-6, rtol=1e-5)


# -- the loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "named"),
    [
        (lambda output: output, r"of shape \(4, 5\): .*a scalar tensor, not outputs"),
        (lambda output: 0.5, "a float"),
        (lambda output: output.mean().item(), "a float"),
    ],
)
def test_what_is_no_loss_is_refused_and_the_record_kept(plain: Net, loss, named: str) -> None:
    pruner = attached(plain.train())
    output = plain(plain.images())
    with pytest.raises(SettingError, match=named):
        pruner.regularize(plain, loss(output))
    assert pruner.penalty() > 0


# -- torch.func and forward-mode AD ----------------------------------------------------------------


def penalty_of(net: Net, pruner: InstanceWisePruner, weights: dict[str, Tensor], images: Tensor) -> Tensor:
    torch.func.functional_call(net, weights, (images,))
    return pruner.penalty()


def test_torch_func_grad_is_the_gradient(residual: Net) -> None:
    net = frozen_statistics(residual)
    images, weights = net.images(), dict(net.named_parameters())
    net.penalty_by_hand(images, LAMBDA).backward()
    pruner = attached(net)
    found = torch.func.grad(lambda these: penalty_of(net, pruner, these, images))(weights)
    for name, gradient in gradients(net).items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)


def test_per_sample_gradients_are_those_of_each_instance(residual: Net) -> None:
    net = frozen_statistics(residual)
    images, weights = net.images(3), {name: p.detach() for name, p in net.named_parameters()}
    pruner = attached(net)

    def one(these: dict[str, Tensor], image: Tensor) -> Tensor:
        return penalty_of(net, pruner, these, image.unsqueeze(0))

    found = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))(weights, images)
    for n, image in enumerate(images):
        alone = torch.func.grad(one)(weights, image)
        for name, gradient in alone.items():
            torch.testing.assert_close(found[name][n], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own rules are scripted
def test_forward_mode_is_the_directional_derivative(residual: Net) -> None:
    net = frozen_statistics(residual)
    images, weights = net.images(), {name: p.detach() for name, p in net.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in weights.items()}
    pruner = attached(net)
    _, found = torch.func.jvp(lambda these: penalty_of(net, pruner, these, images), (weights,), (tangents,))
    gradient = torch.func.grad(lambda these: penalty_of(net, pruner, these, images))(weights)
    torch.testing.assert_close(found, sum((gradient[name] * tangents[name]).sum() for name in weights))
    assert found != 0


# -- checkpointing ---------------------------------------------------------------------------------


class Checkpointed(Residual):
    """The block is recomputed in backward."""

    reentrant = False

    def run(self, x: Tensor, touch) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = checkpoint(self.block, x, touch, use_reentrant=self.reentrant)
        read, _ = touch("block.c2", x)
        return self.fc(self.pool(read).flatten(1))


class Reentrant(Checkpointed):
    reentrant = True


def test_checkpointing_gives_the_same_gradients() -> None:
    expected = by_hand(frozen_statistics(made(Residual)), made(Residual).images())
    net = frozen_statistics(made(Checkpointed))
    pruner = attached(net)
    pruner.regularize(net, task_loss(net(net.images()))).backward()
    assert_same_gradients(net, expected, atol=1e-6, rtol=1e-5)


def test_a_recompute_is_not_recorded() -> None:
    net = frozen_statistics(made(Checkpointed))
    pruner = attached(net)
    pruner.regularize(net, task_loss(net(net.images()))).backward()
    with pytest.raises(NothingRecordedError):
        pruner.penalty()


def test_checkpointing_with_several_forwards_and_one_without_grad_before_backward() -> None:
    first, second = made(Residual).images(4, seed=1), made(Residual).images(3, seed=2)
    expected = by_hand(frozen_statistics(made(Residual)), first, second)
    net = frozen_statistics(made(Checkpointed))
    pruner = attached(net)
    loss = task_loss(net(first)) + task_loss(net(second))
    with torch.no_grad():
        net(first)
    pruner.regularize(net, loss).backward()
    assert_same_gradients(net, expected, atol=1e-6, rtol=1e-5)


def test_checkpointing_without_a_penalty_works_in_eval_mode() -> None:
    net = made(Checkpointed)
    attached(net)
    images = net.images().requires_grad_()
    net(images).sum().backward()
    assert images.grad.isfinite().all()


def test_checkpointing_with_gates_on_gives_the_same_gradients() -> None:
    found = []
    for kind in (Residual, Checkpointed):
        net = frozen_statistics(made(kind))
        pruner = attached(net, alpha=0.1, beta=1.1)
        pruner.step()
        pruner.regularize(net, task_loss(net(net.images()))).backward()
        found.append(gradients(net))
    assert_same_gradients(net, found[0], atol=1e-6, rtol=1e-5)


def test_reentrant_checkpointing_is_an_error_that_says_what_to_do() -> None:
    net = made(Reentrant).train()
    pruner = attached(net)
    with pytest.raises(RecordedWithoutGradError, match=r"stem ran under no_grad.*use_reentrant=False"):
        net(net.images())
    with pytest.raises(NothingRecordedError):
        pruner.penalty()


def test_reentrant_checkpointing_works_where_nothing_is_recorded() -> None:
    net = made(Reentrant).train()
    pruner = attached(net, lambda_=0.0)
    pruner.regularize(net, task_loss(net(net.images()))).backward()
    assert gradients(net)


# -- frozen layers, memory formats, precision ------------------------------------------------------


def test_frozen_layers_get_no_gradient_and_the_others_theirs(residual: Net) -> None:
    residual.stem.requires_grad_(False)
    residual.bn.requires_grad_(False)
    expected = by_hand(frozen_statistics(residual), residual.images())
    pruner = attached(residual)
    pruner.regularize(residual, task_loss(residual(residual.images()))).backward()
    assert not {name for name in gradients(residual) if name.startswith(("stem", "bn."))}
    assert_same_gradients(residual, expected, atol=1e-6, rtol=1e-5)


def test_a_wholly_frozen_body_still_trains_its_head(plain: Net) -> None:
    plain.train().requires_grad_(False)
    plain.fc.requires_grad_(True)
    pruner = attached(plain)
    pruner.regularize(plain, task_loss(plain(plain.images()))).backward()
    assert set(gradients(plain)) == {"fc.weight", "fc.bias"}


def test_channels_last_gives_the_same_gradients(residual: Net) -> None:
    expected = by_hand(frozen_statistics(residual), residual.images())
    residual.to(memory_format=torch.channels_last)
    pruner = attached(residual)
    images = residual.images().to(memory_format=torch.channels_last)
    pruner.regularize(residual, task_loss(residual(images))).backward()
    assert_same_gradients(residual, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_records_float32_norms_of_the_low_precision_map(plain: Net, dtype: torch.dtype) -> None:
    pruner = attached(frozen_statistics(plain))
    with torch.autocast("cpu", dtype=dtype):
        plain(plain.images())
        features = plain.features(plain.images())
        penalty = pruner.penalty()
    assert {feature.dtype for feature in features.values()} == {dtype}
    assert penalty.dtype == torch.float32
    expected = sum(LAMBDA * channel_norm(feature.float()).sum() for feature in features.values())
    torch.testing.assert_close(penalty, expected)


def test_a_float64_model_has_a_float64_penalty(plain: Net) -> None:
    net = frozen_statistics(plain.double())
    images = net.images().double()
    pruner = InstanceWisePruner(net, images)
    net(images)
    assert pruner.penalty().dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_grad_scaler_scales_the_penalty_with_the_loss(plain: Net, dtype: torch.dtype) -> None:
    weights = []
    for scaled in (False, True):
        net = frozen_statistics(copy.deepcopy(plain))
        pruner = attached(net)
        optimizer, scaler = (
            torch.optim.SGD(net.parameters(), 0.1),
            torch.amp.GradScaler("cpu", init_scale=256, enabled=scaled),
        )
        for step in range(2):
            with torch.autocast("cpu", dtype=dtype):
                loss = pruner.regularize(net, task_loss(net(net.images(seed=step))))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        weights.append(net.state_dict())
    assert not torch.equal(weights[0]["c1.weight"], plain.c1.weight)
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-4, rtol=1e-2)


# -- copies while training -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda net: pickle.loads(pickle.dumps(net)),
        lambda net: ModelEmaV2(net).module,
        lambda net: ModelEmaV3(net).module,
    ],
)
def test_a_copy_between_forward_and_backward_disturbs_neither(residual: Net, copied) -> None:
    expected = by_hand(frozen_statistics(residual), residual.images())
    pruner = attached(residual)
    loss = task_loss(residual(residual.images()))
    average = copied(residual)
    theirs = InstanceWisePruner.of(average)
    average.train()
    with pytest.raises(NothingRecordedError):
        theirs.penalty()
    average(average.images())
    pruner.regularize(residual, loss).backward()
    assert theirs.penalty() > 0
    assert_same_gradients(residual, expected, atol=1e-6, rtol=1e-5)


def test_an_ema_follows_the_model_and_gates_by_itself(plain: Net) -> None:
    pruner = attached(plain.train(), alpha=0.0)
    average = ModelEmaV3(plain, decay=0.5)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    pruner.regularize(plain, task_loss(plain(plain.images()))).backward()
    optimizer.step()
    average.update(plain)
    theirs = InstanceWisePruner.of(average.module)
    theirs.step()
    average.module(plain.images())
    assert set(theirs.keep) == {"c1", "c2"}
    assert not pruner.enabled


# -- gates on while training -----------------------------------------------------------------------


def test_gates_in_training_mask_the_output_and_record_the_unmasked_map(plain: Net) -> None:
    bare, images = copy.deepcopy(frozen_statistics(plain)), plain.images()
    pruner = attached(plain, alpha=0.0, beta=1.2, layers="c1")
    pruner.step()
    output = plain(images)
    torch.testing.assert_close(pruner.penalty(), LAMBDA * channel_norm(bare.features(images)["c1"]).sum())
    assert not pruner.keep["c1"].all()
    assert not torch.allclose(output, bare(images))


def test_dropped_channels_get_the_penaltys_gradient_alone(plain: Net) -> None:
    pruner = attached(frozen_statistics(plain), layers="c1", gate=lambda feature, norms: norms < 0)
    pruner.step()
    output = plain(plain.images())
    (task,) = torch.autograd.grad(task_loss(output), plain.c1.weight, retain_graph=True)
    (decay,) = torch.autograd.grad(pruner.penalty(), plain.c1.weight)
    assert (task == 0).all()
    assert decay.abs().sum() > 0


# -- torch.compile ---------------------------------------------------------------------------------

BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [Plain, Residual])
def test_a_compiled_model_gives_the_same_gradients(kind: type[Net], backend: str) -> None:
    net = frozen_statistics(made(kind))
    pruner = attached(net)
    compiled = torch.compile(net, backend=backend)
    for step in range(3):
        images = net.images(seed=step)
        expected = by_hand(net, images)
        pruner.regularize(compiled, task_loss(compiled(images))).backward()
        assert_same_gradients(net, expected, atol=1e-5, rtol=1e-4)
        net.zero_grad()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [Plain, Residual])
def test_a_compiled_training_step_gives_the_same_gradients(kind: type[Net], backend: str) -> None:
    net = frozen_statistics(made(kind))
    pruner = attached(net)

    @torch.compile(backend=backend)
    def step(images: Tensor) -> Tensor:
        return pruner.regularize(net, task_loss(net(images)))

    for seed in range(3):
        expected = by_hand(net, net.images(seed=seed))
        step(net.images(seed=seed)).backward()
        assert_same_gradients(net, expected, atol=1e-5, rtol=1e-4)
        net.zero_grad()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_is_one_graph(plain: Net) -> None:
    attached(plain.train())
    compiled = torch.compile(plain, backend="eager", fullgraph=True)
    assert compiled(plain.images()).shape == (4, 5)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_model_compiled_in_place_gives_the_same_gradients(plain: Net) -> None:
    expected = by_hand(frozen_statistics(plain), plain.images())
    pruner = attached(plain)
    plain.compile(backend="aot_eager")
    pruner.regularize(plain, task_loss(plain(plain.images()))).backward()
    assert_same_gradients(plain, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("fullgraph", [False, True])
def test_every_call_of_a_compiled_encoder_counts(fullgraph: bool) -> None:
    model = Views(frozen_statistics(made(Plain)))
    batches = views(model.encoder, 2)
    expected = sum(model.encoder.penalty_by_hand(x, LAMBDA) for x in batches)
    pruner = InstanceWisePruner(model, batches[0], LAMBDA)
    compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
    for _ in range(3):
        compiled(*batches)
        torch.testing.assert_close(pruner.penalty(), expected)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("scope", ["all", "consumers"])
def test_a_compiled_model_follows_gates_and_modes(residual: Net, scope: str) -> None:
    bare, images = copy.deepcopy(residual), residual.images()
    pruner = attached(residual, alpha=0.1, beta=1.1, scope=scope)
    compiled = torch.compile(residual, backend="aot_eager")
    torch.testing.assert_close(compiled(images), bare(images))
    with pruner.gating():
        torch.testing.assert_close(compiled(images), bare.gated_by_hand(images, 0.1, 1.1, scope))
        assert set(pruner.keep) == set(residual.sites)
    with pruner.gating(beta=0.6):
        torch.testing.assert_close(compiled(images), bare.gated_by_hand(images, 0.1, 0.6, scope))
    torch.testing.assert_close(compiled(images), bare(images))
    frozen_statistics(residual)
    compiled(images)
    torch.testing.assert_close(pruner.penalty(), bare.penalty_by_hand(images, LAMBDA))


@pytest.mark.usefixtures("fresh_compiler")
def test_sites_may_be_found_at_a_compiled_first_forward(plain: Net) -> None:
    expected = by_hand(frozen_statistics(plain), plain.images())
    pruner = InstanceWisePruner(plain, lambda_=LAMBDA)
    compiled = torch.compile(plain, backend="aot_eager")
    pruner.regularize(compiled, task_loss(compiled(plain.images()))).backward()
    assert_same_gradients(plain, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the graph breaks there
def test_a_compiled_checkpoint_gives_the_same_gradients() -> None:
    expected = by_hand(frozen_statistics(made(Residual)), made(Residual).images())
    net = frozen_statistics(made(Checkpointed))
    pruner = attached(net)
    compiled = torch.compile(net, backend="aot_eager")
    pruner.regularize(compiled, task_loss(compiled(net.images()))).backward()
    assert_same_gradients(net, expected, atol=1e-5, rtol=1e-4)
