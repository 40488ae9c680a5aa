"""Measuring: MACs, time, and both with accuracy over a data set."""

from isw_plugin.inputs import measuring
from isw_plugin.measure.evaluate import ClassReport, GateReport, Records, SiteReport, evaluate
from isw_plugin.measure.latency import Latency, compare, hardware
from isw_plugin.measure.macs import MacReport, count_macs
from isw_plugin.measure.sweep import LatencyPoint, latency_by_keep

__all__ = [
    "ClassReport",
    "GateReport",
    "Latency",
    "LatencyPoint",
    "MacReport",
    "Records",
    "SiteReport",
    "compare",
    "count_macs",
    "evaluate",
    "hardware",
    "latency_by_keep",
    "measuring",
]
