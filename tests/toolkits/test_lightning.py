"""The callback puts the penalty into a module's loss for the time of fit, and leaves no trace after it."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isw_plugin import InstanceWisePruner, count_macs
from isw_plugin.errors import AttachError, SettingError, UnsupportedError
from tests.conftest import Net, Plain, made

pytest.importorskip("lightning", reason="needs isw_plugin[trainers]")
from lightning.pytorch import Callback, LightningModule, Trainer

from isw_plugin.toolkits.lightning import FeatureDecay, MacsBudget

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning, about loaders and devices
LAMBDA = 1e-2


class Module(LightningModule):
    def __init__(self, net: nn.Module, form: str = "loss") -> None:
        super().__init__()
        self.net = net
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Tensor, index: int) -> Any:
        loss = self.net(batch).square().mean()
        if self.form == "skip" and index == 0:
            return None
        return {"loss": loss, "more": 1} if self.form == "dict" else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Watch(Callback):
    """Writes down what backward is called on, and what is logged."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.logged: list[float] = []

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.losses.append(loss.detach().clone())

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.logged.append(float(trainer.callback_metrics.get("feature_decay", 0.0)))


def module(form: str = "loss", lambda_: float = LAMBDA) -> Module:
    net = made(Plain)
    InstanceWisePruner(net, net.images(1), lambda_=lambda_)
    made_module = Module(net, form)
    for part in made_module.modules():
        part.training = not isinstance(part, nn.BatchNorm2d)
    return made_module


def fit(target: LightningModule, *callbacks: Callback, batches: int = 1, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(
        **settings | {"callbacks": list(callbacks)} | {k: v for k, v in options.items() if k != "ckpt_path"}
    )
    images = [made(Plain).images()] * batches
    loader = torch.utils.data.DataLoader(images, batch_size=None)
    trainer.fit(target, loader, ckpt_path=options.get("ckpt_path"))
    return trainer


def parts_of_loss() -> tuple[Tensor, Tensor]:
    net: Net = made(Plain)
    return net(net.images()).square().mean().detach(), net.penalty_by_hand(net.images(), LAMBDA).detach()


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("form", ["loss", "dict"])
def test_the_loss_has_the_penalty(form: str, parts: int) -> None:
    watch = Watch()
    fit(module(form), FeatureDecay(), watch, batches=parts, accumulate_grad_batches=parts)
    loss, penalty = parts_of_loss()
    torch.testing.assert_close(torch.stack(watch.losses), (loss / parts + penalty).expand(parts))
    assert watch.logged == [pytest.approx(penalty.item())] * parts


def test_mixed_precision() -> None:
    watch = Watch()
    fit(module(), FeatureDecay(), watch, precision="bf16-mixed")
    loss, penalty = parts_of_loss()
    torch.testing.assert_close(watch.losses[0], loss + penalty, atol=0.05, rtol=0.05)


def test_a_skipped_step_leaves_nothing_behind() -> None:
    watch = Watch()
    fit(module("skip"), FeatureDecay(), watch, batches=2)
    loss, penalty = parts_of_loss()
    torch.testing.assert_close(torch.stack(watch.losses), (loss + penalty).expand(1))


def test_the_module_is_as_before_after_fit() -> None:
    target = module()
    fit(target, FeatureDecay())
    assert "training_step" not in target.__dict__
    assert target.training_step(made(Plain).images(), 0) == parts_of_loss()[0]


class CopyAndPickle(Callback):
    """As weight averaging and spawned processes do, in the middle of a fit."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        trainer_of, pl_module._trainer = pl_module._trainer, None
        try:
            self.copies = [copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))]
        finally:
            pl_module._trainer = trainer_of


def test_copies_have_pruners_of_their_own() -> None:
    target, copying = module(), CopyAndPickle()
    fit(target, FeatureDecay(), copying)
    for other in copying.copies:
        step = other.__dict__["training_step"]
        assert step.module is other
        assert [pruner.model for pruner in step.callback._pruners.values()] == [other.net]


def test_averaged_weights() -> None:
    averaging = pytest.importorskip("lightning.pytorch.callbacks")
    if not hasattr(averaging, "EMAWeightAveraging"):
        pytest.skip("this Lightning averages no weights")
    target, watch = module(), Watch()
    fit(target, FeatureDecay(), averaging.EMAWeightAveraging(decay=0.9), watch, batches=2)
    loss, penalty = parts_of_loss()
    torch.testing.assert_close(torch.stack(watch.losses), (loss + penalty).expand(2))


def test_settings_come_back_with_a_checkpoint(tmp_path: Path) -> None:
    target = module()
    InstanceWisePruner.of(target.net).enable(alpha=0.7)
    trainer = fit(target, FeatureDecay())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again, watch = module(lambda_=0.5), Watch()
    fit(again, FeatureDecay(), watch, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    pruner = InstanceWisePruner.of(again.net)
    assert (pruner.lambda_, pruner.gate.alpha, pruner.enabled) == (LAMBDA, 0.7, True)
    assert len(watch.losses) == 1


def test_without_a_pruner() -> None:
    with pytest.raises(AttachError, match="Module has no pruner"):
        fit(Module(made(Plain)), FeatureDecay())


def test_manual_optimization_is_refused() -> None:
    target = module()
    target.automatic_optimization = False
    with pytest.raises(UnsupportedError, match="before manual_backward"):
        fit(target, FeatureDecay())


def gated_module() -> Module:
    net = made(Plain)
    InstanceWisePruner(net, net.images(1), 0.0, alpha=0.0, beta=0.0)
    return Module(net)


def test_a_budget_is_met_while_a_trainer_fits() -> None:
    target = gated_module()
    trainer = fit(target, MacsBudget(0.7, ramp=20, rate=0.3), batches=60)
    pruner = InstanceWisePruner.of(target.net)
    assert pruner.enabled
    assert trainer.callback_metrics["macs_left"] == pytest.approx(0.7, abs=0.02)
    target.net.train()  # as its maps were when thresholds followed them; the rate is 0
    keep = 1 - count_macs(target.net, made(Plain).images()).saved.mean().item()
    assert keep == pytest.approx(0.7, abs=0.1)  # four images, in eval mode


def test_a_ramp_goes_on_from_a_checkpoint_of_the_trainer() -> None:
    target, budget = gated_module(), MacsBudget(0.75, ramp=20)
    fit(target, budget, batches=5)
    later, again = gated_module(), MacsBudget(0.75, ramp=20)
    again.load_state_dict(budget.state_dict())
    fit(later, again, batches=5)
    assert InstanceWisePruner.of(later.net).state_dict()["budget"] == pytest.approx(0.875)


@pytest.mark.parametrize("settings", [{"macs_left": 45}, {"macs_left": 0.5, "rate": 0}, {"macs_left": 0.5, "ramp": -1}])
def test_a_budget_that_is_none_is_refused_at_once(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError):
        MacsBudget(**settings)


def test_a_budget_needs_a_pruner() -> None:
    with pytest.raises(AttachError, match="has no pruner"):
        fit(Module(made(Plain)), MacsBudget(0.5))
