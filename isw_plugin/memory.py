"""What the hooks of one model share: what holds for every call, and what belongs to a single call.

A call's decisions lie in an object of its own, which is found by thread, so that calls in several threads, and a call
inside another, do not see each other's.
"""

import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from isw_plugin.errors import AttachError, UnsupportedError
from isw_plugin.functional import channel_norm, mask
from isw_plugin.gates import Gate
from isw_plugin.heads import Head, Lesson, Statistics
from isw_plugin.settings import Settings

__all__ = ["Call", "Memory", "Taken"]

_NO_HEADS: Mapping[str, Head] = {}
_NO_FOLLOWERS: Mapping[str, str] = {}
_FORGOTTEN = 100  # training forwards without a penalty taken, after which something is surely wrong


class _Decided(NamedTuple):
    """What a forward decided and saw that a checkpoint repeats; empty where that is not known."""

    norms: Mapping[str, list[Tensor]]
    keep: Mapping[str, list[Tensor]]
    statistics: Mapping[str, Statistics]


class Taken(NamedTuple):
    """What one training forward has recorded: norms (N, C) by site, every time that it ran, and losses of gates."""

    norms: dict[str, list[Tensor]]
    losses: list[Tensor]


class Call:
    """One forward of the attached model; or what its parts do outside of one (``whole`` False).

    Attributes:
        gates: By site name, as they were when the call began; None: gates are off.
        records: Whether norms enter the penalty.
        before: In a checkpoint's recompute, what the forward that it repeats decided, where that is known.
        heads: By site name, what predicts its norms.
        followers: By site name, the site that decides for it.
        watched: Sites whose statistics are kept.
        alone: No earlier forward with gradients waits for its backward, as far as is known.
        recorded: Site name -> norms (N, C) of every time that the site ran, in the graph.
        losses: What gates with parameters add to the loss.
        norms, keep: Site name -> what was decided, every time, detached.
        statistics: Site name -> of its map after the mask, the last time.
        learns: Whether it shows heads what they should have predicted, and records losses of gates.
        read: Site name -> what its head read, the last time.
        lessons: Site name -> what its head read, and the root mean squares that there were, every time.
    """

    def __init__(
        self,
        gates: Mapping[str, Gate] | None,
        records: bool,
        *,
        outer: "Call | None" = None,
        before: _Decided | None = None,
        whole: bool = False,
        heads: Mapping[str, Head] = _NO_HEADS,
        followers: Mapping[str, str] = _NO_FOLLOWERS,
        watched: frozenset[str] = frozenset(),
        learns: bool = False,
    ) -> None:
        self.gates = gates
        self.heads = heads
        self.followers = followers
        self.watched = watched
        self.records = records
        self.learns = learns
        self.outer = outer
        self.before = before
        self.whole = whole
        self.alone = True
        self.running = True
        self.again: Call | None = None  # its recompute
        compiling = torch.compiler.is_compiling()
        self.thread = 0 if compiling else threading.get_ident()
        self.handled = 0 if compiling else id(sys.exception())  # what was being handled when it began
        self.recorded: dict[str, list[Tensor]] = {}
        self.losses: list[Tensor] = []
        self.norms: dict[str, list[Tensor]] = {}
        self.keep: dict[str, list[Tensor]] = {}
        self.statistics: dict[str, Statistics] = {}
        self.read: dict[str, Mapping[str, Statistics]] = {}
        self.lessons: dict[str, list[Lesson]] = {}
        self.notes: dict[str, dict[int, tuple[int, Any]]] = {}  # by site and layer: instances, what its gate noted
        self._made: dict[str, int] = {}  # decisions, by site
        self._read: dict[tuple[str, str], int] = {}  # and how many of them a reader has seen the last of

    def decide(self, site: str, norms: Tensor, keep: Tensor) -> None:
        """Note a decision; outside of a forward only the last one of a site is held."""
        self._made[site] = self._made.get(site, 0) + 1
        self.norms[site] = [*self.norms.get(site, ()), norms] if self.whole else [norms]
        self.keep[site] = [*self.keep.get(site, ()), keep] if self.whole else [keep]

    def decision(self, site: str, reader: str) -> Tensor:
        """The decision (N, C) on the map that a reader gets now.

        Raises:
            UnsupportedError: It cannot be told which that is.
        """
        return self._of(site, reader).keep[site][-1]

    def followed(self, site: str, follower: str) -> tuple[Tensor, Tensor]:
        """Norms and decision (N, C) of a site that decides for another, which runs now.

        Raises:
            UnsupportedError: It cannot be told which they are.
        """
        decided = self._of(site, follower)
        return decided.norms[site][-1], decided.keep[site][-1]

    def known(self, site: str, reader: str) -> Statistics:
        """Statistics of the map of a site that the layer of another, which is predicted, reads now.

        Raises:
            UnsupportedError: It cannot be told which they are.
        """
        return self._of(site, reader).statistics[site]

    def _of(self, site: str, reader: str) -> "Call | _Decided":
        """Whose last decision on a site is that on the map which a reader gets now."""
        made, seen = self._made.get(site, 0), self._read.get((reader, site), 0)
        self._read[reader, site] = made
        if made - seen == 1 or (made and made == seen and self.whole):
            return self
        if self.before is not None:
            if made == seen and len(self.before.keep.get(site, ())) == 1:
                return self.before
            raise UnsupportedError(
                f"a checkpoint recomputes {reader}, which reads {site}, and several forwards wait for their backward: "
                'with gates on call backward after each forward, or attach with scope="all" and without heads'
            )
        raise UnsupportedError(
            f"{reader} reads {site}, which decided {made - seen} times since {reader} last ran, so it is not known "
            f"which channels to drop there: call the whole model, {site} once before each {reader}, or exclude {site}"
        )


