"""The zoo's checks pass on models of different kind, and fail where something is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from benchmarks.zoo import checks, graphs, pruning
from benchmarks.zoo.__main__ import check_pruned, main, read, report, resume
from benchmarks.zoo.checks import check
from benchmarks.zoo.graphs import check_engine, check_graphs
from benchmarks.zoo.models import build, randomise, smallest
from benchmarks.zoo.pruning import pruned
from benchmarks.zoo.report import page, summary, verdict
from benchmarks.zoo.sites import filled_twice, module_of, site_record, unaccounted
from benchmarks.zoo.subject import Failed, Subject
from isw_plugin.accelerate import Accelerated, Record
from isw_plugin.hooks import has_hooks
from isw_plugin.sites import Consumer, Found, default_inputs, find_sites
from tests.conftest import Plain, Residual, made

WRITTEN_FOR = (1, 0, 31)  # the timm whose models these are
KINDS = [
    "test_byobnet",
    "test_convnext",  # channels-last MLPs
    "test_convnext2",  # global response norm
    "test_efficientnet",  # depthwise, squeeze-excite
    "test_efficientnet_evos",  # EvoNorm
    "test_efficientnet_gn",
    "test_efficientnet_ln",
    "test_maxvit",  # windows
    "test_mambaout",  # gated convolutions
    "test_nfnet",  # standardised weights
    "test_resnet",
    "test_vit",
    "test_vit4",  # SwiGLU, RMS norms
]
PREDICTED = ("test_byobnet", "test_efficientnet", "test_resnet")


def quick(*names: str) -> list[Any]:
    """All kinds, these few in continuous integration."""
    return [pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in KINDS]


def built(name: str) -> tuple[nn.Module, Tensor]:
    try:
        return build(name)
    except RuntimeError as error:  # unknown, or not to be made on meta
        if tuple(map(int, timm.__version__.split(".")[:3])) < WRITTEN_FOR:
            pytest.skip(f"timm {timm.__version__}, {name}: {error}")
        raise


@pytest.mark.filterwarnings("ignore")  # of timm and torch, which a released timm may add
@pytest.mark.parametrize("name", KINDS)
def test_models_of_every_kind_pass_every_step(name: str) -> None:
    assert set(check(*built(name)).items()) == {(step, "ok") for step in checks.STEPS}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", quick("test_byobnet", "test_convnext2", "test_efficientnet", "test_resnet", "test_vit")
)
def test_models_of_every_kind_are_accelerated(name: str) -> None:
    results = check_engine(*built(name))
    assert float(results.pop("apart")) < 1e-4
    assert results == {"execution": "accelerated", "accelerate": "ok"}


def test_the_engine_is_checked_alike_where_another_runtime_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    images = made(Plain).images(2)
    expected = check_engine(made(Plain), images)
    monkeypatch.setattr(graphs.plan_module, "is_installed", lambda: True)
    assert check_engine(made(Plain), images) == expected
    assert expected["accelerate"] == "ok"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in quick("test_resnet") if name.values[0] in PREDICTED])
def test_models_are_accelerated_with_norms_predicted(name: str) -> None:
    results = check_engine(*built(name), predicted=True)
    heads, of = results.pop("heads").split(" of ")
    assert float(results.pop("apart")) < 1e-4
    assert results == {"execution": "accelerated", "accelerate": "ok"}
    assert 0 < int(heads) <= int(of.removesuffix(" sites"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", quick("test_resnet", "test_vit4"))
def test_models_of_every_kind_are_exported_and_compiled(name: str) -> None:
    assert check_graphs(*built(name)) == {"export": "ok", "compile": "ok"}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_pruned_model_passes_every_step() -> None:
    model, images = build("test_resnet")
    small, which = pruned(model, images)
    assert which == "all layers"
    assert parameters(small) < 0.6 * parameters(model)
    assert set(check(small, images).values()) == {"ok"}


def test_where_attention_stops_torch_pruning_its_mlps_are_pruned() -> None:
    model, images = built("test_vit")
    small, which = pruned(model, images)
    assert which.startswith("layers that share no channels, since all layers: ")
    before, after = model.blocks[0], small.blocks[0]
    assert after.mlp.fc1.out_features == before.mlp.fc1.out_features // 2
    assert after.attn.qkv.weight.shape == before.attn.qkv.weight.shape
    assert set(check(small, images).values()) == {"ok"}


def test_what_torch_pruning_does_not_manage_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    net = made(Plain)
    monkeypatch.setattr(net, "pretrained_cfg", {"classifier": "fc"}, raising=False)
    monkeypatch.setattr(pruning.tp.pruner.BasePruner, "step", lambda pruner: None)
    assert check_pruned(net, net.images(2)) == {
        "prune": "skipped: torch-pruning: RuntimeError: torch-pruning pruned nothing"
    }


def test_torch_pruning_is_stopped_where_it_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    def forever(pruner: object) -> None:
        while True:
            pass

    net = made(Plain)
    monkeypatch.setattr(net, "pretrained_cfg", {}, raising=False)
    monkeypatch.setattr(pruning, "SECONDS", 0.05)
    monkeypatch.setattr(pruning.tp.pruner.BasePruner, "step", forever)
    assert check_pruned(net, net.images(2)) == {
        "prune": "skipped: torch-pruning: RuntimeError: it takes more than 0.05 s"
    }


def test_a_dropped_channel_that_reaches_its_reader_is_seen() -> None:
    net = made(Plain)
    subject = Subject.of(net, net.images(2))
    checks.attach(subject)
    net.c2.register_forward_pre_hook(lambda layer, args: (args[0] + 1,))
    with pytest.raises(Failed, match="dropped channels reach"):
        checks.gate(subject)


def test_an_output_that_changes_is_seen() -> None:
    net = made(Plain)
    subject = Subject.of(net, net.images(2))
    checks.attach(subject)
    with torch.no_grad():
        net.fc.bias.add_(1)
    for step in (checks.forward, checks.remove):
        with pytest.raises(Failed, match=r"changed|restored"):
            step(subject)


def test_instances_that_depend_on_each_other_are_seen() -> None:
    class Mixed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) - x.mean()

    torch.manual_seed(0)
    model = Mixed(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    subject = Subject.of(model, torch.randn(2, 3, 8, 8) + torch.tensor([0.0, 9.0]).view(2, 1, 1, 1))
    checks.attach(subject)
    with pytest.raises(Failed, match="differs from its instances"):
        checks.one_by_one(subject)


def test_a_site_without_a_gradient_is_seen() -> None:
    net = made(Residual)
    net.block.c1.requires_grad_(False)
    subject = Subject.of(net, net.images(2))
    checks.attach(subject)
    with pytest.raises(Failed, match=r"block\.c1: a site without a gradient"):
        checks.penalty(subject)


def test_an_accelerated_model_that_gives_something_else_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Accelerated.forward
    monkeypatch.setattr(Accelerated, "forward", lambda model, x: right(model, x) + 1)
    net = made(Plain)
    assert check_engine(net, net.images(2))["accelerate"].startswith("differs from masking by ")


def test_an_accelerated_model_that_decides_something_else_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Record.add
    monkeypatch.setattr(
        Record, "add", lambda record, keep, norms: right(record, {name: ~k for name, k in keep.items()}, norms)
    )
    net = made(Plain)
    assert check_engine(net, net.images(2))["accelerate"].startswith("decisions differ at ['c1'")


class Chaos(nn.Module):
    """A map that rounding alone decides."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(1e9 * x)


