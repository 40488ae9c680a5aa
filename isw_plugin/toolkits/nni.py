"""Beside NNI 3.0: a pruner for its evaluators and config lists, and small models from its masks.

Needs ``isw_plugin[nni]``.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from isw_plugin.errors import AttachError, MissingExtraError, PatternError, SettingError, UnsupportedError
from isw_plugin.gates import CVGate
from isw_plugin.hooks import memory_of
from isw_plugin.pruner import InstanceWisePruner as Gates
from isw_plugin.sites import Found, Inputs, default_inputs, find_sites
from isw_plugin.toolkits.nni_compact import compact
from isw_plugin.toolkits.nni_configs import Config, chosen_layers
from isw_plugin.wrappers import unwrapped

try:
    from nni.compression.base.compressor import Compressor, Pruner
    from nni.compression.utils import Evaluator, LightningEvaluator, TransformersEvaluator
except ImportError as error:
    raise MissingExtraError(
        f"isw_plugin.toolkits.nni needs NNI ({error}): pip install 'isw_plugin[nni]'", name=error.name
    ) from error

__all__ = ["InstanceWisePruner", "compact"]


class InstanceWisePruner(Pruner):  # type: ignore[misc]  # NNI ships no types
    """Feature decay and per-image channel gates, as a pruner of NNI.

    ``compress`` trains through the evaluator with the penalty (Eq. 5) in its loss. The gates are those of
    ``isw_plugin.InstanceWisePruner``, at hand as ``gates``: calibrate them, ``gates.step()``, evaluate.
    There is no static mask, so ``get_masks`` gives those of the compressors that this one came from.

    Args:
        model: A bare model; one that NNI has wrapped comes by ``from_compressor``.
        config_list: NNI's form. ``op_names``, ``op_names_re`` (``re.match``, as in NNI), ``op_types`` choose
            the layers whose maps are gated; ``exclude_op_names`` and so on, or a config with
            ``"exclude": True``, leave some out; ``lambda_``, ``alpha``, ``beta`` hold for a config's layers,
            the last config that names a layer wins.
        evaluator: ``TorchEvaluator``, or ``LightningEvaluator`` with a model whose ``training_step`` calls
            ``self(...)``; trains in ``compress``. None: train in a loop of your own with ``gates.regularize``.
        existed_wrappers: For ``from_compressor``.
        lambda_, alpha, beta: Where a config says nothing.
        example_inputs: What the model's forward takes. None: the evaluator's dummy input, else the size
            that a timm model declares.
        accumulation_steps: Parts by which a TorchEvaluator's training function divides its loss.
        scope, reduction, min_keep: As in ``isw_plugin.InstanceWisePruner``.

    Raises:
        SettingError: An unknown key, a value outside its range, no example inputs.
        PatternError: A config that names no module, or none that makes a gated map.
        AttachError: The model is wrapped by NNI, or has a pruner.
        UnsupportedError: TransformersEvaluator, which fails on today's releases.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Config],
        evaluator: Evaluator | None = None,
        existed_wrappers: Mapping[str, Any] | None = None,
        *,
        lambda_: float = 1e-6,
        alpha: float = 0.5,
        beta: float = 1.0,
        example_inputs: Inputs | None = None,
        accumulation_steps: int = 1,
        scope: Literal["all", "consumers"] = "all",
        reduction: Literal["sum", "mean", "relative"] = "sum",
        min_keep: int = 0,
    ) -> None:
        bare = unwrapped(model)
        if any(hasattr(module, "_nni_wrapper") for module in bare.modules()):
            raise AttachError("the model is wrapped by another compressor: use InstanceWisePruner.from_compressor")
        _require_running(evaluator)
        chosen = chosen_layers(bare, config_list)
        inputs = _inputs(bare, example_inputs, evaluator)
        found = _sites(bare, inputs, chosen, scope)
        per_site = {f"re:{re.escape(name)}": chosen[name] for name in _names(found) if chosen.get(name)}
        self.gates = Gates(
            bare,
            inputs,
            lambda_,
            layers=[f"re:{re.escape(name)}" for name in _names(found) if name in chosen],
            gate=CVGate(alpha, beta),
            scope=scope,
            reduction=reduction,
            per_site=per_site,
            min_keep=min_keep,
        )
        self._accumulation_steps = accumulation_steps
        try:
            super().__init__(model, [], evaluator, existed_wrappers)  # no targets of NNI's: it would mask weights
        except BaseException:
            self.gates.remove()
            raise
        self.config_list = [dict(config) for config in config_list]

    @classmethod
    def from_compressor(
        cls,
        compressor: Compressor,
        new_config_list: Sequence[Config],
        *,
        evaluator: Evaluator | None = None,
        **settings: Any,
    ) -> "InstanceWisePruner":
        """Add instance-wise sparsity to what another compressor of NNI does.

        One that has made its masks keeps them as they are, and the scaling factors that a ``SlimPruner``
        trained go into the weights, from where ``unwrap_model`` does not lose them. One that has not runs
        along in ``compress``.

        Args:
            compressor: Its model, wrappers and evaluator are taken over.
            new_config_list: As in the constructor; so are ``settings``.
            evaluator: If the compressor has none.
        """
        done = [other for other in compressor.fused_compressors if _has_finished(other)]
        for other in done:
            _keep_factors(other)
        pruner: InstanceWisePruner = super().from_compressor(
            compressor, new_config_list, evaluator=evaluator, **settings
        )
        pruner.fused_compressors = [other for other in pruner.fused_compressors if other not in done]
        return pruner

    # -- NNI's life cycle --------------------------------------------------------------------------

    def compress(
        self, max_steps: int | None = None, max_epochs: int | None = None
    ) -> tuple[nn.Module, dict[str, dict[str, Tensor | None]]]:
        """Train with feature decay; gates are off afterwards, and ``gates`` says what to do with them.

        Args:
            max_steps, max_epochs: Handed to the evaluator; both None: as long as its training function
                runs by itself.

        Returns:
            The model, and the masks of static compressors that this one came from.

        Raises:
            SettingError: There is no evaluator, or it cannot count steps.
        """
        if self.evaluator is None:
            raise SettingError("compress trains, and there is no evaluator: pass one, or train with gates.regularize")
        if max_steps is not None and isinstance(self.evaluator, LightningEvaluator):
            raise SettingError(f"max_steps={max_steps}: LightningEvaluator cannot set it, give it to the Trainer")
        self.evaluator.bind_model(self.bound_model, self._get_param_names_map())
        try:
            for compressor in self.fused_compressors:
                compressor._fuse_preprocess(self.evaluator)
            self.evaluator.train(max_steps, max_epochs)
            for compressor in self.fused_compressors:
                compressor._fuse_postprocess(self.evaluator)
        finally:
            self.evaluator.unbind_model()
        return self.bound_model, self.get_masks()

    def wrap_model(self) -> None:
        """Wrap as NNI does, and switch feature decay on."""
        super().wrap_model()
        self._decay(True)

    def unwrap_model(self) -> None:
        """Take NNI's wrappers off; the model computes what it would without a pruner, bit for bit.

        The gates wait in the model, off: ``gates.step()`` switches them on, also after ``compact``;
        ``gates.remove()`` takes them out.
        """
        super().unwrap_model()
        self._decay(False)
        self.gates.disable()

    def _fuse_preprocess(self, evaluator: Evaluator) -> None:
        self._decay(True)
        evaluator.patch_loss(self._regularized)

    def _fuse_postprocess(self, evaluator: Evaluator) -> None:
        self._decay(self._is_wrapped)

    def _regularized(self, loss: Tensor, batch: Any) -> Tensor:
        trainer = getattr(self.evaluator, "trainer", None)  # of Lightning, which says by how much it divides
        parts = getattr(trainer, "accumulate_grad_batches", self._accumulation_steps)
        return self.gates.regularize(self.gates.model, loss, accumulation_steps=parts)

    def _validate_config(self) -> None:
        """Nothing: NNI's schema is for static masks, and chosen_layers has looked at ours."""

    def _decay(self, on: bool) -> None:
        """Feature decay on or off; a training loop that takes no penalty must not record."""
        memory = memory_of(self.gates.model)
        if memory is not None:  # else the gates were removed
            memory.decays = on


