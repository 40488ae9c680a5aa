"""Gates: feature and norms -> which channels each instance keeps."""

from isw_plugin.gates.cv import CVGate
from isw_plugin.gates.fixed_ratio import MinNorm, RandomGate
from isw_plugin.gates.gate import Gate, keeps_all, with_parameters
from isw_plugin.gates.named import named_gate, stored_gate

__all__ = ["CVGate", "Gate", "MinNorm", "RandomGate", "keeps_all", "named_gate", "stored_gate", "with_parameters"]
