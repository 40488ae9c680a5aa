"""Heads of random numbers, wherever norms can be predicted; sites behind depthwise layers follow."""

from collections.abc import Sequence
from typing import Any

import torch

from isw_plugin.sites import Site

__all__ = ["random_heads"]


def random_heads(sites: Sequence[Site]) -> dict[str, dict[str, Any]]:
    """Heads of all sites that can have one and follow none, and those that follow, as a pruner's state holds both."""
    generator = torch.Generator().manual_seed(0)
    named = {site.name: site for site in sites}
    can = {site.name: site for site in sites if not site.making.reason}
    followers = {name: site.making.follows for name, site in can.items() if site.making.follows in can}
    heads = {name: _head(site, named, generator) for name, site in can.items() if name not in followers}
    return {"heads": heads, "followers": followers}


def _head(site: Site, sites: dict[str, Site], generator: torch.Generator) -> dict[str, Any]:
    """Means of what is read, with strong and weak channels."""
    inputs = 2 * sum(sites[source].channels for source in site.making.sources)
    rows = torch.rand(site.channels, 1, generator=generator) * 1.9 + 0.1
    weight = rows * torch.randn(site.channels, inputs, generator=generator).abs() / inputs
    return {"sources": list(site.making.sources), "weight": weight, "bias": torch.zeros(site.channels)}
