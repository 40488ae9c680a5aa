"""What a model's outputs are worth: a score of every instance."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from isw_plugin.errors import SettingError

__all__ = ["Metric", "class_labels", "cross_entropy", "scored", "top1"]

Metric = Callable[[Any, Any], Any]

_LOGITS = ("logits", "out")
_HOPELESS = 1e9  # a loss that is not finite


def scored(metric: Metric, outputs: Any, labels: Any, instances: int) -> Tensor:
    """The metric of every instance, (N,) float64 on the CPU.

    Raises:
        SettingError: It gives something else.
    """
    found = metric(outputs, labels)
    try:
        scores = torch.as_tensor(found).double().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingError(f"metric gave a {type(found).__name__}: {_WANTED.format(instances)}") from error
    if scores.shape != (instances,):
        raise SettingError(f"metric gave {_form(found)} for {instances} instances: {_WANTED.format(instances)}")
    if not scores.isfinite().all():
        first = int(scores.isfinite().int().argmin())
        raise SettingError(f"metric gave {scores[first]} for instance {first} of a batch: {_WANTED.format(instances)}")
    return scores


def top1(outputs: Any, labels: Any) -> Tensor:
    """1 where the largest output is the label's, (N,)."""
    logits, classes = _classified(outputs, labels)
    return logits.argmax(1) == classes


def cross_entropy(outputs: Any, labels: Any) -> Tensor:
    """Loss of each instance, (N,)."""
    logits, classes = _classified(outputs, labels)
    loss = F.cross_entropy(logits.float(), classes, reduction="none")
    return loss.nan_to_num(nan=_HOPELESS, posinf=_HOPELESS)


def class_labels(labels: Any) -> Tensor | None:
    """Labels (N,) as int64, of any type that holds whole numbers; None where they are something else."""
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_complex():
        return None
    classes = labels.long()
    return classes if torch.equal(classes.to(labels.dtype), labels) else None


def _classified(outputs: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Logits (N, K), and labels of these K classes."""
    classes = class_labels(labels)
    if classes is None:
        raise SettingError(
            f"the labels are {_form(labels)}, and accuracy needs the number of a class for every instance, (N,): "
            "labels.argmax(1) where they are one-hot, labels.squeeze(1) where they are (N, 1), or another "
            "metric=(outputs, labels) -> (N,)"
        )
    logits = _logits(outputs)
    if logits.dim() != 2 or len(logits) != len(classes) or logits.shape[1] < 2:
        raise SettingError(
            f"the model gave {_form(logits)} for {len(classes)} labels, and accuracy needs (N, classes): pass "
            "metric=(outputs, labels) -> (N,)"
        )
    lowest, highest = int(classes.min()), int(classes.max())
    if lowest < 0 or highest >= logits.shape[1]:
        outside = lowest if lowest < 0 else highest
        raise SettingError(
            f"label {outside} is none of the {logits.shape[1]} classes, 0 to {logits.shape[1] - 1}: number the labels "
            "from 0, leave out images that are to be ignored, or pass metric="
        )
    return logits, classes


def _logits(outputs: Any) -> Tensor:
    """The class scores in what a model gives: a tensor, the first of several, or what is named logits (or out)."""
    found = outputs
    if isinstance(outputs, Mapping):
        found = next(
            (outputs[name] for name in (*_LOGITS, *([*outputs] * (len(outputs) == 1))) if name in outputs), None
        )
    elif not isinstance(outputs, Tensor):
        named = next((getattr(outputs, name) for name in _LOGITS if hasattr(outputs, name)), None)
        found = named if named is not None or not isinstance(outputs, tuple | list) or not outputs else outputs[0]
    if isinstance(found, Tensor):
        return found
    raise SettingError(f"the model gave {_form(outputs)}, without logits: pass metric=(outputs, labels) -> (N,)")


def _form(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {', '.join(map(str, value)) or 'nothing'}"
    if dataclasses.is_dataclass(value):
        return f"a {type(value).__name__} of {', '.join(field.name for field in dataclasses.fields(value))}"
    of = f" of {len(value)} {type(value[0]).__name__}" if isinstance(value, list | tuple) and value else ""
    return f"a {type(value).__name__}{of}"


_WANTED = "it gives one finite score of each instance, shape ({},), such as the mean over all axes but the first"
