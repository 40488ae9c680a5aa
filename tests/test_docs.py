"""Every Python block of README and docs runs, in order, one namespace a page."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_CODE = [page for page in PAGES if "```python" in page.read_text()]


def loader() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3]))]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_code_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    names = {
        "__name__": page.stem,
        "train_loader": loader(),
        "held_out_loader": loader(),
        "test_loader": loader(),
        "criterion": nn.CrossEntropyLoss(),
    }
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    for block in blocks:
        if "optimizer" in block and "optimizer =" not in block:
            block = block.replace("for images", "optimizer = OPTIMIZER(model.parameters())\nfor images")
            names["OPTIMIZER"] = lambda parameters: torch.optim.SGD(parameters, lr=0.01)
        if "max_drop=0.01" in block:
            block = block.replace("max_drop=0.01", "max_drop=1.0")  # noise has no accuracy to lose
        exec(compile(block, str(page), "exec"), names)
    assert blocks


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "examples/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []
