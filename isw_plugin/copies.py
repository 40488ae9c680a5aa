"""Copies of a model, whatever an earlier forward left in it, and the certainty that they are copies."""

import copy
import dis
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules import module as _modules
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from isw_plugin.errors import UnsupportedError

__all__ = ["Untouched", "copy_of", "has_observers", "without_process_hooks"]

_Model = TypeVar("_Model", bound=nn.Module)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OPTIONS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
_OF_THE_PROCESS = (_modules._global_forward_pre_hooks, _modules._global_forward_hooks)
_HIDING = threading.RLock()  # one thread at a time puts others in their place, and them back
_CALLS = (FunctionType, MethodType, partial)
_LARGE = 1000  # a longer container holds data, not modules


def copy_of(model: _Model, memo: dict[int, Any] | None = None, *, observed: bool = True) -> _Model:
    """A deep copy; tensors that a forward computed and kept (attention biases, in LeViT) come without their history.

    Args:
        memo: By id of a tensor: what stands for it in the copy.
        observed: False leaves out the hooks that only a user can have added: functions, partials of them, and
            methods of what is no part of the model. A copy would share what they write to. Callable objects are
            copied like the model, and stay: pruning masks, weight and spectral norm, gates.

    Raises:
        UnsupportedError: A part cannot be copied; or the copy would run the model itself, as where ``forward`` was
            replaced by a function that holds it. The model is as it was.

    ``copy.deepcopy`` alone refuses tensors that are not leaves of the autograd graph.
    """
    memo = {} if memo is None else memo
    parts = {id(module) for module in model.modules()}
    for module in model.modules():
        for leaf in tree_leaves(vars(module)):
            if isinstance(leaf, Tensor) and not leaf.is_leaf:
                memo.setdefault(id(leaf), leaf.detach().clone())
        if not observed:
            memo |= {id(hook): _observer for hook in _hooks(module) if _observes(hook, parts)}
    copied = _deep_copy(model, memo)
    if not observed:
        parts = {id(module) for module in copied.modules()}
        for module in copied.modules():
            _unobserve(module, parts)
    _require_own(model, copied)
    return copied


class Untouched(TorchDispatchMode):  # type: ignore[no-untyped-call]  # of torch
    """Inside, no operation of this thread may take a parameter or buffer of the model: only its copy runs.

    Nor may one change a buffer of a module outside the model, which copies share.

    Raises:
        UnsupportedError: One does; raised before it runs.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.model = model
        self.names = {id(tensor): name for name, tensor in (*model.named_buffers(), *model.named_parameters())}
        self.outside = {id(buffer): type(module).__name__ for module in _outside(model) for buffer in module.buffers()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        taken = (id(item) for arg in args for item in (arg if isinstance(arg, list | tuple) else (arg,)))
        for number in taken:
            if number in self.names:
                raise _runs_itself(self.model, f"something outside its modules holds {self.names[number]}")
            if number in self.outside and func._schema.is_mutable:
                raise UnsupportedError(
                    f"the forward of {type(self.model).__name__} changes a buffer of a {self.outside[number]} that "
                    "is no part of the model, so that a copy would change it too: make it a submodule, or put it in "
                    "eval mode"
                )
        return func(*args, **(kwargs or {}))


def _runs_itself(model: nn.Module, because: str) -> UnsupportedError:
    return UnsupportedError(
        f"a copy of {type(model).__name__} would run the model itself: {because}. Attach before forward is replaced or "
        "wrapped, or take that off first (del module.forward; accelerate: unwrap_model(model, keep_fp32_wrapper="
        "False)), or keep what forward calls in the module"
    )


def _deep_copy(model: _Model, memo: dict[int, Any]) -> _Model:
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever a part raises
        culprit = next(_not_copied(model, memo), "")
        raise UnsupportedError(
            f"{type(model).__name__} cannot be copied{culprit}: {error!r}. Attach before that is set, or give its "
            "class a __deepcopy__"
        ) from error


def _not_copied(model: nn.Module, memo: dict[int, Any]) -> Iterator[str]:
    """Attributes of modules, innermost first, that a copy fails on."""
    for name, module in reversed([*model.named_modules()]):
        for attribute, value in vars(module).items():
            try:
                copy.deepcopy(None if attribute == "_modules" else value, dict(memo))
            except Exception:  # whatever a part raises
                yield f", for its {name}{name and '.'}{attribute}"


# -- hooks -----------------------------------------------------------------------------------------


def _observer(*args: Any) -> None:
    """In place of a hook that is not copied, until it is taken out."""


def has_observers(model: nn.Module) -> bool:
    """Whether any hooks are of those that ``copy_of(observed=False)`` leaves out."""
    parts = {id(module) for module in model.modules()}
    return any(_observes(hook, parts) for module in model.modules() for hook in _hooks(module))


@contextmanager
def without_process_hooks() -> Iterator[None]:
    """Hooks that were registered for all modules of the process see nothing of this thread inside."""
    with _HIDING:
        held = [(hooks, dict(hooks)) for hooks in _OF_THE_PROCESS]
        for hooks, before in held:
            hooks.update({number: partial(_elsewhere, threading.get_ident(), hook) for number, hook in before.items()})
        try:
            yield
        finally:
            for hooks, before in held:
                hooks.update({number: hook for number, hook in before.items() if number in hooks})


def _elsewhere(thread: int, hook: Any, *args: Any) -> Any:
    return None if threading.get_ident() == thread else hook(*args)


def _hooks(module: nn.Module) -> Iterator[Any]:
    for hooks in _HOOKS:
        yield from getattr(module, hooks).values()


def _observes(hook: Any, parts: Collection[int]) -> bool:
    """Whether a hook is a user's own; torch's functions (quantization) keep nothing."""
    if isinstance(hook, partial):
        return _observes(hook.func, parts)
    if isinstance(hook, MethodType):
        return id(hook.__self__) not in parts
    return isinstance(hook, FunctionType | BuiltinFunctionType) and not _of_torch(hook)


def _unobserve(module: nn.Module, parts: Collection[int]) -> None:
    for name in _HOOKS:
        hooks = getattr(module, name)
        for number in [number for number, hook in hooks.items() if _observes(hook, parts)]:
            del hooks[number]
            for options in _OPTIONS:
                getattr(module, options).pop(number, None)


# -- what a copy shares with its model -------------------------------------------------------------


def _require_own(model: nn.Module, copied: nn.Module) -> None:
    """A deep copy shares functions; what those hold is the model's."""
    originals = {id(module): name or type(model).__name__ for name, module in model.named_modules()}
    for name, module in copied.named_modules():
        if id(module) in originals:
            raise _runs_itself(model, f"its {originals[id(module)]} is not copied by __deepcopy__")
        held = [originals[id(part)] for part in _reached([vars(module).get("forward")]) if id(part) in originals]
        if held:
            raise _runs_itself(model, f"{name}{name and '.'}forward is a function that holds {held[0]}")


