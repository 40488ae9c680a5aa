"""Figures from records; knows no model."""

from isw_plugin.report.figures import channel_heatmap, frontier

__all__ = ["channel_heatmap", "frontier"]
