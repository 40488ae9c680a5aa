"""Feature boosting and suppression: saliencies from the layer's input, winners take all (Gao et al., ICLR 2019).

In the paper's words and order (its section 3; equations by their content):

    subsample   s = (mean |x_1|, ..., mean |x_Ci|)                of the layer's input, every channel
    saliency    g = relu(s phi + rho)                             rho starts at 1
    wta         pi = g where it is one of the ceil(d C) largest, 0 elsewhere
    output      relu(pi * (norm(conv(x)) + beta))                 norm: batch norm without scale and shift
    loss        task + lambda * sum over layers of E_x |g|_1      lambda 1e-8

Here pi multiplies the map behind its activation, which is the same for relu, as pi >= 0. The scale and shift of a
trained batch norm stay: its scale times g is the paper's g, its shift is multiplied too, and with rho = 1 a network
starts about as it was, but for the dropped channels. As in the authors' code, |pi|_1 is what is penalised, and a
saliency of 0 is no winner.

Left out: thresholds that are running means instead of the image's own, max and l2 pooling of the input, saliencies of
two layers, and the schedule of densities (``pruner.enable(density=...)`` between epochs does it).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from isw_plugin.errors import SettingError
from isw_plugin.gates.learned import Decision, LearnedGate
from isw_plugin.values import as_number

__all__ = ["FBS"]


@dataclass(frozen=True)
class FBS(LearnedGate):
    """Keep the channels of largest predicted saliency, and multiply them by it (see ``isw_plugin.gates.fbs``).

    Args:
        density: Share of channels that every image keeps, in (0, 1]; ceil(density * C) of them.
        l1: Weight of the sum of kept saliencies, a mean over images, >= 0.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from isw_plugin import InstanceWisePruner
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> images = torch.rand(2, 3, 8, 8)
        >>> pruner = InstanceWisePruner(model, images, 0.0, gate="fbs")
        >>> optimizer = torch.optim.SGD([*model.parameters(), *pruner.gate_parameters()], lr=0.1)
        >>> pruner.enable(density=0.25)
        >>> _ = model(images)
        >>> pruner.keep["0"].sum(1)
        tensor([2, 2])
    """

    density: float = 0.5
    l1: float = 1e-8
    reference: ClassVar = {"density": 1.0}

    def __post_init__(self) -> None:
        density = as_number("density", self.density, "the share of channels to keep is a number in (0, 1]")
        l1 = as_number("l1", self.l1, "the weight of saliencies is a finite number, 0 or more")
        if not 0 < density <= 1:
            raise SettingError(f"density={density}: the share of channels to keep lies in (0, 1]")
        if not (l1 >= 0 and math.isfinite(l1)):
            raise SettingError(f"l1={l1}: the weight of saliencies is a finite number, 0 or more")
        object.__setattr__(self, "density", density)  # frozen
        object.__setattr__(self, "l1", l1)

    def learn(self, layers: Sequence[nn.Module]) -> nn.Module:
        saliency = nn.Linear(sum(map(_inputs, layers)), _outputs(layers[0]))
        nn.init.trunc_normal_(saliency.weight, std=0.05)
        nn.init.ones_(saliency.bias)
        return saliency

    def at_layer(
        self, learned: nn.Module, number: int, layer: nn.Module, x: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor]:
        axis = x.dim() - 1 if isinstance(layer, nn.Linear) else 1
        size, kind = x.abs(), torch.promote_types(x.dtype, torch.float32)
        if x.dim() == 2:
            return y, size.to(kind)
        if axis == 1 and x.stride(1) == 1:  # channels last: a gradient laid out as the map is, three times as fast
            size, axis = size.movedim(1, -1), x.dim() - 1
        return y, size.mean([dim for dim in range(1, x.dim()) if dim != axis], dtype=kind)

    def decide(self, learned: nn.Module, notes: Sequence[Tensor], feature: Tensor, axis: int) -> Decision:
        with torch.autocast(feature.device.type, enabled=False):
            saliency = learned(torch.cat(list(notes), 1).to(next(learned.parameters()).dtype)).relu()
        keep = _winners(saliency.detach(), self.density)
        shape = [feature.shape[0]] + [1] * (feature.dim() - 1)
        shape[axis] = saliency.shape[1]
        boosted = feature * saliency.to(feature.dtype).view(shape)
        return Decision(keep, saliency.detach(), boosted, self.l1 * (saliency * keep).sum(1).mean())

    def macs(self, learned: nn.Module, layers: Sequence[nn.Module], macs: Sequence[float]) -> float:
        weight: Tensor = learned.weight  # type: ignore[assignment]  # of a linear layer
        return weight.numel()


def _winners(saliency: Tensor, density: float) -> Tensor:
    """Which of the saliencies (N, C) are among the ceil(density * C) largest of their row, and not 0."""
    count = math.ceil(density * saliency.shape[1] - 1e-9)  # 0.55 * 20 is a little more than 11 in binary
    largest = saliency.topk(count, dim=1).indices
    return torch.zeros_like(saliency, dtype=torch.bool).scatter(1, largest, True) & ~(saliency <= 0)  # NaN stays


def _inputs(layer: nn.Module) -> int:
    found: int = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels  # type: ignore[assignment]
    return found


def _outputs(layer: nn.Module) -> int:
    found: int = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels  # type: ignore[assignment]
    return found