def test_a_model_whose_decisions_rounding_turns_is_skipped() -> None:
    layers = nn.Conv2d(3, 32, 3), Chaos(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 5, 1), nn.Flatten()
    images = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    result = check_engine(nn.Sequential(*layers).eval(), images)["accelerate"]
    assert result == "skipped: the masked model in float64 decides otherwise too"


def test_a_gated_model_whose_graph_gives_something_else_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def eager(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: model(x) + has_hooks(model)

    for name in graphs.MAKERS:
        monkeypatch.setitem(graphs.MAKERS, name, eager)
    net = made(Plain)
    results = check_graphs(net, net.images(2))
    assert results["export"].startswith("differs from masking by ")
    assert results["compile"].startswith("differs from masking by ")
    assert not has_hooks(net)


def test_a_model_that_has_no_graph_without_gates_either_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
        raise ZeroDivisionError("inside")

    for name in graphs.MAKERS:
        monkeypatch.setitem(graphs.MAKERS, name, fails)
    net = made(Plain)
    skipped = "skipped: nor does the bare model: ZeroDivisionError: inside"
    assert check_graphs(net, net.images(2)) == {"export": skipped, "compile": skipped}


def test_a_step_that_fails_says_so_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(subject: Subject) -> None:
        raise ZeroDivisionError("inside")

    monkeypatch.setitem(checks.STEPS, "gate", fails)
    net = made(Plain)
    results = check(net, net.images(2))
    assert results.pop("gate") == "ZeroDivisionError: inside"
    assert set(results.values()) == {"ok"}


def test_random_weights_make_strong_and_weak_channels_that_the_output_depends_on() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    nn.init.zeros_(model[-1].weight)  # as some heads start
    nn.init.zeros_(model[0].weight[3])
    images = torch.randn(2, 3, 4, 4)
    randomise(model, images)
    assert not model.training
    assert model[1].momentum == 0.1
    assert not torch.equal(model[1].running_mean, torch.zeros(16))
    others = [channel for channel in range(16) if channel != 3]
    assert 0.05 * model[1].running_var.mean() < model[1].running_var[3] <= model[1].running_var[others].min()
    rows = model[0].weight[others].flatten(1).norm(dim=1)
    assert rows.max() > 3 * rows.min()
    first, second = model(images)
    assert not torch.equal(first, second)


# -- finding sites ---------------------------------------------------------------------------------


def test_a_record_of_sites_counts_layers() -> None:
    record = site_record("test_resnet")
    assert record["error"] == ""
    assert record["unaccounted"] == record["filled_twice"] == []
    assert record["layers"] == record["in_sites"] + sum(record["reasons"].values())


def test_a_layer_without_a_place_or_with_two_is_unaccounted_for() -> None:
    model = timm.create_model("test_resnet")
    found = find_sites(model, default_inputs(model))
    assert unaccounted(model, found) == []
    assert unaccounted(model, Found(found.sites, {})) == ["head.fc" if hasattr(model, "head") else "fc"]
    assert set(unaccounted(model, Found((*found.sites, found.sites[0]), found.left_out))) == set(found.sites[0].layers)


def test_columns_that_two_sites_fill_are_named() -> None:
    sites = find_sites(made(Plain), torch.zeros(1, 3, 8, 8)).sites
    assert filled_twice(Found(sites, {})) == []
    assert filled_twice(Found((*sites, sites[1]), {})) == [sites[1].consumers[0].layer]
    assert sites[1].consumers == (Consumer("fc"),)


def test_the_smallest_of_every_module_and_all_tiny_models_are_chosen() -> None:
    records = [
        {"model": "b", "module": "x", "parameters": 2},
        {"model": "a", "module": "x", "parameters": 1},
        {"model": "c", "module": "y", "error": "not built"},
        {"model": "d", "module": "z", "parameters": 0},
        {"model": "test_e", "module": "x", "parameters": 0},
    ]
    assert smallest(records) == ["test_e", "d", "a"]


def test_a_second_run_goes_on_where_the_first_stopped(tmp_path: Path) -> None:
    out = tmp_path / "part.jsonl"
    asked: list[str] = []

    def record(name: str) -> dict[str, str]:
        asked.append(name)
        if name == "c" and len(asked) < 4:
            raise KeyboardInterrupt
        return {"model": name}

    with pytest.raises(KeyboardInterrupt):
        resume(out, "abc", record)
    resume(out, "abc", record)
    assert [json.loads(line)["model"] for line in out.read_text().splitlines()] == ["a", "b", "c"]
    assert asked == ["a", "b", "c", "c"]
    assert read(tmp_path / "none.jsonl") == []


# -- the page --------------------------------------------------------------------------------------

GOOD = {"attach": "ok", "gate": "ok"}


def step_record(model: str, module: str = "x", **steps: str) -> dict[str, object]:
    return {"model": model, "module": module, "steps": GOOD | steps}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (None, ("not run", "")),
        (step_record("a"), ("ok", "")),
        (step_record("a", execution="masked because", pruned="all layers"), ("ok", "")),
        (step_record("a", export="skipped: nor does the bare model"), ("skipped", "nor does the bare model")),
        (step_record("a", gate="hardly differs", export="skipped: so"), ("no", "gate: hardly differs")),
    ],
)
def test_a_record_in_a_word(record: dict[str, object] | None, expected: tuple[str, str]) -> None:
    assert verdict(record) == expected


