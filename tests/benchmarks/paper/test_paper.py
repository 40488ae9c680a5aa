"""The smoke scale on a few digits: trained, found again, measured and written."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch

from benchmarks.lab import decisions
from benchmarks.lab.images import DataError, ImageSplits
from benchmarks.lab.images import load as load_images
from benchmarks.lab.networks import build
from benchmarks.lab.run_folder import OtherRunError
from benchmarks.paper import __main__ as command
from benchmarks.paper.measuring import OFF, Measurer, key_of
from benchmarks.paper.recipes import SCALES, recipes
from benchmarks.paper.tables import TABLES, Row, Table, markdown
from benchmarks.paper.training import Bench, as_pretrained, pretrained
from benchmarks.paper.writing import load_slimmed
from isw_plugin import CVGate, InstanceWisePruner, MinNorm, RandomGate, evaluate
from tests.folders import make_folder

PUBLISHED = Path(command.__file__).with_name("published.json")


def few(data: str, side: int, seed: int) -> ImageSplits:
    splits = load_images(data, side, seed)
    some = {part: getattr(splits, part).at(torch.arange(count)) for part, count in (("train", 192), ("test", 40))}
    return dataclasses.replace(splits, **some)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables 1 and 6 and Figures 1 and 4 of VGG16s trained for an epoch."""
    folder = tmp_path_factory.mktemp("paper")
    run(folder, "table1", "table6", "figure1", "figure4", "figure5")
    return folder


def run(out: Path, *more: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "load", few)
        options = ["--scale", "smoke", "--only", "*vgg16*", "--epochs", "1", "--device", "cpu", "--out", str(out)]
        command.main(command.arguments([*more, *options]))


def test_tables_hold_ours_beside_the_papers_and_where_they_are_from(out: Path) -> None:
    table = json.loads((out / "table6.json").read_text())
    rows = {row["label"]: row for row in table["rows"]}
    assert list(rows) == ["0", "1e-07", "1e-06"]
    assert rows["1e-07"]["ours"] == [None] * 6
    assert rows["1e-07"]["paper"] == [0.937, 0, 0.891, 0.203, 0.930, 0.201]
    ours = rows["1e-06"]
    assert ours["ours"] == [value[part] for value, part in zip(ours["measured"], ["accuracy", "prune_ratio"] * 3)]  # noqa: B905
    assert all(value["instances"] == 40 for value in ours["measured"])
    assert ours["ours"][1] == 0 < ours["ours"][3]
    provenance = table["provenance"]
    assert provenance.keys() >= {"command", "hardware", "versions", "date", "images", "scale", "data"}
    assert provenance["networks"]["slimmed-vgg16-1e-06"]["seed"] == 0
    assert "slimmed network made here" in provenance["networks"]["slimmed-vgg16-1e-06"]["origin"]


def test_what_was_not_run_says_so(out: Path) -> None:
    lines = (out / "table1.md").read_text().splitlines()
    cells = {line.split("|")[1].strip(): line for line in lines if line.startswith("|")}
    assert cells["Res18"].count("not run") == 4
    assert cells["VGG16"].count("not run") == 2
    assert "not run (0.934)" in cells["Res18"]
    figure = json.loads((out / "figure5.json").read_text())
    assert figure["run"] is False
    assert not (out / "figure5.png").exists()


def test_figures_are_drawn_with_their_numbers(out: Path) -> None:
    for name in ("figure1", "figure4"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    curve = json.loads((out / "figure4.json").read_text())
    assert curve["accuracy"] == pytest.approx((curve["easier_half"] + curve["harder_half"]) / 2)
    extremes = json.loads((out / "figure1.json").read_text())
    assert extremes["easiest"][0]["prune_ratio"] >= extremes["hardest"][0]["prune_ratio"]
    assert "digits" in extremes["caption"]


def test_a_second_run_trains_and_measures_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file: file.stat().st_mtime_ns for file in (out / "runs").rglob("*.safetensors")}
    monkeypatch.setattr(Measurer, "_measure", lambda *args, **kwargs: pytest.fail("measured again"))
    run(out, "table6")
    assert {file: file.stat().st_mtime_ns for file in (out / "runs").rglob("*.safetensors")} == before


