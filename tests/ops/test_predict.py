"""Predicted norms and sums beside squares, on the kernels of every instruction set against reference.py."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from isw_plugin import ops
from isw_plugin.errors import EngineInputError
from isw_plugin.functional import channel_norm
from isw_plugin.heads import Head, statistics
from isw_plugin.ops import cpu, pack_weight, reference
from tests.ops.test_operators import CONVS, gating_of, normal
from tests.ops.test_out_keep import keep_of


@pytest.fixture(
    params=[isa for n, isa in enumerate(cpu.available()) if n == 0 or isa != "avx512"], autouse=True, scope="module"
)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    yield cpu.use(request.param)
    cpu.use()


def read(n: int, channels: int, slots: int, seed: int) -> Tensor:
    """Statistics of a map; some channels are zero."""
    squares, sums = normal(n, slots, channels, seed=seed).square(), normal(n, slots, channels, seed=seed + 1)
    return torch.stack([squares, sums]) * (normal(n, 1, channels, seed=seed + 2) > -0.5)


def head(features: int, outputs: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return (normal(features, outputs, seed=5) / features**0.5).to(dtype), normal(outputs, seed=6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [1, 7, 16, 31, 64, 129, 300, 512])
@pytest.mark.parametrize("n", [0, 1, 2, 5, 33])
def test_norms_and_decisions(n: int, outputs: int, dtype: torch.dtype) -> None:
    for channels, slots in (((3,), (1,)), ((70, 5), (4, 1)), ((0, 300), (2, 1))):
        known = [read(n, count, each, 10 * count) for count, each in zip(channels, slots, strict=True)]
        keeps = [keep_of("random", n, count) if place == 0 else None for place, count in enumerate(channels)]
        given = (*head(2 * sum(channels), outputs, dtype), known, keeps, [9, 16][: len(known)], 4, 0.0, 0.8)
        (norms, keep), (wanted, decided) = ops.predict(*given), reference.predict(*given)
        torch.testing.assert_close(norms, wanted, rtol=1e-5, atol=1e-5)
        ties = (wanted - 0.8 * wanted.mean(1, keepdim=True)).abs() < 1e-5 * wanted.abs().mean(1, keepdim=True)
        assert torch.equal(keep | ties, decided | ties)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 16, 50, 200])
@pytest.mark.parametrize("n", [0, 1, 2, 33])
def test_two_factors(n: int, rank: int, dtype: torch.dtype) -> None:
    known = [read(n, 70, 4, 1), read(n, 5, 1, 2)]
    keeps = [keep_of("random", n, 70), None]
    basis, (weight, bias) = (normal(150, rank, seed=7) / 12).to(dtype), head(rank, 129, dtype)
    given = (weight, bias, known, keeps, [9, 16], 4, 0.0, 0.8, basis)
    norms, keep = ops.predict(*given)
    wanted, decided = reference.predict(*given)
    torch.testing.assert_close(norms, wanted, rtol=1e-5, atol=1e-5)
    ties = (wanted - 0.8 * wanted.mean(1, keepdim=True)).abs() < 1e-5 * wanted.abs().mean(1, keepdim=True)
    assert torch.equal(keep | ties, decided | ties)
    whole = (basis.float() @ weight.float(), *given[1:-1])
    torch.testing.assert_close(norms, reference.predict(*whole)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "basis", [torch.ones(40, 0), torch.ones(39, 8), torch.ones(40, 7), torch.ones(40, 8).bfloat16(), torch.ones(40)]
)
def test_factors_that_do_not_fit(basis: Tensor) -> None:
    with pytest.raises(EngineInputError, match=r"basis|weight"):
        ops.predict(*head(8, 48), [read(1, 20, 1, 3)], [None], [4], 4, 0.0, 1.0, basis)


def test_it_is_the_head() -> None:
    """docs/predicting.md: of a map's statistics after its own mask."""
    x, keep, size = normal(3, 20, 6, 6), keep_of("random", 3, 20), 25
    weight, bias = head(40, 48)
    left = x * keep[:, :, None, None]
    known = {"x": statistics(left, 1, channel_norm(left))}
    wanted = Head(("x",), weight.T, bias).norms(known, size)
    norms, everything = ops.predict(weight, bias, [ops.sum_squares(x, sums=True)], [keep], [36], size, 0.0, 0.0)
    torch.testing.assert_close(norms, wanted, rtol=1e-5, atol=1e-5)
    assert everything.all()


