"""The callables placed in a model, and the memory they share: record norms, decide, mask.

Module-level classes, so that a model pickles with them; what they share holds no module, and drops its
tensors on copy and pickle, so that a copied model (EMA) has hooks and memory of its own.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from isw_plugin.errors import RecordedWithoutGradError, SettingError, UnsupportedError
from isw_plugin.functional import channel_norm
from isw_plugin.gates import Gate, keeps_all
from isw_plugin.sites import Consumer, Site

__all__ = [
    "Memory",
    "Part",
    "attach_at_first_forward",
    "attach_hooks",
    "column_keep",
    "detach_hooks",
    "has_hooks",
    "memory_of",
    "reader_parts",
]

_FORGOTTEN = 100  # training forwards without a penalty taken, after which something is surely wrong


class Memory:
    """What the hooks of one model share.

    Attributes:
        gates: By site name; which channels to keep.
        recording: By site name; whether its norms enter the penalty.
        enabled: Whether gates act.
        min_keep: Channels that every instance keeps at every site, the largest.
        channel_norm: What takes a map's norms (Eq. 3).
        tape: One dict a training forward: site name -> norms (N, C), in the graph.
        norms, keep: Of the last gated forward, by site name, (N, C), detached.
        owner: What the pruner of a copied model is rebuilt from; holds no module either.
    """

    def __init__(self, owner: Any = None) -> None:
        self.owner = owner
        self.gates: dict[str, Gate] = {}
        self.recording: dict[str, bool] = {}
        self.enabled = False
        self.min_keep = 0
        self.channel_norm: Callable[[Tensor, int], Tensor] = channel_norm
        self.running = False
        self.training = False  # this forward, or the last, records
        self.repeats = False  # so did the last with grad, which is what a checkpoint recomputes
        self.tape: list[dict[str, Tensor]] = []
        self.norms: dict[str, Tensor] = {}
        self.keep: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        dropped: dict[str, Any] = {"tape": [], "norms": {}, "keep": {}, "running": False}
        return self.__dict__ | dropped | {"next_hook": RemovableHandle.next_id}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # In another process, hooks registered later must not get the numbers of those that come with the model.
        RemovableHandle.next_id = max(RemovableHandle.next_id, state.pop("next_hook"))
        self.__dict__.update(state)

    def clear(self) -> None:
        """Forget all that was recorded and decided."""
        self.take()
        self.norms.clear()
        self.keep.clear()

    def take(self) -> list[dict[str, Tensor]]:
        """The tape, which is empty from here on."""
        self._drop_unfinished()
        tape, self.tape = self.tape, []
        return [norms for norms in tape if norms]

    def _drop_unfinished(self) -> None:
        if self.running and self.training:
            self.tape.pop()  # that forward raised
        self.running = False

    def begin(self, training: bool) -> None:
        """A forward of the whole model starts, in training mode or not."""
        self._drop_unfinished()
        grad = torch.is_grad_enabled()
        self.running = True
        self.training = training and grad and any(self.recording.values())
        if self.enabled:
            self.norms, self.keep = {}, {}  # a site that this forward skips has no decision
        if grad:
            self.repeats = self.training
        if self.training:
            self.tape.append({})
            if len(self.tape) == _FORGOTTEN:
                warnings.warn(
                    f"{_FORGOTTEN} training forwards were recorded and no penalty taken: their graphs stay in memory. "
                    "Call pruner.regularize(model, loss) before backward, or set pruner.lambda_ = 0",
                    stacklevel=2,
                )

    def end(self) -> None:
        # Nothing more: torch.compile runs this hook as a graph of its own, and would look into the tape's tensors.
        self.running = False


@dataclass(frozen=True)
class Part:
    """Columns of a reader's input that a site's channels fill (see ``Consumer``)."""

    site: str
    start: int
    repeat: int
    channels: tuple[int, ...] | None = None


class _Begin:
    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if getattr(module, "_is_replica", False):
            raise UnsupportedError("nn.DataParallel runs gates in several threads: use DistributedDataParallel")
        self.memory.begin(module.training)


class _End:
    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.memory.end()


class _FirstForward:
    """Attaches the hooks when the first inputs are seen; this forward already runs with them."""

    def __init__(self, memory: Memory, attach: Callable[[nn.Module, Any], None]) -> None:
        self.memory = memory
        self.attach = attach

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs: Any = args
        if kwargs:
            inputs = _by_name(inspect.signature(module.forward), args, kwargs)
        attach: Callable[..., None] = self.attach
        if torch.compiler.is_compiling():
            attach = torch.compiler.disable(attach)  # type: ignore[no-untyped-call]  # of torch
        attach(module, inputs)
        _Begin(self.memory)(module, args)


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    named = signature.bind(*args, **kwargs).arguments
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return dict(named)


class _Observe:
    """Sees a site's map first: records its norms, decides, and under scope="all" masks it."""

    def __init__(self, memory: Memory, site: Site, applies: bool) -> None:
        self.memory = memory
        self.site = site
        self.applies = applies

    def observe(self, feature: Tensor) -> Tensor:
        """What the others see of the map."""
        memory, site = self.memory, self.site
        # Outside a forward this is a checkpoint's recompute: it repeats the arithmetic, not the record.
        recording = (memory.training if memory.running else memory.repeats) and memory.recording[site.name]
        if not (recording or memory.enabled):
            return feature
        # What the gradient of the norms needs must outlive the forward.
        norms = memory.channel_norm(feature.clone() if recording and site.overwritten else feature, site.axis)
        if recording and memory.running:
            self._record(norms)
        return self._gate(feature, norms.detach()) if memory.enabled else feature

    def _record(self, norms: Tensor) -> None:
        if not torch.is_grad_enabled():
            raise RecordedWithoutGradError(
                f"{self.site.name} ran under no_grad inside a training forward, so its penalty would have no "
                "gradient. Checkpointing: pass use_reentrant=False. Frozen on purpose: exclude it, or give it "
                "per_site lambda_ 0"
            )
        self.memory.tape[-1][self.site.name] = norms

    def _gate(self, feature: Tensor, norms: Tensor) -> Tensor:
        memory, name = self.memory, self.site.name
        gate = memory.gates[name]
        memory.norms[name] = norms
        if keeps_all(gate):
            memory.keep[name] = torch.ones_like(norms, dtype=torch.bool)
            return feature
        keep = gate(feature.detach(), norms)
        if keep.dtype != torch.bool or keep.shape != norms.shape:
            raise SettingError(
                f"{gate} gave {keep.dtype} of shape {tuple(keep.shape)} at {name}: a gate gives bool of shape "
                f"{tuple(norms.shape)}, True where the channel is kept"
            )
        if memory.min_keep:
            largest = norms.topk(min(memory.min_keep, norms.shape[1]), dim=1).indices
            keep = keep.scatter(1, largest, True)
        memory.keep[name] = keep
        return _mask(feature, keep, self.site.axis) if self.applies else feature