def _outside(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that functions of a model hold and its tree does not."""
    parts = set(model.modules())
    kinds = {type(part) for part in parts}
    functions = [kind.forward for kind in kinds if not _of_torch(kind)]
    functions += [value for part in parts for value in vars(part).values() if isinstance(value, _CALLS)]
    yield from (module for module in _reached(functions) if module not in parts)


def _reached(values: list[Any]) -> list[nn.Module]:
    """Modules that a call of these values may run, by what functions hold."""
    waiting, seen, found = values, set[int](), []
    while waiting:
        item = waiting.pop()
        if id(item) not in seen:
            seen.add(id(item))
            waiting += _behind(item)
            found += [item] if isinstance(item, nn.Module) else []
    return found


def _behind(item: Any) -> Iterable[Any]:
    if isinstance(item, FunctionType):
        return _captured(item)
    if isinstance(item, MethodType):
        owner = item.__self__
        return (owner, item.__func__, *(() if isinstance(owner, nn.Module | type) else _attributes(owner)))
    if isinstance(item, partial):
        return (item.func, *item.args, *item.keywords.values())
    if isinstance(item, dict):
        return item.values() if len(item) < _LARGE else ()
    if isinstance(item, list | tuple | set):
        return item if len(item) < _LARGE else ()
    return _attributes(item) if callable(item) and not isinstance(item, type | nn.Module | Tensor) else ()


def _attributes(item: Any) -> Iterable[Any]:
    return getattr(item, "__dict__", {}).values()


def _captured(function: FunctionType) -> list[Any]:
    """What a function encloses, its defaults, attributes, and globals by the names that it loads."""
    held = [_content(cell) for cell in function.__closure__ or ()]
    held += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *vars(function).values()]
    own = function.__globals__
    for name in () if str(own.get("__name__")).startswith("torch.") else _loaded(function.__code__):
        value = own.get(name)
        elsewhere = isinstance(value, FunctionType) and value.__globals__ is not own
        held += [] if elsewhere else [value]
    return held


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # of a name that is not bound yet
        return None


def _loaded(code: CodeType) -> Iterator[str]:
    yield from (step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _loaded(constant)


def _of_torch(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).split(".")[0] == "torch"
