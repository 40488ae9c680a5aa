"""The paper's gate."""

import math
from dataclasses import dataclass

from torch import Tensor

from isw_plugin.errors import SettingError
from isw_plugin.functional import keep_mask
from isw_plugin.values import as_number

__all__ = ["CVGate"]


@dataclass(frozen=True)
class CVGate:
    """Drop channels of small norm where norms vary much (section 3.3, Eq. 6-7).

    Args:
        alpha: CV threshold, >= 0: a map is prunable for an instance when its CV exceeds it.
        beta: Drop threshold as a multiple of the mean norm, in [0, 2).

    Example:
        >>> import torch
        >>> from isw_plugin import CVGate
        >>> norms = torch.tensor([[0.1, 0.2, 3.0, 4.7]])
        >>> feature = norms.view(1, 4, 1, 1)
        >>> CVGate(alpha=0.5, beta=1.0)(feature, norms)
        tensor([[False, False,  True,  True]])
    """

    alpha: float = 0.5
    beta: float = 1.0

    def __post_init__(self) -> None:
        alpha = as_number("alpha", self.alpha, "a CV threshold is a number, 0 or more")
        beta = as_number("beta", self.beta, "a drop threshold is a number in [0, 2)")
        if math.isnan(alpha) or alpha < 0:
            raise SettingError(f"alpha={alpha}: a CV threshold is 0 or more")
        if not 0 <= beta < 2:
            raise SettingError(f"beta={beta}: a drop threshold lies in [0, 2)")
        object.__setattr__(self, "alpha", alpha)  # frozen
        object.__setattr__(self, "beta", beta)

    @property
    def keeps_all(self) -> bool:
        return self.beta == 0

    def __call__(self, feature: Tensor, norms: Tensor) -> Tensor:
        return keep_mask(norms, self.alpha, self.beta)
