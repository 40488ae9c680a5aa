"""What is compared: gates, and how each is trained within the same epochs."""

from dataclasses import dataclass

from isw_plugin import FBS, LCCL, ChannelGating, CVGate, Gate, InstanceWisePruner, MinNorm, RandomGate

__all__ = ["RIVALS", "Rival"]

# Maps that are added to on and on. LCCL multiplies by another map: all the way through they overflow in five steps.
_ADDED_TO = {"resnet20": ("0", "*.second.0"), "resnet18": ("conv1", "*.conv2")}
_DENSITIES = (1.0, 0.9, 0.8, 0.7, 0.6)  # of FBS, on the way to its own


@dataclass(frozen=True)
class Rival:
    """One row of the table.

    Attributes:
        gate: None: all channels, trained for as long.
        lambda_: Of feature decay.
        trained_as: Whose trained network is taken, where it is another row's.
        predicted: Whether norms are predicted, by heads fitted after training.
    """

    gate: Gate | None
    lambda_: float = 0.0
    trained_as: str = ""
    predicted: bool = False

    def leaves_out(self, network: str) -> tuple[str, ...]:
        """Patterns of sites that it has no gate at."""
        return _ADDED_TO.get(network, ()) if isinstance(self.gate, LCCL) else ()

    def before_step(self, pruner: InstanceWisePruner, progress: float) -> None:
        """Settings that follow the training, at a share of it in [0, 1): FBS's density falls in its first half."""
        if isinstance(self.gate, FBS):
            step = int(progress * 2 * len(_DENSITIES))
            density = max(_DENSITIES[step], self.gate.density) if step < len(_DENSITIES) else self.gate.density
            if density != pruner.gate.density:  # type: ignore[attr-defined]  # the gate is FBS
                pruner.set_thresholds(density=density)


_CV = CVGate(0.0, 0.4)
RIVALS: dict[str, Rival] = {
    "none": Rival(None),
    "cv": Rival(_CV, lambda_=1e-7),
    "cv, predicted": Rival(_CV, lambda_=1e-7, trained_as="cv", predicted=True),
    "min-norm": Rival(MinNorm(0.3), lambda_=1e-7),
    "random": Rival(RandomGate(0.3), lambda_=1e-7),
    "fbs": Rival(FBS(0.5)),
    "channel gating": Rival(ChannelGating(parts=4, target=1.0)),
    "lccl": Rival(LCCL("1x1")),
}
