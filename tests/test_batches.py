"""Batches of any form, taken apart."""

from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from isw_plugin.batches import Batch, batches_in, fitting, taken_apart
from isw_plugin.errors import SettingError
from isw_plugin.inputs import instances_in

IMAGES, LABELS = torch.zeros(4, 3, 6, 6), torch.tensor([0, 1, 2, 0])
Named = namedtuple("Named", ["labels", "pixel_values"])
Plain = namedtuple("Plain", ["a", "b"])


@dataclass
class Fields:
    pixel_values: Tensor
    labels: Tensor


@pytest.mark.parametrize(
    "batch",
    [
        {"pixel_values": IMAGES, "labels": LABELS},
        UserDict(pixel_values=IMAGES, label=LABELS),
        Named(LABELS, IMAGES),
        Fields(IMAGES, LABELS),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_named_fields(batch: Any) -> None:
    found = Batch.of(batch)
    assert list(found.inputs) == ["pixel_values"]
    assert found.inputs["pixel_values"] is IMAGES
    assert torch.equal(found.labels, LABELS)
    assert found.instances == 4


@pytest.mark.parametrize(
    "labels", [LABELS, LABELS.tolist(), tuple(LABELS.tolist()), LABELS.numpy(), list(LABELS), np.float32([0, 1, 2, 0])]
)
def test_pairs_triples_and_labels_of_any_kind(labels: Any) -> None:
    for batch in ((IMAGES, labels), [IMAGES, labels], (IMAGES, labels, torch.ones(4)), Plain(IMAGES, labels)):
        found = Batch.of(batch)
        assert found.inputs is IMAGES
        assert found.labels.tolist() == [0, 1, 2, 0]


def test_arguments_that_default_collate_listed() -> None:
    found = Batch.of([[IMAGES, torch.ones(4, 2)], LABELS])
    assert isinstance(found.inputs, tuple)
    assert [len(part) for part in found.first(3).inputs] == [3, 3]


def test_images_and_targets_of_detection() -> None:
    targets = [{"boxes": torch.zeros(n, 4)} for n in (2, 0)]
    for images in ([IMAGES[0], IMAGES[1]], (IMAGES[0], IMAGES[1])):
        found = Batch.of((images, targets))
        assert isinstance(found.inputs, list)
        assert (found.instances, instances_in(found.inputs)) == (2, 2)
        assert (len(found.first(1).inputs), found.first(1).labels) == (1, targets[:1])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (IMAGES, r"a tensor of shape \(4, 3, 6, 6\), without labels"),
        ([IMAGES], "a list of 1, without labels"),
        ({"pixel_values": IMAGES, "class_labels": LABELS}, "a dict of pixel_values, class_labels, without labels"),
        ([{"image": IMAGES[0], "label": 1}, {"image": IMAGES[1], "label": 0}], "default_collate"),
        ((IMAGES[0], 1), "DataLoader"),
        ("pixel_values", "a batch is inputs"),
        (None, "a batch is inputs"),
        ((), "a batch is inputs"),
    ],
)
def test_what_is_no_batch_is_refused(batch: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Batch.of(batch)


@pytest.mark.parametrize("loader", [IMAGES, (IMAGES, LABELS), [IMAGES, LABELS], {"x": IMAGES}, "train"])
def test_one_batch_is_no_loader(loader: Any) -> None:
    with pytest.raises(SettingError, match="one batch and not batches"):
        batches_in(loader)


def test_no_loader_at_all() -> None:
    with pytest.raises(SettingError, match="a DataLoader, or a list"):
        batches_in(3)  # type: ignore[arg-type]


class Takes(nn.Module):
    def forward(self, pixel_values: Tensor, mask: Tensor | None = None) -> Tensor:
        return pixel_values


def test_forward_gets_what_it_takes() -> None:
    inputs = {"pixel_values": IMAGES, "index": LABELS}
    assert list(fitting(inputs, Takes())) == ["pixel_values"]
    assert fitting({"image": IMAGES, "index": LABELS}, Takes()) is IMAGES
    assert fitting(IMAGES, Takes()) is IMAGES
    with pytest.raises(SettingError, match=r"takes pixel_values, mask, and the batch holds left, right"):
        fitting({"left": IMAGES, "right": IMAGES}, Takes())


def test_unlabelled_inputs() -> None:
    assert taken_apart(IMAGES) == (IMAGES, None)
    assert taken_apart({"x": IMAGES}) == ({"x": IMAGES}, None)


@pytest.mark.parametrize("inputs", [torch.zeros(8), torch.zeros(()), torch.zeros(0, 3), {}, "x", [None]])
def test_inputs_without_a_batch(inputs: Any) -> None:
    with pytest.raises(SettingError, match="no batch"):
        instances_in(inputs)
