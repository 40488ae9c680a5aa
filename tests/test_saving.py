"""save_pretrained and load_pretrained: the same model and the same decisions, in this process and in a fresh one."""

import contextlib
import errno
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch_pruning as tp
from safetensors.torch import load_file, save
from torch import Tensor, nn

from isw_plugin import CVGate, InstanceWisePruner, MinNorm, calibrate, load_pretrained
from isw_plugin.errors import AttachError, SettingError, StateMismatchError, UnsupportedError
from isw_plugin.saving import encoded_inputs, origin, rebuilt
from isw_plugin.stored import decoded_inputs
from tests.conftest import Net, Plain, Residual, hooks_of, made
from tests.processes import Script

SIZE = 64


def slim(model: nn.Module, images: Tensor, ratio: float = 0.5) -> nn.Module:
    """As torch-pruning's users do it."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, 0, 0.1)
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else model.fc
    tp.pruner.BasePruner(
        model, images[:1], tp.importance.MagnitudeImportance(), pruning_ratio=ratio, ignored_layers=[classifier]
    ).step()
    return model.eval()


def pretrained(name: str, slimmed: bool = True) -> tuple[InstanceWisePruner, Tensor]:
    torch.manual_seed(0)
    model, images = timm.create_model(name, num_classes=5).eval(), torch.randn(3, 3, SIZE, SIZE)
    if slimmed:
        slim(model, images)
    return InstanceWisePruner(model, images[:1], lambda_=1e-5, alpha=0.2, beta=0.7), images


def gated(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


def assert_restored(pruner: InstanceWisePruner, restored: InstanceWisePruner, images: Tensor) -> None:
    assert restored.state_dict() == pruner.state_dict()
    assert restored.sites == pruner.sites
    assert restored.model is not pruner.model
    pruner.enable()
    restored.enable()
    assert torch.equal(gated(restored.model, images), gated(pruner.model.eval(), images))
    for name, keep in pruner.keep.items():
        assert torch.equal(restored.keep[name], keep)


@pytest.mark.parametrize("slimmed", [False, True])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "mobilenetv2_035", "regnetx_002"])
def test_timm_models_come_back_from_their_name(tmp_path: Path, name: str, slimmed: bool) -> None:
    pruner, images = pretrained(name, slimmed)
    pruner.save_pretrained(tmp_path)
    assert_restored(pruner, load_pretrained(tmp_path), images)


@pytest.mark.parametrize("scope", ["all", "consumers"])
@pytest.mark.parametrize("kind", [Plain, Residual], ids=lambda kind: kind.__name__)
def test_other_models_come_back_into_their_architecture(tmp_path: Path, kind: type[Net], scope: str) -> None:
    net = made(kind)
    pruner = InstanceWisePruner(
        net, net.images(1), 0.5, exclude="c1" if kind is Plain else (), scope=scope, gate=MinNorm(0.4), min_keep=1
    )
    pruner.save_pretrained(tmp_path)
    assert_restored(pruner, load_pretrained(tmp_path, made(kind, seed=1)), net.images())


def test_a_slimmed_net_comes_back_into_the_unpruned_one(tmp_path: Path) -> None:
    net = slim(made(Plain), made(Plain).images())
    assert net.c1.out_channels == 2
    pruner = InstanceWisePruner(net, net.images(1))
    pruner.save_pretrained(tmp_path)
    restored = load_pretrained(tmp_path, made(Plain, seed=1))
    assert (restored.model.c1.out_channels, restored.model.c2.in_channels) == (2, 2)
    assert_restored(pruner, restored, net.images())


def test_what_never_was_kept_stays_away(tmp_path: Path) -> None:
    net = made(Plain)
    net.bn1.weight.data[1], net.bn1.bias.data[1] = 0.0, -1.0
    pruner = InstanceWisePruner(net, net.images(1), alpha=0.1)
    assert pruner.to_static([net.images()]).layers
    pruner.save_pretrained(tmp_path)
    assert_restored(pruner, load_pretrained(tmp_path, made(Plain, seed=1)), net.images())


def test_calibrated_thresholds_come_back(tmp_path: Path) -> None:
    net = made(Plain)
    pruner = InstanceWisePruner(net, net.images(1))
    best = calibrate(pruner, [(net.images(8), torch.zeros(8))], max_drop=0.49).best
    pruner.step()
    pruner.save_pretrained(tmp_path)
    restored = load_pretrained(tmp_path, made(Plain))
    assert restored.gate == CVGate(**best.parameters)
    assert restored.enabled


def test_a_fresh_process(tmp_path: Path) -> None:
    pruner, images = pretrained("test_resnet")
    calibration = calibrate(pruner, [(images, torch.zeros(3))], max_drop=0.49, grid={"beta": (0.5, 0.9)})
    pruner.step()
    pruner.save_pretrained(tmp_path)
    torch.save(images, tmp_path / "images.pt")
    code = """
