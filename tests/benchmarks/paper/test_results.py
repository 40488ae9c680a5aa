"""The paper's claims on the stored tables and figures, on every network that was trained at two lambdas or more.

Each claim is stated as the paper has it. The cells that contradict it are listed in the study's README, a line a cell,
and that list has to be what the JSON says: neither can be edited alone.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.lab import decisions
from benchmarks.paper.writing import load_slimmed
from isw_plugin import InstanceWisePruner, count_macs

STORED = Path(__file__).parents[3] / "benchmarks" / "paper" / "results"
TABLES = ("table1", "table2", "table3", "table4", "table5", "table6", "table8")
README = (STORED.parent / "README.md").read_text()
FIGURES = ("figure1", "figure3", "figure4", "figure5")
OWN = {"table2": "VGG16", "table3": "VGG16", "table4": "VGG16"}  # of rows that are labelled by lambda alone

Rows = dict[float, dict[str, float]]  # lambda -> column -> ours


def stored(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((STORED / f"{name}.json").read_text())
    return found


def families(name: str) -> dict[str, Rows]:
    """What was run, by network and then lambda."""
    table = stored(name)
    found: dict[str, Rows] = {}
    for row in table["rows"]:
        run = {column: value for column, value in zip(table["columns"], row["ours"], strict=True) if value is not None}
        if run:
            network, _, lambda_ = row["label"].rpartition(": ")
            found.setdefault(network or OWN[name], {})[float(lambda_)] = run
    return found


def rises(name: str) -> dict[str, tuple[float, float, float]]:
    """Network and column -> lambda, the column at the lambda before, the column at it."""
    return {
        f"{network}, {column}, λ {new:g}": (new, rows[old][column], rows[new][column])
        for network, rows in families(name).items()
        for old, new in itertools.pairwise(sorted(rows))
        for column in rows[new].keys() & rows[old].keys()
    }


def contradicting(kind: str, cells: dict[str, tuple[float, float, float]]) -> set[str]:
    """The cells whose last value is not above the one before it, as lines of the page."""
    return {f"- {kind}: {cell}: {low:.4f}, {high:.4f}" for cell, (_, low, high) in cells.items() if high <= low}


def documented(kind: str) -> set[str]:
    """The page's lines of this kind."""
    return {line for line in README.splitlines() if line.startswith(f"- {kind}: ")}


def test_every_table_and_figure_is_stored_with_where_it_is_from() -> None:
    for name in (*TABLES, *FIGURES):
        provenance = stored(name)["provenance"]
        assert provenance.keys() >= {"command", "hardware", "versions", "date", "data", "images", "precision"}
    assert all((STORED / f"{name}.md").exists() for name in TABLES)
    assert all((STORED / f"{name}.png").exists() == stored(name)["run"] for name in FIGURES)


def test_what_was_not_run_is_listed_as_such() -> None:
    for name in TABLES:
        missing = sum(value is None for row in stored(name)["rows"] for value in row["ours"])
        assert (STORED / f"{name}.md").read_text().count("not run") >= missing


def test_cv_rises_with_lambda() -> None:
    """Table 2."""
    found = rises("table2")
    assert len(found) >= 4
    assert contradicting("CV falls", found) == documented("CV falls")
    rows = families("table2")["VGG16, slimmed"]
    assert all(rows[1e-6][column] > rows[0][column] for column in rows[0])


def test_at_equal_ratio_accuracy_rises_with_lambda_up_to_1e_7() -> None:
    """Table 3."""
    found = {cell: values for cell, values in rises("table3").items() if values[0] <= 1e-7}
    if not found:  # the page must say so
        assert any("accuracy rises with λ" in line and "| not run" in line for line in README.splitlines())
    assert contradicting("accuracy falls", found) == documented("accuracy falls")


def test_min_norm_beats_random_by_far() -> None:
    """Table 3; by far: 0.1."""
    gaps = {
        f"{network}, {ratio} %, λ {lambda_:g}": (0.0, row[f"{ratio} % rand"] + 0.1, row[f"{ratio} % min"])
        for network, rows in families("table3").items()
        for lambda_, row in rows.items()
        for ratio in (10, 20)
        if row.keys() >= {f"{ratio} % min", f"{ratio} % rand"}
    }
    assert gaps
    assert contradicting("min-norm not .1 above random", gaps) == documented("min-norm not .1 above random")


def test_the_cv_gate_beats_min_norm_at_equal_ratio() -> None:
    """Tables 3 and 4; min-norm drops no more here."""
    pairs = {}
    for row in stored("table4")["rows"]:
        network, _, lambda_ = row["label"].rpartition(": ")
        for measured in row["measured"]:
            if measured is None or measured["same_ratio"] is None:
                continue
            rival = measured["same_ratio"]
            assert rival["prune_ratio"] <= measured["prune_ratio"] + 1e-3
            cell = f"{network or OWN['table4']}, {measured['gate']}, λ {lambda_}"
            pairs[cell] = (0.0, rival["accuracy"], measured["accuracy"])
    assert len(pairs) >= 6
    assert contradicting("min-norm wins", pairs) == documented("min-norm wins")


def test_the_half_that_drops_most_is_the_more_accurate_one() -> None:
    """Figure 4, with the whole curve drawn; by three standard errors."""
    curve = stored("figure4")
    error = curve["standard_error_of_difference"]
    assert error > 0
    halves = {
        f"{curve['network']}, λ {curve['lambda']:g}": (0.0, curve["harder_half"] + 3 * error, curve["easier_half"])
    }
    assert contradicting("easier half not ahead", halves) == documented("easier half not ahead")
    assert len(curve["windows_from_easy_to_hard"]) * curve["window"] >= curve["provenance"]["images"]["test"]


def test_keep_decisions_are_small_and_of_256_images() -> None:
    files = sorted((STORED / "decisions").glob("*.npz"))
    runs = [stored(name)["provenance"] for name in ("table1", "table8")]
    runs += [earlier for run in runs for earlier in run.get("earlier", [])]
    assert {file.stem for file in files} == {name for run in runs for name in run["networks"]}
    for file in files:
        assert file.stat().st_size < 300_000
        keep, facts = decisions.load(file)
        assert {len(mask) for mask in keep.values()} == {256} == {len(facts["images"])}
        share = 1 - sum(int(mask.sum()) for mask in keep.values()) / sum(mask.numel() for mask in keep.values())
        least = 0.0 if file.stem == "mobilenetv2-0" else 0.01  # that one drops .001 at the paper's thresholds
        assert least < share < 0.99


def test_the_slimmed_network_can_be_loaded_and_gated() -> None:
    (file,) = STORED.glob("slimmed-vgg16-*.safetensors")
    assert file.stat().st_size < 5_000_000
    model, facts = load_slimmed(file)
    assert len(facts["classes"]) == 10
    image = torch.zeros(1, 3, 32, 32)
    assert [len(site.name) > 0 for site in InstanceWisePruner(model, image).sites] == [True] * 13
    assert count_macs(model, image).dense == pytest.approx(168.09e6, rel=1e-3)
