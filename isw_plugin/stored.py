"""What a saved folder says, checked before anything is made of it: whoever wrote it may have meant harm."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isw_plugin.errors import StateMismatchError
from isw_plugin.folders import DOCUMENTS, parsed, short, tensors_in
from isw_plugin.heads import heads_of
from isw_plugin.learned import learned_of
from isw_plugin.structure import WIDTHS

__all__ = ["FILE", "VERSION", "decoded_inputs", "stored"]

VERSION = 1
FILE = DOCUMENTS[0]
_FILES = ("weights", "heads", "learned")  # parts that name a file; the latter two only of pruners that have some

_PARTS = {
    "model": ("name", "architecture", "options", "edited", "modules"),
    "weights": ("file", "sha256"),
    "pruner": ("layers", "exclude", "inputs", "state"),
}
_LARGEST_INPUTS = 1 << 32  # elements of one example input
_LONGEST_PATTERN = 500
_INFINITIES = {word: float(word) for word in ("inf", "-inf", "nan")}  # as ``structure`` writes them

Check = Callable[[Any], bool]


def stored(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The facts of a folder, heads among the pruner's state, and the weights that belong to them.

    Raises:
        FileNotFoundError: Nothing was saved there.
        StateMismatchError: Of another version, damaged, or nothing that ``save_pretrained`` writes.
    """
    while True:
        facts = _read(folder / FILE)
        named = {part: facts[part] for part in _FILES if part in facts}
        try:
            tensors = {part: tensors_in(folder / file["file"], file["sha256"]) for part, file in named.items()}
        except StateMismatchError:
            later = _read(folder / FILE)
            if {part: later[part] for part in _FILES if part in later} == named:  # else somebody saved in between
                raise
            continue
        state = heads_of(facts["pruner"]["state"], tensors.get("heads", {}))
        facts["pruner"]["state"] = learned_of(state, tensors.get("learned", {}))
        return facts, tensors["weights"]


def decoded_inputs(encoded: Mapping[str, Any]) -> Any:
    """What ``encoded_inputs`` was given, its tensors on ``meta``.

    Raises:
        StateMismatchError: It gave something else.
    """
    value: Any
    kind, value = next(iter(encoded.items())) if isinstance(encoded, dict) and encoded else ("nothing", None)
    if kind == "shape" and encoded.keys() == {"shape", "dtype"}:
        dtype = getattr(torch, encoded["dtype"], None) if _is_word(encoded["dtype"]) else None
        if isinstance(dtype, torch.dtype) and _is_shape(value):
            return torch.empty(value, dtype=dtype, device="meta")
    elif len(encoded) == 1:
        if kind == "dict" and isinstance(value, dict):
            return {name: decoded_inputs(item) for name, item in value.items()}
        if kind in ("tuple", "list") and isinstance(value, list):
            return {"tuple": tuple, "list": list}[kind](decoded_inputs(item) for item in value)
        if kind == "number" and value in _INFINITIES:
            return _INFINITIES[value]
        if kind == "value" and (value is None or isinstance(value, bool | int | float | str)):
            return value
    raise StateMismatchError(f"{FILE} holds example inputs that were never saved: {short(encoded)}")


# -- reading -------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any]:
    facts = parsed(path)
    if type(facts) is not dict or "version" not in facts:
        raise StateMismatchError(f"{path} was not written by save_pretrained, or is damaged: it has no version")
    if facts["version"] != VERSION or isinstance(facts["version"], bool):
        raise StateMismatchError(
            f"{path} is of version {short(facts['version'])}, and this isw_plugin reads version {VERSION}: "
            "load it by the isw_plugin that wrote it, or save it anew"
        )
    parts = {part: facts[part] if isinstance(facts.get(part), dict) else {} for part in _PARTS}
    lacking = [f"{part}.{key}" for part, keys in _PARTS.items() for key in keys if key not in parts[part]]
    if lacking:
        raise StateMismatchError(f"{path} is damaged: it has no {', '.join(lacking)}")
    for part, checks in _CHECKS.items():
        _require(path, part, parts[part], checks)
    for part in _FILES[1:]:
        if part in facts and not _is_file(facts[part]):
            raise StateMismatchError(f"{path} is damaged: {part} cannot be {short(facts[part])}")
    for name, module in facts["model"]["modules"].items():
        _require(path, f"model.modules.{short(name)}", module, _MODULE)
    state = facts["pruner"]["state"] = _with_infinities(facts["pruner"]["state"])
    _require(path, "pruner.state", state, _STATE)
    return facts


