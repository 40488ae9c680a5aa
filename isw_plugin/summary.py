"""What a pruner gates, as a table."""

from isw_plugin.settings import Settings
from isw_plugin.sites import Site

__all__ = ["site_table"]


def site_table(settings: Settings) -> str:
    """Layer -> where it is gated -> who reads it, and every layer left out with the reason."""
    found, heads, follow = settings.known(), settings.heads, settings.followers
    rows = [("layer", "channels", "gated at", "read by")]
    for site in found.sites:
        readers = ", ".join(consumer.layer for consumer in site.consumers)
        taps = ", ".join(str(tap) for tap in site.taps)
        norms = f"; {_known_by(site, settings)}" if heads else ""
        rows.append((" + ".join(site.layers), str(site.channels), taps, readers + norms))
    rows += [(name, "", "-", f"left out: {reason}") for name, reason in found.left_out.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows]
    channels = sum(site.channels for site in found.sites)
    predicted = f", {len(heads) + len(follow)} sites predicted" if heads else ""
    predicted += f", of which {len(follow)} follow" if follow else ""
    return "\n".join([*lines, f"{len(found.sites)} sites, {channels:,} channels{predicted}"])


def _known_by(site: Site, settings: Settings) -> str:
    """Whether a site's norms are predicted, and why not."""
    if site.name in settings.heads:
        return f"predicted from {', '.join(settings.heads[site.name].sources)}"
    if site.name in settings.followers:
        return f"follows {settings.followers[site.name]}"
    reason = site.making.reason or settings.unpredicted.get(site.name)
    return f"measured: {reason}" if reason else "measured"
