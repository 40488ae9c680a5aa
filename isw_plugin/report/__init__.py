"""A page and figures from what ``evaluate`` recorded; knows no model."""

from isw_plugin.report.difficulty import EasyToHard, easy_to_hard
from isw_plugin.report.figures import frontier, latency_curve
from isw_plugin.report.image_figures import accuracy_curve, class_ratios, extreme_images, extremes
from isw_plugin.report.site_figures import channel_heatmap, cv_per_site, keep_per_site
from isw_plugin.report.write import write

__all__ = [
    "EasyToHard",
    "accuracy_curve",
    "channel_heatmap",
    "class_ratios",
    "cv_per_site",
    "easy_to_hard",
    "extreme_images",
    "extremes",
    "frontier",
    "keep_per_site",
    "latency_curve",
    "write",
]
