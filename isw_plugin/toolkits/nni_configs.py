"""NNI's config lists: which layers they choose, and what they set there."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from isw_plugin.errors import PatternError, SettingError

__all__ = ["Config", "chosen_layers"]

_SELECTION = ("op_names", "op_names_re", "op_types")
_EXCLUSION = ("exclude_op_names", "exclude_op_names_re", "exclude_op_types", "exclude")
_PARAMETERS = ("lambda_", "alpha", "beta")

Config = Mapping[str, Any]


def chosen_layers(model: nn.Module, config_list: Sequence[Config]) -> dict[str, dict[str, float]]:
    """Every module that the configs mean, with what they set there.

    Raises:
        SettingError: No list of dicts, an unknown key, or a config that chooses nothing.
        PatternError: A config that names no module.
    """
    _require_list(config_list)
    modules = dict(model.named_modules())
    chosen: dict[str, dict[str, float]] = {}
    excluded: set[str] = set()
    for config in config_list:
        _check(config, modules)
        names = _selected(model, config)
        if not names:
            types = ", ".join(sorted({type(module).__name__ for module in modules.values() if module is not model}))
            raise PatternError(f"{dict(config)} selects no module of {type(model).__name__}, which has {types}")
        if config.get("exclude"):
            excluded |= names
            continue
        for name in names:
            chosen[name] = chosen.get(name, {}) | {key: config[key] for key in _PARAMETERS if key in config}
    return {name: chosen[name] for name in modules if name in chosen and name not in excluded}


def _selected(model: nn.Module, config: Config) -> set[str]:
    from nni.compression.base.config import select_modules_by_config  # NNI is looked for by isw_plugin.toolkits.nni

    plain = {key: value for key, value in config.items() if key not in ("exclude", *_PARAMETERS)}
    # NNI gives a dict in the order of a set, which differs from process to process.
    return set(select_modules_by_config(model, plain)[0])


def _require_list(configs: Sequence[Config]) -> None:
    listed = bool(configs) and not isinstance(configs, Mapping | str)
    if not listed or not all(isinstance(config, Mapping) for config in configs):
        raise SettingError(f'config_list={configs!r}: a list of dicts, such as [{{"op_types": ["Conv2d"]}}]')


def _check(config: Config, modules: Mapping[str, nn.Module]) -> None:
    unknown = sorted(config.keys() - {*_SELECTION, *_EXCLUSION, *_PARAMETERS})
    if unknown:
        raise SettingError(
            f"{', '.join(unknown)} in {dict(config)}: a config of InstanceWisePruner has {', '.join(_SELECTION)}, "
            f"{', '.join(_EXCLUSION)}, {', '.join(_PARAMETERS)}; how many channels go is decided for every image"
        )
    for key in (*_SELECTION, *_EXCLUSION):
        if isinstance(config.get(key), str):
            raise SettingError(f"{key}={config[key]!r}: a list, [{config[key]!r}]")
    if not any(config.get(key) for key in _SELECTION):
        raise SettingError(f"{dict(config)} chooses no layers: give one of {', '.join(_SELECTION)}")
    for name in config.get("op_names", ()):
        if name not in modules:
            close = difflib.get_close_matches(name, modules, n=3, cutoff=0.3)
            raise PatternError(f"op_names has {name!r}, and there is no such module. Close names: {', '.join(close)}")
