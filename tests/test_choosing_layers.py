"""Every pattern of docs/choosing-layers.md finds maps that stay in their block, in the model that the page names."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm

from isw_plugin.sites import Found, default_inputs, find_sites
from tests.conftest import on_meta

PAGE = Path(__file__).parent.parent / "docs" / "choosing-layers.md"
FEW = {"convnext", "densenet", "efficientnet", "mobilenetv3", "regnet", "resnet", "swin_transformer", "vgg"}
FEW |= {"eva", "mambaout", "mlp_mixer", "vision_transformer"}  # the others take minutes together
WRITTEN_FOR = (1, 0, 31)  # the page names models that older timm does not have


@dataclass(frozen=True)
class Row:
    module: str
    model: str
    layers: tuple[str, ...]
    block: str


def rows() -> list[Row]:
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.read_text().splitlines()]
    table = [row for row in cells if len(row) == 4 and "`" in row[2] and row[0] != "timm module"]
    return [Row(row[0], row[1], tuple(re.findall(r"`([^`]+)`", row[2])), row[3].strip("`")) for row in table]


def require(model: str) -> None:
    if not timm.is_model(model) and tuple(map(int, timm.__version__.split(".")[:3])) < WRITTEN_FOR:
        pytest.skip(f"timm {timm.__version__} has no {model}")


def found(row: Row) -> Found:
    model = on_meta(row.model)
    return find_sites(model, default_inputs(model), layers=row.layers)


def prefix(name: str, block: str) -> list[str]:
    return name.split(".")[: 0 if block == "-" else block.count(".") + 1]


def test_every_module_of_timm_has_a_pattern() -> None:
    modules = {timm.model_entrypoint(name).__module__.rpartition(".")[2] for name in timm.list_models()}
    assert modules <= {row.module for row in rows()}


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.model)
def test_a_row_names_a_model_of_its_module(row: Row) -> None:
    require(row.model)
    assert timm.model_entrypoint(row.model).__module__.rpartition(".")[2] == row.module


PATTERNS = [pytest.param(row, id=row.model, marks=() if row.module in FEW else pytest.mark.slow) for row in rows()]


@pytest.mark.parametrize("row", PATTERNS)
def test_a_pattern_finds_maps_that_stay_in_their_block(row: Row) -> None:
    require(row.model)
    sites = found(row).sites
    assert len(sites) >= 4
    left = [
        f"{site.name} -> {reader.layer}"
        for site in sites
        for reader in site.consumers
        if prefix(reader.layer, row.block) != prefix(site.name, row.block)
    ]
    assert left == []


def test_the_trap_of_conv_pw_is_one() -> None:
    """In the first block of MobileNetV2 conv_pw is the projection: its map is the block's output."""
    sites = {site.name: site for site in found(Row("", "mobilenetv2_100", ("blocks.*.conv_pw",), "")).sites}
    assert [reader.layer for reader in sites["blocks.0.0.conv_pw"].consumers] == ["blocks.1.0.conv_pw"]
    assert [reader.layer for reader in sites["blocks.1.0.conv_pw"].consumers] == ["blocks.1.0.conv_dw"]


def test_in_resnet18_only_conv1_is_hidden() -> None:
    sites = {site.name: site for site in found(Row("", "resnet18", ("layer*.conv*",), "")).sites}
    assert [reader.layer for reader in sites["layer1.0.conv1"].consumers] == ["layer1.0.conv2"]
    assert [reader.layer for reader in sites["layer1.0.conv2"].consumers] == ["layer1.1.conv1"]