def test_what_is_dropped_is_not_read() -> None:
    known, keep = read(1, 20, 2, 3), keep_of("random", 1, 20)
    weight, bias = head(40, 48)
    clean = ops.predict(weight, bias, [known], [keep], [4], 4, 0.0, 1.0)
    weight[:20][~keep[0]] = weight[20:][~keep[0]] = float("nan")
    known[:, :, :, ~keep[0]] = float("inf")
    found = ops.predict(weight, bias, [known], [keep], [4], 4, 0.0, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(found, clean, strict=True))


def test_what_is_no_number_passes() -> None:
    known = read(1, 20, 1, 3)
    known[0, 0, 0, 4] = float("nan")
    norms, keep = ops.predict(*head(40, 48), [known], [None], [4], 4, 0.0, 1.0)
    assert norms.isnan().all()
    assert keep.all()


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    given = (*head(600, 512), [read(5, 300, 2, 1)], [None], [4], 4, 0.0, 1.0)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(ops.predict(*given)[0])
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def assert_sums(name: str, *args: Any, **options: Any) -> None:
    """Squares as without sums; sums as the reference."""
    y, both = getattr(ops, name)(*args, **options, sums=True)
    plain, squares = getattr(ops, name)(*args, **options)
    assert torch.equal(y, plain)
    assert torch.equal(both[0], squares)
    wanted = getattr(reference, name)(*args, **options, sums=True)[1][1]
    share = 1e-4 if y.dtype == torch.float32 else 2**-6
    torch.testing.assert_close(both[1], wanted, rtol=share, atol=share * wanted.abs().max().item())


