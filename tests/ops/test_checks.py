"""Wrong input: an error that names the argument and says what to do, never a crash."""

import inspect
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor

from isw_plugin import ops
from isw_plugin.errors import EngineInputError, ISWError
from isw_plugin.ops import Statistics, pack_weight, reference


def conv(**changed: Any) -> Any:
    arguments = {"x": torch.zeros(2, 3, 6, 6), "weight": pack_weight(torch.zeros(5, 3, 3, 3)), "bias": torch.zeros(5)}
    return ops.conv2d(**(arguments | changed))


def depthwise(**changed: Any) -> Any:
    arguments = {"x": torch.zeros(2, 3, 6, 6), "weight": torch.zeros(3, 1, 3, 3), "bias": torch.zeros(3)}
    return ops.depthwise_conv2d(**(arguments | changed))


def grouped(groups: int = 3, **changed: Any) -> Any:
    packed = pack_weight(torch.zeros(6, 1, 3, 3), 3)
    arguments = {"x": torch.zeros(2, 3, 6, 6), "weight": packed, "bias": torch.zeros(6), "groups": groups}
    return ops.grouped_conv2d(**(arguments | changed))


def keep(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def squares(*shape: int) -> Statistics:
    return Statistics(torch.ones(shape), 0.0, 1.0)


def learned() -> Tensor:
    return torch.zeros(2, 3, 6, 6, requires_grad=True)


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "float64": (lambda: conv(x=torch.zeros(2, 3, 6, 6).double()), r"x: expected float32 or bfloat16, got .*64"),
    "half": (lambda: depthwise(x=torch.zeros(2, 3, 6, 6).half()), r"convert it with .float\(\)"),
    "no tensor": (lambda: conv(x=[1.0]), "x: expected a tensor, got list"),
    "device": (lambda: conv(x=torch.zeros(2, 3, 6, 6, device="meta")), "bias is on cpu but x is on meta"),
    "sparse": (lambda: conv(x=torch.zeros(2, 3, 6, 6).to_sparse()), "to_dense"),
    "dimensions": (lambda: conv(x=torch.zeros(3, 6, 6)), r"x: expected shape \(any, any, any, any\), got \(3, 6, 6\)"),
    "input channels": (lambda: conv(x=torch.zeros(2, 4, 6, 6)), r"weight: expected shape \(1, 4, any, any, 32\)"),
    "not packed": (lambda: conv(weight=torch.zeros(5, 3, 3, 3)), "call pack_weight once"),
    "output channels": (lambda: conv(bias=torch.zeros(40)), r"weight: expected shape \(2, 3"),
    "no channels": (lambda: conv(bias=torch.zeros(0)), "remove the layer"),
    "keep channels": (lambda: conv(gating=keep(2, 4)), r"gating: expected shape \(2, 3\), got \(2, 4\)"),
    "keep batch": (lambda: conv(gating=keep(1, 3)), r"gating: expected shape \(2, 3\)"),
    "keep dtype": (lambda: conv(gating=torch.ones(2, 3)), "bool keep mask, got torch.float32"),
    "keep device": (lambda: conv(gating=keep(2, 3).to("meta")), "gating is on meta"),
    "statistics channels": (lambda: conv(gating=squares(2, 1, 4)), r"gating.squares: expected shape \(2, any, 3\)"),
    "statistics without slots": (lambda: conv(gating=squares(2, 0, 3)), "no slot"),
    "residual shape": (lambda: conv(residual=torch.zeros(2, 5, 6, 6)), r"residual: expected shape \(2, 5, 4, 4\)"),
    "residual keep": (
        lambda: conv(residual=torch.zeros(2, 5, 4, 4), residual_gating=keep(2, 3)),
        r"residual_gating: expected shape",
    ),
    "no residual": (lambda: conv(residual_gating=keep(2, 5)), "there is no residual"),
    "out_keep channels": (lambda: conv(out_keep=keep(2, 3)), r"out_keep: expected shape \(2, 5\), got \(2, 3\)"),
    "out_keep batch": (lambda: depthwise(out_keep=keep(1, 3)), r"out_keep: expected shape \(2, 3\)"),
    "out_keep dtype": (lambda: grouped(out_keep=torch.ones(2, 6)), "out_keep: expected a bool keep mask"),
    "out_keep statistics": (lambda: conv(out_keep=squares(2, 1, 5)), "out_keep: expected a bool keep mask"),
    "act": (lambda: conv(act="tanh"), "act='tanh': expected one of none, relu, relu6"),
    "stride": (lambda: conv(stride=0), "must be positive"),
    "three strides": (lambda: conv(stride=(1, 1, 1)), "expected a number or two"),
    "padding": (lambda: conv(padding=-1), "not negative"),
    "stride as text": (lambda: conv(stride="11"), "stride='11': expected a number or two, whole ones"),
    "no stride": (lambda: depthwise(stride=None), "stride=None: expected a number or two"),
    "stride of a flag": (lambda: grouped(stride=True), "stride=True: expected a number or two"),
    "stride of a fraction": (lambda: conv(stride=(1, 1.0)), "whole ones"),
    "padding as a tensor": (lambda: conv(padding=torch.tensor(1)), "whole ones"),
    "padding by name": (lambda: conv(padding="same"), "padding='same'"),
    "huge stride": (lambda: conv(stride=2**58), "none above"),
    "huge padding": (lambda: depthwise(padding=(0, 2**63 - 1)), "none above"),
    "padding beyond integers": (lambda: conv(padding=2**70), "none above"),
    "pool kernel": (lambda: ops.max_pool2d(torch.zeros(1, 1, 4, 4), "2"), "kernel='2'"),  # type: ignore[arg-type]
    "no act": (lambda: conv(act=None), "act=None: expected one of"),
    "list of acts": (lambda: depthwise(act=["relu"]), "expected one of"),
    "flag of groups": (lambda: grouped(groups=True), "groups=True: does not divide"),
    "groups as text": (lambda: grouped(groups="3"), "groups='3': does not divide"),  # type: ignore[arg-type]
    "alpha as text": (lambda: conv(gating=Statistics(torch.ones(2, 1, 3), "0", 1.0)), "a number as alpha, got '0'"),  # type: ignore[arg-type]
    "beta not a number": (lambda: ops.keep_mask(torch.ones(1, 1, 2), 0.0, float("nan")), "a number as beta, got nan"),
    "sparse keep": (lambda: conv(gating=keep(2, 3).to_sparse()), "gating: expected a dense tensor"),
    "a tensor of tensors": (
        lambda: conv(x=TwoTensor(torch.zeros(2, 3, 6, 6), torch.zeros(2, 3, 6, 6))),
        "plain tensor",
    ),
    "small map": (lambda: conv(x=torch.zeros(2, 3, 2, 6)), "a map of 2x6 .* smaller than the kernel"),
    "empty map": (lambda: conv(x=torch.zeros(2, 3, 0, 6)), "a map of 0x6"),
    "padded empty map": (lambda: conv(x=torch.zeros(2, 3, 0, 6), padding=3), "a map of 0x6 is empty"),
    "gradient": (lambda: conv(x=learned()), "inference_mode"),
    "depthwise weight": (lambda: depthwise(weight=torch.zeros(4, 1, 3, 3)), r"weight: expected shape \(3, 1"),
    "depthwise bias": (lambda: depthwise(bias=torch.zeros(4)), r"bias: expected shape \(3\)"),
    "groups": (lambda: grouped(groups=2), "groups=2: does not divide 3 input and 6 output channels"),
    "no groups": (lambda: grouped(groups=0), "groups=0"),
    "weight of other groups": (lambda: grouped(groups=1), r"weight: expected shape \(1, 3, any, any, 32\)"),
    "grouped bfloat16": (lambda: grouped(x=torch.zeros(2, 3, 6, 6).bfloat16()), "x: expected float32"),
    "linear vector": (lambda: ops.linear(torch.zeros(3), torch.zeros(1), torch.zeros(1)), r"\(N, ..., C_in\)"),
    "linear kernel": (
        lambda: ops.linear(torch.zeros(2, 3), pack_weight(torch.zeros(5, 3, 3, 3)), torch.zeros(5)),
        "has none",
    ),
    "pool padding": (lambda: ops.max_pool2d(torch.zeros(1, 1, 4, 4), 2, padding=2), "more than half the kernel"),
    "mask as statistics": (lambda: ops.keep_mask(keep(1, 1, 2), 0.0, 1.0), "squares: expected float32"),
    "no statistics": (lambda: ops.keep_mask(torch.ones(1, 0, 2), 0.0, 1.0), "no slot"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises(EngineInputError, match=message) as raised:
        call()
    assert isinstance(raised.value, ISWError)
    assert isinstance(raised.value, ValueError)


def test_a_gradient_is_fine_where_none_is_recorded() -> None:
    with torch.inference_mode():
        assert not conv(x=torch.zeros(2, 3, 6, 6))[0].requires_grad
    with torch.no_grad():
        assert not conv(x=learned())[0].requires_grad


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's forward mode loads it
def test_a_tangent_is_refused() -> None:
    x = torch.zeros(2, 3, 6, 6)
    with pytest.raises(EngineInputError, match="x carries a forward-mode tangent"):
        torch.func.jvp(lambda x: conv(x=x)[0], (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(EngineInputError, match="x carries a forward-mode tangent"):
        depthwise(x=forward_ad.make_dual(x, x))


RAW: dict[str, Callable[[], Any]] = {  # torch.ops.isw itself, past the checks in Python
    "dtype": lambda: raw(x=torch.zeros(2, 3, 6, 6).double()),
    "dimensions": lambda: raw(x=torch.zeros(3, 6, 6)),
    "packed": lambda: raw(weight=torch.zeros(1, 3, 3, 3, 16)),
    "channels": lambda: raw(x=torch.zeros(2, 4, 6, 6)),
    "keep": lambda: raw(gate=keep(2, 4)),
    "out_keep": lambda: raw(out_keep=keep(2, 3)),
    "one out_keep": lambda: raw(out_keep=keep(5)),
    "out_keep of numbers": lambda: raw(out_keep=torch.ones(2, 5)),
    "one keep": lambda: raw(gate=keep(6)),
    "statistics": lambda: raw(gate=torch.zeros(2, 0, 3)),
    "flat statistics": lambda: raw(gate=torch.zeros(6)),
    "residual": lambda: raw(residual=torch.zeros(2, 5, 6, 6)),
    "stride": lambda: raw(stride=[0, 1]),
    "huge stride": lambda: raw(stride=[1, 2**58]),
    "huge padding": lambda: raw(padding=[2**63 - 1, 0]),
    "large padding": lambda: raw(padding=[2**31, 2**31]),
    "one stride": lambda: raw(stride=[1]),
    "three paddings": lambda: raw(padding=[0, 0, 0]),
    "huge window": lambda: torch.ops.isw.max_pool2d(torch.zeros(1, 1, 4, 4), [2**62, 2], [2**58, 1], [2**61, 0]),
    "empty map": lambda: raw(x=torch.zeros(2, 3, 0, 6), padding=[3, 3]),
    "thresholds": lambda: raw(gate=torch.ones(2, 1, 3), alpha=float("nan")),
    "decision": lambda: torch.ops.isw.keep_mask(torch.ones(2, 1, 3), 0.0, float("nan")),
    "act": lambda: raw(act="tanh"),
    "pool": lambda: torch.ops.isw.max_pool2d(torch.zeros(1, 1, 4, 4), [2, 2], [1, 1], [2, 2]),
    "depthwise": lambda: torch.ops.isw.depthwise_conv2d(
        torch.zeros(2, 3, 6, 6), torch.zeros(4, 1, 3, 3), torch.zeros(3), [1, 1], [0, 0], "none", None, 0.0, 0.0
    ),
    "groups": lambda: raw_grouped(2),
    "no groups": lambda: raw_grouped(0),
    "other groups": lambda: raw_grouped(1),
    "grouped bfloat16": lambda: raw_grouped(3, torch.bfloat16),
    "squares": lambda: torch.ops.isw.sum_squares(torch.zeros(3)),
    "mask": lambda: torch.ops.isw.keep_mask(keep(1, 2), 0.0, 1.0),
}


def raw(**changed: Any) -> Any:
    arguments = {
        "x": torch.zeros(2, 3, 6, 6),
        "weight": pack_weight(torch.zeros(5, 3, 3, 3)),
        "bias": torch.zeros(5),
        "stride": [1, 1],
        "padding": [0, 0],
        "act": "relu",
        "gate": None,
        "alpha": 0.0,
        "beta": 1.0,
        "residual": None,
        "residual_gate": None,
        "residual_alpha": 0.0,
        "residual_beta": 0.0,
        "out_keep": None,
    }
    return torch.ops.isw.conv2d(*(arguments | changed).values())


def raw_grouped(groups: int, dtype: torch.dtype = torch.float32) -> Any:
    x, weight = torch.zeros(2, 3, 6, 6, dtype=dtype), pack_weight(torch.zeros(6, 1, 3, 3, dtype=dtype), 3)
    return torch.ops.isw.grouped_conv2d(x, weight, torch.zeros(6), groups, [1, 1], [0, 0], "none", None, 0.0, 0.0)


@pytest.mark.parametrize("case", RAW)
def test_the_operators_themselves_refuse_too(case: str) -> None:
    with pytest.raises(ValueError, match=r"expected|fit|positive|slot|padding"):
        RAW[case]()


RAW_SIZES: dict[str, Callable[[], Any]] = {  # no memory holds what they ask for
    "output": lambda: raw(padding=[2**24, 2**24]),
    "batch": lambda: raw(x=torch.zeros(2**60, 0, 6, 6), weight=torch.zeros(1, 0, 3, 3, 32)),
}


@pytest.mark.parametrize("case", RAW_SIZES)
def test_sizes_beyond_memory_are_an_error(case: str) -> None:
    with pytest.raises((RuntimeError, MemoryError)):
        RAW_SIZES[case]()


def test_a_sparse_mask_is_an_error_of_the_operator() -> None:
    conv()  # there are kernels from here on
    for wrong in ({"gate": keep(2, 3).to_sparse()}, {"residual": torch.zeros(2, 5, 4, 4).to_sparse()}):
        with pytest.raises(EngineInputError, match="expected dense tensors on one device"):
            raw(**wrong)
    with pytest.raises(EngineInputError, match="must be positive"):
        torch.ops.isw.max_pool2d(torch.zeros(1, 1, 4, 4, device="meta"), [2, 2], [0, 1], [0, 0])


class Mine(Tensor):
    """A subclass that only adds methods."""


def test_tensors_that_are_more_than_tensors_are_right() -> None:
    x = torch.randn(2, 3, 6, 6)
    weight, bias = pack_weight(torch.randn(5, 3, 3, 3)), torch.randn(5)
    wanted = conv(x=x, weight=weight, bias=bias)
    negated = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negated.is_neg()
    mapped = torch.vmap(lambda x: conv(x=x[None], weight=weight, bias=bias)[0][0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that its loop is slow
        assert torch.equal(mapped(x), wanted[0])
    for same in (x.as_subclass(Mine), torch.nn.Parameter(x, requires_grad=False), negated):
        assert torch.equal(conv(x=same, weight=weight, bias=bias)[0], wanted[0])
    meta = conv(x=x.to("meta"), weight=weight.to("meta"), bias=bias.to("meta"))
    assert [each.shape for each in meta] == [each.shape for each in wanted]


@pytest.mark.parametrize("name", sorted(set(ops.__all__) & set(dir(torch.ops.isw)) | {"linear"}))
def test_signature_and_words_are_those_of_the_reference(name: str) -> None:
    public, plain = getattr(ops, name), getattr(reference, name)
    assert inspect.signature(public) == inspect.signature(plain)
    assert public.__doc__ == plain.__doc__
    assert pickle.loads(pickle.dumps(public)) is public
    with pytest.raises(TypeError, match="argument"):
        public(torch.zeros(1), nothing=1)
