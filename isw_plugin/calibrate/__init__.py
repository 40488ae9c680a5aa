"""Choose gate parameters on held-out images, within a budget of accuracy or of MACs."""

from isw_plugin.calibrate.result import Calibration, Candidate
from isw_plugin.calibrate.search import calibrate

__all__ = ["Calibration", "Candidate", "calibrate"]
