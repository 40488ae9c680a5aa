"""Two gloo processes with half the batch each have the gradients of one process with all of it."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from isw_plugin import InstanceWisePruner
from tests.conftest import Net, Residual, made
from tests.processes import run_ranks

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")

LAMBDA = 1e-2
BATCH = 4  # of each rank


CASES: dict[str, dict[str, object]] = {
    # name: parts that a step is accumulated from, batch norm synchronized or in eval mode, settings
    "sum": {},
    "mean": {"reduction": "mean"},
    "relative": {"reduction": "relative"},  # references are those of both ranks' first batches
    "consumers": {"scope": "consumers"},
    "accumulated": {"parts": 2},
    "accumulated mean": {"parts": 2, "reduction": "mean"},
    "fbs": {"gate": "fbs"},
    "fbs accumulated": {"gate": "fbs", "parts": 2},
    "synchronized": {"synchronized": True},
}
NEEDS_GPU = {"synchronized"}  # torch runs SyncBatchNorm on GPUs only
HERE = [name for name in CASES if name not in NEEDS_GPU or torch.cuda.is_available()]


def prepared(
    synchronized: bool = False, alone: bool = True, **settings: object
) -> tuple[Net, InstanceWisePruner, torch.device]:
    device = torch.device("cuda" if synchronized else "cpu")
    net = made(Residual).to(device).train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and not synchronized:
            module.eval()
    if synchronized and not alone:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    pruner = InstanceWisePruner(net, net.images(1), lambda_=LAMBDA, **settings)
    if "gate" in settings:
        pruner.step()
    return net, pruner, device


def task_loss(output: Tensor) -> Tensor:
    return output.square().mean()


def gradients(net: nn.Module) -> dict[str, Tensor]:
    gates = {f"gate.{k}": own for k, own in enumerate(InstanceWisePruner.of(net).gate_parameters())}
    return {name: parameter.grad.cpu() for name, parameter in [*net.named_parameters(), *gates.items()]}


def step(rank: int, parts: int = 1, **settings: object) -> dict[str, Tensor]:
    net, pruner, device = prepared(alone=False, **settings)
    wrapped = DistributedDataParallel(net)
    mine = net.images(2 * BATCH)[rank * BATCH : (rank + 1) * BATCH].to(device)
    for index, images in enumerate(mine.chunk(parts)):
        wrapped.require_backward_grad_sync = index == parts - 1
        loss = pruner.regularize(wrapped, task_loss(wrapped(images)), accumulation_steps=parts)
        (loss / parts).backward()
    return gradients(net)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    try:
        torch.save({name: step(rank, **CASES[name]) for name in HERE}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What both processes found, for every case; starting them takes longest, so it is done once."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    run_ranks(work, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process(ranks: list[dict[str, dict[str, Tensor]]], case: str) -> None:
    if case not in HERE:
        pytest.skip("torch runs SyncBatchNorm on GPUs only")
    settings = {name: value for name, value in CASES[case].items() if name != "parts"}
    net, pruner, device = prepared(**settings)
    pruner.regularize(net, task_loss(net(net.images(2 * BATCH).to(device)))).backward()
    for rank in ranks:
        for name, gradient in gradients(net).items():
            torch.testing.assert_close(rank[case][name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("reduction", "factor"), [("sum", 6), ("mean", 1), ("relative", 1)])
def test_the_factors_can_be_given(residual: Net, reduction: str, factor: int) -> None:
    residual.train()
    pruner = InstanceWisePruner(residual, residual.images(1), lambda_=LAMBDA, reduction=reduction)
    residual(residual.images())
    one = pruner.regularize(residual, torch.zeros(()))
    residual(residual.images())
    many = pruner.regularize(residual, torch.zeros(()), world_size=3, accumulation_steps=2)
    torch.testing.assert_close(many, factor * one)
