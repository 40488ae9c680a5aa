import copy
import math
import pickle

import pytest

from isw_plugin.errors import AttachError, SettingError
from isw_plugin.gates import CVGate, Gate, MinNorm, RandomGate
from isw_plugin.settings import Settings, check_lambda, choose_gate
from tests.conftest import Net, Plain, made


def resolved(net: Net, **changes: object) -> Settings:
    values = {"lambda_": 0.5, "gate": CVGate(), "layers": "*", "exclude": (), "scope": "all", "reduction": "sum"}
    settings = Settings(**{**values, "per_site": {}, **changes})
    settings.resolve(net, net.images(1))
    return settings


@pytest.mark.parametrize(
    ("gate", "alpha", "beta", "expected"),
    [
        ("cv", None, None, CVGate(0.5, 1.0)),
        ("cv", 0.1, None, CVGate(0.1, 1.0)),
        ("cv", None, 0.0, CVGate(0.5, 0.0)),
        (MinNorm(0.1), None, None, MinNorm(0.1)),
    ],
)
def test_the_gate_that_is_meant(gate: Gate | str, alpha: float | None, beta: float | None, expected: Gate) -> None:
    assert choose_gate(gate, alpha, beta) == expected


@pytest.mark.parametrize("gate", ["CV", "", None, 3, MinNorm])
def test_what_is_no_gate(gate: object) -> None:
    with pytest.raises(SettingError, match="gate="):
        choose_gate(gate, None, None)


@pytest.mark.parametrize("lambda_", [0, 0.0, 1e-6, 3])
def test_lambdas(lambda_: float) -> None:
    check_lambda(lambda_)


@pytest.mark.parametrize("lambda_", [-1e-9, math.nan, math.inf, -math.inf])
def test_bad_lambdas(lambda_: float) -> None:
    with pytest.raises(SettingError, match=f"lambda_={lambda_}"):
        check_lambda(lambda_)


def test_a_failed_resolve_changes_nothing(plain: Net) -> None:
    settings = resolved(plain)
    before = copy.deepcopy(settings.__dict__)
    settings.layers = "c9"
    with pytest.raises(SettingError):
        settings.resolve(plain, plain.images(1))
    assert {**settings.__dict__, "layers": "*", "inputs": None} == {**before, "inputs": None}


def test_example_inputs_are_kept_as_shapes_only(plain: Net) -> None:
    assert resolved(plain).inputs.device.type == "meta"


def test_sites_are_unknown_before_they_are_resolved() -> None:
    settings = Settings(0.0, CVGate(), "*", (), "all", "sum", {})
    with pytest.raises(AttachError, match="first forward"):
        settings.known()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_functions_as_patterns_are_saved_as_names(copied) -> None:
    settings = resolved(made(Plain), layers=lambda name, module: name == "c1")
    assert copied(settings).layers == ["c1"]


def test_a_function_that_excludes_is_saved_as_what_it_left(plain: Net) -> None:
    other = copy.deepcopy(resolved(plain, exclude=lambda name, module: name == "c1"))
    other.resolve(plain, plain.images(1))
    assert [site.name for site in other.found.sites] == ["c2"]


@pytest.mark.parametrize("value", ["0.5", None, True, [0.5], 1j])
@pytest.mark.parametrize(
    "make",
    [lambda v: CVGate(alpha=v), lambda v: CVGate(beta=v), MinNorm, RandomGate, lambda v: RandomGate(0.5, seed=v)],
)
def test_gates_take_numbers_only(make, value: object) -> None:
    with pytest.raises(SettingError, match=r"(alpha|beta|ratio|seed)="):
        make(value)
