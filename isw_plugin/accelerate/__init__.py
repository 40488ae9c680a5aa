"""From a gated model to one that skips: trace, simplify, lower, fit, replay."""

from isw_plugin.accelerate.accelerated import Accelerated
from isw_plugin.accelerate.acceleration import BACKENDS, accelerate
from isw_plugin.accelerate.choose import Fitted
from isw_plugin.accelerate.loaded import LoadedModel
from isw_plugin.accelerate.record import Record
from isw_plugin.accelerate.saved import load_accelerated

__all__ = ["BACKENDS", "Accelerated", "Fitted", "LoadedModel", "Record", "accelerate", "load_accelerated"]
