"""Measuring: MACs, time, and both with accuracy over a data set."""

from isw_plugin.measure.evaluate import ClassReport, GateReport, Records, SiteReport, evaluate
from isw_plugin.measure.latency import Latency, compare, hardware
from isw_plugin.measure.macs import MacReport, count_macs
from isw_plugin.measure.modes import measuring

__all__ = [
    "ClassReport",
    "GateReport",
    "Latency",
    "MacReport",
    "Records",
    "SiteReport",
    "compare",
    "count_macs",
    "evaluate",
    "hardware",
    "measuring",
]
