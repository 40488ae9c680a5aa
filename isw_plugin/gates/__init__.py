"""Gates: feature and norms -> which channels each instance keeps. One file a gate, to be read beside its paper."""

from isw_plugin.gates.channel_gating import ChannelGating
from isw_plugin.gates.cv import CVGate
from isw_plugin.gates.fbs import FBS
from isw_plugin.gates.fixed_ratio import MinNorm, RandomGate
from isw_plugin.gates.gate import Gate, keeps_all, with_parameters
from isw_plugin.gates.lccl import LCCL
from isw_plugin.gates.learned import Decision, LearnedGate
from isw_plugin.gates.named import BUILT_IN, named_gate, stored_gate

__all__ = [
    "BUILT_IN",
    "FBS",
    "LCCL",
    "CVGate",
    "ChannelGating",
    "Decision",
    "Gate",
    "LearnedGate",
    "MinNorm",
    "RandomGate",
    "keeps_all",
    "named_gate",
    "stored_gate",
    "with_parameters",
]