def test_the_page_counts_what_went_well_and_names_what_did_not() -> None:
    sites = [site_record("test_resnet"), {"model": "odd", "module": "y", "built": True, "error": "NoSitesError: none"}]
    gates = [step_record("a"), step_record("b", gate="hardly differs"), step_record("test_resnet")]
    engine = [step_record("a", execution="masked: no export")]
    written = page(summary({"sites": sites, "gates": gates, "engine": engine}))
    assert f"| 1 of 2 (50.0%); 2 of {len(timm.list_models()):,} were run |" in written
    assert f"| 100.00% of {sites[0]['layers']} |" in written
    assert "| >= 96 | 0 ok, 0 skipped, 1 no, 1 not run |" in written
    assert "| all that it prunes | 0 of 0; 0 ok, 0 skipped, 0 no, 2 not run |" in written
    assert "- odd: NoSitesError: none" in written
    assert "- gated: 1 ok, 0 skipped, 1 no, 0 not run; of 2 modules" in written
    assert "- engine: 1 ok, 0 skipped, 0 no, 1 not run; of 2 modules" in written
    assert "- graphs: not run" in written
    unlisted = {module_of(name) for name in timm.list_models()} - {"resnet"}
    assert f"- nothing was run yet of {len(unlisted)} more modules: {min(unlisted)}, " in written
    assert "| x | b |  |  | no | not run | not run | not run | gated: gate: hardly differs |" in written
    assert "| x | a |  |  | ok | ok | not run | not run | runs masked: no export |" in written
    layers, count = sites[0]["layers"], sites[0]["sites"]
    assert f"| resnet | test_resnet | {layers} | {count} | ok | not run | not run | not run |  |" in written


def test_the_page_of_predicted_norms_says_how_many_and_how_far_apart(tmp_path: Path) -> None:
    report({"gates": [step_record("a")]}, tmp_path)
    results = tmp_path / "benchmarks" / "zoo" / "results"
    before = (results / "models.md").read_text()
    ran = {"execution": "accelerated", "heads": "3 of 5 sites"}
    none = {"heads": "0 of 2 sites", "accelerate": "skipped: the masked model in float64 decides otherwise too"}
    wrong = ran | {"accelerate": "decisions differ at ['c']", "apart": "0.0e+00"}
    masked = {"execution": "masked: no export", "heads": "1 of 2 sites", "apart": "3.0e-07"}
    steps = {"a": ran | {"apart": "2.5e-07"}, "b": none, "c": wrong, "d": masked, "test_e": ran | {"apart": "1.0e-06"}}
    report({"predicted": [step_record(name, **said) for name, said in steps.items()]}, tmp_path)
    assert (results / "models.md").read_text() == before
    written = (results / "predicted.md").read_text()
    assert "- modules: 4, of which 2 ok, 1 skipped, 1 no" in written
    assert "- models with heads: 4 of 5, 10 heads" in written
    assert "- largest difference: 1.0e-06, test_e" in written
    assert "| x | a | 3 | 5 | 2.5e-07 | ok |  |" in written
    assert "| x | b | 0 | 2 |  | skipped | the masked model in float64 decides otherwise too |" in written
    assert "| x | c | 3 | 5 | 0.0e+00 | no | accelerate: decisions differ at ['c'] |" in written
    assert "| x | d | 1 | 2 | 3.0e-07 | ok | runs masked: no export |" in written
    rows = json.loads((results / "predicted.json").read_text())
    assert [row["model"] for row in rows] == ["a", "b", "c", "d", "test_e"]
    assert rows[0] == {
        "module": "x",
        "model": "a",
        "heads": 3,
        "sites": 5,
        "apart": 2.5e-07,
        "verdict": "ok",
        "note": "",
    }


def test_the_page_says_where_only_some_layers_were_pruned() -> None:
    some = step_record("a", pruned="layers that share no channels, since all layers: so")
    written = page(summary({"pruned": [some, step_record("b", module="y", pruned="all layers")]}))
    assert "| all that it prunes | 2 of 2; 2 ok, 0 skipped, 0 no, 0 not run |" in written
    note = "pruned: layers that share no channels, since all layers: so"
    assert f"| x | a |  |  | not run | not run | not run | ok | {note} |" in written
    assert "| y | b |  |  | not run | not run | not run | ok |  |" in written


def test_a_module_that_was_not_run_has_its_row() -> None:
    small, large = ({"model": name, "module": "y", "built": True, "error": ""} for name in ("small", "large"))
    counts = {"layers": 3, "in_sites": 2, "sites": 2, "unaccounted": [], "filled_twice": [], "reasons": {}}
    seconds = {"seconds": 0.5, "cpu_seconds": 0.25}
    sites = [large | counts | seconds | {"parameters": 9}, small | counts | seconds | {"parameters": 1}]
    told = summary({"sites": sites})
    assert [(model["model"], model["gates"]) for model in told["models"]] == [("small", "not run")]
    assert "- gated: not run" in page(told)
    written = page(told, "one core")
    assert "| 0.25 s of processor time; 0.50 s on the clock," in written
    assert "; one core.\n" in written
    told = summary({"sites": sites, "gates": [step_record("large", module="y")]})
    assert [(model["model"], model["gates"]) for model in told["models"]] == [("large", "ok")]


def test_the_report_is_a_page_and_its_numbers(tmp_path: Path) -> None:
    report({"gates": [step_record("a")]}, tmp_path)
    assert "| x | a |  |  | ok |" in (tmp_path / "benchmarks" / "zoo" / "results" / "models.md").read_text()
    told = json.loads((tmp_path / "benchmarks" / "zoo" / "results" / "summary.json").read_text())
    assert told == summary({"gates": [step_record("a")]})


def test_without_sites_there_is_nothing_to_choose_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["zoo", "gates", "--out", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "run `sites` first" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
