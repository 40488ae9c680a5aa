"""The example of a whole detector, small: what it draws, and the figures that it gives."""

import pytest
import torch

pytest.importorskip("torchmetrics")
pytest.importorskip("pycocotools")

import gate_detector
from gate_detector import CLASSES, Shapes, image_scores, mean_average_precision


def test_shapes_are_drawn_where_their_boxes_are() -> None:
    shapes = Shapes(5, 64, seed=3, batch=2)
    batches = list(shapes)
    assert [len(images) for images, _ in batches] == [2, 2, 1] == [len(targets) for _, targets in batches]
    assert len(shapes) == 3
    again = list(shapes)
    for images, targets in batches:
        for image, target in zip(images, targets, strict=True):
            assert image.shape == (3, 64, 64)
            assert len(target["boxes"]) == len(target["labels"]) in (1, 2, 3)
            assert set(target["labels"].tolist()) <= set(range(1, len(CLASSES)))
            left, top, right, bottom = target["boxes"][-1].int().tolist()  # the last lies above the others
            inside = image[:, (top + bottom) // 2, (left + right) // 2]
            assert inside.max() >= 96 / 255
    assert torch.equal(batches[0][0][1], again[0][0][1])


def test_the_score_of_an_image_is_its_average_precision() -> None:
    _, targets = next(iter(Shapes(3, 64, seed=0)))
    right = [target | {"scores": torch.ones(len(target["labels"]))} for target in targets]
    nothing = {name: value[:0] for name, value in right[1].items()}
    scores = image_scores([right[0], nothing, right[2]], targets)
    assert scores.tolist() == [1, 0, 1]
    assert mean_average_precision(right, targets).item() == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Encountered more than 100 detections")
def test_a_whole_detector_is_gated() -> None:
    sizes = ["--side", "96", "--train", "8", "--held-out", "4", "--test", "4", "--batch", "4"]
    found = gate_detector.main(gate_detector.arguments([*sizes, "--epochs", "1", "--max-drop", "0.49"]))
    assert found["part"] == "backbone"
    assert found["execution"] in ("accelerated", "dense")
    assert 0 < found["macs_saved"] < 1
    assert [name.split(",")[0] for name in found["rows"]] == ["gates off", "gates on", "copy of accelerate"]