class _ObserveOutput(_Observe):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.observe(output)


class _ObserveInput(_Observe):
    def __init__(self, memory: Memory, site: Site, applies: bool, argument: int) -> None:
        super().__init__(memory, site, applies)
        self.argument = argument

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return _replaced(args, self.argument, self.observe(args[self.argument]))


class _Apply:
    """Masks a module's input by decisions that were made before."""

    def __init__(self, memory: Memory, parts: tuple[Part, ...], axis: int, argument: int = 0) -> None:
        self.memory = memory
        self.parts = parts
        self.axis = axis
        self.argument = argument

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        memory = self.memory
        if not memory.enabled or all(keeps_all(memory.gates[part.site]) for part in self.parts):
            return None
        feature = args[self.argument]
        keep = column_keep(self.parts, memory.keep, feature.shape[self.axis])
        if feature.shape[0] != keep.shape[0]:  # a linear layer whose rows are places of instances
            keep = keep.repeat_interleave(feature.shape[0] // keep.shape[0], dim=0)
        return _replaced(args, self.argument, _mask(feature, keep, self.axis))


def column_keep(parts: Sequence[Part], keep: dict[str, Tensor], columns: int) -> Tensor:
    """Which input columns of a reader survive, (N, columns): its sites' decisions, True between them."""
    if any(part.channels for part in parts):
        return _cut_keep(parts, keep, columns)
    pieces: list[Tensor] = []
    filled = 0
    for part in sorted(parts, key=lambda part: part.start):
        kept = keep[part.site] if part.repeat == 1 else keep[part.site].repeat_interleave(part.repeat, dim=1)
        pieces += [*_ungated(kept, part.start - filled), kept]
        filled = part.start + kept.shape[1]
    pieces += _ungated(pieces[0], columns - filled)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _cut_keep(parts: Sequence[Part], keep: dict[str, Tensor], columns: int) -> Tensor:
    """Where maps were cut or their channels shuffled: in runs that are slices, since an index would be copied anew."""
    held: list[tuple[str, int]] = [("", at) for at in range(columns)]
    for part in parts:
        reader = Consumer("", part.start, part.repeat, part.channels)
        for column, channel in reader.columns(keep[part.site].shape[1]):
            held[column] = (part.site, channel)
    first = keep[parts[0].site]
    known = keep | {"": first.new_ones(first.shape[0], columns)}
    return torch.cat([known[name][:, start:stop:step] for name, start, stop, step in _runs(held)], dim=1)


def _runs(held: Sequence[tuple[str, int]]) -> Iterator[tuple[str, int, int, int]]:
    """Columns as slices of their sites' channels: site, start, stop, step."""
    at = 0
    while at < len(held):
        (name, start), end = held[at], at + 1
        step = held[end][1] - start if end < len(held) and held[end][0] == name else 0
        while step > 0 and end < len(held) and held[end] == (name, start + step * (end - at)):
            end += 1
        yield name, start, start + max(step, 1) * (end - at - 1) + 1, max(step, 1)
        at = end


def _ungated(keep: Tensor, columns: int) -> list[Tensor]:
    return [keep.new_ones(keep.shape[0], columns)] if columns else []


def _mask(feature: Tensor, keep: Tensor, axis: int) -> Tensor:
    shape = [keep.shape[0]] + [1] * (feature.dim() - 1)  # len() would make it a constant for torch.export
    shape[axis] = keep.shape[1]
    return torch.where(keep.view(shape), feature, 0)  # masked_fill would make channels_last maps contiguous


def _replaced(args: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*args[:index], value, *args[index + 1 :])


_HOOKS = (_Begin, _End, _FirstForward, _Observe, _Apply)


def attach_at_first_forward(model: nn.Module, memory: Memory, attach: Callable[[nn.Module, Any], None]) -> None:
    """Call ``attach(model, inputs)`` when the model is first called; it must detach this hook."""
    model.register_forward_pre_hook(_FirstForward(memory, attach), prepend=True, with_kwargs=True)


def attach_hooks(model: nn.Module, memory: Memory, sites: Sequence[Site], scope: str) -> None:
    """Place the hooks of all sites; gates and recording flags are read from the memory at run time."""
    modules = dict(model.named_modules())
    model.register_forward_pre_hook(_Begin(memory), prepend=True)
    for site in sites:
        _observe_site(modules, memory, site, applies=scope == "all")
    if scope == "consumers":
        for layer, parts in reader_parts(sites).items():
            axis = -1 if isinstance(modules[layer], nn.Linear) else 1
            modules[layer].register_forward_pre_hook(_Apply(memory, parts, axis))
    model.register_forward_hook(_End(memory))


def _observe_site(modules: dict[str, nn.Module], memory: Memory, site: Site, applies: bool) -> None:
    first, *others = site.taps
    if first.argument is None:
        modules[first.module].register_forward_hook(_ObserveOutput(memory, site, applies))
        return
    modules[first.module].register_forward_pre_hook(_ObserveInput(memory, site, applies, first.argument))
    for tap in others if applies else ():
        apply = _Apply(memory, (Part(site.name, 0, 1),), site.axis, tap.argument or 0)
        modules[tap.module].register_forward_pre_hook(apply)


def reader_parts(sites: Sequence[Site]) -> dict[str, tuple[Part, ...]]:
    """For every layer that reads sites, which site fills which of its input columns."""
    parts: dict[str, tuple[Part, ...]] = {}
    for site in sites:
        for consumer in site.consumers:
            part = Part(site.name, consumer.start, consumer.repeat, consumer.channels)
            parts[consumer.layer] = (*parts.get(consumer.layer, ()), part)
    return parts


def detach_hooks(model: nn.Module) -> None:
    """Remove every hook of ours, and nothing else."""
    for module, hooks, number in list(_ours(model)):
        del hooks[number]
        module._forward_pre_hooks_with_kwargs.pop(number, None)


def memory_of(model: nn.Module) -> Memory | None:
    """The memory of the pruner that was attached to this model, or None; one on a part or a whole is not its own."""
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, _Begin | _FirstForward):
            return hook.memory
    return None


def has_hooks(model: nn.Module) -> bool:
    """Whether any part of the model has hooks of ours."""
    return any(True for _ in _ours(model))


def _ours(model: nn.Module) -> Iterator[tuple[nn.Module, dict[int, Any], int]]:
    for module in model.modules():
        # Handles would tie the hooks to this model; a copy must be able to find its own.
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            yield from ((module, hooks, number) for number, hook in hooks.items() if isinstance(hook, _HOOKS))