def test_an_earlier_table_may_have_fewer_columns_or_more() -> None:
    older = Table("title", "corner", ["a", "c"], [Row("net", [1.0, 3.0], [0.1, 0.3], [None, None])])
    newer = Table("title", "corner", ["a", "b", "c"], [Row("net", [None, 2.0, None], [None] * 3, [None] * 3)])
    (row,) = newer.with_stored(older.to_dict()).rows
    assert (row.ours, row.paper) == ([1.0, 2.0, 3.0], [0.1, None, 0.3])
    joined = older.with_stored(newer.to_dict())
    assert joined.columns == newer.columns
    assert (joined.rows[0].ours, joined.rows[0].paper) == (row.ours, row.paper)
    assert older.with_stored(dataclasses.replace(newer, rows=[]).to_dict()) is older
    rows = [Row(label, [1.0, 1.0, 1.0], [None] * 3, [None] * 3) for label in ("first", "net", "last")]
    longer = older.with_stored(dataclasses.replace(newer, rows=rows).to_dict())
    assert [row.label for row in longer.rows] == ["first", "net", "last"]
    with pytest.raises(ValueError, match="the stored table has columns"):
        dataclasses.replace(older, columns=["a", "d"]).with_stored(newer.to_dict())


def test_what_an_earlier_run_measured_is_kept_where_this_one_did_not_run(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / "runs" / "vgg16-0", tmp_path / "runs" / "vgg16-0")
    run(tmp_path, "table1", "table5", "table6", "--trained", "--earlier", str(out))
    before, after = (json.loads((folder / "table1.json").read_text()) for folder in (out, tmp_path))
    assert [row["ours"] for row in after["rows"]] == [row["ours"] for row in before["rows"]]
    assert list(after["provenance"]["networks"]) == ["vgg16-0"]
    (earlier,) = after["provenance"]["earlier"]
    assert earlier["networks"].keys() == before["provenance"]["networks"].keys() - {"vgg16-0"}
    assert "Of an earlier run: digits" in (tmp_path / "table1.md").read_text()
    assert (
        json.loads((tmp_path / "table6.json").read_text())["rows"]
        == json.loads((out / "table6.json").read_text())["rows"]
    )
    assert "earlier" not in json.loads((tmp_path / "table5.json").read_text())["provenance"]
    run(tmp_path, "table1", "--trained", "--earlier", str(tmp_path))  # over its own tables
    assert json.loads((tmp_path / "table1.json").read_text())["provenance"]["earlier"] == [earlier]


def test_with_measured_nothing_new_is_measured(out: Path, tmp_path: Path) -> None:
    bench, found = a_bench(out)
    stored = Measurer(bench, found, stored_only=True)
    assert stored.at("vgg16", 0.0, OFF) is not None
    assert stored.at("vgg16", 0.0, CVGate(0.25, 0.25)) is None
    assert stored.records("vgg16", 0.0, CVGate(0.25, 0.25)) is None


def test_keep_decisions_are_those_of_the_stored_network(out: Path) -> None:
    keep, facts = decisions.load(out / "decisions" / "slimmed-vgg16-1e-06.npz")
    assert facts["gate"] == "cv-0.7-0.7"
    bench, found = a_bench(out)
    recipe = next(recipe for recipe in found if recipe.name == "slimmed-vgg16-1e-06")
    model = bench.network(recipe)
    pruner = InstanceWisePruner(model, bench.inputs, alpha=0.7, beta=0.7)
    pruner.step()
    records = evaluate(model, bench.batches("test"), records=True).records
    assert records is not None
    assert [site.name for site in pruner.sites] == list(keep)
    assert all(torch.equal(keep[name], records.keep[name][torch.tensor(facts["images"])]) for name in keep)


def a_bench(out: Path) -> tuple[Bench, list[command.Recipe]]:
    splits = few("digits", 32, 0)
    return Bench(splits, out, torch.device("cpu")), recipes("smoke", data="digits", epochs=1)


def test_the_slimmed_network_is_stored_in_half_precision_and_loaded(out: Path) -> None:
    model, facts = load_slimmed(out / "slimmed-vgg16-1e-06.safetensors")
    bench, found = a_bench(out)
    trained = bench.network(next(recipe for recipe in found if recipe.name == "slimmed-vgg16-1e-06"))
    images, _ = next(iter(bench.batches("test")))
    with torch.no_grad():
        ours, theirs = model(images), trained(images)
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    assert facts["classes"] == list("0123456789")


