"""Instance-wise sparsity: each image computes only the channels it needs."""

from isw_plugin.errors import ISWError
from isw_plugin.gates import CVGate, Gate, MinNorm, RandomGate
from isw_plugin.pruner import InstanceWisePruner

__all__ = ["CVGate", "Gate", "ISWError", "InstanceWisePruner", "MinNorm", "RandomGate"]
__version__ = "0.1.0"
