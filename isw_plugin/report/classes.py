"""Labels and their names."""

from collections.abc import Sequence

import torch

from isw_plugin.errors import SettingError
from isw_plugin.measure import Records

__all__ = ["by_prune_ratio", "class_names", "ends"]


def class_names(records: Records, classes: Sequence[str] | None) -> list[str]:
    """A name for every label from 0 on; the labels themselves where there are no names.

    Raises:
        SettingError: A label is negative, or has no name.
    """
    lowest, highest = int(records.labels.min()), int(records.labels.max())
    if lowest < 0:
        raise SettingError(
            f"label {lowest}: labels count from 0, and -1 stands for what is no class (a detector's targets): draw "
            "report.frontier, keep_per_site and cv_per_site of those"
        )
    if classes is None:
        return [str(label) for label in range(highest + 1)]
    if isinstance(classes, str):
        raise SettingError(f"classes={classes!r}: a sequence of names, by label, not one name")
    if highest >= len(classes):
        raise SettingError(f"classes has {len(classes)} names, but label {highest} is in the records: one name a label")
    return [str(name) for name in classes]


def by_prune_ratio(records: Records) -> dict[int, float]:
    """Mean share of channels dropped of each label that is there, the highest first."""
    labels = torch.unique(records.labels).tolist()
    means = {int(label): records.prune_ratio[records.labels == label].mean().item() for label in labels}
    return dict(sorted(means.items(), key=lambda item: -item[1]))


def ends(labels: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of them: the first and the last, half each."""
    if len(labels) <= most:
        return list(labels)
    return [*labels[: most - most // 2], *labels[len(labels) - most // 2 :]]
