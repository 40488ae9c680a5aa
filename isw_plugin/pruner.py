"""The pruner: attaches a feature regularizer and a per-image channel gate to a model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn

from isw_plugin.accelerate import BACKENDS, Accelerated, accelerate
from isw_plugin.attachment import attach, configure, settings_of
from isw_plugin.decay import decay
from isw_plugin.errors import AttachError, NothingRecordedError, SettingError, UnsupportedError
from isw_plugin.gates import Gate
from isw_plugin.heads import Head, stored
from isw_plugin.hooks import Memory, detach_hooks, memory_of, orphaned_memory
from isw_plugin.inputs import device_of
from isw_plugin.learned import average_after_backward, stored_learned
from isw_plugin.places import without_hooks
from isw_plugin.saving import encoded_inputs, write
from isw_plugin.settings import Settings, check_lambda, choose_gate
from isw_plugin.sites import Found, Inputs, Patterns, Site, default_inputs
from isw_plugin.summary import site_table
from isw_plugin.values import as_count, check_choice, check_inputs
from isw_plugin.wrappers import attachable, unwrapped

if TYPE_CHECKING:
    from isw_plugin.batches import Batches
    from isw_plugin.predict import Predictors
    from isw_plugin.static import Conversion

__all__ = ["InstanceWisePruner"]


class InstanceWisePruner:
    """Feature decay for training and a per-image channel gate for inference (Liu et al., 2019).

    A site is a feature map that a convolution or linear layer reads. In training, ``regularize`` adds
    lambda times the norms of all sites' channels to the loss (Eq. 5). With gates on, each image drops
    the channels of small norm where norms vary much (Eq. 6-7). Gates are off after construction. No
    parameter, buffer or state_dict key is added; ``remove`` leaves the model as it was.

    Args:
        model: Any module; timm models need no ``example_inputs``.
        example_inputs: What the model's forward takes, a tensor, tuple or dict; only shapes are looked
            at. None: the size that a timm model declares, else the inputs of the first forward.
        lambda_: Weight of the penalty, >= 0, per unit of feature. Under reduction="sum" it is tied to
            the batch size and the map size.
        layers: Which layers' maps, by name: a glob or several, ``re:`` for a regular expression, or a
            function (name, module) -> bool.
        exclude: Layers to leave out, in the same form.
        alpha, beta: Short for ``gate=CVGate(alpha, beta)`` (0.5 and 1.0).
        gate: "cv", "fbs", "channel_gating", "lccl", the name of an installed gate, or any ``Gate``.
        scope: "all": dropped channels are zero for every user of the map, the literal reading of
            section 3.3. "consumers": only for the convolutions and linear layers; shortcuts and
            squeeze-excite see the whole map.
        reduction: "sum" over the batch as in Eq. 5; "mean"; or "relative": norms as shares of each site's mean
            norm in the first batch, averaged over instances, channels and sites, so that one lambda suits all.
            A site that runs several times in a forward (an encoder on two views) counts every time: "sum" adds
            them, the others average over all of its instances. One that does not run adds nothing.
        per_site: Patterns and what differs there, such as ``{"blocks.0.*": {"beta": 0.0}}``.
        min_keep: Channels that every instance keeps at every site, the largest.

    Raises:
        SettingError: A setting outside its range, an unknown gate parameter, a pattern without a match.
        NoSitesError: There is no map to gate.
        ProbeError: The model cannot be run on the inputs.
        AttachError: The model already has a pruner.
        UnsupportedError: A compiled model, DataParallel or FSDP.

    Example (those of the methods go on from here):
        >>> import torch
        >>> from torch import nn
        >>> from isw_plugin import InstanceWisePruner, MinNorm
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> images, labels = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
        >>> pruner = InstanceWisePruner(model, images, gate=MinNorm(0.5))
        >>> pruner.sites[0].channels, pruner.enabled
        (8, False)
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs | None = None,
        lambda_: float = 1e-6,
        *,
        layers: Patterns = "*",
        exclude: Patterns = (),
        alpha: float | None = None,
        beta: float | None = None,
        gate: Gate | str = "cv",
        scope: Literal["all", "consumers"] = "all",
        reduction: Literal["sum", "mean", "relative"] = "sum",
        per_site: Mapping[str, Mapping[str, Any]] | None = None,
        min_keep: int = 0,
    ) -> None:
        _require_module(model)
        check_inputs(example_inputs)
        model = attachable(model)
        overrides = {} if per_site is None else per_site
        settings = Settings(lambda_, choose_gate(gate, alpha, beta), layers, exclude, scope, reduction, overrides)
        min_keep = as_count("min_keep", min_keep, "a number of channels")
        settings.require_channels(min_keep)
        inputs = example_inputs if example_inputs is not None else default_inputs(model)
        if inputs is not None:
            settings.resolve(model, inputs)
        self.model = model
        self._memory = Memory(settings)
        self._memory.min_keep = min_keep
        self._attach()

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """The pruner of a model that was copied, unpickled or attached elsewhere.

        Raises:
            AttachError: The model has none.

        Example:
            >>> import copy
            >>> InstanceWisePruner.of(copy.deepcopy(model)).gate
            MinNorm(ratio=0.5)
        """
        _require_module(model)
        model = unwrapped(model)
        memory = memory_of(model) or orphaned_memory(model)
        if memory is None:
            raise AttachError(f"{type(model).__name__} has no pruner attached")
        pruner = cls.__new__(cls)
        pruner.model, pruner._memory = model, memory
        if memory_of(model) is None:
            pruner._attach()  # torch.fx copies a graph without the hooks on the whole
        return pruner

    # -- what is attached where --------------------------------------------------------------------

    @property
    def sites(self) -> tuple[Site, ...]:
        """The gated feature maps, in the order of execution.

        Raises:
            AttachError: They are not known before the first forward, or were removed.
        """
        return self._found.sites

    def summary(self) -> str:
        """A table of layer -> where it is gated -> who reads it, and every layer left out with the reason.

        Example:
            >>> print(pruner.summary())
            layer  channels  gated at     read by
            0      8         output of 1  3
            3                -            left out: the model's output
            1 sites, 8 channels
        """
        return site_table(self._settings)

    def update_regularizer(self) -> None:
        """Find the sites again, after a static pruning step has changed the model.

        Example:
            >>> model[0], model[3] = nn.Conv2d(3, 4, 3), nn.Linear(144, 10)  # as a static step may leave them
            >>> pruner.update_regularizer()
            >>> pruner.sites[0].channels
            4
        """
        inputs = self._settings.inputs
        if inputs is None:
            raise AttachError("the model has not been run yet: there are no sites to update")
        with without_hooks(self.model):  # also of those that came with a part of another model
            self._settings.resolve(self.model, inputs)
        self._attach()

    def remove(self) -> None:
        """Take everything out of the model again; safe to call twice.

        Example:
            >>> pruner.remove()
            >>> again = InstanceWisePruner(model, images)  # a second pruner would be an AttachError
        """
        if memory_of(self.model) is self._memory:
            detach_hooks(self.model)
        self._memory.clear()
        self._settings.found = None
        self._settings.inputs = None
        self._settings.heads, self._settings.followers, self._settings.learned = {}, {}, {}

    # -- training: Eq. 5 ---------------------------------------------------------------------------

    @property
    def lambda_(self) -> float:
        """Weight of the penalty; may be set at any time. Sites with a ``per_site`` value keep theirs."""
        return self._settings.lambda_

    @lambda_.setter
    def lambda_(self, value: float) -> None:
        self._settings.lambda_ = check_lambda(value)
        self._memory.decays = True
        self._configure()

    def penalty(self) -> Tensor:
        """Take the penalty of the training forwards since it was last taken (second term of Eq. 5).

        Returns:
            lambda times the sum (or as ``reduction`` says) over instances of Eq. 4, a scalar in the graph; and what
            gates with parameters add.

        Raises:
            NothingRecordedError: No training forward was recorded and lambda is not 0.

        Example:
            >>> _ = model(images)  # in training mode, with gradients on
            >>> pruner.penalty().shape
            torch.Size([])
        """
        decayed, own = self._penalties()
        return decayed + own

    def _penalties(self) -> tuple[Tensor, Tensor]:
        """Feature decay, and what gates with parameters add."""
        taken, settings = self._memory.take(), self._settings
        zero = torch.zeros((), device=device_of(self.model))
        own = sum((loss for forward in taken for loss in forward.losses), zero)
        tape = [forward.norms for forward in taken if forward.norms]
        if tape:
            settings.measure(tape[0])
            weights = settings.norm_weights()
            return torch.stack([decay(norms, weights, settings.reduction) for norms in tape]).sum(), own
        if self._memory.decays and any((settings.lambdas() or {"unknown yet": self.lambda_}).values()):
            raise NothingRecordedError(
                "no training forward of the attached model was recorded since the penalty was last taken: it ran in "
                "eval mode, under no_grad, through a submodule, or was compiled before the pruner was attached; or a "
                "feature extractor or copied graph ran that does not have all of the pruner's hooks"
            )
        return zero, own

    def regularize(
        self, model: nn.Module, loss: Tensor, *, world_size: int | None = None, accumulation_steps: int = 1
    ) -> Tensor:
        """Add the penalty to the loss; call it before backward, on the loss of the whole step.

        Args:
            model: The attached model or a wrapper of it (DistributedDataParallel, compiled).
            loss: Task loss, a scalar, a mean over this rank's batch.
            world_size: Ranks whose gradients are averaged; None: the process group's size.
            accumulation_steps: Parts that the loss of one optimizer step is divided into afterwards.

        Returns:
            loss + penalty. Under reduction="sum" the penalty is multiplied by both factors, so that the
            gradient equals one process on the whole batch.

        Raises:
            AttachError: Another model.
            SettingError: A factor below 1, or a loss that is no scalar in a graph.

        Example:
            >>> loss = pruner.regularize(model, nn.functional.cross_entropy(model(images), labels))
            >>> loss.backward()
        """
        if unwrapped(model) is not self.model:
            raise AttachError("regularize got another model than the one this pruner is attached to")
        for name, factor in (("world_size", world_size), ("accumulation_steps", accumulation_steps)):
            if factor is not None:
                as_count(name, factor, "a count", least=1)
        _require_loss(loss)
        penalty, own = self._penalties()
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self._settings.reduction == "sum":
            ranks = world_size or (torch.distributed.get_world_size() if distributed else 1)
            penalty = penalty * (ranks * accumulation_steps)
        total = loss + penalty + own
        if distributed and self.enabled:
            average_after_backward(total, self._settings.learned)
        return total

    def gate_parameters(self) -> list[nn.Parameter]:
        """What gates with parameters (``gate="fbs"``, "channel_gating", "lccl") train, for the optimizer.

        They are the pruner's, not in the model's ``parameters()`` and ``state_dict``; those of other gates are none.
        Train with gates on and call ``regularize``, which adds the gates' own losses, and lets ranks share gradients.

        Raises:
            AttachError: Sites are not known yet, or the pruner was removed.

        Example:
            >>> pruner.gate_parameters()
            []
        """
        self._found  # noqa: B018  # raises where there are no sites
        return [parameter for learned in self._settings.learned.values() for parameter in learned.parameters()]

    @property
    def learned(self) -> dict[str, nn.Module]:
        """What holds these parameters, by site name."""
        return dict(self._settings.learned)

    # -- inference: Eq. 6-7 ------------------------------------------------------------------------

    @property
    def gate(self) -> Gate:
        """The gate; sites with ``per_site`` parameters differ in those."""
        return self._settings.gate

    @property
    def enabled(self) -> bool:
        """Whether gates act."""
        return self._memory.enabled

    @property
    def keep(self) -> dict[str, Tensor]:
        """Which channels each instance kept in the last gated forward, by site: bool, (N, C).

        Of this thread's last, or where it ran none, of the last of any thread. A site that ran several times in it has
        the instances of all times, one below the other; one that did not run is missing.
        """
        keep = self._memory.keep
        return {site.name: keep[site.name] for site in self.sites if site.name in keep}

    @property
    def norms(self) -> dict[str, Tensor]:
        """Channel norms (Eq. 3) on which ``keep`` was decided, by site: (N, C), detached."""
        norms = self._memory.norms
        return {site.name: norms[site.name] for site in self.sites if site.name in norms}

    @property
    def per_site(self) -> dict[str, dict[str, Any]]:
        """What differs at single sites, by site name; gate parameters of none that follows another."""
        settings = self._settings
        differs = {
            site: {name: value for name, value in own.items() if name == "lambda_" or site not in settings.followers}
            for site, own in settings.overrides.items()
        }
        return {site: own for site, own in differs.items() if own}

    @property
    def calibration(self) -> dict[str, Any] | None:
        """Record of the last ``calibrate`` (``Calibration.of``), saved with the rest; None before."""
        return self._settings.calibration

    @calibration.setter
    def calibration(self, record: Mapping[str, Any]) -> None:
        self._settings.calibration = dict(record)

    def enable(self, *, per_site: Mapping[str, Mapping[str, Any]] | None = None, **parameters: Any) -> None:
        """Switch gates on, with new gate parameters where given (``alpha=``, ``beta=``, ...).

        Args:
            per_site: Patterns and what differs there, instead of all that differs now; None: no change.

        Example:
            >>> pruner.enable(ratio=0.25)
            >>> pruner.gate, pruner.enabled
            (MinNorm(ratio=0.25), True)
        """
        self.set_thresholds(per_site=per_site, **parameters)
        self._memory.enabled = True

    def set_thresholds(self, *, per_site: Mapping[str, Mapping[str, Any]] | None = None, **parameters: Any) -> None:
        """Change gate parameters as ``enable`` does; gates stay on or off.

        Example:
            >>> pruner.disable()
            >>> pruner.set_thresholds(ratio=0.5)
            >>> pruner.gate, pruner.enabled
            (MinNorm(ratio=0.5), False)
        """
        self._require_attached()
        self._settings.set_thresholds(self.model, parameters, per_site)
        if parameters or per_site is not None:
            self._settings.budget = None  # thresholds that were not steered to it
        self._configure()

    def step(self) -> None:
        """Switch gates on. As in torch-pruning, the step after which the model is smaller, here per image.

        Example:
            >>> pruner.step()
            >>> _ = model(images)
            >>> pruner.keep["0"].sum(1)  # of 8 channels
            tensor([4, 4])
        """
        self.enable()

    def disable(self) -> None:
        """Switch gates off: the model computes what it would without a pruner, bit for bit.

        Example:
            >>> pruner.disable()
            >>> pruner.enabled
            False
        """
        self._memory.enabled = False

    @contextmanager
    def gating(self, *, per_site: Mapping[str, Mapping[str, Any]] | None = None, **parameters: Any) -> Iterator[None]:
        """Gates on inside the block, as ``enable`` does; thresholds and on / off are as before after it.

        Example:
            >>> with pruner.gating(ratio=0.75):
            ...     _ = model(images)
            >>> pruner.keep["0"].sum(1), pruner.gate, pruner.enabled
            (tensor([2, 2]), MinNorm(ratio=0.5), False)
        """
        gate, differed, enabled = self.gate, self._settings.per_site, self.enabled
        budget = self._settings.budget
        self.enable(per_site=per_site, **parameters)
        try:
            yield
        finally:
            self._settings.gate, self._settings.budget = gate, budget
            if per_site is not None:
                self._settings.set_thresholds(self.model, {}, differed, known=True)
            self._configure()
            self._memory.enabled = enabled

    # -- norms known before the layer runs -----------------------------------------------------------

    @property
    def heads(self) -> dict[str, Head]:
        """What predicts norms, by site name."""
        return dict(self._settings.heads)

    @property
    def predicted(self) -> tuple[str, ...]:
        """Names of the sites that are decided on before their layers run: norms are predicted, or they follow."""
        held = self._settings.heads.keys() | self._settings.followers.keys()
        return tuple(site.name for site in self.sites if site.name in held) if held else ()

    @property
    def followers(self) -> dict[str, str]:
        """Sites that keep what another keeps, and which: a depthwise layer makes their map of the other's."""
        return dict(self._settings.followers)

    def fit_predictors(
        self, batches: "Batches", *, max_instances: int = 6000, depthwise: Literal["follow", "own"] = "follow"
    ) -> "Predictors":
        """Predict norms from the maps that a site's layers read, so that what is dropped need not be computed.

        A head for every site that can have one, ``norms = sqrt(P) relu(A phi + b)``, is fitted in closed form
        (docs/predicting.md) to what gates measure at their present thresholds, in eval mode. Every fifth image judges
        the heads. Sites that read the image, or whose head does not pay, go on measuring. Heads that there were go.
        Under torch.distributed every rank must call this, and all get the same heads.

        Args:
            batches: Images, with labels or without, in any form that ``evaluate`` takes.
            max_instances: Images to use at most, of each rank's loader.
            depthwise: "follow": where a depthwise layer alone reads a predicted map, the site that it makes has no head
                and keeps what the other keeps, whose head predicts its norms: one decision serves expansion, filter and
                projection. But for sites whose gate parameters were set apart by ``per_site``. "own": a head for each.

        Returns:
            How well each head predicts, what it keeps and what it costs.

        Raises:
            PredictionError: Fewer images than a head needs, a site that is zero for all of them, a gate that needs
                more than norms, no site that can be predicted, or scope="consumers". Nothing is changed.
            NonFiniteFeatureError: A map holds NaN or infinity.
            SettingError: No loader, or another number.
            AttachError: The pruner was removed, or its sites are not known yet.

        Example:
            >>> from isw_plugin.errors import PredictionError
            >>> try:
            ...     pruner.fit_predictors([images])
            ... except PredictionError as error:  # it has one site
            ...     print(error)
            no site can be predicted; 0: 0 reads the image
        """
        from isw_plugin.predict import fit  # closed forms are of no use to those who only gate

        self._require_attached()
        most = as_count("max_instances", max_instances, "a number of images", least=1)
        check_choice("depthwise", depthwise, ("follow", "own"))
        settings, before = self._settings, (self._settings.heads, self._settings.followers)
        settings.require_scope_all()
        sites = self.sites
        may_follow = settings.may_follow() if depthwise == "follow" else {}
        settings.heads, settings.followers = {}, {}
        try:
            with self.gating():
                heads, found = fit(self.model, self._memory, sites, batches, most, may_follow)
        finally:
            settings.heads, settings.followers = before
            self._configure()
        reasons = {name: head.reason for name, head in found.sites.items()}
        settings.take_heads(heads, found.followers, reasons)
        self._configure()
        return found

    def follow_predictors(self, *, decay: float = 0.99, every: int = 10) -> None:
        """Let heads follow the network while it trains with gates on; call it once after every training step.

        Each call takes the last training forward with gates on (the model in training mode, with gradients): outputs
        are computed there before they are masked, so it is known what heads should have predicted. Sums of products
        of all forwards, weighed by ``decay`` a call, are solved for new heads at every ``every``-th call, once they
        hold two images for each input of a head; until then heads stay. A checkpoint's recompute does not count. Sums
        and count are part of ``state_dict``, so training goes on where it stopped; ``fit_predictors`` forgets them.
        Under torch.distributed every rank must call this: sums are averaged, and heads are equal on all ranks.

        Args:
            decay: Weight of the past at each call, in [0, 1): 0.99 remembers the last 100 batches.
            every: Calls from one solution to the next.

        Raises:
            PredictionError: There are no heads.
            NothingRecordedError: No training forward with gates on since the last call.
            SettingError: A number outside its range, or a decay that forgets sooner than a head has seen enough.
            AttachError: The pruner was removed.

        Example:
            >>> from isw_plugin.errors import PredictionError
            >>> try:
            ...     pruner.follow_predictors()
            ... except PredictionError as error:
            ...     print(error)
            there are no heads to follow the network: fit_predictors first
        """
        from isw_plugin.predict import follow

        self._require_attached()
        self._settings.heads = follow(self._settings.heads, self._memory, decay, every)
        self._configure()

    def drop_predictors(self) -> None:
        """Measure at every site again.

        Example:
            >>> pruner.drop_predictors()
            >>> pruner.predicted
            ()
        """
        self._settings.take_heads({})
        self._configure()

    # -- static pruning ----------------------------------------------------------------------------

    def to_static(self, batches: "Batches", threshold: float = 0.0) -> "Conversion":
        """Prune for good the channels that images do not use, with gates on at their present thresholds.

        A channel is used by an image where some layer reads anything but zeros from it: its gates keep it
        and it is not dead. Channels that torch-pruning's graph ties together go together or not at all;
        those that end in the model's output, in a norm over channels or in a grouped convolution stay.

        At threshold 0, gated outputs on these images are as before, up to rounding. A gate compares norms
        with statistics over all channels, so the sites' thresholds become others that decide on the rest
        as before (``per_site`` of that site); channels whose loss would still change a decision stay.
        Above 0, every channel used by at most this share of the images goes, and nothing is promised; any
        value below 1 / images means all that are never used. Parameters are new objects: make the
        optimizer after this.

        Args:
            batches: Images, (images, labels) as a loader gives them, or dicts of what forward takes.
            threshold: Share of images, in [0, 1).

        Returns:
            What went.

        Raises:
            SettingError: Another threshold, or no images.
            UnsupportedError: Norms are predicted; torch-pruning cannot trace the model; or a gate at threshold
                0 of which it is not known how it decides on fewer channels (known are CVGate and MinNorm).
                Nothing is changed then.

        Example:
            >>> print(pruner.to_static([images[:1]]))  # a loader, or a list of batches
            4 channels of 1 sites pruned for good
        """
        from isw_plugin.static import convert  # torch-pruning is imported only where it is needed

        self._require_attached()
        if self.predicted:
            raise UnsupportedError(
                f"norms of {len(self.predicted)} sites are predicted from maps that would lose channels, so equal "
                "outputs cannot be promised: drop_predictors() first, and fit new ones afterwards"
            )
        with self.gating():
            conversion = convert(self.model, self._memory, self.sites, self._settings.inputs, batches, threshold)
        for site, parameters in conversion.parameters.items():
            self._settings.override(site, parameters)
        self.update_regularizer()
        return conversion

    def accelerate(
        self, example_inputs: Inputs | None = None, *, backend: Literal["auto", "gated", "dense"] = "auto"
    ) -> Accelerated:
        """Make a copy that really skips dropped channels, with the gate and the weights as they are now.

        Args:
            example_inputs: Real inputs at the size and batch that will run: layers are timed on them. None: noise
                in the shape of the last gated forward.
            backend: "auto" takes the faster of the gated graph and the model's best dense form, which keeps every
                channel; "gated" and "dense" one of them, whatever the clock says.

        Returns:
            A module in eval mode without gradients, a snapshot. Its outputs equal the gated model's to float rounding,
            near-ties aside: it was compared, and runs masked, with one warning, where they do not. ``summary()`` says
            what was timed and chosen, ``recording()`` collects decisions, ``prepare()`` takes further sizes.

        Raises:
            SettingError: No ``example_inputs`` and no gated forward before, or none with a tensor and an instance; an
                unknown backend.
            EngineInputError: The model does not take the inputs.
            UnsupportedError: The model cannot be copied with its gates.
            AttachError: The pruner was removed, or its sites are not known yet.

        Example:
            >>> fast = pruner.accelerate(images, backend="gated")
            >>> with pruner.gating():
            ...     torch.allclose(fast(images), model.eval()(images), atol=1e-5)
            True
        """
        self._require_attached()
        if backend not in BACKENDS:
            raise SettingError(f"backend={backend!r}: one of {', '.join(map(repr, BACKENDS))}")
        check_inputs(example_inputs)
        inputs = example_inputs if example_inputs is not None else self._noise()
        return accelerate(self.model, self.sites, inputs, backend)

    def _noise(self) -> Inputs:
        instances = next((len(keep) for keep in self.keep.values()), 0)
        if not instances:
            raise SettingError("accelerate needs example_inputs, or a gated forward before it, to know the batch")
        return self._settings.noise(instances, next(self.model.parameters(), torch.empty(0)))

    # -- saving ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Settings and sites as plain JSON values, and the tensors of heads and gates; without the model's weights.

        Example:
            >>> pruner.state_dict()["gate"]
            {'type': 'MinNorm', 'parameters': {'ratio': 0.5}}
        """
        settings = self._settings
        return settings.state() | {"min_keep": self._memory.min_keep, "enabled": self.enabled} | self._tensors()

    def _tensors(self) -> dict[str, Any]:
        followers = {"followers": self.followers} if self.followers else {}
        return stored(self._settings.heads) | followers | stored_learned(self._settings.learned)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the settings of a pruner on the same architecture.

        Raises:
            StateMismatchError: Another version, other sites, another scope, an unknown gate, heads of another
                model; nothing is changed then.
            PredictionError: Heads, and a gate that needs more than norms; nothing is changed then.

        Example:
            >>> saved = pruner.state_dict()
            >>> pruner.enable(ratio=0.25)
            >>> pruner.load_state_dict(saved)
            >>> pruner.gate, pruner.enabled
            (MinNorm(ratio=0.5), False)
        """
        self._require_attached()
        min_keep = as_count("min_keep", state.get("min_keep", 0), "a number of channels")
        before = self._settings.learned
        self._memory.settings = self._settings.restored(state, self.model)
        self._memory.min_keep = min_keep
        self._memory.enabled = state.get("enabled", False)
        if before.keys() == self._settings.learned.keys():
            self._configure()
        else:  # other layers have hooks
            self._attach()

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Save model and pruner, to be restored by ``isw_plugin.load_pretrained`` in any process.

        safetensors and JSON, no pickle. A slimmed model is saved with its widths. Each file is replaced at
        once, so the folder always holds a whole state, the old or the new; any number of processes may save.

        Raises:
            SettingError: The folder is no path.
            AttachError: Sites are not known yet.
            UnsupportedError: Something in the model's state_dict, the settings or the example inputs is no plain
                value.

        Example:
            >>> import os, tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     pruner.save_pretrained(folder)
            ...     os.path.exists(f"{folder}/pruner.json")
            True
        """
        attach = self._settings.attach_arguments()
        inputs = encoded_inputs(self._settings.inputs)
        write(folder, self.model, {**attach, "inputs": inputs, "state": self.state_dict()}, self.per_site)

    # -- attaching ---------------------------------------------------------------------------------

    @property
    def _settings(self) -> Settings:
        return settings_of(self._memory)

    def _require_attached(self) -> None:
        if memory_of(self.model) is not self._memory:
            raise AttachError("this pruner was removed from its model: attach another")

    @property
    def _found(self) -> Found:
        return self._settings.known()

    def _attach(self) -> None:
        attach(self.model, self._memory)

    def _configure(self) -> None:
        configure(self.model, self._memory)


def _require_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        hint = f", such as timm.create_model({model!r})" if isinstance(model, str) else ""
        raise SettingError(f"model={model!r} is no torch.nn.Module: pass the model itself{hint}")


def _require_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise SettingError(f"the loss is {what}: regularize takes the task loss, a scalar tensor, not outputs")
