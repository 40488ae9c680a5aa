"""The callables placed in a model: record norms, decide, mask.

Module-level classes, so that a model pickles with them; what they share holds no module but the parameters of gates,
and drops what calls recorded on copy and pickle, so that a copied model (EMA) has hooks and memory of its own.
"""

import inspect
import math
import sys
import threading
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from isw_plugin.errors import AttachError, ProbeError, RecordedWithoutGradError, UnsupportedError
from isw_plugin.followers import root
from isw_plugin.gates import Gate, LearnedGate, keeps_all
from isw_plugin.heads import UNSEEN, positions, statistics
from isw_plugin.learned_hooks import AtLayer, decision_of
from isw_plugin.masking import (
    Part,
    column_keep,
    reader_parts,
    require_instances,
    require_map,
    require_mask,
    size,
)
from isw_plugin.memory import Call, Memory
from isw_plugin.places import Hook, Step, hooks_in, steps_to
from isw_plugin.sites import Site

__all__ = [
    "Memory",
    "Part",
    "attach_at_first_forward",
    "attach_hooks",
    "column_keep",
    "detach_hooks",
    "has_hooks",
    "memory_of",
    "orphaned_memory",
    "reader_parts",
]

_Attach = Callable[[nn.Module, Memory, Any], None]


class _Begin(Hook):
    """A forward of the whole model starts.

    Args:
        places: The modules that have hooks, by name. Where each was found is kept, so that every forward can tell
            at once whether they are still the model's.
    """

    def __init__(self, memory: Memory, places: tuple[str, ...]) -> None:
        self.memory = memory
        self.places = places
        self.paths: list[Step] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"paths": None}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> None:
        if getattr(module, "_is_replica", False):
            raise UnsupportedError("nn.DataParallel runs gates in several threads: use DistributedDataParallel")
        compiling = torch.compiler.is_compiling()
        if self.memory.running is not None and not compiling and not _runs_inside_itself(module):
            self.memory.abandon()
        call = self.memory.begin(module.training)
        if (call.records or call.gates is not None) and not compiling and not self._are_in_place():
            self.paths = steps_to(module, self.memory, self.places)

    def _are_in_place(self) -> bool:
        return self.paths is not None and all(modules.get(name) is child for modules, name, child in self.paths)


def _runs_inside_itself(module: nn.Module) -> bool:
    frame, calls = sys._getframe(1), 0
    while frame is not None:
        calls += frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals["self"] is module
        frame = frame.f_back  # type: ignore[assignment]  # None ends the loop
    return calls > 1


class _End(Hook):
    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.memory.end()


class _FirstForward(Hook):
    """Attaches the hooks when the first inputs are seen; this forward already runs with them.

    Inputs on which the model cannot be probed are most often ones that it cannot take: the forward goes on without
    hooks, so that its own error is seen, and only if there is none does ``_FirstResult`` raise that of the probe.
    """

    def __init__(self, memory: Memory, attach: _Attach) -> None:
        self.memory = memory
        self.attach = attach
        self.failed: ProbeError | None = None
        self.probed: int | None = None  # id of the model that is being probed, so that its copy can tell

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"failed": None}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.probed not in (None, id(module)):
            return
        try:
            inputs: Any = _by_name(inspect.signature(module.forward), args, kwargs) if kwargs else args
        except TypeError:
            return  # forward says better what is wrong with these arguments
        attach_now: Callable[..., None] = self._attach
        if torch.compiler.is_compiling():
            attach_now = torch.compiler.disable(attach_now)  # type: ignore[no-untyped-call]  # of torch
        attach_now(module, inputs)
        if self.failed is None:
            begin: Any = next(hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _Begin))
            begin(module, args)

    def _attach(self, module: nn.Module, inputs: Any) -> None:
        with _FIRST:
            self.probed, self.failed = id(module), None
            try:
                self.attach(module, self.memory, inputs)
            except ProbeError as error:
                self.failed = error
            finally:
                self.probed = None


_FIRST = threading.RLock()  # first forwards in several threads: one attaches, the others wait


class _FirstResult(Hook):
    def __init__(self, first: _FirstForward) -> None:
        self.memory = first.memory
        self.first = first

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        failed, self.first.failed = self.first.failed, None
        if failed is not None:
            raise failed


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    named = signature.bind(*args, **kwargs).arguments
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return dict(named)


