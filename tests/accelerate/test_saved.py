"""A fast model as a file: what comes back gives the same, and what was changed is refused."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isw_plugin import FBS, CVGate, InstanceWisePruner, MinNorm, RandomGate, evaluate, load_accelerated, load_pretrained
from isw_plugin.accelerate import Accelerated, saved
from isw_plugin.accelerate.graphs import _function
from isw_plugin.errors import (
    EngineInputError,
    NothingSavedError,
    SettingError,
    StateMismatchError,
    UnsupportedError,
)
from tests.accelerate.nets import Inverted, Slimmed, attached, images_for, seeded, set_clock
from tests.conftest import Plain, SqueezeExcite, Tokens


def fast_one(kind: Any, images: Tensor, backend: str = "gated", gate: Any = None) -> Accelerated:
    return attached(seeded(kind), images, gate=gate or CVGate(0.1, 0.9)).accelerate(images, backend=backend)


@pytest.fixture(autouse=True)
def _gated_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, "gated")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "fast"
    with pytest.MonkeyPatch.context() as patch:
        set_clock(patch, "gated")
        fast_one(Plain, Plain().images()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, original: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "fast"))


@pytest.mark.parametrize("backend", ["gated", "dense"])
@pytest.mark.parametrize("gate", [CVGate(0.1, 0.9), MinNorm(0.45)], ids=["cv", "min"])
@pytest.mark.parametrize("kind", [Slimmed, Inverted, SqueezeExcite, Tokens], ids=lambda kind: kind.__name__)
def test_what_comes_back_gives_the_same_bits(tmp_path: Path, kind: Any, gate: Any, backend: str) -> None:
    images = images_for(kind())
    fast = fast_one(kind, images, backend, gate)
    fast.save_pretrained(tmp_path)
    again = load_accelerated(tmp_path)
    for batch in (images, images[:1], torch.cat([images, images])):
        assert torch.equal(again(batch), fast(batch))
        assert torch.equal(again(batch), fast(batch))  # from its tape
    assert (again.execution, again.choices, again.fitted) == (fast.execution, fast.choices, fast.fitted)


@pytest.mark.parametrize("gate", [FBS(0.5), RandomGate(0.4)], ids=["fbs", "random"])
def test_other_gates_come_back_too(tmp_path: Path, gate: Any) -> None:
    images = images_for(Slimmed())
    fast = fast_one(Slimmed, images, gate=gate)
    assert fast.execution == "accelerated"
    fast.save_pretrained(tmp_path)
    assert torch.equal(load_accelerated(tmp_path)(images), fast(images))


def test_decisions_are_recorded(tmp_path: Path) -> None:
    images = Plain().images()
    fast = fast_one(Plain, images)
    fast.save_pretrained(tmp_path)
    again = load_accelerated(tmp_path)
    with fast.recording() as wanted:
        fast(images)
    with again.recording() as found:
        again(images)
    assert found.keep.keys() == wanted.keep.keys()
    assert all(torch.equal(found.keep[site], keep) for site, keep in wanted.keep.items())
    assert 0 < found.keep_ratio < 1


class Packed(nn.Module):
    """Two inputs, one by name; a dict with a tuple of outputs, one of which is a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Any]:
        y = self.c2(F.relu(self.c1(x))) * scale[:, None, None, None]
        return {"maps": (y, y.flatten(1).amax(1)), "bias": self.c2.bias}


def test_inputs_by_name_and_packed_outputs(tmp_path: Path) -> None:
    inputs = {"x": torch.randn(3, 3, 8, 8), "scale": torch.rand(3)}
    fast = InstanceWisePruner(seeded(Packed), inputs, alpha=0.1).accelerate(inputs, backend="gated")
    fast.save_pretrained(tmp_path)
    found, wanted = load_accelerated(tmp_path)(**inputs), fast(**inputs)
    assert list(found) == ["maps", "bias"]
    assert isinstance(found["maps"], tuple)
    assert all(torch.equal(f, w) for f, w in zip(found["maps"], wanted["maps"], strict=True))
    assert torch.equal(found["bias"], wanted["bias"])


