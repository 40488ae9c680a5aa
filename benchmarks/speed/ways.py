"""One network at one size in every way to run it, timed in turns: rows of the engine's benchmark."""

import copy
import dataclasses
import pickle
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, fx, nn

from benchmarks.speed import handover
from benchmarks.speed.apart import Apart, Task
from benchmarks.speed.networks import force, gate_at, gate_by, network, noise
from benchmarks.speed.runtimes import frozen
from benchmarks.speed.steady import Probe, taken_rounds
from isw_plugin import InstanceWisePruner, count_macs
from isw_plugin.accelerate.accelerated import Accelerated
from isw_plugin.accelerate.execution import DenseConv
from isw_plugin.accelerate.layers import Layer, conv
from isw_plugin.accelerate.replay import Replayed
from isw_plugin.accelerate.simplify import constants_of, simplify
from isw_plugin.accelerate.trace import trace
from isw_plugin.gates import Gate

__all__ = ["FORCED", "TRAINED", "Row", "measure"]

_SECONDS = 0.04  # a timing repeats a short run for about this long
_TOLERANCE = 1e-3  # of the largest output
_PATIENCE = 20.0  # seconds to wait for other guests of the machine
TRAINED = "trained"  # instead of a keep ratio: the masks of a trained network
FORCED = ("forced inputs", "forced outputs")  # and a keep ratio: masks of each image; the latter are known before
Run = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; times in milliseconds a batch, ratios are medians of per-round ones.

    Attributes:
        steady: Rounds in which nothing else disturbed (``speed/steady.py``); figures are of these, if there are any.
        all_rounds: ``speedup`` over all rounds.
        takes: ``speedup`` in each process of several; the row is that of the middle one.
        openvino, onnxruntime: Milliseconds, like the others; None: not among the dense ways, as in rows before
            2026-11-30.
        handover: Nanoseconds in which a core handed a cache line to another, median over the rounds; None: one thread,
            or not measured.
    """

    network: str
    side: int
    batch: int
    masks: str
    keep: float
    best_eager: float
    prepacked: float
    compiled: float | None
    floor: float
    all_kept: float
    gated: float
    speedup: float
    bound: float
    all_kept_over_dense: float
    gated_over_floor: float
    error: float
    execution: str
    steady: int
    all_rounds: float
    takes: list[float] = dataclasses.field(default_factory=list)
    handover: float | None = None
    openvino: float | None = None
    onnxruntime: float | None = None

    @property
    def key(self) -> tuple[str, int, int, str]:
        """What was timed."""
        return self.network, self.side, self.batch, self.masks

    @property
    def share(self) -> float:
        return self.speedup / self.bound


@dataclasses.dataclass(frozen=True)
class _Gating:
    """The network gated in one way: how it runs, and what is known of it besides time."""

    fast: dict[str, Accelerated]  # timed in processes of their own
    floor: Run
    keep: float
    bound: float
    error: float
    execution: str


def measure(
    name: str,
    side: int,
    batch: int,
    masks: Sequence[float | str],
    rounds: int,
    compiles: bool,
    probe: Probe,
    others: Sequence[str] = (),
) -> list[Row]:
    """Time the network's dense ways and its gated ones, all in turns.

    Args:
        name: See ``networks.network``.
        masks: Keep ratios; TRAINED for the decisions stored with the network; one of FORCED and a keep ratio.
        rounds: Timed while the machine was steady, after one that warms up; a turn's first call is not counted.
        compiles: Whether torch.compile with freezing is among the dense ways.
        others: Of runtimes.RUNTIMES: also among them, each in a process of its own.

    Returns:
        A row for each of ``masks``.
    """
    model = network(name, side)
    images = noise(batch, side)
    with torch.inference_mode(), ExitStack() as stack:
        probe.wait(_PATIENCE)
        gatings = {str(ratio): _gating(model, images, ratio, name) for ratio in masks}
        folder = Path(stack.enter_context(TemporaryDirectory()))
        place = Task("", name, side, batch, torch.get_num_threads(), models=folder)
        dense = _dense(model, images, compiles) | _runtimes(place, others, stack)
        runs = dict(dense)
        for key, gating in gatings.items():
            runs |= {f"floor {key}": gating.floor}
            runs |= {f"{way} {key}": _ours(place, folder, fast, stack) for way, fast in gating.fast.items()}
        probe.wait(_PATIENCE)
        handovers: list[float] = []

        def is_steady() -> bool:
            if torch.get_num_threads() > 1:
                handovers.append(handover.nanoseconds())
            return probe.is_steady()

        timing = _Timing(list(runs), *taken_rounds(list(runs.values()), rounds, _SECONDS, is_steady), handovers)
    return [_row((name, side, batch, key), gating, list(dense), timing) for key, gating in gatings.items()]


def _dense(model: nn.Module, images: Tensor, compiles: bool) -> dict[str, Run]:
    pruner = InstanceWisePruner(model, images[:1])
    (plan,) = pruner.accelerate(images, backend="dense").plans.values()
    prepacked = Replayed(plan.graph)  # PyTorch's, whatever runtime won
    pruner.remove()
    channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    last = images.contiguous(memory_format=torch.channels_last)
    runs: dict[str, Run] = {
        "eager NCHW": lambda: model(images),
        "eager channels_last": lambda: channels_last(last),
        "prepacked": lambda: prepacked(images),
    }
    if compiles:
        runs["compiled"] = frozen(channels_last, last)
    return runs


def _runtimes(place: Task, others: Sequence[str], stack: ExitStack) -> dict[str, Run]:
    """Each in a process of its own, where no threads of PyTorch disturb its own.

    Raises:
        ValueError: One gives something else than the model.
    """
    runs: dict[str, Run] = {}
    for way in others:
        runs[way] = process = stack.enter_context(Apart(dataclasses.replace(place, way=way)))
        if process.error > _TOLERANCE:
            raise ValueError(f"{way} is {process.error:.0e} off on {place.name}")
    return runs


def _ours(place: Task, folder: Path, fast: Accelerated, stack: ExitStack) -> Run:
    """The same for one of ours."""
    file = folder / "fast.pickle"
    file.write_bytes(pickle.dumps(fast))
    return stack.enter_context(Apart(dataclasses.replace(place, way="gated", fast=file)))


def _gating(model: nn.Module, images: Tensor, masks: float | str, name: str) -> _Gating:
    pruner = InstanceWisePruner(model, images[:1])
    if masks == TRAINED:
        gate_by(pruner, name, len(images))
    elif str(masks).startswith(FORCED):
        way, ratio = str(masks).rsplit(" ", 1)
        force(pruner, float(ratio), len(images), way == FORCED[1])
    else:
        pruner = gate_at(pruner, images, float(masks))
        pruner.step()
    fast = pruner.accelerate(images, backend="gated")
    with fast.recording() as record:
        output = fast(images)
    error = ((output - model(images)).abs().max() / output.abs().max()).item()
    macs = count_macs(fast, images)
    floor = _floor(pruner, images)
    pruner.remove()
    return _Gating(
        {"all kept": _all_kept(fast), "gated": fast},
        floor,
        record.keep_ratio,
        macs.dense / macs.gated.mean().item(),
        error,
        _automatic(fast),
    )


def _automatic(fast: Accelerated) -> str:
    """What accelerate would have taken by what it timed."""
    return "dense" if fast.execution == "accelerated" and not fast.fitted.wins else fast.execution


def _all_kept(fast: Accelerated) -> Accelerated:
    """The same layers with gates that drop nothing; those with beta = 0 would be taken out."""
    opened = copy.deepcopy(fast)
    memory = opened._held.memory
    memory.gates = {name: _open(gate) for name, gate in memory.gates.items()}
    opened.plans.clear()  # made anew, with the choices that were made
    return opened


def _open(gate: Gate) -> Gate:
    change: dict[str, Any] = {"alpha": 1e9} if hasattr(gate, "alpha") else {"keep": torch.ones_like(gate.keep)}  # type: ignore[attr-defined]
    return dataclasses.replace(gate, **change)  # type: ignore[type-var]


def _floor(pruner: InstanceWisePruner, images: Tensor) -> Run:
    """Every convolution, prepacked, on a map that holds the mean kept channels only."""
    layers = _CompactLayers(simplify(trace(pruner.model, pruner.sites, images)))
    layers.run(images)
    modules, maps = zip(*layers.compact, strict=True)
    run = Replayed(lambda *maps: [module(x, None, None, None) for module, x in zip(modules, maps, strict=True)])
    return partial(run, *maps)


class _CompactLayers(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.constants = constants_of(graph)
        self.compact: list[tuple[DenseConv, Tensor]] = []

    def run_node(self, n: fx.Node) -> Any:
        layer = Layer.of(n, self.constants) if n.target is conv else None
        if layer is not None:
            args = self.fetch_args_kwargs_from_env(n)[0]
            self.compact.append(_compact(layer, args[0], args[4], *args[11:]))
        return super().run_node(n)


def _compact(layer: Layer, x: Tensor, keep: Tensor | None, out_keep: Tensor | None = None) -> tuple[DenseConv, Tensor]:
    count = x.shape[1] if keep is None else _mean_kept(keep)
    if layer.is_grouped:
        count = layer.groups * max(1, round(count / layer.groups))
    x = x[:, :count].contiguous(memory_format=torch.channels_last)
    if layer.is_depthwise:
        layer = dataclasses.replace(
            layer, weight=layer.weight[:count].contiguous(), bias=layer.bias[:count].contiguous(), groups=count
        )
    else:
        outputs = len(layer.weight) if out_keep is None or layer.is_grouped else _mean_kept(out_keep)
        weight = layer.weight[:outputs, : count // layer.groups].contiguous()
        layer = dataclasses.replace(layer, weight=weight, bias=layer.bias[:outputs].contiguous())
    return DenseConv(layer, x.shape), x


def _mean_kept(keep: Tensor) -> int:
    return max(1, round(keep.float().sum(1).mean().item()))


@dataclasses.dataclass(frozen=True)
class _Timing:
    runs: list[str]
    rounds: list[list[float]]
    steady: list[bool]
    handovers: list[float]

    def of(self, run: str, every: bool = False) -> list[float]:
        """Seconds in the steady rounds; in all where none was, or if asked."""
        place, every = self.runs.index(run), every or not any(self.steady)
        return [taken[place] for taken, steady in zip(self.rounds, self.steady, strict=True) if steady or every]

    def ratio(self, a: str, b: str, every: bool = False) -> float:
        return statistics.median(x / y for x, y in zip(self.of(a, every), self.of(b, every), strict=True))


def _row(about: tuple[str, int, int, str], gating: _Gating, dense: Sequence[str], timing: _Timing) -> Row:
    *_, key = about
    middle = {run: 1e3 * statistics.median(timing.of(run)) for run in timing.runs}
    best = min(dense, key=middle.__getitem__)
    return Row(
        *about,
        keep=gating.keep,
        best_eager=min(middle["eager NCHW"], middle["eager channels_last"]),
        prepacked=middle["prepacked"],
        compiled=middle.get("compiled"),
        floor=middle[f"floor {key}"],
        all_kept=middle[f"all kept {key}"],
        gated=middle[f"gated {key}"],
        speedup=timing.ratio(best, f"gated {key}"),
        bound=gating.bound,
        all_kept_over_dense=timing.ratio(f"all kept {key}", best),
        gated_over_floor=timing.ratio(f"gated {key}", f"floor {key}"),
        error=gating.error,
        execution=gating.execution,
        steady=sum(timing.steady),
        all_rounds=timing.ratio(best, f"gated {key}", every=True),
        handover=statistics.median(timing.handovers) if timing.handovers else None,
        openvino=middle.get("openvino"),
        onnxruntime=middle.get("onnxruntime"),
    )
