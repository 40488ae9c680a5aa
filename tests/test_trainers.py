"""One optimizer step under each trainer is the step of Eq. 5 by hand, however the batch is divided."""

import importlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from isw_plugin import InstanceWisePruner, calibrate, evaluate
from tests.conftest import Net, Residual, made
from tests.processes import run_ranks

LAMBDA = 1e-2
RATE = 0.1
EXTRAS = {"accelerate": "accelerate", "lightning": "lightning", "timm": "isw_plugin.toolkits.timm"}
pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers, about loaders and devices


def installed(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


INSTALLED = [name for name, package in EXTRAS.items() if installed(package)]


def task_loss(output: Tensor, labels: Tensor | None = None) -> Tensor:
    return output.square().mean()


def network() -> tuple[Net, InstanceWisePruner]:
    """Norms in eval mode, so that parts of a batch do not see each other."""
    net = made(Residual)
    for module in net.modules():
        module.training = not isinstance(module, nn.BatchNorm2d)
    return net, InstanceWisePruner(net, net.images(1), lambda_=LAMBDA)


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=RATE)


def by_hand(images: Tensor) -> dict[str, Tensor]:
    net, _ = network()
    InstanceWisePruner.of(net).remove()
    (task_loss(net(images)) + net.penalty_by_hand(images, LAMBDA)).backward()
    sgd(net).step()
    return net.state_dict()


def step_of_timm(parts: list[Tensor]) -> Net:
    from timm.task import ClassificationTask

    from isw_plugin.toolkits.timm import add_feature_decay

    net, pruner = network()
    task = ClassificationTask(net, task_loss, verbose=False)
    add_feature_decay(task, pruner, accumulation_steps=len(parts))
    if dist.is_initialized():
        task.prepare_distributed()
    optimizer = sgd(net)
    for index, images in enumerate(parts):
        if dist.is_initialized():
            task.trainable_module.require_backward_grad_sync = index == len(parts) - 1
        (task(images, torch.zeros(len(images)))["loss"] / len(parts)).backward()
    optimizer.step()
    return net


def step_of_accelerate(parts: list[Tensor]) -> Net:
    from accelerate import Accelerator

    net, pruner = network()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=len(parts))
    model, optimizer = accelerator.prepare(net, sgd(net))
    for images in parts:
        with accelerator.accumulate(model):
            loss = pruner.regularize(model, task_loss(model(images)), accumulation_steps=len(parts))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    return net


def step_of_lightning(parts: list[Tensor]) -> Net:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy

    from isw_plugin.toolkits.lightning import FeatureDecay

    class Module(LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return task_loss(self.net(batch))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self.net)

    net, _ = network()
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=ranks,
        strategy=DDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto",
        accumulate_grad_batches=len(parts),
        use_distributed_sampler=False,
        callbacks=[FeatureDecay()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(net), torch.utils.data.DataLoader(parts, batch_size=None))
    return net


STEPS: dict[str, Callable[[list[Tensor]], Net]] = {
    "accelerate": step_of_accelerate,
    "lightning": step_of_lightning,
    "timm": step_of_timm,
}


def require(trainer: str) -> None:
    if trainer not in INSTALLED:
        pytest.skip("needs isw_plugin[trainers], or timm 1.0.27")


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("trainer", STEPS)
def test_accumulation_does_not_shrink_the_penalty(trainer: str, parts: int) -> None:
    require(trainer)
    images = made(Residual).images(4)
    net = STEPS[trainer](list(images.chunk(parts)))
    for name, expected in by_hand(images).items():
        torch.testing.assert_close(net.state_dict()[name], expected, atol=1e-6, rtol=1e-5)


# -- two processes --------------------------------------------------------------------------------------


def labelled(images: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(batch, torch.arange(len(batch)) % 5) for batch in images.split(2)]


def measured(images: Tensor) -> dict[str, Any]:
    """What evaluate and calibrate find on these images."""
    net, pruner = network()
    chosen = calibrate(pruner, labelled(images), max_drop=0.49)
    with pruner.gating(alpha=0.2, beta=1.0):
        report = evaluate(net, labelled(images), records=True)
    values = report.to_dict() | {"latency": None, "best": chosen.best, "tried": chosen.instances}
    return values | {"macs of each": report.records.macs.sort().values.tolist()}


def work(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    dist.init_process_group("gloo")
    try:
        mine = made(Residual).images(8)[rank::2]
        found: dict[str, Any] = {name: STEPS[name](list(mine.chunk(2))).state_dict() for name in INSTALLED}
        local = evaluate(network()[0], labelled(mine), across_ranks=False).instances
        torch.save(found | {"measured": measured(mine), "local": local}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("needs gloo")
    folder: Path = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_ranks(work, str(folder), port)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("trainer", STEPS)
def test_two_processes_take_the_step_of_one(ranks: list[dict[str, Any]], trainer: str) -> None:
    require(trainer)
    expected = by_hand(made(Residual).images(8))
    for rank in ranks:
        for name, value in expected.items():
            torch.testing.assert_close(rank[trainer][name], value, atol=1e-6, rtol=1e-5)


def test_statistics_are_of_all_ranks(ranks: list[dict[str, Any]]) -> None:
    images = made(Residual).images(8)
    expected = measured(torch.cat([images[::2], images[1::2]]))
    assert 0 < expected["prune_ratio"] < 1
    for rank in ranks:
        assert rank["local"] == 4
        assert rank["measured"].keys() == expected.keys()
        assert rank["measured"]["tried"] == expected["instances"] == 8
        for name, value in expected.items():
            found = rank["measured"][name]
            if isinstance(value, float):
                assert found == pytest.approx(value), name
            else:
                assert str(found) == str(value), name
