"""From a gated model to one that skips: trace, simplify, lower, fit, replay."""

from isw_plugin.accelerate.accelerated import Accelerated
from isw_plugin.accelerate.acceleration import BACKENDS, accelerate
from isw_plugin.accelerate.choose import Fitted
from isw_plugin.accelerate.record import Record

__all__ = ["BACKENDS", "Accelerated", "Fitted", "Record", "accelerate"]
