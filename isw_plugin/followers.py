"""Sites that keep what another keeps: a depthwise layer makes them, channel by channel, of the other's map.

docs/predicting.md has the definition.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from isw_plugin.errors import SettingError, StateMismatchError
from isw_plugin.gates import Gate
from isw_plugin.sites import Site

__all__ = ["following", "last", "require_followed", "restored_followers", "root", "set_apart"]


def root(followers: Mapping[str, str], site: str) -> str:
    """The site that decides for this one: itself, unless it follows."""
    while site in followers:
        site = followers[site]
    return site


def following(followers: Mapping[str, str], decider: str) -> list[str]:
    """The sites for which this one decides, itself first."""
    return [decider, *(site for site in followers if root(followers, site) == decider)]


def last(followers: Mapping[str, str], site: str) -> str:
    """The end of the chain that this site decides for, whose norms its head predicts; itself where none follows."""
    after = {source: name for name, source in followers.items()}
    while site in after:
        site = after[site]
    return site


def set_apart(
    followers: Mapping[str, str], overrides: Mapping[str, Mapping[str, Any]], gates: Mapping[str, Gate]
) -> Iterator[tuple[str, str, Any]]:
    """Followers whose own gate parameters are not those that the site before them has: site, parameter, value.

    Args:
        overrides: What differs at sites, by name.
        gates: What would decide if none followed, by site name.
    """
    for site, source in followers.items():
        for name, value in overrides.get(site, {}).items():
            if name != "lambda_" and value != getattr(gates[source], name):
                yield site, name, value


def require_followed(
    followers: Mapping[str, str], overrides: Mapping[str, Mapping[str, Any]], gates: Mapping[str, Gate]
) -> None:
    """Raise SettingError where a site that follows is given gate parameters that the one that decides has not."""
    for site, name, value in set_apart({site: root(followers, site) for site in followers}, overrides, gates):
        decider = root(followers, site)
        raise SettingError(
            f"per_site has {name}={value!r} for {site}, which keeps what {followers[site]} keeps: set it for "
            f"{decider}, which decides with {getattr(gates[decider], name)!r}, or let {site} decide by itself, "
            'fit_predictors(..., depthwise="own")'
        )


def restored_followers(followers: Any, sites: Sequence[Site], heads: Mapping[str, Any]) -> dict[str, str]:
    """What a pruner's state has under "followers", for these sites.

    Args:
        heads: Of the same state; by site name.

    Raises:
        StateMismatchError: They are another model's, have heads of their own, or follow sites that are measured.
    """
    if not isinstance(followers, Mapping):
        raise StateMismatchError(f"followers are a {type(followers).__name__}, and not a dict by site name")
    here = {site.name: site.making.follows for site in sites}
    for name, source in followers.items():
        if name not in here:
            raise StateMismatchError(f"a follower of another model: there is no site {name!r} here")
        if not here[name] or source != here[name]:
            can = f"what can be followed is {here[name]}" if here[name] else "no depthwise layer alone makes its map"
            raise StateMismatchError(f"{name} follows {source!r}, and here {can}")
    for name, source in followers.items():
        if name in heads or root(followers, name) not in heads:
            what = "has a head of its own" if name in heads else f"{source}, which is measured, decides too late"
            raise StateMismatchError(f"{name} follows {source}: {what}")
    return {name: followers[name] for name in here if name in followers}
