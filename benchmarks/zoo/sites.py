"""Part (a) of the zoo: the sites of one timm entry point, found without weights on ``meta``."""

import time
from collections import Counter
from typing import Any

import timm
import torch
from torch import nn

from isw_plugin.errors import ISWError
from isw_plugin.sites import LAYERS, Found, default_inputs, find_sites

__all__ = ["filled_twice", "module_of", "site_record", "unaccounted"]


def module_of(name: str) -> str:
    """The timm module that an entry point is defined in."""
    return timm.model_entrypoint(name).__module__.rpartition(".")[2]


def site_record(name: str) -> dict[str, Any]:
    """What finding the sites of an entry point gave: counts, seconds, reasons, and what went wrong.

    ``built`` is False where timm itself cannot build the model on ``meta``.
    """
    record: dict[str, Any] = {"model": name, "module": module_of(name), "built": False}
    try:
        with torch.device("meta"):
            model = timm.create_model(name)
    except Exception as error:
        return record | {"error": f"{type(error).__name__}: {error}"[:300]}
    start, cpu = time.perf_counter(), time.process_time()
    try:
        inputs = default_inputs(model)
        if inputs is None:
            return record | {"built": True, "error": "declares no input size"}
        found = find_sites(model, inputs)
    except ISWError as error:
        return record | {"built": True, "error": f"{type(error).__name__}: {error}"[:600]}
    seconds = {"seconds": round(time.perf_counter() - start, 3), "cpu_seconds": round(time.process_time() - cpu, 3)}
    return record | {"built": True, "error": ""} | seconds | _counts(model, found)


def unaccounted(model: nn.Module, found: Found) -> list[str]:
    """Conv and linear layers that are neither in exactly one site nor left out with a reason."""
    layers = [name for name, module in model.named_modules() if isinstance(module, LAYERS)]
    places = Counter(name for site in found.sites for name in site.layers)
    places.update(name for name, reason in found.left_out.items() if reason)
    return [name for name in layers if places[name] != 1]


def filled_twice(found: Found) -> list[str]:
    """Layers of which one input column is said to be filled by two sites."""
    columns = Counter(
        (consumer.layer, column)
        for site in found.sites
        for consumer in site.consumers
        for column, _ in consumer.columns(site.channels)
    )
    return sorted({layer for (layer, _), count in columns.items() if count > 1})


def _counts(model: nn.Module, found: Found) -> dict[str, Any]:
    layers = {name for name, module in model.named_modules() if isinstance(module, LAYERS)}
    return {
        "layers": len(layers),
        "in_sites": len({name for site in found.sites for name in site.layers} & layers),
        "sites": len(found.sites),
        "channels": sum(site.channels for site in found.sites),
        "unaccounted": unaccounted(model, found),
        "filled_twice": filled_twice(found),
        "reasons": dict(Counter(_kind(reason) for reason in found.left_out.values())),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _kind(reason: str) -> str:
    """A reason without the names in it."""
    return " ".join(word for word in reason.split() if "." not in word and not word.isdigit())