import json, sys, torch
from isw_plugin import load_pretrained
folder = sys.argv[1]
pruner = load_pretrained(folder)
with open(folder + "/state.json", "w") as file:
    json.dump(pruner.state_dict(), file)
with torch.no_grad():
    torch.save(pruner.model(torch.load(folder + "/images.pt")), folder + "/logits.pt")
assert "pickle" not in open(folder + "/pruner.json").read()
"""
    Script(code, str(tmp_path)).printed()
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), gated(pruner.model, images))
    state = json.loads((tmp_path / "state.json").read_text())
    assert state == pruner.state_dict()
    assert state["calibration"] == calibration.to_dict()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_type_of_the_weights_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    net = made(Plain).to(dtype)
    InstanceWisePruner(net, net.images(1).to(dtype)).save_pretrained(tmp_path)
    assert load_pretrained(tmp_path, made(Plain)).model.c1.weight.dtype == dtype


def test_tied_weights(tmp_path: Path) -> None:
    class Tied(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.bn2.bias = self.bn2.weight

    net = made(Tied)
    pruner = InstanceWisePruner(net, net.images(1))
    pruner.save_pretrained(tmp_path)
    assert_restored(pruner, load_pretrained(tmp_path, made(Tied, seed=1)), net.images())


def test_functions_as_patterns_come_back_as_names(tmp_path: Path) -> None:
    net = made(Plain)
    pruner = InstanceWisePruner(net, net.images(1), layers=lambda name, module: name == "c2")
    pruner.save_pretrained(tmp_path)
    assert [site.name for site in load_pretrained(tmp_path, made(Plain)).sites] == ["c2"]


# -- which models timm can make again --------------------------------------------------------------


def edited_stride(model: nn.Module) -> None:
    model.conv1.stride = (1, 1)


def edited_head(model: nn.Module) -> None:
    model.fc = nn.Sequential(nn.Linear(512, 8), nn.Linear(8, 5))


def edited_activation(model: nn.Module) -> None:
    model.act1 = nn.GELU()


@pytest.mark.parametrize(
    ("edit", "why"),
    [(edited_stride, "conv1.stride is"), (edited_head, "fc is .*Linear here"), (edited_activation, "act1 is .*ReLU")],
)
def test_an_edited_timm_model_must_be_passed(tmp_path: Path, edit, why: str) -> None:
    model, again = (timm.create_model("resnet18", num_classes=5) for _ in range(2))
    edit(model)
    pruner = InstanceWisePruner(model, torch.zeros(1, 3, SIZE, SIZE))
    pruner.save_pretrained(tmp_path)
    with pytest.raises(StateMismatchError, match=rf"cannot be made again.*{why}.*load_pretrained\(folder, model\)"):
        load_pretrained(tmp_path)
    with pytest.raises(StateMismatchError, match="was saved"):
        load_pretrained(tmp_path, again)
    edit(again)
    assert_restored(pruner, load_pretrained(tmp_path, again), torch.randn(2, 3, SIZE, SIZE))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet", {"in_chans": 1, "num_classes": 3, "drop_rate": 0.2}),
        ("test_vit", {"img_size": 96, "global_pool": "avg"}),
        ("test_convnext", {"num_classes": 0}),
    ],
)
def test_options_that_timm_remembers_are_no_edits(name: str, options: dict[str, object]) -> None:
    assert origin(timm.create_model(name, **options))["edited"] is None


def test_constructors_that_compute_with_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of older timm, which cannot make every model on meta; random numbers go on as without saving."""
    whole = timm.create_model

    def older(*args, **kwargs):
        torch.zeros(1).item()
        return whole(*args, **kwargs)

    model = timm.create_model("test_vit", num_classes=5)
    monkeypatch.setattr(timm, "create_model", older)
    with pytest.raises(RuntimeError), torch.device("meta"):
        older("test_vit")
    assert rebuilt("test_vit", {}) is not None
    before = torch.get_rng_state()
    assert origin(model)["edited"] is None
    assert torch.equal(torch.get_rng_state(), before)


