"""Serving by LitServe: what one process answers, the server under clients, and what is said where it cannot start."""

import base64
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from isw_cli.data import Images, Preparation, keep_preparation
from isw_cli.errors import InputError
from isw_plugin import InstanceWisePruner, load_accelerated

pytest.importorskip("litserve")
DEPLOY = Path(__file__).parents[2] / "examples" / "deploy"


@pytest.fixture(scope="module")
def modules() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DEPLOY))
        import load
        import serve

        yield serve, load


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fast model that skips, and images of its classes."""
    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(32, 3)).eval()
    pruner = InstanceWisePruner(model, torch.zeros(1, 3, 16, 16), alpha=0.0, beta=1.0)
    pruner.accelerate(torch.randn(4, 3, 16, 16), backend="gated").save_pretrained(folder / "fast")
    prepare = Preparation(16, 3, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    keep_preparation(folder / "fast", Images((), (), ("cat", "dog", "fox"), prepare, 1))
    for name in ("cat", "dog", "fox"):
        (folder / "data" / name).mkdir(parents=True)
        for count in range(4):
            Image.fromarray(torch.randint(0, 256, (16, 16, 3)).byte().numpy()).save(folder / f"data/{name}/{count}.png")
    return folder


def request_of(file: Path) -> dict[str, str]:
    return {"image": base64.b64encode(file.read_bytes()).decode()}


def test_an_image_that_cannot_be_read_costs_the_others_nothing(modules: Any, place: Path, tmp_path: Path) -> None:
    serve, _ = modules
    api = serve.Classifier(place / "fast", [], tmp_path / "log.jsonl", 16, 0)
    api.load()
    files = sorted((place / "data").glob("*/*.png"))[:3]
    given = [request_of(files[0]), {"image": "#"}, {}, request_of(files[1]), request_of(files[2])]
    answers = api.predict([api.decode_request(each) for each in given])
    assert [set(answer) for answer in answers[1:3]] == [{"error"}] * 2
    fast = load_accelerated(place / "fast")
    batch = torch.stack([api.prepare(Image.open(file)) for file in files])
    with fast.recording() as record:
        scores, labels = fast(batch).max(1)
    kept = torch.cat([*record.keep.values()], 1).double().mean(1)
    for at, answer in enumerate([answers[0], *answers[3:]]):
        assert (answer["label"], answer["name"]) == (labels[at], ("cat", "dog", "fox")[labels[at]])
        assert answer["score"] == pytest.approx(scores[at].item(), abs=1e-5)
        assert answer["kept"] == pytest.approx(kept[at].item(), abs=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == labels.tolist()
    assert [line["batch"] for line in lines] == [3, 3, 3]
    assert lines[1]["kept_by_site"] == {site: int(keep[1].sum()) for site, keep in record.keep.items()}


def test_cores_are_divided(modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    serve, _ = modules
    monkeypatch.setattr(serve.os, "sched_getaffinity", lambda _: {2, 3, 5, 7, 8})
    assert serve.groups_of(2) == [[2, 3], [5, 7, 8]]
    with pytest.raises(InputError, match=r"--processes 6: this process may use 5 cores, and each needs one"):
        serve.groups_of(6)


def test_what_cannot_start_says_so_in_one_line(modules: Any, place: Path, tmp_path: Path) -> None:
    serve, _ = modules
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, str(DEPLOY / "serve.py"), str(place / "fast"), "--port", str(port)],
            capture_output=True,
            text=True,
        )
    assert (done.returncode, done.stderr) == (1, f"error: --port {port}: Address already in use; take another\n")
    with pytest.raises(FileNotFoundError, match="nothing was saved"):
        serve.require_runs(tmp_path, 4)


@pytest.mark.slow
def test_clients_get_the_models_answers_and_ctrl_c_ends_it(modules: Any, place: Path, capfd: Any) -> None:
    _, load = modules
    with load.served(place / "fast", ["--log", str(place / "log.jsonl"), "--wait", "0.02"]) as (port, pid):
        asked = load.expected(place / "fast", place / "data", 12)
        seen = load.loaded(port, pid, asked, clients=6, seconds=3)
    assert len(seen.seconds) > 20
    assert seen.wrong == []
    lines = [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
    assert len(lines) == len(seen.seconds)
    assert max(line["batch"] for line in lines) > 1
    assert "Traceback" not in capfd.readouterr().err