def test_a_run_folder_of_the_example_is_adopted(out: Path, tmp_path: Path) -> None:
    recipe = next(recipe for recipe in recipes("smoke", data="digits", epochs=1) if recipe.name == "slimmed-vgg16-0")
    source = shutil.copytree(out / "runs" / "slimming", tmp_path / "example")
    shutil.copy(out / "runs" / recipe.name / "trained.safetensors", source / "finetuned-0.0.safetensors")
    settings = json.loads((source / "settings.json").read_text()) | {"epochs_finetune": recipe.epochs}
    (source / "settings.json").write_text(json.dumps(settings))
    bench = Bench(few("digits", 32, 0), tmp_path / "out", torch.device("cpu"), adopt=source)
    bench.train(recipe)
    assert "adopted" in bench.facts(recipe)["origin"]
    assert torch.equal(bench.network(recipe).head.fc.bias, a_bench(out)[0].network(recipe).head.fc.bias)
    with pytest.raises(OtherRunError, match="cannot be adopted"):
        bench.train(dataclasses.replace(recipe, seed=7, lambda_=1.0))


def test_imagenet_is_a_folder_of_its_own(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "some-imagenet", count=40, test="val")
    options = ["--imagenet", str(folder), "--scale", "smoke", "--epochs", "1", "--device", "cpu"]
    command.main(command.arguments(["table8", "figure5", *options, "--out", str(tmp_path / "out")]))
    table = json.loads((tmp_path / "out" / "table8.json").read_text())
    assert table["rows"][1]["label"] == "1e-08"
    assert all(value is not None for row in table["rows"] for value in row["ours"])
    assert "some-imagenet" in table["provenance"]["data"]
    assert (tmp_path / "out" / "figure5.png").exists()


def test_every_paper_cell_has_a_column() -> None:
    published = json.loads(PUBLISHED.read_text())
    empty = Measurer(Bench(few("digits", 32, 0), Path("nowhere"), torch.device("cpu")), [])
    for name, make in TABLES.items():
        table = make(empty)
        assert all(len(row.ours) == len(row.paper) == len(row.measured) == len(table.columns) for row in table.rows)
        cells = [value for row in table.rows for value in row.paper]
        count = sum(value is not None for value in cells)
        flat = json.dumps(published[name]).replace("null", "").replace("[", " ").replace("]", " ").split(",")
        assert count == sum(any(c.isdigit() for c in part.split(":")[-1]) for part in flat)
        assert markdown(table).count("not run") == len(cells)


@pytest.mark.parametrize("scale", SCALES)
def test_recipes_have_names_and_folders_of_their_own(scale: str) -> None:
    found = recipes(scale, data="x") + recipes(scale, data="x", imagenet=True)
    assert len({recipe.name for recipe in found}) == len(found)
    assert all(recipe.scope == "all" for recipe in found)
    json.dumps([recipe.settings() for recipe in found])


def test_the_full_scale_has_the_papers_networks_and_lambdas() -> None:
    lambdas: dict[str, set[float]] = {}
    for recipe in recipes("full", data="x"):
        lambdas.setdefault(recipe.network, set()).add(recipe.lambda_)
    assert lambdas["vgg16"] == lambdas["resnet18"] == lambdas["resnet18-pooled"] == {0, 1e-8, 1e-7, 1e-6}
    assert lambdas["mobilenetv2"] == {0, 1e-8, 1e-7}
    assert lambdas["slimmed-vgg16"] == {0, 1e-7, 1e-6}


@pytest.mark.parametrize(
    ("name", "sites", "mmacs"),
    [("vgg16", 13, 313.2), ("resnet18-pooled", 17, 140.2), ("resnet18", 17, 555.4), ("mobilenetv2", 52, 88.0)],
)
def test_networks_are_the_papers(name: str, sites: int, mmacs: float) -> None:
    from isw_plugin import count_macs

    model = build(name, 10, 1.0, seed=0)
    image = torch.zeros(1, 3, 32, 32)
    assert len(InstanceWisePruner(model, image).sites) == sites
    assert count_macs(model, image).dense / 1e6 == pytest.approx(mmacs, abs=0.1)


def test_gates_have_names_of_their_own() -> None:
    gates = [OFF, CVGate(0.5, 1.0), CVGate(1.0, 0.5), MinNorm(0.1), MinNorm(0.2), RandomGate(0.1), RandomGate(0.1, 1)]
    assert len({key_of(gate) for gate in gates}) == len(gates)


def test_without_the_hub_there_are_no_pretrained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("the hub cannot be reached")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(DataError, match=r"the hub cannot be reached.*leave out --pretrained"):
        pretrained(1000)
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: torch.nn.Module())
    monkeypatch.setattr(torch.nn.Module, "num_classes", 1000, raising=False)
    with pytest.raises(DataError, match="knows 1000 classes and the folder has 50"):
        pretrained(50)


def test_pretrained_weights_get_their_own_normalisation() -> None:
    splits = as_pretrained(few("digits", 32, 0))
    assert splits.mean.tolist() == pytest.approx([255 * value for value in (0.485, 0.456, 0.406)])
