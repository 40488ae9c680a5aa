import json
from pathlib import Path

import pytest
import timm
import torch
from classes import keep_classes, known_classes, rows_of
from gate_pretrained import arguments, load_model, main
from images import DataError
from safetensors.torch import save_file
from torch import nn
from torchvision.datasets import ImageFolder

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


def imagenet(tmp_path: Path, folders: tuple[str, ...]) -> tuple[Path, Path, nn.Module]:
    """Data of some classes, weights of all, and the model."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet")
    save_file(model.state_dict(), tmp_path / "all.safetensors")
    data = make_folder(tmp_path / "some", folders, count=2, test="val")
    return data, tmp_path / "all.safetensors", model


@pytest.mark.parametrize(
    ("folders", "rows"),
    [
        (("n01855672", "n01774384", "n02104365"), [75, 99, 223]),  # ImageFolder sorts
        (("Goose", "black_widow", "black widow, latrodectus mactans 2"), None),
        (("goose", "schipperke", "black_widow"), [75, 99, 223]),
    ],
    ids=["WordNet ids", "an unknown name", "names"],
)
def test_some_classes_take_their_rows(
    folders: tuple[str, ...], rows: list[int] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, weights, whole = imagenet(tmp_path, folders)
    if rows is None:
        with pytest.raises(DataError, match=r"1 of 3 folders are named after no class.*mactans 2"):
            load_model("test_resnet", weights, sorted(folders))
        return
    model = load_model("test_resnet", weights, ImageFolder(str(data / "train")).classes).eval()
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(image), whole.eval()(image)[:, rows])
    assert "knows 1000 classes, the folder has 3: rows 75, 99, 223 are taken" in capsys.readouterr().out


def test_a_whole_run_on_some_classes(tmp_path: Path) -> None:
    data, weights, _ = imagenet(tmp_path, ("goose", "schipperke"))
    main(
        arguments(
            [
                "test_resnet",
                "--data",
                str(data),
                "--workers",
                "0",
                "--device",
                "cpu",
                "--checkpoint",
                str(weights),
                "--max-drop",
                "0.49",
                "--max-instances",
                "4",
                "--out",
                str(tmp_path / "out"),
            ]
        )
    )
    assert json.loads((tmp_path / "out" / "results.json").read_text())["gated"]["instances"] == 4


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["crane"], "'crane' is the name of 2 classes: name the folder n02012849, n03126707"),
        (["goose", "n01855672"], "'goose' and another folder are named after the same class"),
        (["gose"], "1 of 1 folders are named after no class.*close names: goose"),
        (["cat", "dog"], "2 of 2 folders are named after no class"),
    ],
)
def test_names_that_mean_no_one_class(folders: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        rows_of(folders, known_classes(timm.create_model("test_resnet")))


def test_both_classifiers_and_convolutions_lose_rows() -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224").eval()
    image = torch.randn(1, 3, 224, 224)
    expected = model(image)[:, [7, 3]]
    keep_classes(model, [7, 3])
    torch.testing.assert_close(model(image), expected)
    assert (model.num_classes, model.head.out_features, model.head_dist.out_features) == (2, 2, 2)
