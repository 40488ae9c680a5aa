"""Instance-wise sparsity: each image computes only the channels it needs."""

from isw_plugin.calibrate import Calibration, calibrate
from isw_plugin.errors import ISWError
from isw_plugin.gates import CVGate, Gate, MinNorm, RandomGate
from isw_plugin.measure import GateReport, MacReport, count_macs, evaluate
from isw_plugin.pruner import InstanceWisePruner

__all__ = [
    "CVGate",
    "Calibration",
    "Gate",
    "GateReport",
    "ISWError",
    "InstanceWisePruner",
    "MacReport",
    "MinNorm",
    "RandomGate",
    "calibrate",
    "count_macs",
    "evaluate",
]
__version__ = "0.1.0"
