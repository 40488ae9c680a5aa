"""Heads in a saved folder: a file of their own, which comes and goes with the rest."""

import json
from pathlib import Path

import pytest
import torch

from isw_plugin import InstanceWisePruner, load_pretrained
from isw_plugin.errors import StateMismatchError
from isw_plugin.heads import heads_of, heads_tensors
from tests.conftest import Net, made
from tests.predict.nets import Down, Residual, Stack, predicting


def files(folder: Path) -> list[str]:
    return sorted(path.name.split("-")[0] for path in folder.iterdir())


def saved(folder: Path, kind: type[Net] = Stack) -> tuple[Net, InstanceWisePruner]:
    net, pruner = predicting(kind)
    pruner.save_pretrained(folder)
    return net, pruner


@pytest.mark.parametrize("kind", [Stack, Down, Residual])
def test_a_folder_brings_heads_back(tmp_path: Path, kind: type[Net]) -> None:
    net, pruner = saved(tmp_path, kind)
    images = net.images()
    back = load_pretrained(tmp_path, made(kind, seed=1))
    assert files(tmp_path) == ["heads", "model", "pruner.json"]
    assert back.predicted == pruner.predicted
    assert torch.equal(back.model(images), net(images))
    assert all(torch.equal(back.keep[name], keep) for name, keep in pruner.keep.items())
    assert "Tensor" not in (tmp_path / "pruner.json").read_text()


def test_heads_go_with_the_next_save(tmp_path: Path) -> None:
    _, pruner = saved(tmp_path)
    pruner.save_pretrained(tmp_path)
    assert files(tmp_path) == ["heads", "model", "pruner.json"]
    other = predicting(Stack, seed=5)[1]
    other.save_pretrained(tmp_path)
    assert files(tmp_path) == ["heads", "model", "pruner.json"]
    pruner.drop_predictors()
    pruner.save_pretrained(tmp_path)
    assert files(tmp_path) == ["model", "pruner.json"]
    assert load_pretrained(tmp_path, made(Stack)).predicted == ()


def test_a_file_of_heads_that_is_missing_or_changed_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    (heads,) = tmp_path.glob("heads-*")
    content = heads.read_bytes()
    heads.write_bytes(content[:-4] + b"\0\0\0\1")
    net = made(Stack, seed=1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(StateMismatchError, match="missing or was changed"):
        load_pretrained(tmp_path, net)
    heads.unlink()
    with pytest.raises(StateMismatchError, match="missing or was changed"):
        load_pretrained(tmp_path, net)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("heads", {"file": "../heads", "sha256": ""}, "heads cannot be"),
        ("heads", 3, "heads cannot be"),
        ("heads", None, "heads and their tensors differ"),
        ("state", {"c2": {"sources": ["c2"]}}, "reads c2"),
        ("state", {"c2": {"sources": [3]}}, "heads cannot be"),
        ("state", {"c2": {"sources": ["c1"], "weight": 3}}, "heads cannot be"),
        ("state", {}, "heads and their tensors differ"),
        ("state", {"other": {"sources": ["c1"]}}, "heads and their tensors differ"),
    ],
)
def test_facts_of_heads_that_do_not_fit_are_refused(tmp_path: Path, key: str, value: object, match: str) -> None:
    saved(tmp_path)
    path = tmp_path / "pruner.json"
    facts = json.loads(path.read_text())
    if key == "state":
        facts["pruner"]["state"]["heads"] = value
    elif value is None:
        del facts["heads"]
    else:
        facts["heads"] = value
    path.write_text(json.dumps(facts))
    with pytest.raises(StateMismatchError, match=match):
        load_pretrained(tmp_path, made(Stack, seed=1))


def test_a_state_and_its_tensors_are_taken_apart_and_put_together() -> None:
    state = predicting(Down)[1].state_dict()
    plain, tensors = heads_tensors(state)
    json.dumps(plain)
    assert tensors.keys() == {"c1.weight", "c1.bias", "c2.weight", "c2.bias"}
    again = heads_of(plain, tensors)
    assert again["heads"].keys() == state["heads"].keys()
    assert torch.equal(again["heads"]["c2"]["weight"], state["heads"]["c2"]["weight"])
    without = {name: value for name, value in state.items() if name != "heads"}
    assert heads_tensors(without) == (without, {})
    assert heads_of(without, {}) == without
