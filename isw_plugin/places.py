"""Where hooks of ours are in a model, and whether they are still where they were placed."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from isw_plugin.errors import AttachError, UnsupportedError
from isw_plugin.memory import Memory

__all__ = ["Hook", "Step", "hooks_in", "steps_to", "without_hooks"]

Step = tuple[dict[str, nn.Module | None], str, nn.Module]  # where a module is held, by which name, and the module
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # what wraps a part in place holds it as


class Hook:
    """Any hook of ours."""

    memory: Memory

    @property
    def __name__(self) -> str:  # only torch.jit.script asks
        raise UnsupportedError(
            "torch.jit.script takes no hooks of ours: script the bare model (remove() first), or trace"
        )


def hooks_in(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, dict[int, Any], int]]:
    """Every hook of ours: its module, the module's hooks of that kind, and its number among them."""
    for module in modules:
        # Handles would tie the hooks to this model; a copy must be able to find its own.
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            yield from ((module, hooks, number) for number, hook in hooks.items() if isinstance(hook, Hook))


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """The bare model, inside the block."""
    held = {id(hooks): (hooks, dict(hooks)) for _, hooks, _ in hooks_in(model.modules())}
    for _, hooks, number in list(hooks_in(model.modules())):
        hooks.pop(number, None)
    try:
        yield
    finally:
        for hooks, before in held.values():
            hooks.clear()
            hooks.update(before)


def steps_to(model: nn.Module, memory: Memory, places: Iterable[str]) -> list[Step]:
    """Every step from the model to the modules with hooks.

    Raises:
        AttachError: One was replaced.
    """
    steps: list[Step] = []
    for place in places:
        module = model
        for name in place.split(".") if place else ():
            while module._modules.get(name) is None:
                module = _step(module, _wrapped(module, place), steps)
            module = _step(module, name, steps)
        while not any(hooks[number].memory is memory for _, hooks, number in hooks_in([module])):
            module = _step(module, _wrapped(module, place), steps)
    return steps


def _step(module: nn.Module, name: str, steps: list[Step]) -> nn.Module:
    child = module._modules[name]
    assert child is not None
    steps.append((module._modules, name, child))
    return child


def _wrapped(module: nn.Module, place: str) -> str:
    names = (*_WRAPPED, *(["module"] if isinstance(module, nn.parallel.DistributedDataParallel) else []))
    for name in names:
        if module._modules.get(name) is not None:
            return name
    raise AttachError(
        f"{place or 'the model'} was replaced after the pruner was attached (an edit, LoRA, a converted norm), so it "
        "has no hooks: pruner.update_regularizer() finds the sites of the model as it is now, pruner.remove() takes "
        "the rest out"
    )
