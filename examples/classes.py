"""A folder that holds some of a model's classes: which rows of its classifier those are."""

import difflib
from collections.abc import Sequence

import torch
from images import DataError
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

__all__ = ["keep_classes", "known_classes", "rows_of", "some_rows"]


def known_classes(model: nn.Module) -> list[tuple[str, ...]]:
    """The names of each class of a model that has as many as ImageNet, WordNet id first; else none."""
    subset = infer_imagenet_subset(model)
    if subset is None:
        return []
    info = ImageNetInfo(subset)
    ids, descriptions = info.label_names(), info.label_descriptions()
    return [(name, text, *text.split(", ")) for name, text in zip(ids, descriptions, strict=True)]


def some_rows(model: nn.Module, folders: Sequence[str]) -> list[int]:
    """The rows of a model's classifier that these folders are named after; none where it is not known what they mean.

    Raises:
        DataError: The folders are fewer than the model's classes, and one is named after none or several.
    """
    names = known_classes(model)
    if not names or len(folders) > len(names):
        return []
    try:
        return rows_of(folders, names)
    except DataError:
        if len(folders) == len(names):
            return []  # as many classes of one's own
        raise


def rows_of(folders: Sequence[str], names: Sequence[tuple[str, ...]]) -> list[int]:
    """The class that each folder is named after, by WordNet id or by name.

    Raises:
        DataError: A folder is named after none, or after several; nearest names are told.
    """
    rows: dict[str, set[int]] = {}
    for row, of_class in enumerate(names):
        for name in of_class:
            rows.setdefault(_plain(name), set()).add(row)
    found = [rows.get(_plain(folder), set()) for folder in folders]
    unknown = [folder for folder, of_folder in zip(folders, found, strict=True) if not of_folder]
    if unknown:
        close = difflib.get_close_matches(_plain(unknown[0]), rows, n=3)
        hint = f"; close names: {', '.join(close)}" if close else ""
        raise DataError(
            f"{len(unknown)} of {len(folders)} folders are named after no class of the model (by WordNet id or name), "
            f"such as {unknown[0]!r}{hint}"
        )
    for folder, of_folder in zip(folders, found, strict=True):
        if len(of_folder) > 1:
            ids = ", ".join(names[row][0] for row in sorted(of_folder))
            raise DataError(f"{folder!r} is the name of {len(of_folder)} classes: name the folder {ids}")
    chosen = [of_folder.pop() for of_folder in found]
    twice = next((folder for folder, row in zip(folders, chosen, strict=True) if chosen.count(row) > 1), None)
    if twice is not None:
        raise DataError(f"{twice!r} and another folder are named after the same class")
    return chosen


def keep_classes(model: nn.Module, rows: Sequence[int]) -> None:
    """Leave these rows of a timm model's classifier, in this order.

    Raises:
        DataError: Its classifier is no linear layer or 1x1 convolution.
    """
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    odd = [type(head).__name__ for head in heads if not isinstance(head, nn.Linear | nn.Conv2d)]
    if odd:
        raise DataError(f"the classifier is a {odd[0]}, of which no rows can be taken: a linear layer is needed")
    for head in heads:
        with torch.no_grad():
            head.weight = nn.Parameter(head.weight[list(rows)].clone())
            if head.bias is not None:
                head.bias = nn.Parameter(head.bias[list(rows)].clone())
        if isinstance(head, nn.Linear):
            head.out_features = len(rows)
        else:
            head.out_channels = len(rows)
    model.num_classes = len(rows)


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
