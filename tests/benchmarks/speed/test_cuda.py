"""The networks of the CUDA benchmark on the CPU, and what it says where there is no GPU."""

import subprocess
import sys

import pytest
import torch

from benchmarks.speed.cuda.__main__ import captured, gain, table
from benchmarks.speed.cuda.nets import Calibrated, Chosen, Dense, Gated, Masked, Network, resnet18, vgg16
from isw_plugin.engine import pack_weight, sum_squares

NETS = {
    "vgg16": (lambda: vgg16(0.25), 32),
    "resnet18, small stem": (lambda: resnet18(32, 0.25), 32),
    "resnet18": (lambda: resnet18(96, 0.25), 96),
}


def made(name: str) -> tuple[Network, torch.Tensor]:
    torch.manual_seed(0)
    make, side = NETS[name]
    return make().placed(torch.device("cpu"), torch.float32), torch.randn(3, 3, side, side)


@pytest.mark.parametrize("name", NETS)
def test_gated_is_what_masked_computes(name: str) -> None:
    network, images = made(name)
    calibrated = Calibrated(0.5)
    network(images, calibrated)
    assert 1.5 < calibrated.macs / calibrated.kept_macs < 2.5
    wanted = network(images, Masked())
    assert not torch.allclose(wanted, network(images, Dense()), rtol=0.01)
    torch.testing.assert_close(network(images, Gated()), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", NETS)
def test_everything_kept_is_dense(name: str) -> None:
    network, images = made(name)
    network(images, Calibrated(1.0))
    for layer in list(network.layers)[::2]:
        layer.dense = True
    wanted = network(images, Dense())
    torch.testing.assert_close(network(images, Chosen()), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_gain_is_over_the_best_of_the_others_round_by_round() -> None:
    taken = {"eager": [9.0, 8.0, 7.0], "graph": [4.0, 6.0, 8.0], "gated": [2.0, 2.0, 2.0]}
    assert gain(taken, "gated", ["eager", "graph"]) == 3.0


def test_table_spreads_what_is_nested() -> None:
    lines = table([{"net": "a", "ms": {"x": 1.23456}}, {"net": "b", "ms": {"y": 2.0}}]).splitlines()
    assert lines == ["| net | ms: x | ms: y |", "| --- | --- | --- |", "| a | 1.23 |  |", "| b |  | 2 |"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, "-m", "benchmarks.speed.cuda", "--out", "unused"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "found none" in done.stderr
    assert "Traceback" not in done.stderr


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@needs_gpu
@pytest.mark.parametrize("name", NETS)
def test_a_cuda_graph_replays_with_other_masks(name: str) -> None:
    network, images = made(name)
    network.placed(torch.device("cuda"), torch.bfloat16)
    first, other = (x.to("cuda", torch.bfloat16, memory_format=torch.channels_last) for x in (images, images.flip(0)))
    network(first, Calibrated(0.5))
    read, outputs = first.clone(memory_format=torch.preserve_format), []
    replay = captured(lambda: outputs.append(network(read, Gated())))
    for x in (first, other, first):
        read.copy_(x)
        replay()
        assert torch.equal(outputs[-1], network(x, Gated()))


@needs_gpu
@pytest.mark.parametrize("name", ["vgg16", "resnet18"])
def test_compiles_into_one_graph_on_a_gpu(name: str) -> None:
    network, images = made(name)
    network.placed(torch.device("cuda"), torch.float16)
    images = images.to("cuda", torch.float16, memory_format=torch.channels_last)
    network(images, Calibrated(0.5))
    compiled = torch.compile(lambda x: network(x, Gated()), fullgraph=True)
    torch.testing.assert_close(compiled(images), network(images, Gated()), rtol=0.01, atol=0.01)


@needs_gpu
def test_opcheck_on_a_gpu() -> None:
    x = torch.randn(2, 40, 9, 9, device="cuda")
    weight, bias, squares = pack_weight(torch.randn(9, 40, 3, 3, device="cuda")), x.new_zeros(9), sum_squares(x)
    window = ([1, 1], [1, 1], "relu")
    arguments = (x, weight, bias, *window, squares, 0.0, 1.0, None, None, 0.0, 0.0)
    torch.library.opcheck(torch.ops.isw.conv2d.default, arguments)
    planes = (x, torch.randn(40, 1, 3, 3, device="cuda"), x.new_zeros(40), *window, squares, 0.0, 1.0)
    torch.library.opcheck(torch.ops.isw.depthwise_conv2d.default, planes)
    torch.library.opcheck(torch.ops.isw.sum_squares.default, (x,))
    torch.library.opcheck(torch.ops.isw.keep_mask.default, (squares, 0.0, 1.0))
    torch.library.opcheck(torch.ops.isw.max_pool2d.default, (x, [2, 2], [2, 2], [0, 0]))
