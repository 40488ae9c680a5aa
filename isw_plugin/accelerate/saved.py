"""A fast model as a folder: ``accelerated.json`` (graphs, choices, where they were made) and safetensors."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isw_plugin.accelerate.choose import Fitted
from isw_plugin.accelerate.fit import Cost
from isw_plugin.accelerate.graphs import TensorNames, decoded_plan, encoded_plan, packed, unpacked
from isw_plugin.accelerate.loaded import Form, LoadedModel, leaf_form, warn_of_another_processor
from isw_plugin.accelerate.plan import Plan
from isw_plugin.accelerate.plans import Plans
from isw_plugin.accelerate.runtime import OnnxRuntime, is_installed, require_own
from isw_plugin.errors import EngineInputError, ISWError, NothingSavedError, StateMismatchError, UnsupportedError
from isw_plugin.folders import DOCUMENTS, parsed, path_of, replace, short, tensor_file, tensors_in
from isw_plugin.machine import hardware, own_version

__all__ = ["load_accelerated", "save"]

_VERSION = 1
_TRIED = (1, 2, 3, 5)  # instances that a graph is compared on before it is saved for any number


def save(folder: str | os.PathLike[str], plans: Plans, chosen: Mapping[str, Any], threads: int) -> None:
    """``Accelerated.save_pretrained``; ``chosen`` is what ``LoadedModel`` is made of besides graphs."""
    path = path_of(folder)
    if plans.masked.devices - {torch.device("cpu")}:
        raise UnsupportedError("graphs are saved for the CPU: move the model there and accelerate it again")
    names = TensorNames()
    held = [plan for form, plan in plans.by_form.items() if form[-1] is None]  # others are of autocast
    if not held:
        raise UnsupportedError("no graph is held that runs outside of autocast: call the model so, or prepare() it")
    versions = {"isw_plugin": own_version(), "torch": torch.__version__}
    facts = {
        **chosen,
        "made": {"hardware": hardware(), "threads": threads, **versions},
        "graphs": [_encoded_graph(plan, plans, names) for plan in held],
    }
    file = tensor_file("graphs", names.tensors)
    facts["weights"] = {"file": file.name, "sha256": file.digest}
    document = json.dumps({"version": _VERSION, "sha256": _digest(facts), **facts}, indent=1, allow_nan=False)
    replace(path, DOCUMENTS[1], [file], document.encode())


def load_accelerated(folder: str | os.PathLike[str]) -> LoadedModel:
    """Bring back a fast model that ``save_pretrained`` of an accelerated model wrote.

    Nothing is unpickled, timed, traced or downloaded, and the model that it was made from is not needed. Warns where
    the processor is another than the one that layers were chosen on, and where onnxruntime ran it and cannot here.

    Args:
        folder: What was saved.

    Returns:
        A module in eval mode that gives what the saved one gives, on inputs of the forms that were saved.

    Raises:
        SettingError: The folder is no path.
        NothingSavedError: Nothing was saved there.
        StateMismatchError: Another version, or a file that was changed or damaged.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from torch import nn
        >>> from isw_plugin import InstanceWisePruner, MinNorm, load_accelerated
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> images = torch.rand(2, 3, 8, 8)
        >>> fast = InstanceWisePruner(model, images, gate=MinNorm(0.5)).accelerate(images, backend="gated")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fast.save_pretrained(folder)
        ...     again = load_accelerated(folder)
        >>> torch.equal(again(images), fast(images))
        True
    """
    path = path_of(folder)
    if not (path / DOCUMENTS[1]).is_file():
        raise NothingSavedError(_what_is_there(path))
    facts, tensors = _stored(path)
    try:
        graphs = [(_form(graph), _decoded_graph(graph, tensors)) for graph in facts["graphs"]]
        fitted = Fitted(**facts["fitted"] | {"costs": [Cost(**cost) for cost in facts["fitted"]["costs"]]})
        made = {name: facts["made"][name] for name in ("hardware", "threads", "isw_plugin", "torch")}
        loaded = LoadedModel(graphs, facts["execution"], fitted, facts["choices"], made, facts["parameters"])
    except ISWError as error:
        raise StateMismatchError(f"{path / DOCUMENTS[1]}: {error}") from error
    except Exception as error:  # whatever an edited file leads to
        raise StateMismatchError(f"{path / DOCUMENTS[1]} is damaged: {short(error)}") from error
    warn_of_another_processor(made, hardware())
    return loaded


def _encoded_graph(plan: Plan, plans: Plans, names: TensorNames) -> dict[str, Any]:
    assert plan.example is not None  # it was compared before it was held
    flat, spec = plan.example.flat
    return {
        "inputs": {"packed": packed(spec), "leaves": [_encoded_leaf(leaf) for leaf in flat]},
        "instances": _instances(plan, plans),
        "runtime": None if plan.runtime is None else names.of(_as_tensor(plan.runtime.model())),
        **encoded_plan(plan, names),
    }


def _as_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _decoded_graph(graph: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Plan:
    plan = decoded_plan(graph, tensors)
    if graph["runtime"] is None:
        return plan
    if not is_installed():
        return _by_pytorch(plan, "is not installed here (extra onnxruntime)")
    content = tensors[graph["runtime"]].numpy().tobytes()
    require_own(content)
    try:
        return dataclasses.replace(plan, runtime=OnnxRuntime(content))
    except Exception as error:  # whatever onnxruntime says, an older one for instance
        return _by_pytorch(plan, f"cannot run it here ({short(error)})")


def _by_pytorch(plan: Plan, reason: str) -> Plan:
    text = f"the saved model was fastest by onnxruntime, which {reason}: it runs by PyTorch"
    warnings.warn(text, RuntimeWarning, stacklevel=4)
    return plan


def _instances(plan: Plan, plans: Plans) -> list[int] | None:
    """Numbers that the graph gave the right results for; None: for any, as far as can be told."""
    assert plan.example is not None
    for count in set(_TRIED) - plan.right_for:
        call = plan.example.like(count)
        with contextlib.suppress(EngineInputError):  # which says that the model itself takes no such number
            plans.check(plan, plans.masked.wanted(call), call)
    return None if plan.guards is None and plan.right_for.issuperset(_TRIED) else sorted(plan.right_for)


def _encoded_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        shape, dtype = leaf_form(leaf)
        return {"shape": list(shape), "dtype": dtype}
    if leaf is None or type(leaf) in (bool, int, str) or (type(leaf) is float and math.isfinite(leaf)):
        return {"value": leaf}
    raise UnsupportedError(f"inputs cannot be saved: a {type(leaf).__name__} is among them")


def _form(graph: Mapping[str, Any]) -> Form:
    inputs = graph["inputs"]
    leaves = tuple(
        leaf["value"] if "value" in leaf else (tuple(leaf["shape"]), leaf["dtype"]) for leaf in inputs["leaves"]
    )
    counts = graph["instances"]
    return Form(unpacked(inputs["packed"], len(leaves)), leaves, None if counts is None else tuple(counts))


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _stored(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    while True:
        facts = _read(path / DOCUMENTS[1])
        try:
            return facts, tensors_in(path / Path(facts["weights"]["file"]).name, facts["weights"]["sha256"])
        except StateMismatchError:
            if _read(path / DOCUMENTS[1]) == facts:  # else somebody saved in between
                raise


def _read(path: Path) -> dict[str, Any]:
    facts = parsed(path)
    if type(facts) is not dict or "version" not in facts:
        raise StateMismatchError(f"{path} was not written by save_pretrained, or is damaged: it has no version")
    if type(facts["version"]) is not int or facts.pop("version") != _VERSION:
        raise StateMismatchError(f"{path} is of another version; this isw_plugin reads version {_VERSION}: save anew")
    if facts.pop("sha256", None) != _digest(facts):
        raise StateMismatchError(f"{path} was changed after it was saved: save the accelerated model anew")
    return facts


def _what_is_there(folder: Path) -> str:
    if (folder / DOCUMENTS[0]).is_file():
        return f"{folder} holds a gated model, no accelerated one: load_pretrained(folder).accelerate(images) makes one"
    found = f"has no {DOCUMENTS[1]}" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
    return f"nothing was saved by save_pretrained of an accelerated model in {folder}, which {found}"