def test_no_timm_model_must_be_passed(tmp_path: Path, plain: Net) -> None:
    InstanceWisePruner(plain, plain.images(1)).save_pretrained(tmp_path)
    with pytest.raises(StateMismatchError, match=r"this Plain cannot be made again.*no timm model"):
        load_pretrained(tmp_path)


# -- what is refused -------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path, plain: Net) -> Path:
    InstanceWisePruner(plain, plain.images(1)).save_pretrained(tmp_path)
    return tmp_path


def changed(folder: Path, change) -> None:
    facts = json.loads((folder / "pruner.json").read_text())
    change(facts)
    (folder / "pruner.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda facts: facts.update(version=2),
            "version 2, and this isw_plugin reads version 1: load it by the isw_plugin that wrote it",
        ),
        (lambda facts: facts.pop("version"), "not written by save_pretrained"),
        (lambda facts: facts["weights"].update(sha256="0"), "checksum .*: copy the folder again, or save it anew"),
        (lambda facts: facts["weights"].update(file="other.safetensors"), "missing or was changed"),
        (lambda facts: facts["pruner"]["state"]["sites"].update(c1=9), "c1 has 4 channels here and 9 there"),
        (lambda facts: facts["pruner"]["state"]["gate"].update(type="Unheard"), "no installed package offers"),
        (lambda facts: facts["model"]["modules"].pop("bn1"), "there is no module bn1 there"),
        (lambda facts: facts.pop("pruner"), r"damaged: it has no pruner\.layers, .*pruner\.state"),
        (lambda facts: facts["model"].pop("edited"), r"damaged: it has no model\.edited"),
        (lambda facts: facts["pruner"].update(state={}), "no state_dict of version 1"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(saved: Path, change, why: str) -> None:
    changed(saved, change)
    net = made(Plain, seed=1)
    hooks = hooks_of(net)
    with pytest.raises(StateMismatchError, match=why):
        load_pretrained(saved, net)
    assert hooks_of(net) == hooks


HOSTILE = {
    "deep": lambda facts: '{"version": 1, "a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "nested": lambda facts: json.dumps({**facts, "extra": json.loads("[" * 80 + "]" * 80)}),
    "nan": lambda facts: json.dumps({**facts, "extra": float("nan")}),
    "1e999": lambda facts: json.dumps(facts)[:-1] + ', "extra": 1e999}',
    "twice": lambda facts: json.dumps(facts)[:-1] + ', "version": 1}',
    "list": lambda facts: "[1]",
    "true": lambda facts: json.dumps({**facts, "version": True}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_json_that_was_never_written(saved: Path, kind: str) -> None:
    file = saved / "pruner.json"
    file.write_text(HOSTILE[kind](json.loads(file.read_text())))
    with pytest.raises(StateMismatchError, match=r"pruner\.json"):
        load_pretrained(saved, made(Plain))


def put(*path: str, **values: object):
    """An edit: values at a place in the facts."""

    def change(facts) -> None:
        for key in path:
            facts = facts[key]
        facts.update(values)

    return change


EDITS = [
    put("weights", file="../../model.safetensors"),
    put("weights", file="/etc/passwd"),
    put("weights", file=".."),
    put("weights", file="a\0b"),
    put("weights", file="a" * 5000),
    put("weights", file=["model"]),
    put("model", modules=[]),
    put("model", modules={"c1": None}),
    put("model", options={"checkpoint_path": "evil.pth"}),
    put("model", options={"pretrained": True}),
    put("model", options={"num_classes": "7"}),
    put("model", options={"img_size": [1 << 20, 1 << 20]}),
    put("model", "modules", "c1", "widths", forward=1),
    put("model", "modules", "c1", "widths", out_channels=5),
    put("model", "modules", "c1", "widths", in_channels=1 << 20),
    put("model", "modules", "c1", "widths", groups="1"),
    put("model", "modules", "bn1", "widths", num_features=5),
    put("model", "modules", "fc", "widths", in_features=[6]),
    put("model", "modules", "act1", "widths", num_heads="x"),
    put("pruner", layers=3),
    put("pruner", layers="nothing"),
    put("pruner", exclude="*"),
    put("pruner", layers="*" * 501),
    put("pruner", inputs={}),
    put("pruner", inputs={"shape": [1, 3, 8, 8], "dtype": "load"}),
    put("pruner", inputs={"shape": [10**6, 10**6, 1, 1], "dtype": "float32"}),
    put("pruner", inputs={"shape": [1, 3.0, 8, 8], "dtype": "float32"}),
    put("pruner", inputs={"shape": [1, 5, 8, 8], "dtype": "float32"}),
    put("pruner", inputs={"set": []}),
    put("pruner", inputs={"tuple": {}}),
    put("pruner", "state", min_keep="all"),
    put("pruner", "state", min_keep=-1),
    put("pruner", "state", min_keep=True),
    put("pruner", "state", enabled="yes"),
    put("pruner", "state", lambda_="1"),
    put("pruner", "state", lambda_=-1.0),
    put("pruner", "state", lambda_="inf"),
    put("pruner", "state", scope="some"),
    put("pruner", "state", reduction=["sum"]),
    put("pruner", "state", references={"c1": "x"}),
    put("pruner", "state", calibration=[1]),
    put("pruner", "state", version=True),
    put("pruner", "state", per_site={"re:(a|a)*$": {"beta": 0.1}}),
    put("pruner", "state", per_site={"c1": 3}),
    put("pruner", "state", per_site={"c1": {"gamma": 1}}),
    put("pruner", "state", per_site={"c1": {"beta": "0.5"}}),
    put("pruner", "state", per_site={"c1": {"lambda_": []}}),
    put("pruner", "state", per_site={"c9": {"beta": 0.5}}),
    put("pruner", "state", "gate", parameters={"alpha": "nan", "beta": 0.5}),
    put("pruner", "state", "gate", parameters={"alpha": True, "beta": 0.5}),
    put("pruner", "state", "gate", parameters={"alpha": 0.5, "beta": "inf"}),
    put("pruner", "state", "gate", parameters=[]),
    put("pruner", "state", gate={"type": "RandomGate", "parameters": {"ratio": 0.5, "seed": 0.5}}),
    put("pruner", "state", gate={"type": "MinNorm", "parameters": {}}),
]


@pytest.mark.parametrize("index", range(len(EDITS)))
def test_an_edited_file_is_refused_and_nothing_is_changed(saved: Path, index: int) -> None:
    changed(saved, EDITS[index])
    net = made(Plain, seed=1)
    hooks = hooks_of(net)
    before = {key: (value, value.clone()) for key, value in net.state_dict(keep_vars=True).items()}
    with pytest.raises(StateMismatchError):
        load_pretrained(saved, net)
    assert hooks_of(net) == hooks
    for key, value in net.state_dict(keep_vars=True).items():
        assert value is before[key][0]
        assert torch.equal(value, before[key][1])


def test_a_regular_expression_of_a_file_is_not_evaluated(saved: Path) -> None:
    changed(saved, put("pruner", layers=f"re:{'(.*)*' * 20}[^a-z0-9]"))
    assert [site.name for site in load_pretrained(saved, made(Plain)).sites] == ["c1", "c2"]


def test_what_regular_expressions_mean_comes_back(tmp_path: Path, plain: Net) -> None:
    overrides = {"c1": {"alpha": 0.1}, "c*": {"alpha": 0.2}, "re:c[1]": {"beta": 0.3}}
    pruner = InstanceWisePruner(plain, plain.images(1), layers=["re:c.", "fc"][:1], per_site=overrides)
    pruner.save_pretrained(tmp_path)
    restored = load_pretrained(tmp_path, made(Plain))
    assert restored.per_site == {"c1": {"alpha": 0.2, "beta": 0.3}, "c2": {"alpha": 0.2}} == pruner.per_site


@pytest.mark.parametrize(
    "edit",
    [
        put("model", options={"num_classes": 10_000_000}),
        put("model", architecture="vit_giant_patch14_dinov2"),
        put("model", architecture="test_resnet.no_such_tag"),
        put("model", options={"img_size": [64, 64]}),
        put("model", architecture=None),
    ],
)
def test_what_timm_is_asked_for_costs_no_more_than_the_file(tmp_path: Path, edit, monkeypatch) -> None:
    pretrained("test_resnet", slimmed=False)[0].save_pretrained(tmp_path)
    changed(tmp_path, edit)
    made_of = []
    empty = torch.empty

    def counted(*args, **kwargs):
        made_of.append(empty(*args, **kwargs))
        return made_of[-1]

    monkeypatch.setattr(torch, "empty", counted)
    with pytest.raises(StateMismatchError):
        load_pretrained(tmp_path)
    assert sum(tensor.numel() for tensor in made_of if not tensor.is_meta) < 20_000_000


def test_loading_draws_no_random_numbers_and_keeps_ties_and_buffers(tmp_path: Path) -> None:
    pretrained("test_resnet", slimmed=False)[0].save_pretrained(tmp_path)
    before = torch.get_rng_state()
    restored = load_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(tensor.is_meta for tensor in (*restored.model.parameters(), *restored.model.buffers()))


def resaved(folder: Path, content: bytes) -> None:
    next(folder.glob("*.safetensors")).write_bytes(content)
    changed(folder, put("weights", sha256=hashlib.sha256(content).hexdigest()))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        (1 << 40).to_bytes(8, "little") + b"{}",
        (1 << 24).to_bytes(8, "little") + b" " * (1 << 24),
        (2).to_bytes(8, "little") + b"[]",
    ],
)
def test_safetensors_made_to_break_it(saved: Path, content: bytes) -> None:
    resaved(saved, content)
    with pytest.raises(StateMismatchError, match="damaged"):
        load_pretrained(saved, made(Plain))


def test_weights_of_another_kind_are_refused(saved: Path) -> None:
    tensors = load_file(next(saved.glob("*.safetensors")))
    resaved(saved, save(tensors | {"c1.weight": tensors["c1.weight"].long()}))
    with pytest.raises(StateMismatchError, match=r"c1\.weight is torch\.float32 here and torch\.int64 there"):
        load_pretrained(saved, made(Plain))


def test_a_pipe_is_not_waited_for(saved: Path) -> None:
    (saved / "pruner.json").unlink()
    os.mkfifo(saved / "pruner.json")
    with pytest.raises(FileNotFoundError, match="nothing was saved"):
        load_pretrained(saved, made(Plain))


def test_damaged_json_is_refused(saved: Path) -> None:
    (saved / "pruner.json").write_text("{")
    with pytest.raises(StateMismatchError, match="damaged"):
        load_pretrained(saved, made(Plain))


def test_damaged_weights_are_refused(saved: Path) -> None:
    weights = next(saved.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    net = made(Plain, seed=1)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(StateMismatchError, match="checksum"):
        load_pretrained(saved, net)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"bn1.weight": torch.ones(3)}, "do not fit each other: .*3"),
        ({"c1.weight": torch.ones(4, 3)}, r"model: c1\.weight is \(4, 3, 3, 3\) here and \(4, 3\) there"),
        ({"c9.weight": torch.ones(4)}, r"do not fit the model: no c9\.weight here"),
        ({"c1.weight": None}, r"do not fit the model: no c1\.weight there"),
    ],
)
def test_weights_of_other_shapes_are_refused(saved: Path, other: dict[str, Tensor | None], why: str) -> None:
    weights = next(saved.glob("*.safetensors"))
    tensors = {key: tensor for key, tensor in (load_file(weights) | other).items() if tensor is not None}
    weights.write_bytes(save(tensors))
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    changed(saved, lambda facts: facts["weights"].update(sha256=digest))
    with pytest.raises(StateMismatchError, match=why):
        load_pretrained(saved, made(Plain))


