"""Keep decisions of a trained network as packed bits in one small file: real masks for benchmarks to run on."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["load", "save"]

_FACTS = "facts.json"


def save(path: Path, keep: dict[str, Tensor], **facts: Any) -> None:
    """Write ``keep`` (site name -> bool (N, C)) as a compressed .npz of bits, with JSON facts about it.

    Raises:
        ValueError: No site, or masks that are not bool (N, C) of one N.
    """
    instances = {len(mask) for mask in keep.values()}
    if len(instances) != 1 or any(mask.dtype != torch.bool or mask.dim() != 2 for mask in keep.values()):
        found = {name: (str(mask.dtype), tuple(mask.shape)) for name, mask in keep.items()}
        raise ValueError(f"decisions are bool (N, C) of one N at every site, found {found}")
    # Channels as rows: instances agree on most of them, and runs of equal bytes compress.
    packed = {name: np.packbits(mask.cpu().numpy().T, axis=1) for name, mask in keep.items()}
    stored = json.dumps({"instances": instances.pop(), "facts": facts})
    content = io.BytesIO()
    np.savez_compressed(content, **packed, **{_FACTS: np.array(stored)})  # type: ignore[arg-type]  # names are keys
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.getvalue())


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what ``save`` was given: site name -> bool (N, C) in the sites' order, and the facts."""
    with np.load(path, allow_pickle=False) as file:
        stored = json.loads(str(file[_FACTS]))
        count = stored["instances"]
        keep = {name: _unpacked(file[name], count) for name in file.files if name != _FACTS}
        return keep, stored["facts"]


def _unpacked(bits: Any, instances: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(bits, axis=1, count=instances).T.copy()).bool()
