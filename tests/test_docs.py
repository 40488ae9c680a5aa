"""Every Python block of README and docs runs, in order, one namespace a page."""

import re
from importlib.metadata import metadata
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parent.parent
STUDIES = sorted((ROOT / "benchmarks").glob("*/README.md"))
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *STUDIES]
WITH_CODE = [page for page in PAGES if "```python" in page.read_text()]

# Extras, and what not every timm has.
NEEDS = {
    "deployment.md": ("onnx", "onnxscript"),
    "beside-nni.md": ("nni",),
    "training.md": ("accelerate", "lightning", "isw_plugin.toolkits.timm"),
}


def blocks_of(page: Path | str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def loader() -> DataLoader[tuple[torch.Tensor, ...]]:
    return DataLoader(TensorDataset(torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])), batch_size=4)


def runnable(page: Path) -> object:
    """A page of a toolkit's brings the toolkit's warnings."""
    return pytest.param(page, marks=pytest.mark.filterwarnings("ignore") if page.name in NEEDS else ())


@pytest.mark.parametrize("page", [runnable(page) for page in WITH_CODE], ids=lambda page: page.name)
def test_code_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    for package in NEEDS.get(page.name, ()):
        pytest.importorskip(package, exc_type=ImportError)
    torch.manual_seed(0)
    names = {
        "__name__": page.stem,
        "train_loader": loader(),
        "held_out_loader": loader(),
        "test_loader": loader(),
        "criterion": nn.CrossEntropyLoss(),
    }
    blocks = blocks_of(page)
    for block in blocks:
        if "\nfor images" in block and "optimizer" in block and "optimizer =" not in block:
            block = block.replace("\nfor images", "\noptimizer = OPTIMIZER(model.parameters())\nfor images")
            names["OPTIMIZER"] = lambda parameters: torch.optim.SGD(parameters, lr=0.01)
        if "max_drop=0.01" in block:
            block = block.replace("max_drop=0.01", "max_drop=0.49")  # noise has no accuracy to lose
        exec(compile(block, str(page), "exec"), names)
    assert blocks


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text())
    assert [target for target in targets if not leads_somewhere(page, target)] == []


def leads_somewhere(page: Path, target: str) -> bool:
    path, _, section = target.partition("#")
    there = page.parent / path if path else page
    return there.exists() and (not section or section in sections_of(there))


def sections_of(page: Path) -> set[str]:
    """As GitHub names them in addresses."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_of_modules_and_scripts_that_exist(page: Path) -> None:
    """From a fresh clone, so without a variable set."""
    text = page.read_text()
    assert "PYTHONPATH" not in text
    for module in set(re.findall(r"python -m (benchmarks[.\w]*\w)", text)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for script in set(re.findall(r"python ((?:examples|benchmarks)/\S+\.py)", text)):
        assert (ROOT / script).exists(), script


@pytest.mark.filterwarnings("ignore")  # of NNI
def test_nni_users_add_at_most_five_lines() -> None:
    pytest.importorskip("nni", reason="needs isw_plugin[nni]")
    preparation, quick_start = blocks_of("docs/beside-nni.md")[:2]
    names: dict[str, object] = {"train_loader": loader()}
    torch.manual_seed(0)
    exec("\n".join([preparation, quick_start]), names)
    assert any(not mask.all() for mask in names["dynamic"].gates.keep.values())
    lines = quick_start.splitlines()
    assert sum("# +" in line for line in lines) <= 5
    ours = [line for line in lines if re.search("isw|InstanceWise|compact|dynamic", line)]
    assert all("# +" in line for line in ours)
    # What is left is NNI's own, and runs without us.
    exec("\n".join([preparation, "criterion = F.nll_loss", *(line for line in lines if line not in ours)]), names)


def test_torch_pruning_users_add_at_most_three_lines() -> None:
    """Below the README of the installed release, as it stands but for the download and the size of its images."""
    readme = metadata("torch-pruning").get_payload()
    example = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "round_to=8" in block)
    lines = [line for line in blocks_of("docs/beside-torch-pruning.md")[1].splitlines() if line.strip()]
    assert len(lines) <= 3
    names: dict[str, object] = {}
    torch.manual_seed(0)
    example = example.replace("pretrained=True", "").replace("224, 224", "64, 64")
    exec("\n".join([example, *lines]), names)
    names["model"](torch.randn(2, 3, 64, 64))
    keep = names["dynamic"].keep
    assert keep
    assert any(not mask.all() for mask in keep.values())
