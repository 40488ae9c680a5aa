"""From per-image decisions to static pruning: what images use, what can go, and how gates decide on the rest."""

from isw_plugin.batches import Batches
from isw_plugin.static.conversion import Conversion, convert
from isw_plugin.static.groups import Removal, reader_columns
from isw_plugin.static.use import ColumnUse, used_columns

__all__ = ["Batches", "ColumnUse", "Conversion", "Removal", "convert", "reader_columns", "used_columns"]