class _Observe(Hook):
    """Sees a site's map first: records its norms, decides, and under scope="all" masks it."""

    def __init__(self, memory: Memory, site: Site, applies: bool) -> None:
        self.memory = memory
        self.site = site
        self.applies = applies

    def observe(self, feature: Tensor) -> Tensor:
        """What the others see of the map."""
        memory, site = self.memory, self.site
        call = memory.running or memory.outside()
        recording = call.records and memory.weighed[site.name]
        if not recording and call.gates is None:
            return feature
        require_map(feature, site)
        gate = call.gates[site.name] if call.gates is not None else None
        head = call.heads.get(site.name) if gate is not None else None
        source = call.followers.get(site.name) if gate is not None else None
        learns = isinstance(gate, LearnedGate)
        if recording or not (head or source or learns):
            # What the gradient of the norms needs must outlive the forward.
            norms = memory.channel_norm(feature.clone() if recording and site.overwritten else feature, site.axis)
            if recording and call.whole:  # a checkpoint's recompute repeats the arithmetic, not the record
                self._record(call, norms)
        if gate is None:
            return feature
        if isinstance(gate, LearnedGate):
            return self._learned(call, gate, feature)
        if head is not None:
            known = {source: call.known(source, site.name) for source in head.sources}
            require_instances({name: of_map.rms for name, of_map in known.items()}, feature, site)
            call.read[site.name] = known
        if call.learns and (head or source):
            self._learn(call, norms if recording else memory.channel_norm(feature.detach(), site.axis), feature)
        if head is not None:
            norms = head.norms(known, positions(feature, site.axis))
        if source is not None:
            gated = self._followed(call, gate, feature, source)
        else:
            gated = self._gate(call, gate, feature, norms.detach(), feature.detach() if head is None else UNSEEN)
        if site.name in call.watched:
            left = gated.detach()
            keep = call.keep[site.name][-1]
            measured = head is None and source is None
            known_norms = torch.where(keep, norms.detach(), 0) if measured else memory.channel_norm(left, site.axis)
            call.statistics[site.name] = statistics(left, site.axis, known_norms)
        return gated

    def _learn(self, call: Call, true: Tensor, feature: Tensor) -> None:
        """Show the head that decides on this map what it should have predicted: norms of the last that follows it."""
        if self.site.name not in call.followers.values():
            decider = root(call.followers, self.site.name)
            rms = true.detach() / math.sqrt(positions(feature, self.site.axis))
            call.lessons.setdefault(decider, []).append((call.read[decider], rms))

    def _record(self, call: Call, norms: Tensor) -> None:
        if not torch.is_grad_enabled():
            raise RecordedWithoutGradError(
                f"{self.site.name} ran under no_grad inside a training forward, so its penalty would have no "
                "gradient. Checkpointing: pass use_reentrant=False. Frozen on purpose: exclude it, or give it "
                "per_site lambda_ 0"
            )
        call.recorded[self.site.name] = [*call.recorded.get(self.site.name, ()), norms]

    def _gate(self, call: Call, gate: Gate, feature: Tensor, norms: Tensor, seen: Any) -> Tensor:
        name = self.site.name
        if keeps_all(gate):
            call.decide(name, norms, torch.ones_like(norms, dtype=torch.bool))
            return feature
        keep = self._with_largest(gate(seen, norms), gate, norms)
        call.decide(name, norms, keep)
        return self.memory.mask(feature, keep, self.site.axis) if self.applies else feature

    def _followed(self, call: Call, gate: Gate, feature: Tensor, source: str) -> Tensor:
        """The map under the decision on the one that it is made of."""
        norms, keep = call.followed(source, self.site.name)
        require_instances({source: keep}, feature, self.site)
        call.decide(self.site.name, norms, keep)
        return feature if keeps_all(gate) else self.memory.mask(feature, keep, self.site.axis)

    def _with_largest(self, keep: Tensor, gate: Gate, norms: Tensor) -> Tensor:
        """What a gate keeps, and ``min_keep`` channels at least."""
        require_mask(keep, gate, norms, self.site.name)
        if not self.memory.min_keep:
            return keep
        largest = norms.topk(min(self.memory.min_keep, self.site.channels), dim=1).indices
        return keep.scatter(1, largest, True)

    def _learned(self, call: Call, gate: LearnedGate, feature: Tensor) -> Tensor:
        """The map that a gate with parameters makes of it."""
        made = decision_of(self.memory, call, gate, self.site, feature)
        keep = self._with_largest(made.keep, gate, made.scores)
        call.decide(self.site.name, made.scores.detach(), keep)
        return self.memory.mask(made.feature, keep, self.site.axis) if gate.whole_channels else made.feature


class _ObserveOutput(_Observe):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.observe(output)


class _ObserveInput(_Observe):
    def __init__(self, memory: Memory, site: Site, applies: bool, argument: int) -> None:
        super().__init__(memory, site, applies)
        self.argument = argument

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return _replaced(args, self.argument, self.observe(_argument(args, self.argument, self.site.name)))


