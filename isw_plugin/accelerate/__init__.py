"""From a gated model to one that skips: trace, simplify, lower, fit, replay."""

from isw_plugin.accelerate.accelerated import BACKENDS, Accelerated, Record, accelerate
from isw_plugin.accelerate.choose import Fitted

__all__ = ["BACKENDS", "Accelerated", "Fitted", "Record", "accelerate"]