class Memory:
    """What the hooks of one model share.

    Attributes:
        gates: By site name; which channels to keep.
        decays: Whether training forwards are kept for the penalty at all.
        weighed: By site name; whether its norms enter the penalty.
        enabled: Whether gates act.
        heads: By site name; what predicts norms. Sites without one are measured, or follow.
        followers: By site name; the site that decides for it.
        watched: Sites whose statistics calls keep: those that heads read.
        learned: By site name; the parameters of its gate, where that has some.
        min_keep: Channels that every instance keeps at every site, the largest.
        channel_norm, mask: What takes a map's norms (Eq. 3), and what drops its channels; operators while it is traced.
        tape: The training forwards whose penalty has not been taken.
        settings: What the pruner of a copied model is rebuilt from; of modules it holds ``learned`` alone.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings
        self.gates: dict[str, Gate] = {}
        self.heads: dict[str, Head] = {}
        self.followers: Mapping[str, str] = {}
        self.watched: frozenset[str] = frozenset()
        self.learned: dict[str, nn.Module] = {}
        self.decays = True
        self.weighed: dict[str, bool] = {}
        self.enabled = False
        self.min_keep = 0
        self.channel_norm: Callable[[Tensor, int], Tensor] = channel_norm
        self.mask: Callable[[Tensor, Tensor, int], Tensor] = mask
        self._forget()

    def _forget(self) -> None:
        self.tape: list[Call] = []
        self._last: Call | None = None  # the last with gates, of any thread
        self._graded: Call | None = None  # the last with gradients, which is what a checkpoint recomputes
        self._mine = threading.local()  # running, last, graded and loose: this thread's

    def __getstate__(self) -> dict[str, Any]:
        held = {name: value for name, value in self.__dict__.items() if name not in _OF_CALLS}
        return held | {"next_hook": RemovableHandle.next_id}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # In another process, hooks registered later must not get the numbers of those that come with the model.
        RemovableHandle.next_id = max(RemovableHandle.next_id, state.pop("next_hook"))
        self.__dict__.update(state)
        self._forget()

    def clear(self) -> None:
        """Forget all that was recorded and decided."""
        self._forget()

    @property
    def running(self) -> Call | None:
        """The forward that this thread is in."""
        running: Call | None = getattr(self._mine, "running", None)
        return running

    @property
    def norms(self) -> dict[str, Tensor]:
        """Of the last gated forward, this thread's if there was one, by site name, (N, C)."""
        last = getattr(self._mine, "last", None) or self._last
        return {name: _joined(norms) for name, norms in last.norms.items()} if last else {}

    @property
    def keep(self) -> dict[str, Tensor]:
        """The decisions on these norms."""
        last = getattr(self._mine, "last", None) or self._last
        return {name: _joined(keep) for name, keep in last.keep.items()} if last else {}

    @property
    def statistics(self) -> dict[str, Statistics]:
        """Of the maps that were watched in it, the last time that each ran."""
        last = getattr(self._mine, "last", None) or self._last
        return dict(last.statistics) if last else {}

    def take_lessons(self) -> dict[str, list[Lesson]]:
        """Take what the last forward with gradients, this thread's if there was one, has shown to heads."""
        graded: Call | None = getattr(self._mine, "graded", None) or self._graded
        if graded is None:
            return {}
        lessons, graded.lessons = graded.lessons, {}
        return lessons

    def take(self) -> list[Taken]:
        """Take off the tape what this thread's forwards have recorded, or if there were none, any thread's."""
        thread = 0 if torch.compiler.is_compiling() else threading.get_ident()
        done = [call for call in self.tape if not call.running]
        taken = [call for call in done if (call.recorded or call.losses) and call.thread in (0, thread)] or done
        self.tape = [call for call in self.tape if not any(call is other for other in taken)]
        recorded = [Taken(call.recorded, call.losses) for call in taken if call.recorded or call.losses]
        for call in taken:
            call.recorded, call.losses = {}, []
        return recorded

    def begin(self, training: bool) -> Call:
        """A forward of the whole model starts, in training mode or not."""
        grad = torch.is_grad_enabled()
        records = self.decays and training and grad and any(self.weighed.values())
        call = self._call(records, outer=self.running, whole=True, learns=training and grad)
        self._mine.running, self._mine.loose = call, None
        if self.enabled:
            self._mine.last = self._last = call
        if grad:
            before = self._graded
            call.alone = before is None or before.again is not None or before.gates is None
            self._mine.graded = self._graded = call
        if records:
            self._tape(call)
        return call

    def add_loss(self, call: Call, loss: Tensor) -> None:
        """What a gate adds to the loss in a training forward."""
        call.losses.append(loss)
        if not call.records and len(call.losses) == 1:
            self._tape(call)

    def _tape(self, call: Call) -> None:
        self.tape.append(call)
        if len(self.tape) == _FORGOTTEN:
            warnings.warn(
                f"{_FORGOTTEN} training forwards were recorded and no penalty taken: their graphs stay in memory. "
                "Call pruner.regularize(model, loss) before backward, or set pruner.lambda_ = 0",
                stacklevel=3,
            )

    def _call(self, records: bool, **of_it: Any) -> Call:
        gates = self.gates if self.enabled else None
        return Call(gates, records, **_who_predicts(self), **of_it)

    def end(self) -> None:
        """The forward has ended; what one that raised has recorded goes."""
        call = self.running
        if call is None:
            return
        call.running = False
        self._mine.running = call.outer
        # Nothing more: torch.compile runs this hook as a graph of its own, and would look into the tape's tensors.
        if not torch.compiler.is_compiling() and id(sys.exception()) != call.handled:
            self._drop(call)

    def abandon(self) -> None:
        """Forwards of this thread that an interrupt broke off are not running any more."""
        while (call := self.running) is not None:
            self._mine.running = call.outer
            self._drop(call)

    def _drop(self, call: Call) -> None:
        self.tape = [other for other in self.tape if other is not call]

    def outside(self) -> Call:
        """What a hook belongs to that runs outside of any forward: a checkpoint's recompute, or a part called alone."""
        compiling = torch.compiler.is_compiling()
        gates = self.gates if self.enabled else None
        if compiling or torch._C._current_graph_task_id() != -1:  # inside a backward
            graded: Call | None = getattr(self._mine, "graded", None) or self._graded
            if graded is not None and (graded.gates is gates or not compiling):
                if graded.again is None:
                    seen = (graded.norms, graded.keep, graded.statistics) if graded.alone else ({}, {}, {})
                    graded.again = Call(graded.gates, graded.records, before=_Decided(*seen), **_who_predicts(graded))
                return graded.again
        loose: Call | None = getattr(self._mine, "loose", None)
        if loose is None or loose.gates is not gates:
            loose = self._mine.loose = self._call(False)
        if gates is not None:
            if not compiling:
                _require_no_trace()
            self._mine.last = self._last = loose
        return loose


_OF_CALLS = frozenset(["tape", "_last", "_graded", "_mine"])


def _who_predicts(held: "Call | Memory") -> dict[str, Any]:
    return {"heads": held.heads, "followers": held.followers, "watched": held.watched}


def _joined(times: list[Tensor]) -> Tensor:
    return times[0] if len(times) == 1 else torch.cat(times)


def _require_no_trace() -> None:
    """A graph made of a model's parts calls those that are leaves, and so has half of the hooks."""
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), fx.GraphModule | fx.Interpreter | fx.Tracer):
            raise AttachError(
                "this graph (a feature extractor, a trace or a copy of one) was made from an attached model and has "
                "lost some of the pruner's hooks. Make it from the bare model (remove() first) and attach to it; for a "
                "copy of an attached graph, InstanceWisePruner.of(copy) puts them back"
            )
        frame = frame.f_back  # type: ignore[assignment]  # None ends the loop