class Renamed(Plain):
    """The same modules and shapes; what forward does with them may be another."""


def test_a_model_of_another_name_is_refused(saved: Path) -> None:
    with pytest.raises(StateMismatchError, match=r"the model is .*\.Renamed here and .*\.Plain there"):
        load_pretrained(saved, made(Renamed))


def test_another_architecture_is_refused_unchanged(saved: Path) -> None:
    net = made(Residual)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(StateMismatchError, match=r"a Plain was saved, and Residual is another: .*c1.*; and \d+ more"):
        load_pretrained(saved, net)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("", r"has no pruner\.json; one was saved in its deep$"),
        ("absent", "does not exist$"),
        ("deep/pruner.json", "is a file$"),
    ],
)
def test_a_folder_in_which_nothing_was_saved(tmp_path: Path, plain: Net, place: str, why: str) -> None:
    InstanceWisePruner(plain, plain.images(1)).save_pretrained(tmp_path / "deep")
    with pytest.raises(FileNotFoundError, match=f"nothing was saved by save_pretrained in .*{why}"):
        load_pretrained(tmp_path / place)


def test_a_name_is_no_model(saved: Path) -> None:
    with pytest.raises(StateMismatchError, match="model='resnet18' is no module: pass the architecture, or None"):
        load_pretrained(saved, "resnet18")