class _Apply(Hook):
    """Masks a module's input by decisions that were made before."""

    def __init__(self, memory: Memory, reader: str, parts: tuple[Part, ...], axis: int, argument: int = 0) -> None:
        self.memory = memory
        self.reader = reader
        self.parts = parts
        self.axis = axis
        self.argument = argument

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        call = self.memory.running or self.memory.outside()
        gates = call.gates
        if gates is None or all(keeps_all(gates[part.site]) for part in self.parts):
            return None
        feature = _argument(args, self.argument, self.reader)
        keep = {part.site: call.decision(part.site, self.reader) for part in self.parts}
        columns = column_keep(self.parts, keep, size(feature, self.axis))
        if feature.dim() > 1 and size(feature, 0) != size(
            columns, 0
        ):  # a linear layer whose rows are places of instances
            columns = columns.repeat_interleave(feature.shape[0] // columns.shape[0], dim=0)
        return _replaced(args, self.argument, self.memory.mask(feature, columns, self.axis))


def _argument(args: tuple[Any, ...], index: int, name: str) -> Any:
    if index >= len(args):
        raise UnsupportedError(f"the map at {name} was passed by keyword, and by position when the sites were found")
    return args[index]


def _replaced(args: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*args[:index], value, *args[index + 1 :])


def attach_at_first_forward(model: nn.Module, memory: Memory, attach: _Attach) -> None:
    """Call ``attach(model, memory, inputs)`` when the model is first called; it must detach this hook."""
    first = _FirstForward(memory, attach)
    model.register_forward_pre_hook(first, prepend=True, with_kwargs=True)
    model.register_forward_hook(_FirstResult(first))


def attach_hooks(model: nn.Module, memory: Memory, sites: Sequence[Site], scope: str) -> None:
    """Place the hooks of all sites, that of the model last; gates and recording flags are read at run time."""
    modules = dict(model.named_modules())
    readers = reader_parts(sites) if scope == "consumers" else {}
    for site in sites:
        for number, layer in enumerate(site.layers if site.name in memory.learned else ()):
            modules[layer].register_forward_hook(AtLayer(memory, site.name, number))
        _observe_site(modules, memory, site, applies=scope == "all")
    for layer, parts in readers.items():
        axis = -1 if isinstance(modules[layer], nn.Linear) else 1
        modules[layer].register_forward_pre_hook(_Apply(memory, layer, parts, axis))
    model.register_forward_hook(_End(memory), always_call=True)
    begin = _Begin(memory, _places(sites, scope, memory))
    begin.paths = steps_to(model, memory, begin.places)
    waiting = [number for number, hook in model._forward_pre_hooks.items() if isinstance(hook, _FirstForward)]
    if not waiting:
        model.register_forward_pre_hook(begin, prepend=True)
    for number in waiting:  # in its place, since another thread's forward may start meanwhile
        model._forward_pre_hooks[number] = begin
        model._forward_pre_hooks_with_kwargs.pop(number)
    for number in [number for number, hook in model._forward_hooks.items() if isinstance(hook, _FirstResult)]:
        del model._forward_hooks[number]


def _places(sites: Sequence[Site], scope: str, memory: Memory) -> tuple[str, ...]:
    """Names of the modules that get hooks."""
    layers = [layer for site in sites if site.name in memory.learned for layer in site.layers]
    taps = [tap.module for site in sites for tap in (site.taps if scope == "all" else site.taps[:1])]
    return tuple(dict.fromkeys([*layers, *taps, *(reader_parts(sites) if scope == "consumers" else ())]))


def _observe_site(modules: dict[str, nn.Module], memory: Memory, site: Site, applies: bool) -> None:
    first, *others = site.taps
    if first.argument is None:
        modules[first.module].register_forward_hook(_ObserveOutput(memory, site, applies))
        return
    modules[first.module].register_forward_pre_hook(_ObserveInput(memory, site, applies, first.argument))
    for tap in others if applies else ():
        apply = _Apply(memory, f"{tap}, {tap.argument}", (Part(site.name, 0, 1),), site.axis, tap.argument or 0)
        modules[tap.module].register_forward_pre_hook(apply)


def detach_hooks(model: nn.Module) -> None:
    """Remove every hook of ours, also from modules that have left the model since, and nothing else."""
    begun = [hook for hook in model._forward_pre_hooks.values() if isinstance(hook, _Begin)]
    left = [child for hook in begun for _, _, child in hook.paths or ()]
    for module, hooks, number in list(hooks_in(chain(model.modules(), left))):
        hooks.pop(number, None)
        module._forward_pre_hooks_with_kwargs.pop(number, None)
        module._forward_hooks_always_called.pop(number, None)


def memory_of(model: nn.Module) -> Memory | None:
    """The memory of the pruner that was attached to this model, or None; one on a part or a whole is not its own."""
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, _Begin | _FirstForward):
            return hook.memory
    return None


def orphaned_memory(model: nn.Module) -> Memory | None:
    """The memory of hooks that are all in their places but for those on the model itself, or None."""
    hooks = [hooks[number] for _, hooks, number in hooks_in(model.modules())]
    memories = {id(hook.memory): hook.memory for hook in hooks}
    if len(memories) != 1 or any(isinstance(hook, _Begin | _FirstForward) for hook in hooks):
        return None
    (memory,) = memories.values()
    observed = [hook.site for hook in hooks if isinstance(hook, _Observe)]
    scope = "all" if any(hook.applies for hook in hooks if isinstance(hook, _Observe)) else "consumers"
    try:
        steps_to(model, memory, _places(observed, scope, memory))
    except AttachError:
        return None
    return memory if len(observed) == len(memory.gates) else None


def has_hooks(model: nn.Module) -> bool:
    """Whether any part of the model has hooks of ours."""
    return any(True for _ in hooks_in(model.modules()))
