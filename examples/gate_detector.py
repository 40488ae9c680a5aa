"""Gate a whole detector: train torchvision's SSDLite on drawn shapes, choose thresholds by AP, measure, accelerate.

    python examples/gate_detector.py
    python examples/gate_detector.py --weights COCO.pth --epochs 0

The images are circles, squares and triangles of random colours on noise, drawn here: they show that a detector works
whole, lists of images in, boxes out, and say nothing of photographs. `calibrate` takes a score of every image: its
average precision at IoU 0.5, by torchmetrics. What is reported is the mAP over all images of another part of the set.
"""

from isw_cli.script import in_one_line

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

from isw_cli.weights import fill
from isw_plugin import InstanceWisePruner, calibrate, evaluate

CLASSES = ("background", "circle", "square", "triangle")
Targets = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Shapes:
    """Images with one to three shapes each, in batches (images, targets); the same for the same seed.

    Attributes:
        side: Of the images in pixels.
    """

    count: int
    side: int
    seed: int
    batch: int = 16

    def __len__(self) -> int:
        return -(-self.count // self.batch)

    def __iter__(self) -> Iterator[tuple[list[Tensor], Targets]]:
        generator = torch.Generator().manual_seed(self.seed)
        for start in range(0, self.count, self.batch):
            drawn = [self.drawn(generator) for _ in range(min(self.batch, self.count - start))]
            yield [image for image, _ in drawn], [target for _, target in drawn]

    def drawn(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        def between(low: int, high: int) -> int:
            return int(torch.randint(low, high, (), generator=generator))

        noise = torch.randint(0, 96, (self.side, self.side, 3), generator=generator, dtype=torch.uint8)
        picture = Image.fromarray(noise.numpy())
        boxes, labels = [], []
        for _ in range(between(1, 4)):
            size = between(self.side // 5, self.side // 2)
            left, top = between(0, self.side - size), between(0, self.side - size)
            boxes.append([left, top, left + size, top + size])
            labels.append(between(1, len(CLASSES)))
            draw(picture, boxes[-1], labels[-1], (between(96, 256), between(96, 256), between(96, 256)))
        return to_tensor(picture), {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels)}


def draw(picture: Image.Image, box: Sequence[int], label: int, colour: tuple[int, int, int]) -> None:
    left, top, right, bottom = box
    pen = ImageDraw.Draw(picture)
    if label == 1:
        pen.ellipse(box, colour)
    elif label == 2:
        pen.rectangle(box, colour)
    else:
        pen.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], colour)


def detector(side: int, weights: Path | None) -> nn.Module:
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=len(CLASSES))
    model.transform.fixed_size = (side, side)
    if weights is not None:
        fill(model, weights)
    return model


def train(model: nn.Module, pruner: InstanceWisePruner, shapes: Shapes, epochs: int) -> None:
    """With feature decay: one line more than without."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    steps = epochs * len(shapes)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps) if steps else None
    model.train()
    with tqdm(total=steps, desc="training", unit="batch", leave=False, disable=None) as progress:
        for images, targets in (batch for _ in range(epochs) for batch in shapes):
            loss = pruner.regularize(model, sum(model(images, targets).values()))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            progress.update()


def image_scores(found: Targets, targets: Targets) -> Tensor:
    """Average precision at IoU 0.5 of every image, (N,): what evaluate and calibrate take as ``metric``."""
    return torch.stack(
        [mean_average_precision([one], [wanted], [0.5]) for one, wanted in zip(found, targets, strict=True)]
    )


def mean_average_precision(found: Targets, targets: Targets, thresholds: list[float] | None = None) -> Tensor:
    """mAP at these thresholds of IoU; None: COCO's."""
    metric = MeanAveragePrecision(iou_thresholds=thresholds)
    metric.warn_on_many_detections = False  # an SSD gives up to 300, and the best 100 count
    metric.update(found, targets)
    return metric.compute()["map"].clamp_min(0)


@torch.no_grad()
def over_all(model: nn.Module, shapes: Shapes) -> tuple[float, float]:
    """mAP over all images, and milliseconds an image."""
    found, wanted, seconds = [], [], 0.0
    model.eval()
    for images, targets in tqdm(shapes, "testing", unit="batch", leave=False, disable=None):
        start = time.perf_counter()
        found += model(images)
        seconds += time.perf_counter() - start
        wanted += targets
    return float(mean_average_precision(found, wanted)), 1e3 * seconds / shapes.count


def main(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(args.seed)
    drawn = partial(Shapes, side=args.side, batch=args.batch)
    held_out, test = drawn(args.held_out, seed=args.seed + 1), drawn(args.test, seed=args.seed + 2)
    images, _ = next(iter(held_out))
    model = detector(args.side, args.weights)
    pruner = InstanceWisePruner(model, images[:2], args.lambda_, layers=args.layers)
    print(pruner.summary().splitlines()[-1])
    train(model, pruner, drawn(args.train, seed=args.seed), args.epochs)

    rows = {"gates off": over_all(model, test)}
    chosen = calibrate(pruner, held_out, metric=image_scores, max_drop=args.max_drop)
    print(f"chosen on {chosen.instances} images, accuracy is the mean of their AP at IoU 0.5: {chosen.best}")
    pruner.step()
    report = evaluate(model, test, metric=image_scores)
    print(f"gates on: {report}")
    rows["gates on, masked"] = over_all(model, test)
    fast = pruner.accelerate(images)
    print(fast.verdict())
    rows[f"copy of accelerate, {fast.execution}"] = over_all(fast, test)
    for name, (score, milliseconds) in rows.items():
        print(f"{name:34} mAP {score:.3f}  {milliseconds:6.1f} ms an image, {torch.get_num_threads()} threads")
    return {"rows": rows, "macs_saved": report.macs_saved, "part": fast.part, "execution": fast.execution}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="a state_dict of this detector, with 4 classes")
    parser.add_argument("--layers", default="backbone.*", help="which layers to gate, a glob or re:REGEX")
    parser.add_argument("--lambda", dest="lambda_", type=float, default=1e-7)
    parser.add_argument("--max-drop", type=float, default=0.02, help="of the mean score that may be lost")
    parser.add_argument("--side", type=int, default=96, help="of the images in pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    for part, count in (("train", 600), ("held-out", 96), ("test", 200)):
        parser.add_argument(f"--{part}", type=int, default=count, help="images")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with in_one_line():
        main(arguments())