def test_a_model_that_has_a_pruner(saved: Path) -> None:
    net = made(Plain)
    InstanceWisePruner(net, net.images(1))
    with pytest.raises(AttachError, match="already has a pruner"):
        load_pretrained(saved, net)


def test_a_name_that_timm_does_not_have_is_not_looked_for_elsewhere(tmp_path: Path) -> None:
    pretrained("test_resnet", slimmed=False)[0].save_pretrained(tmp_path)
    changed(tmp_path, lambda facts: facts["model"].update(architecture="hf-hub:someone/something"))
    with pytest.raises(StateMismatchError, match="has no model 'hf-hub:someone/something'"):
        load_pretrained(tmp_path)


def test_sites_must_be_known(tmp_path: Path, plain: Net) -> None:
    with pytest.raises(AttachError, match="no sites"):
        InstanceWisePruner(plain).save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_tensor_is_not_saved(tmp_path: Path) -> None:
    class Extra(Plain):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

    net = made(Extra)
    with pytest.raises(UnsupportedError, match="_extra_state"):
        InstanceWisePruner(net, net.images(1)).save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- gates of other people -------------------------------------------------------------------------


@dataclass(frozen=True)
class Largest:
    """Keeps the channels within a share of the largest."""

    share: float = 0.5

    def __call__(self, feature: Tensor, norms: Tensor) -> Tensor:
        return norms >= self.share * norms.amax(1, keepdim=True)