def _require_running(evaluator: Evaluator | None) -> None:
    if evaluator is not None and not isinstance(evaluator, Evaluator):
        raise SettingError(
            f"evaluator={evaluator!r}: one of NNI's, such as TorchEvaluator(train, optimizer, training_step), or None"
        )
    if isinstance(evaluator, TransformersEvaluator):
        raise UnsupportedError(
            "NNI 3.0's TransformersEvaluator overrides methods whose arguments have changed since (compute_loss, "
            "get_optimizer_cls_and_kwargs): use TorchEvaluator, or the Trainer's own loop with gates.regularize"
        )


def _inputs(model: nn.Module, given: Inputs | None, evaluator: Evaluator | None) -> Inputs:
    for inputs in (given, getattr(evaluator, "dummy_input", None), default_inputs(model)):
        if inputs is not None:
            return inputs
    raise SettingError(f"{type(model).__name__} does not say its input size: pass example_inputs")


def _sites(model: nn.Module, inputs: Inputs, chosen: Mapping[str, Any], scope: str) -> Found:
    try:
        return find_sites(model, inputs, lambda name, _: name in chosen, scope=scope)
    except PatternError as error:
        names = ", ".join(list(chosen)[:3])
        raise PatternError(
            f"the configs select {len(chosen)} modules ({names}, ...), none of which makes a map that is gated: name "
            "convolutions or linear layers, the norm and activation behind them belong to their map"
        ) from error


def _names(found: Found) -> list[str]:
    return [name for site in found.sites for name in site.layers]


def _has_finished(compressor: Compressor) -> bool:
    """Whether it has made its masks: all ones before that."""
    targets = [target for spaces in compressor._target_spaces.values() for target in spaces.values()]
    masks = [target.mask for target in targets] if isinstance(compressor, Pruner) else []
    return any(mask is not None and bool(mask.eq(0).any()) for mask in masks)


def _keep_factors(compressor: Compressor) -> None:
    """Multiply what SlimPruner trained beside a weight into it."""
    for wrapper in compressor._module_wrappers.values():
        for name, target in wrapper.pruning_target_spaces.items():
            factor = getattr(wrapper, f"{name}_slim_factor", None)
            if factor is not None:
                scaler = target._scaler
                full = scaler.expand(factor, target.shape, keepdim=True, full_expand=False) if scaler else factor
                target.target.data.mul_(full.detach())
                delattr(wrapper, f"{name}_slim_factor")
