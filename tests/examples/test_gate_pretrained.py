import json
from pathlib import Path

import pytest
import timm
import torch
from gate_pretrained import arguments, main
from images import DataError
from safetensors.torch import save_file

from tests.folders import make_folder


def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=2)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def options(tmp_path: Path, *more: str) -> list[str]:
    data = make_folder(tmp_path / "data", count=6, test="val")
    return ["test_resnet", "--data", str(data), "--workers", "0", "--device", "cpu", "--out", str(tmp_path), *more]


def test_a_local_checkpoint_is_gated_without_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = ["--checkpoint", str(checkpoint(tmp_path)), "--max-drop", "0.49", "--max-instances", "8"]
    main(arguments(options(tmp_path, *arrays)))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["gated"]["macs"] < results["dense"]["macs"]
    assert results["gated"]["instances"] == 12
    assert results["pruner"]["lambda_"] == 0
    assert (tmp_path / "frontier.png").exists()
    assert "12 sites" in capsys.readouterr().out


def test_no_hub_and_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("the hub cannot be reached")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(DataError, match="give a file with --checkpoint"):
        main(arguments(options(tmp_path)))


def test_a_model_of_other_classes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("test_resnet", num_classes=7)
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: model)
    with pytest.raises(DataError, match="knows 7 classes and the folder has 2"):
        main(arguments(options(tmp_path)))


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such checkpoint"):
        main(arguments(options(tmp_path, "--checkpoint", "nowhere.safetensors")))
    (tmp_path / "data" / "train" / "cat" / "0.png").write_bytes(b"torn")
    file = checkpoint(tmp_path)
    command = ["test_resnet", "--data", str(tmp_path / "data"), "--workers", "0", "--checkpoint", str(file)]
    with pytest.raises(DataError, match=r"0\.png: not a readable image"):
        main(arguments(command))