def test_a_gate_of_other_people_is_passed(tmp_path: Path, plain: Net) -> None:
    pruner = InstanceWisePruner(plain, plain.images(1), gate=Largest(0.3))
    pruner.save_pretrained(tmp_path)
    with pytest.raises(StateMismatchError, match="Largest"):
        load_pretrained(tmp_path, made(Plain))
    restored = load_pretrained(tmp_path, made(Plain), gate=Largest())
    assert restored.gate == Largest(0.3)
    assert_restored(pruner, restored, plain.images())


# -- writing ---------------------------------------------------------------------------------------


def test_saving_again_replaces(saved: Path) -> None:
    net = made(Plain, seed=2)
    pruner = InstanceWisePruner(net, net.images(1))
    pruner.save_pretrained(saved)
    assert len(list(saved.iterdir())) == 2
    assert_restored(pruner, load_pretrained(saved, made(Plain)), net.images())


def test_what_others_put_in_the_folder_stays(saved: Path, plain: Net) -> None:
    others = ["model-00001-of-00002.safetensors", "model-0123456789abcdef.safetensors", ".notes.1.draft"]
    for name in others:
        (saved / name).write_text("of others")
    plain.c1.weight.data.zero_()
    InstanceWisePruner.of(plain).save_pretrained(saved)
    ours = json.loads((saved / "pruner.json").read_text())["weights"]["file"]
    assert {file.name for file in saved.iterdir()} == {*others, ours, "pruner.json"}


