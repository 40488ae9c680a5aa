"""Sites: the maps that walks from layers end in, by the names that a user gives."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from isw_plugin.errors import NoSitesError
from isw_plugin.sites.making import Makings
from isw_plugin.sites.patterns import Patterns, select
from isw_plugin.sites.probe import Graph, Inputs, probe
from isw_plugin.sites.readers import Readers
from isw_plugin.sites.site import Site
from isw_plugin.sites.taps import Taps
from isw_plugin.sites.walk import Ends, Walks

__all__ = ["Found", "find_sites"]


@dataclass(frozen=True)
class Found:
    """The sites, in the order of execution, and why every other conv / linear layer has none."""

    sites: tuple[Site, ...]
    left_out: dict[str, str]


def find_sites(
    model: nn.Module, inputs: Inputs, layers: Patterns = "*", exclude: Patterns = (), scope: str = "all"
) -> Found:
    """Find the feature maps that the named layers make and a convolution or linear layer reads.

    Args:
        model: Left untouched.
        inputs: What its forward takes; only shapes are looked at.
        layers, exclude: Layer-name patterns (see ``isw_plugin.sites.patterns``).
        scope: "all" needs every user of a map to be reachable by a hook, "consumers" only its readers.

    Raises:
        ProbeError: The model cannot be run on the inputs.
        NoSitesError: There is no site, whatever the patterns.
        PatternError: A pattern that selects nothing.
    """
    graph = probe(model, inputs)
    readers = Readers(graph)
    taps = Taps(readers, scope)
    ends = Walks(graph, readers, taps).ends(_classifiers(model))
    makers, reasons = ends.layers, ends.reasons
    # A norm after a join makes a map of its own and can be named like a layer.
    nameable = graph.layers | {name: graph.modules[name] for names in makers.values() for name in names}
    if not makers:
        raise NoSitesError(
            f"{type(model).__name__} has {len(graph.layers)} conv / linear layers and no feature map that one of "
            f"them reads from another{_because(reasons)}"
        )
    chosen = set(select(nameable, layers, exclude))
    values = {value: names[0] for value, names in makers.items() if chosen & set(names)}
    makings = Makings(readers, values, ends.axes)
    sites = tuple(_site(graph, ends, value, readers, taps, makings) for value in values)
    for site_names in makers.values():
        if not chosen & set(site_names):
            reasons |= {name: "not selected by layers / exclude" for name in site_names if name in graph.layers}
    if not sites:
        raise NoSitesError(f"layers={layers!r} selects layers without a site{_because(reasons, chosen)}")
    return Found(sites, {name: reasons[name] for name in graph.modules if name in reasons})


def _because(reasons: dict[str, str], names: Iterable[str] | None = None) -> str:
    shown = [f"{name}: {reasons[name]}" for name in (reasons if names is None else sorted(names)) if name in reasons]
    return f" ({'; '.join(shown[:5])})" if shown else ""


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (named,) if isinstance(named, str) else tuple(named)


def _site(graph: Graph, ends: Ends, value: int, readers: Readers, taps: Taps, makings: Makings) -> Site:
    axis, names = ends.axes[value], ends.layers[value]
    made = {node.name: graph.shapes[node.outputs[0]][1:] for node in graph.nodes if node.name in names}
    return Site(
        name=names[0],
        layers=names,
        channels=graph.shapes[value][axis],
        axis=1 if axis == 1 else -1,
        shape=graph.shapes[value][1:],
        taps=taps.of(value, axis),
        consumers=tuple(readers.of(value, axis)),
        overwritten=any(value in call.inputs and _drops_in_place(graph.modules[call.name]) for call in graph.calls),
        making=makings.of(value, axis, names),
        made=tuple(made[name] for name in names if name in made),
    )


def _drops_in_place(module: nn.Module) -> bool:
    return isinstance(module, _DropoutNd) and module.inplace
