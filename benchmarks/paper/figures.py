"""Figures 1, 3, 4 and 5, drawn by isw_plugin.report from what was recorded of every test image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.paper.measuring import Measurer
from benchmarks.paper.tables import NAMES
from isw_plugin import CVGate
from isw_plugin.measure import Records
from isw_plugin.report import accuracy_curve, channel_heatmap, easy_to_hard, extreme_images, extremes

__all__ = ["FIGURES", "Subject", "subject"]

DROPPING = CVGate(0.5, 1.0)  # Figure 3's; the paper gives none for the others
MILD = CVGate(0.5, 0.5)
VGG16 = ("vgg16", "slimmed-vgg16", "vgg16-bn-l1")
LAYERS = tuple(
    f"conv{block}_{layer}" for block, count in enumerate((2, 2, 3, 3, 3), 1) for layer in range(1, count + 1)
)
LIGHT = CVGate(0.8, 0.3)  # the one of Table 8 that drops more


@dataclass(frozen=True)
class Subject:
    """Whose test images a figure shows."""

    measurer: Measurer
    network: str
    lambda_: float
    gate: CVGate
    data: str
    records: Records

    @property
    def caption(self) -> str:
        shown = f"{NAMES[self.network]}, λ {self.lambda_:g}, alpha {self.gate.alpha:g}, beta {self.gate.beta:g}"
        measured = self.records.scores.mean().item(), self.records.prune_ratio.mean().item()
        return f"{self.data}: {shown}; accuracy {measured[0]:.4f}, prune ratio {measured[1]:.3f}"


def subject(measurer: Measurer, networks: Sequence[str], gate: CVGate, data: str) -> Subject | None:
    """The first network that is trained, at the paper's best lambda, 1e-7, or at the largest; None: none is."""
    network = next((name for name in networks if measurer.lambdas(name)), None)
    if network is None:
        return None
    lambdas = measurer.lambdas(network)
    lambda_ = 1e-7 if 1e-7 in lambdas else lambdas[-1]
    records = measurer.records(network, lambda_, gate)
    return records and Subject(measurer, network, lambda_, gate, data, records)


def _extremes(subject: Subject, path: Path) -> dict[str, Any]:
    splits, records = subject.measurer.bench.splits, subject.records
    extreme_images(records, splits.test.pixels.cpu(), path, subject.caption, classes=splits.classes)
    easiest, hardest = extremes(records)
    return {
        "easiest": [_image(subject, index) for index in easiest],
        "hardest": [_image(subject, index) for index in hardest],
        "mean_prune_ratio_by_class": _by_class(subject),
    }


def _image(subject: Subject, index: int) -> dict[str, Any]:
    records = subject.records
    return {
        "index": index,
        "class": subject.measurer.bench.splits.classes[int(records.labels[index])],
        "prune_ratio": records.prune_ratio[index].item(),
        "right": bool(records.scores[index]),
    }


def _by_class(subject: Subject) -> dict[str, float]:
    records = subject.records
    classes = subject.measurer.bench.splits.classes
    present = sorted(set(records.labels.tolist()))
    return {classes[label]: records.prune_ratio[records.labels == label].mean().item() for label in present}


def _heatmap(subject: Subject, path: Path) -> dict[str, Any]:
    splits, records = subject.measurer.bench.splits, subject.records
    keep = dict(zip(LAYERS, records.keep.values(), strict=True))
    records = replace(records, keep=keep)
    channel_heatmap(records, splits.classes, path, subject.caption)
    return {"dropped_by_site": {name: 1 - mask.double().mean().item() for name, mask in records.keep.items()}}


def _curve(subject: Subject, path: Path) -> dict[str, Any]:
    accuracy_curve(subject.records, path, subject.caption)
    curve = easy_to_hard(subject.records)
    return {
        "accuracy": curve.accuracy,
        "easier_half": curve.easier,
        "harder_half": curve.harder,
        "standard_error_of_difference": curve.error,
        "window": curve.window,
        "windows_from_easy_to_hard": curve.windows.tolist(),
    }


@dataclass(frozen=True)
class FigureOf:
    """Title, networks in order of choice, gate and what draws it and returns its numbers."""

    title: str
    networks: tuple[str, ...]
    gate: CVGate
    draw: Callable[[Subject, Path], dict[str, Any]]


FIGURES: dict[str, FigureOf] = {
    "figure1": FigureOf("Images that drop most and least channels", VGG16, MILD, _extremes),
    "figure3": FigureOf("Channels dropped by class", VGG16, DROPPING, _heatmap),
    "figure4": FigureOf("Accuracy from easy to hard images", VGG16, MILD, _curve),
    "figure5": FigureOf(
        "Images that drop most and least channels, ImageNet", ("mobilenetv2-imagenet",), LIGHT, _extremes
    ),
}