@pytest.mark.parametrize("stop_at", range(12))
def test_a_save_that_stops_leaves_one_whole_state(saved: Path, monkeypatch, stop_at: int) -> None:
    """Killed at any step, nothing cleaned up: the next save leaves two files, and until then either state is whole."""
    steps = []

    def stopping(original):
        def step(*args, **kwargs):
            steps.append(original)
            if len(steps) > stop_at:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return step

    for name in ("replace", "unlink", "open"):
        monkeypatch.setattr(Path, name, stopping(getattr(Path, name)))
    net = made(Plain, seed=2)
    pruner = InstanceWisePruner(net, net.images(1))
    with contextlib.suppress(KeyboardInterrupt):
        pruner.save_pretrained(saved)
    monkeypatch.undo()
    weights = load_pretrained(saved, made(Plain, seed=3)).model.c1.weight
    assert any(torch.equal(weights, made(Plain, seed=seed).c1.weight) for seed in (0, 2))
    pruner.save_pretrained(saved)
    assert len(list(saved.iterdir())) == 2
    assert_restored(pruner, load_pretrained(saved, made(Plain)), net.images())


def test_a_full_disk_leaves_the_folder_as_it_was(saved: Path, monkeypatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    monkeypatch.setattr(os, "fsync", full)
    net = made(Plain, seed=2)
    with pytest.raises(OSError, match="No space left"):
        InstanceWisePruner(net, net.images(1)).save_pretrained(saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


SAVE = """
import sys
from tests.conftest import Plain, made
from isw_plugin import InstanceWisePruner
net = made(Plain, seed=int(sys.argv[2]))
pruner = InstanceWisePruner(net, net.images(1))
for turn in range(5):
    net.fc.bias.data.fill_(turn)
    pruner.save_pretrained(sys.argv[1])
"""


def test_two_processes_save_while_one_reads(saved: Path) -> None:
    savers = [Script(SAVE, str(saved), str(seed)) for seed in (1, 2)]
    known = {seed: made(Plain, seed=seed).c1.weight for seed in (0, 1, 2)}
    while any(saver.is_running() for saver in savers):
        weights = load_pretrained(saved, made(Plain)).model.c1.weight
        assert any(torch.equal(weights, whole) for whole in known.values())
    for saver in savers:
        saver.printed()
    assert len(list(saved.iterdir())) == 2
    load_pretrained(saved, made(Plain))


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        (CVGate(alpha=float("inf")), CVGate(alpha=float("inf"))),
        (CVGate(alpha=np.float32(0.25), beta=torch.tensor(0.5)), CVGate(0.25, 0.5)),
    ],
)
def test_thresholds_that_json_does_not_have(tmp_path: Path, plain: Net, gate: CVGate, expected: CVGate) -> None:
    per_site = {"c2": {"alpha": float("inf"), "beta": np.float64(0.75)}}
    pruner = InstanceWisePruner(plain, (plain.images(1),), gate=gate, per_site=per_site, min_keep=1)
    pruner.save_pretrained(tmp_path)
    restored = load_pretrained(tmp_path, made(Plain))
    assert restored.gate == expected
    assert restored.per_site == {"c2": {"alpha": float("inf"), "beta": 0.75}}
    assert {type(value) for value in restored.state_dict()["gate"]["parameters"].values()} == {float}


