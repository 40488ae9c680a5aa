"""Sites: from layer-name patterns to feature maps, where they can be touched, and who reads them."""

from isw_plugin.sites.find import Found, find_sites
from isw_plugin.sites.patterns import Patterns
from isw_plugin.sites.probe import LAYERS, Inputs, default_inputs
from isw_plugin.sites.site import Consumer, Making, Site, Tap

__all__ = ["LAYERS", "Consumer", "Found", "Inputs", "Making", "Patterns", "Site", "Tap", "default_inputs", "find_sites"]