def test_memory_order_does_not_matter(folder: Path) -> None:
    again, images = load_accelerated(folder), Plain().images()
    wanted = again(images)
    assert torch.equal(again(images.to(memory_format=torch.channels_last)), wanted)
    assert torch.equal(again(images.flip(3).flip(3)[::1]), wanted)


def test_nothing_is_timed_or_traced_at_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError

    for name in ("isw_plugin.accelerate.fit.take_turns", "torch.export.export"):
        monkeypatch.setattr(name, refused)
    assert load_accelerated(folder)(Plain().images()).shape == (4, 5)


def test_a_fresh_process_needs_no_model(folder: Path) -> None:
    images = Plain().images()
    torch.save(images, folder / "images.pt")
    code = (
        "import sys, torch; from isw_plugin import load_accelerated; f = load_accelerated(sys.argv[1]); "
        "print(f(torch.load(sys.argv[1] + '/images.pt')).double().sum().item()); "
        "print([m for m in ('timm', 'torchvision', 'tests.conftest', 'torch_pruning') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    total, modules = done.stdout.split("\n")[:2]
    assert float(total) == load_accelerated(folder)(images).double().sum().item()
    assert modules == "[]"


# -- which inputs ----------------------------------------------------------------------------------


def test_another_size_is_refused_with_what_there_is(folder: Path) -> None:
    with pytest.raises(EngineInputError, match=r"float32 \(4, 3, 9, 9\) was not saved; .* float32 \(N, 3, 8, 8\)"):
        load_accelerated(folder)(torch.randn(4, 3, 9, 9))
    with pytest.raises(EngineInputError, match=r"float64 .* was not saved"):
        load_accelerated(folder)(Plain().images().double())
    with pytest.raises(EngineInputError, match="outside of autocast"), torch.autocast("cpu", torch.bfloat16):
        load_accelerated(folder)(Plain().images())


class Branch(nn.Module):
    """Another network above three images."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c3(F.relu(self.c2(F.relu(self.c1(x))))).mean((2, 3))
        return y if x.shape[0] < 4 else 2 * y


def test_a_branch_on_the_batch_is_saved_for_what_was_seen(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 8, 8)
    fast = fast_one(Branch, images)
    fast.save_pretrained(tmp_path)
    again = load_accelerated(tmp_path)
    assert torch.equal(again(images), fast(images))
    with pytest.raises(EngineInputError, match=r"compared on (1, )?2, 3 instances, .* prepare\(\[7\]\)"):
        again(torch.randn(7, 3, 8, 8))


def test_several_sizes_are_saved(tmp_path: Path) -> None:
    fast = fast_one(Plain, Plain().images())
    larger = torch.randn(2, 3, 12, 12)
    fast.prepare([larger])
    fast.save_pretrained(tmp_path)
    again = load_accelerated(tmp_path)
    assert torch.equal(again(larger), fast(larger))
    assert torch.equal(again(Plain().images()), fast(Plain().images()))


# -- files -----------------------------------------------------------------------------------------


def edited(folder: Path, edit: Callable[[dict[str, Any]], None], sealed: bool = True) -> None:
    """Change the document; ``sealed``: with its checksum, as whoever means harm would."""
    facts = json.loads((folder / "accelerated.json").read_text())
    edit(facts)
    if sealed:
        version, _ = facts.pop("version"), facts.pop("sha256")
        facts = {"version": version, "sha256": saved._digest(facts), **facts}
    (folder / "accelerated.json").write_text(json.dumps(facts))


def first_call(facts: dict[str, Any]) -> dict[str, Any]:
    return next(node for node in facts["graphs"][0]["nodes"] if node["op"] == "call")


def first_layer(facts: dict[str, Any]) -> dict[str, Any]:
    return next(node["layer"] for node in facts["graphs"][0]["nodes"] if node["op"] == "layer")


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a version": (lambda facts: facts.update(version=99), "another version"),
    "a version that equals": (lambda facts: facts.update(version=True), "another version"),
    "a program": (lambda facts: first_call(facts).update(target="os.system"), "does not have"),
    "a dunder": (lambda facts: first_call(facts).update(target="aten.__class__.mro"), "does not have"),
    "a file reader": (lambda facts: first_call(facts).update(target="aten.from_file.default"), "none that was saved"),
    "a writer": (lambda facts: first_call(facts).update(target="aten.add_.Tensor"), "none that was saved"),
    "an operator of later": (lambda facts: first_call(facts).update(target="aten.later.default"), "does not have"),
    "a node to come": (lambda facts: first_call(facts).update(args=[{"node": 900}]), "damaged"),
    "another layer": (lambda facts: first_layer(facts).update(runs="pickled"), "damaged"),
    "no such tensor": (lambda facts: first_layer(facts).update(weight="99"), "damaged"),
    "an activation": (lambda facts: first_layer(facts).update(act=7), "damaged|does not"),
    "no graphs": (lambda facts: facts.pop("graphs"), "damaged"),
    "packed otherwise": (lambda facts: facts["graphs"][0]["inputs"].update(packed={"set": [0]}), "damaged"),
    "no figures": (lambda facts: facts.update(fitted={}), "damaged"),
    "no machine": (lambda facts: facts.update(made={}), "damaged"),
}


@pytest.mark.parametrize("name", EDITS)
def test_what_an_edited_file_means_is_looked_up_not_run(folder: Path, name: str) -> None:
    edit, problem = EDITS[name]
    edited(folder, edit)
    with pytest.raises((StateMismatchError, EngineInputError), match=problem):
        load_accelerated(folder)(Plain().images())


def test_any_edit_shows(folder: Path) -> None:
    edited(folder, lambda facts: facts["choices"].update(c1=False), sealed=False)
    with pytest.raises(StateMismatchError, match="was changed after it was saved: save"):
        load_accelerated(folder)


def test_changed_and_missing_weights_show(folder: Path) -> None:
    (weights,) = folder.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(StateMismatchError, match="missing or was changed"):
        load_accelerated(folder)
    weights.unlink()
    with pytest.raises(StateMismatchError, match="missing or was changed"):
        load_accelerated(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": NaN}', b"\x80\x04K\x01."])
def test_no_document_of_ours(folder: Path, content: bytes) -> None:
    (folder / "accelerated.json").write_bytes(content)
    with pytest.raises(StateMismatchError, match="was not written by save_pretrained, or is damaged"):
        load_accelerated(folder)


def test_folders_without_one(tmp_path: Path) -> None:
    with pytest.raises(NothingSavedError, match="does not exist"):
        load_accelerated(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no accelerated\.json"):
        load_accelerated(tmp_path)
    with pytest.raises(SettingError, match="the path of a folder"):
        load_accelerated(7)  # type: ignore[arg-type]


def test_gated_and_fast_ones_are_told_apart_and_share_a_folder(tmp_path: Path) -> None:
    images = Plain().images()
    pruner = attached(seeded(Plain), images, gate=CVGate(0.1, 0.9))
    fast = pruner.accelerate(images, backend="gated")
    pruner.save_pretrained(tmp_path / "gated")
    with pytest.raises(NothingSavedError, match=r"holds a gated model, .* load_pretrained\(folder\)"):
        load_accelerated(tmp_path / "gated")
    fast.save_pretrained(tmp_path / "fast")
    with pytest.raises(NothingSavedError, match=r"holds an accelerated model, .* load_accelerated\(folder\)"):
        load_pretrained(tmp_path / "fast", Plain())
    fast.save_pretrained(tmp_path / "gated")
    fast.save_pretrained(tmp_path / "gated")
    assert load_pretrained(tmp_path / "gated", Plain()).gate == CVGate(0.1, 0.9)
    assert torch.equal(load_accelerated(tmp_path / "gated")(images), fast(images))
    assert len(list((tmp_path / "gated").iterdir())) == 4


def test_another_processor_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "threads" in load_accelerated(folder).summary().splitlines()[-1]
    monkeypatch.setattr(saved, "hardware", lambda: "Another Processor")
    with pytest.warns(RuntimeWarning, match="this is Another Processor. Results are the same"):
        load_accelerated(folder)


@pytest.mark.parametrize("made", [{"hardware": "Another Processor"}, {"isw_plugin": "0.0.1", "torch": "2.0.0"}])
def test_what_was_made_elsewhere_runs_right(folder: Path, made: dict[str, str]) -> None:
    images, wanted = Plain().images(), load_accelerated(folder)
    facts = json.loads((folder / "accelerated.json").read_text())
    version, _ = facts.pop("version"), facts.pop("sha256")
    facts["made"] |= made
    (folder / "accelerated.json").write_text(json.dumps({"version": version, "sha256": saved._digest(facts), **facts}))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        again = load_accelerated(folder)
    assert [str(each.message).split(",")[0] for each in said] == (
        ["layers were chosen on Another Processor"] if "hardware" in made else []
    )
    assert torch.equal(again(images), wanted(images))
    assert all(value in again.summary().splitlines()[-1] for value in made.values())


def test_what_runs_masked_cannot_be_saved(tmp_path: Path) -> None:
    fast = fast_one(Plain, Plain().images())
    fast.execution, fast.reason = "masked", "because"
    with pytest.raises(UnsupportedError, match=r"runs masked \(because\), .* save the pruner"):
        fast.save_pretrained(tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_macs_of_a_loaded_one_are_refused(folder: Path) -> None:
    with pytest.raises(UnsupportedError, match="no layers to count: measure the one"):
        evaluate(load_accelerated(folder), [(Plain().images(), torch.arange(4))])


@pytest.mark.parametrize(
    "name", ["aten.relu.default", "isw.conv2d.default", "aten.arange.default", "sizes.mul", "aten.__or__.Tensor"]
)
def test_operators_that_graphs_call(name: str) -> None:
    assert callable(_function(name))


# -- torch.export ----------------------------------------------------------------------------------


@pytest.mark.parametrize("loaded", [False, True], ids=["accelerated", "loaded"])
@pytest.mark.parametrize("kind", [Slimmed, Tokens], ids=lambda kind: kind.__name__)
def test_export_with_a_dynamic_batch(tmp_path: Path, kind: Any, loaded: bool) -> None:
    images = images_for(kind())
    fast: Any = fast_one(kind, images)
    if loaded:
        fast.save_pretrained(tmp_path)
        fast = load_accelerated(tmp_path)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(fast, (images,), dynamic_shapes=({0: batch},)).module()
    for given in (images, torch.cat([images, images[:3]])):
        torch.testing.assert_close(exported(given), fast(given), atol=1e-5, rtol=1e-4)


def test_a_dynamic_batch_by_the_name_of_the_input(tmp_path: Path) -> None:
    fast, images = fast_one(Plain, Plain().images()), Plain().images(7)
    fast.save_pretrained(tmp_path)
    shapes = {"x": {0: torch.export.Dim("batch")}}
    for model in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), load_accelerated(tmp_path)):
        model(Plain().images())  # a copy makes its graphs anew
        exported = torch.export.export(model, (Plain().images(),), dynamic_shapes=shapes).module()
        torch.testing.assert_close(exported(images), fast(images), atol=1e-5, rtol=1e-4)


def test_an_export_that_cannot_be_had(tmp_path: Path) -> None:
    fast = fast_one(Branch, torch.randn(2, 3, 8, 8))
    with pytest.raises(UnsupportedError, match="without dynamic shapes"):
        torch.export.export(fast, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with pytest.raises(UnsupportedError, match=r"prepare\(\) it first"):
        torch.export.export(fast, (torch.randn(2, 3, 9, 9),))