@pytest.mark.parametrize("folder", [None, 3, b"folder", "", "a\0b"])
def test_what_is_no_folder(plain: Net, folder: object) -> None:
    with pytest.raises(SettingError, match="folder="):
        InstanceWisePruner(plain, plain.images(1)).save_pretrained(folder)
    with pytest.raises(SettingError, match="folder="):
        load_pretrained(folder, made(Plain))


def test_a_file_is_no_folder(tmp_path: Path, plain: Net) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        InstanceWisePruner(plain, plain.images(1)).save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("allowed", [0, 1])
def test_stopped_at_any_time_the_old_state_is_whole(saved: Path, plain: Net, monkeypatch, allowed: int) -> None:
    """Writing stops before the first file is replaced, or between the two."""
    replaced = []
    original = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if len(replaced) == allowed:
            raise KeyboardInterrupt
        replaced.append(target)
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    net = made(Plain, seed=2)
    with pytest.raises(KeyboardInterrupt):
        InstanceWisePruner(net, net.images(1)).save_pretrained(saved)
    monkeypatch.undo()
    assert_restored(InstanceWisePruner.of(plain), load_pretrained(saved, made(Plain)), plain.images())


@pytest.mark.parametrize(
    "inputs",
    [
        torch.zeros(2, 3),
        (torch.zeros(1, dtype=torch.int64), [torch.zeros(1, 2, dtype=torch.bfloat16)], None, 2.5),
        {"x": torch.zeros(1, 2), "flag": True, "word": "a"},
    ],
)
def test_example_inputs_as_json(inputs: object) -> None:
    again = decoded_inputs(json.loads(json.dumps(encoded_inputs(inputs))))
    assert encoded_inputs(again) == encoded_inputs(inputs)
    assert type(again) is type(inputs)


def test_example_inputs_that_json_cannot_hold() -> None:
    with pytest.raises(UnsupportedError, match="object"):
        encoded_inputs((object(),))


# -- compiled and exported -------------------------------------------------------------------------

RUN = """
import sys, torch
from isw_plugin import load_pretrained
folder, kind = sys.argv[1:]
images = torch.load(folder + "/images.pt")
if kind == "export":
    run = torch.export.load(folder + "/model.pt2").module()
else:
    run = torch.compile(load_pretrained(folder).model, fullgraph=True, backend="aot_eager")
with torch.no_grad():
    torch.save(run(images), folder + "/logits.pt")
"""


@pytest.mark.parametrize("kind", ["compile", "export"])
def test_compiled_and_exported_in_a_fresh_process(tmp_path: Path, kind: str) -> None:
    pruner, images = pretrained("test_resnet")
    pruner.step()
    pruner.save_pretrained(tmp_path)
    expected = gated(pruner.model, images)
    assert not all(keep.all() for keep in pruner.keep.values())
    torch.save(images, tmp_path / "images.pt")
    if kind == "export":
        torch.export.save(torch.export.export(pruner.model, (images,)), tmp_path / "model.pt2")
    Script(RUN, str(tmp_path), kind).printed()
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)
