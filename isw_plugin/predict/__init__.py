"""Heads that know norms before the layer runs: fitted in closed form from images without labels."""

from isw_plugin.predict.fit import fit
from isw_plugin.predict.follow import follow
from isw_plugin.predict.report import HeadReport, Predictors

__all__ = ["HeadReport", "Predictors", "fit", "follow"]