SHAPES = ((1, 37, 70, (13, 11)), (3, 5, 130, (4, 4)), (2, 390, 24, (8, 8)), (1, 3, 5, (40, 40)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("conv", CONVS)
def test_sums_of_convolutions(conv: str, dtype: torch.dtype) -> None:
    kernel, stride, padding = CONVS[conv]
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    for n, inputs, outputs, size in SHAPES:
        x = normal(n, inputs, *size).to(dtype)
        weight = (normal(outputs, inputs, kh, kw, seed=1) / (inputs * kh * kw) ** 0.5).to(dtype)
        filters = weight[:1, :1].expand(inputs, 1, kh, kw)
        options: dict[str, Any] = {"stride": stride, "padding": padding, "act": "relu"}
        options["gating"] = gating_of("random", x)
        for keep in (None, keep_of("random", n, max(inputs, outputs))):
            out, own = (None, None) if keep is None else (keep[:, :outputs], keep[:, :inputs])
            assert_sums("conv2d", x, pack_weight(weight), normal(outputs), **options, out_keep=out)
            assert_sums("depthwise_conv2d", x, filters, normal(inputs), **options, out_keep=own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(2, 2), (4, 4), (9, 13), (32, 32), (57, 61)])
def test_sums_are_of_the_map_before_it_is_pooled(size: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = normal(2, 40, *size).to(dtype), pack_weight((normal(70, 40, 3, 3) / 19).to(dtype))
    for out_keep in (None, keep_of("random", 2, 70)):
        assert_sums("pooled_conv2d", x, weight, normal(70), padding=1, act="silu", out_keep=out_keep)


def test_sums_of_groups_and_of_other_maps() -> None:
    x = normal(2, 6, 9, 9)
    assert_sums("grouped_conv2d", x, pack_weight(normal(40, 3, 3, 3), 2), normal(40), 2, padding=1)
    both = ops.sum_squares(x, sums=True)
    assert torch.equal(both[0], ops.sum_squares(x))
    torch.testing.assert_close(both[1], x.sum((2, 3))[:, None], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    known, keeps = [read(2, 5, 3, 1), read(2, 4, 1, 4)], [keep_of("random", 2, 5), None]
    given = (*head(18, 7, dtype), known, keeps, [4, 9], 4, 0.1, 0.9)
    torch.library.opcheck(torch.ops.isw.predict.default, given)
    x, window = normal(2, 5, 6, 6).to(dtype), ([1, 1], [1, 1], "relu", None, 0.0, 0.0)
    weight = pack_weight(normal(7, 5, 3, 3).to(dtype))
    torch.library.opcheck(
        torch.ops.isw.conv2d.default, (x, weight, normal(7), *window, None, None, 0.0, 0.0, None, True)
    )
    torch.library.opcheck(torch.ops.isw.pooled_conv2d.default, (x, weight, normal(7), *window, None, True))
    filters = normal(5, 1, 3, 3).to(dtype)
    torch.library.opcheck(torch.ops.isw.depthwise_conv2d.default, (x, filters, normal(5), *window, None, True))
    torch.library.opcheck(torch.ops.isw.sum_squares.default, (x, True))


def arguments(**changed: Any) -> dict[str, Any]:
    weight, bias = head(10, 7)
    given = {"weight": weight, "bias": bias, "statistics": [read(2, 5, 1, 1)], "keeps": [None], "positions": [4]}
    return given | {"size": 4, "alpha": 0.0, "beta": 1.0} | changed


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "weight of another head": ({"weight": torch.zeros(8, 7)}, r"weight: expected shape \(10, 7\), got \(8, 7\)"),
    "weight as it is fitted": ({"weight": torch.zeros(7, 10)}, r"weight: expected shape \(10, 7\)"),
    "half": ({"weight": torch.zeros(10, 7).half()}, "weight: expected float32 or bfloat16"),
    "no list": ({"statistics": torch.zeros(2, 2, 1, 5)}, "statistics: expected a list, one for each map, got Tensor"),
    "squares alone": ({"statistics": [torch.zeros(2, 1, 5)]}, r"statistics\[0\]: expected shape \(2, any, any, any\)"),
    "no slot": ({"statistics": [torch.zeros(2, 2, 0, 5)]}, r"statistics\[0\]: no slot"),
    "instances": (
        {"statistics": [read(2, 3, 1, 1), read(1, 2, 1, 1)], "keeps": [None] * 2, "positions": [4, 4]},
        r"statistics\[1\]: expected shape \(2, 2, any, any\)",
    ),
    "nothing to read": ({"statistics": [], "keeps": [], "positions": []}, "one at least, got 0 statistics"),
    "fewer keeps": (
        {"keeps": []},
        "as many keeps .* one at least, got 1 statistics, 0 keeps",
    ),
    "keep": ({"keeps": [torch.ones(2, 4, dtype=torch.bool)]}, r"keeps\[0\]: expected shape \(2, 5\), got \(2, 4\)"),
    "keep of numbers": ({"keeps": [torch.ones(2, 5)]}, r"keeps\[0\]: expected a bool keep mask, got torch.float32"),
    "no pixels": ({"positions": [0]}, r"positions\[0\]=0: expected the pixels of a map"),
    "half a pixel": ({"size": 0.5}, "size=0.5: expected the pixels of a map, a whole number"),
    "threshold": ({"beta": float("nan")}, "a number as beta, got nan"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named(case: str) -> None:
    changed, message = WRONG[case]
    with pytest.raises(EngineInputError, match=message):
        ops.predict(**arguments(**changed))


def test_sums_are_asked_for_by_a_flag() -> None:
    with pytest.raises(EngineInputError, match="sums=1: expected True or False"):
        ops.sum_squares(normal(1, 2, 3, 3), sums=1)  # type: ignore[arg-type]


RAW: dict[str, dict[str, Any]] = {
    name: changed for name, (changed, _) in WRONG.items() if name not in ("no list", "half a pixel")
}


@pytest.mark.parametrize("case", RAW)
def test_the_operator_itself_refuses_too(case: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        torch.ops.isw.predict(*arguments(**RAW[case]).values())
