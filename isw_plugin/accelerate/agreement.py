"""Whether a graph gives what the masked model gives: decisions, near-ties aside, and outputs."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from isw_plugin.functional import coefficient_of_variation
from isw_plugin.gates import CVGate, Gate

__all__ = ["Outcome", "difference", "tolerance_of"]

_TOLERANCE = 1e-4  # of the largest value
_COARSE = {torch.bfloat16: 2**-4, torch.float16: 2**-7}  # a rounding a layer, at other places when layers are fused


@dataclass(frozen=True)
class Outcome:
    """What one call gave, and decided: site name -> (N, C), in the order of execution."""

    output: Any
    keep: Mapping[str, Tensor] = field(default_factory=dict)
    norms: Mapping[str, Tensor] = field(default_factory=dict)


def tolerance_of(dtypes: Iterable[torch.dtype | None]) -> float:
    """How far results may be apart, of the largest, where a network computes in these types."""
    return max((_COARSE.get(dtype, _TOLERANCE) for dtype in dtypes if dtype is not None), default=_TOLERANCE)


def difference(found: Outcome, wanted: Outcome, gates: Mapping[str, Gate], tolerance: float) -> str:
    """How they differ by more than rounding; "" where they do not.

    Args:
        gates: By site; what decides by nothing but thresholds is a CVGate.
    """
    turned: Tensor | None = None  # instances with a decision that rounding turned; what follows is another's
    for site, keep in wanted.keep.items():
        other = found.keep.get(site)
        if other is None or other.shape != keep.shape:
            return f"{site} decided for {None if other is None else tuple(other.shape)} of {tuple(keep.shape)}"
        turned = torch.zeros_like(keep[:, 0]) if turned is None else turned
        apart = (other != keep).any(1) & ~turned
        if apart.any():
            ties = _ties(gates[site], found.norms[site], wanted.norms[site], other != keep, tolerance)
            if (apart & ~ties).any():
                return f"{int((apart & ~ties).sum())} of {len(keep)} instances decide otherwise at {site}"
            turned = turned | apart
    return _outputs_apart(found.output, wanted.output, turned, tolerance)


def _ties(gate: Gate, found: Tensor, norms: Tensor, turned: Tensor, tolerance: float) -> Tensor:
    """Instances whose decisions rounding may have turned, (N,)."""
    mean = norms.mean(1, keepdim=True)
    same = ((found - norms).abs() <= tolerance * norms.amax(1, keepdim=True)).all(1)
    if not isinstance(gate, CVGate):
        return same
    channels = ((norms - gate.beta * mean).abs() <= tolerance * norms.amax(1, keepdim=True)) | ~turned
    variation = (coefficient_of_variation(norms) - gate.alpha).abs() <= tolerance
    return same & (channels.all(1) | variation)


def _outputs_apart(found: Any, wanted: Any, turned: Tensor | None, tolerance: float) -> str:
    leaves, spec = pytree.tree_flatten(found)
    others, other_spec = pytree.tree_flatten(wanted)
    if spec != other_spec:
        return "outputs are packed otherwise"
    for leaf, other in zip(leaves, others, strict=True):
        problem = _apart(leaf, other, turned, tolerance)
        if problem:
            return problem
    return ""


def _apart(found: Any, wanted: Any, turned: Tensor | None, tolerance: float) -> str:
    if not isinstance(found, Tensor) or not isinstance(wanted, Tensor):
        same = type(found) is type(wanted) and (found is wanted or repr(found) == repr(wanted))
        return "" if same else f"an output is {found!r}, not {wanted!r}"
    if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
        return f"an output is {found.dtype} {tuple(found.shape)}, not {wanted.dtype} {tuple(wanted.shape)}"
    if turned is not None and turned.any():
        if not wanted.dim() or len(wanted) != len(turned):
            return ""  # instances are not apart in it
        found, wanted = found[~turned], wanted[~turned]
    if not wanted.numel():
        return ""
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return "" if torch.equal(found, wanted) else "an output of whole numbers differs"
    return _far(found, wanted, tolerance)


def _far(found: Tensor, wanted: Tensor, tolerance: float) -> str:
    sizes = wanted.abs().double().nan_to_num(0.0, 0.0, 0.0)
    largest = float(sizes.max())
    same = (found == wanted) | wanted.isnan()  # zeros times what a graph never reads
    gap = torch.where(same, 0, (found - wanted).abs()).double()
    worst = float(gap.max())
    if worst <= tolerance * largest:
        return ""
    share = worst / largest if largest else math.inf
    return f"an output is {share:.1e} of its largest value off"
