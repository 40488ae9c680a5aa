"""Instance-wise sparsity: each image computes only the channels it needs."""

from isw_plugin.accelerate import load_accelerated
from isw_plugin.calibrate import Calibration, calibrate
from isw_plugin.errors import ISWError
from isw_plugin.gates import FBS, LCCL, ChannelGating, CVGate, Gate, MinNorm, RandomGate
from isw_plugin.loading import load_pretrained
from isw_plugin.measure import GateReport, MacReport, count_macs, evaluate
from isw_plugin.pruner import InstanceWisePruner
from isw_plugin.steering import steer_thresholds
from isw_plugin.toolkits.registry import PRUNERS, register

__all__ = [
    "FBS",
    "LCCL",
    "PRUNERS",
    "CVGate",
    "Calibration",
    "ChannelGating",
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
    "load_accelerated",
    "load_pretrained",
    "register",
    "steer_thresholds",
]
__version__ = "0.2.0"