def _require(path: Path, part: str, values: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    for key, fits in checks.items():
        if key in values and not fits(values[key]):
            raise StateMismatchError(f"{path} is damaged: {part}.{key} cannot be {short(values[key])}")


def _with_infinities(value: Any) -> Any:
    """Words for infinities as numbers again; they are no names here, which are keys."""
    if isinstance(value, dict):
        return {key: _with_infinities(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_infinities(item) for item in value]
    return _INFINITIES.get(value, value) if isinstance(value, str) else value


# -- what may stand where ------------------------------------------------------------------------


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) < 1 << 31


def _is_count(value: Any) -> bool:
    return _is_whole(value) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_]{0,40}", value) is not None


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) < 200 and Path(value).name == value != ".."


def _is_file(value: Any) -> bool:
    return isinstance(value, dict) and _is_file_name(value.get("file")) and _is_text(value.get("sha256"))


def _is_head(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"sources"} or not isinstance(value["sources"], list):
        return False
    return all(map(_is_text, value["sources"]))


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value)) and len(value) == len(set(value))


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value)) and math.prod(value) <= _LARGEST_INPUTS


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_count(side) and 0 < side <= 4096 for side in value)


def _are_patterns(value: Any) -> bool:
    several = value if isinstance(value, list) else [value]
    return all(isinstance(pattern, str) and len(pattern) <= _LONGEST_PATTERN for pattern in several)


def _are_overrides(value: Any) -> bool:
    if not isinstance(value, dict) or not all(isinstance(override, dict) for override in value.values()):
        return False
    # A regular expression of somebody else's can take for ever; saving writes names instead.
    return all(_are_patterns(pattern) and not pattern.startswith("re:") for pattern in value)


def _are_options(value: Any) -> bool:
    return isinstance(value, dict) and all(key in _OPTIONS and _OPTIONS[key](value[key]) for key in value)


def _are_widths(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() <= WIDTHS


def _or_none(fits: Check) -> Check:
    return lambda value: value is None or fits(value)


def _mapping_to(fits: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _is_gate(value: Any) -> bool:
    return isinstance(value, dict) and _is_text(value.get("type")) and _is_mapping(value.get("parameters"))


# Of ``timm.create_model``: what ``saving.origin`` finds out, and nothing else; one of them opens files.
_OPTIONS: dict[str, Check] = {
    "num_classes": _or_none(_is_count),
    "in_chans": lambda value: _is_count(value) and value > 0,
    "drop_rate": lambda value: _is_number(value) and 0 <= value <= 1,
    "global_pool": _is_word,
    "img_size": _is_size,
}
_CHECKS: dict[str, dict[str, Check]] = {
    "model": {
        "name": _is_text,
        "architecture": _or_none(_is_text),
        "options": _are_options,
        "edited": _or_none(_is_text),
        "modules": _mapping_to(lambda module: isinstance(module, dict) and _MODULE.keys() == module.keys()),
    },
    "weights": {"file": _is_file_name, "sha256": _is_text},
    "pruner": {"layers": _are_patterns, "exclude": _are_patterns, "inputs": _is_mapping, "state": _is_mapping},
}
_MODULE: dict[str, Check] = {"type": _is_text, "widths": _are_widths, "settings": _is_mapping}
_STATE: dict[str, Check] = {
    "version": _is_whole,
    "lambda_": _is_number,
    "gate": _is_gate,
    "scope": _is_text,
    "reduction": _is_text,
    "per_site": _are_overrides,
    "sites": _mapping_to(_is_count),
    "references": _mapping_to(lambda norm: _is_number(norm) and 0 < norm < math.inf),
    "calibration": _or_none(_is_mapping),
    "budget": _or_none(lambda share: _is_number(share) and 0 < share <= 1),
    "min_keep": _is_count,
    "heads": _mapping_to(_is_head),
    "followers": _mapping_to(_is_text),
    "learned": _mapping_to(_are_names),
    "enabled": lambda value: isinstance(value, bool),
}
