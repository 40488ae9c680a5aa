"""What a pruner is besides its model: plain values that are checked once, copied and saved."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from isw_plugin.decay import REDUCTIONS, first_norms, relative_weights
from isw_plugin.errors import AttachError, PredictionError, SettingError, StateMismatchError
from isw_plugin.followers import require_followed, restored_followers, root, set_apart
from isw_plugin.gates import BUILT_IN, CVGate, Gate, LearnedGate, named_gate, stored_gate, with_parameters
from isw_plugin.heads import Head, require_norms_only, restored
from isw_plugin.learned import kept_learned, made_learned, put_values, restored_learned
from isw_plugin.sites import Found, Inputs, Patterns, find_sites
from isw_plugin.sites.patterns import select
from isw_plugin.values import as_number, check_choice, check_patterns, check_per_site

__all__ = ["Settings", "check_lambda", "choose_gate"]

_VERSION = 1
_ADDED = {"calibration", "references", "budget"}  # to a state of this version, after some were saved without


@dataclass
class Settings:
    """What a user chose for a pruner, and what was found with it: plain values that can be copied and pickled."""

    lambda_: float
    gate: Gate
    layers: Patterns
    exclude: Patterns
    scope: str
    reduction: str
    per_site: Mapping[str, Mapping[str, Any]]
    inputs: Any = None
    found: Found | None = None
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)  # per_site, by site name
    references: dict[str, float] = field(default_factory=dict)  # mean norm at the start of training, by site
    calibration: dict[str, Any] | None = None  # of the last ``calibrate``, plain values
    budget: float | None = None  # share of the MACs that steered thresholds aim at now
    counted: Any = None  # MACs of the layers, once thresholds were steered by them
    heads: dict[str, Head] = field(default_factory=dict)  # of the sites whose norms are predicted
    followers: dict[str, str] = field(default_factory=dict)  # sites that keep what another keeps, and which
    unpredicted: dict[str, str] = field(default_factory=dict)  # why others have none, beside how they are made
    learned: dict[str, nn.Module] = field(default_factory=dict)  # parameters of gates that have some, by site

    def __post_init__(self) -> None:
        self.lambda_ = check_lambda(self.lambda_)
        check_choice("scope", self.scope, ("all", "consumers"))
        if isinstance(self.gate, LearnedGate) and self.scope != "all":
            raise SettingError(
                f'scope="{self.scope}": {type(self.gate).__name__} makes the map anew for all: scope="all"'
            )
        check_choice("reduction", self.reduction, REDUCTIONS)
        check_patterns("layers", self.layers)
        check_patterns("exclude", self.exclude)
        check_per_site(self.per_site)
        self.per_site = {pattern: self._plain(override) for pattern, override in self.per_site.items()}

    def __getstate__(self) -> dict[str, Any]:
        """Functions as patterns become the names that they chose, which can be pickled."""
        state = dict(self.__dict__)
        if self.found and (callable(self.layers) or callable(self.exclude)):
            state["layers"] = [name for site in self.found.sites for name in site.layers]
            state["exclude"] = ()
        return state

    def _plain(self, override: Mapping[str, Any]) -> dict[str, Any]:
        """A site's overrides, checked, with its numbers as Python floats."""
        lambda_, gate = self.lambda_and_gate(override)
        return {name: lambda_ if name == "lambda_" else getattr(gate, name) for name in override}

    def lambda_and_gate(self, override: Mapping[str, Any]) -> tuple[float, Gate]:
        """The lambda and the gate of a site that has these overrides."""
        parameters = dict(override)
        lambda_ = check_lambda(parameters.pop("lambda_", self.lambda_))
        return lambda_, with_parameters(self.gate, **parameters)

    def gates(self) -> dict[str, Gate]:
        """What decides at every site: at one that follows, what decides at the site that it follows."""
        own = self._gates(self.overrides)
        return {name: own[root(self.followers, name)] for name in own}

    def _gates(self, overrides: Mapping[str, Mapping[str, Any]]) -> dict[str, Gate]:
        return {name: self.lambda_and_gate(override)[1] for name, override in overrides.items()}

    def require_channels(self, min_keep: int) -> None:
        """Raise SettingError where channels shall be kept of a gate that drops single elements."""
        if min_keep and isinstance(self.gate, LearnedGate) and not self.gate.whole_channels:
            raise SettingError(f"min_keep={min_keep}: {type(self.gate).__name__} drops no channels but elements: 0")

    def lambdas(self) -> dict[str, float]:
        """The weight of every site's penalty."""
        return {name: self.lambda_and_gate(override)[0] for name, override in self.overrides.items()}

    def norm_weights(self) -> dict[str, float]:
        """What one norm weighs at every site, under the reduction."""
        lambdas = self.lambdas()
        if self.reduction != "relative":
            return lambdas
        return relative_weights(lambdas, {s.name: s.channels for s in self.known().sites}, self.references)

    def measure(self, norms: Mapping[str, Sequence[Tensor]]) -> None:
        """Under reduction="relative", take the first norms of sites as their references."""
        if self.reduction == "relative":
            missing = [name for name, lambda_ in self.lambdas().items() if lambda_ and name not in self.references]
            if missing:
                first: Callable[..., dict[str, float]] = first_norms
                if torch.compiler.is_dynamo_compiling():  # ranks and numbers are no graph's matter
                    first = torch.compiler.disable(first)  # type: ignore[no-untyped-call]  # of torch
                self.references |= first(norms, missing)

    def known(self) -> Found:
        """The sites, once they are known."""
        if self.found is None:
            raise AttachError(
                "no sites: they are found at the first forward (pass example_inputs to find them now), or the pruner "
                "was removed"
            )
        return self.found

    def resolve(self, model: nn.Module, inputs: Inputs) -> None:
        """Find the sites, and which of them ``per_site`` means."""
        found = find_sites(model, inputs, self.layers, self.exclude, self.scope)
        overrides = _by_site(model, found, self.per_site)
        learned = made_learned(model, found.sites, self._gates(overrides))
        self._keep_heads(found)
        self.learned = kept_learned(learned, self.learned)
        self.overrides = overrides
        before = {site.name: site.channels for site in self.found.sites} if self.found else {}
        same = {site.name for site in found.sites if before.get(site.name) == site.channels}
        self.references = {name: norm for name, norm in self.references.items() if name in same}
        self.found, self.counted = found, None
        self.inputs = tree_map_only(Tensor, lambda tensor: tensor.detach().to("meta"), inputs)

    def _keep_heads(self, found: Found) -> None:
        """Heads whose site and sources are as they were stay."""
        before = {site.name: site for site in self.found.sites} if self.found else {}
        here = {site.name: site for site in found.sites}
        same = {name for name, site in here.items() if name in before and site.channels == before[name].channels}
        kept = {
            name: head
            for name, head in self.heads.items()
            if {name, *head.sources} <= same and here[name].making.sources == head.sources
        }
        follow = {
            name: source
            for name, source in self.followers.items()
            if name in same and here[name].making.follows == source and root(self.followers, name) in kept
        }
        if gone := [name for name in (*self.heads, *self.followers) if name not in kept | follow]:
            warnings.warn(
                f"{', '.join(gone)}: measured again, since they or the maps that their heads read have changed. "
                "fit_predictors fits new heads",
                stacklevel=4,
            )
        self.heads, self.followers = kept, follow

    def set_thresholds(
        self,
        model: nn.Module,
        parameters: Mapping[str, Any],
        per_site: Mapping[str, Mapping[str, Any]] | None,
        known: bool = False,
    ) -> None:
        """Change parameters of the gate and, unless None, all that differs at single sites.

        Args:
            known: They are put back: sites that follow now may have held others before.
        """
        gate = with_parameters(self.gate, **parameters)
        changed = dataclasses.replace(self, gate=gate)
        if per_site is not None:
            changed = dataclasses.replace(changed, per_site=per_site)
            changed.overrides = _by_site(model, self.found, changed.per_site) if self.found else {}
            if not known:
                require_followed(self.followers, changed.overrides, changed._gates(changed.overrides))
        if isinstance(gate, LearnedGate):
            _require_fixed(self._gates(self.overrides), changed._gates(changed.overrides))
        self.gate, self.per_site, self.overrides = gate, changed.per_site, changed.overrides

    def may_follow(self) -> dict[str, str]:
        """Sites that a depthwise layer alone makes, and of which, where nobody set other gate parameters for them.

        What ``calibrate`` and a budget set is set anew, for the site that decides.
        """
        calibrated = (self.calibration or {}).get("best", {}).get("per_site", {})
        free = {"lambda_", "beta"} if self.budget is not None else {"lambda_"}
        chosen = {
            site: {
                name: value
                for name, value in own.items()
                if name not in free and (name, value) not in calibrated.get(site, {}).items()
            }
            for site, own in self.overrides.items()
        }
        follow = {site.name: site.making.follows for site in self.known().sites if site.making.follows}
        others = {site for site, *_ in set_apart(follow, chosen, self._gates(self.overrides))}
        return {site: source for site, source in follow.items() if site not in others}

    def override(self, site: str, parameters: Mapping[str, Any]) -> None:
        """Set gate parameters of one site, whatever patterns say of it; its overrides are found at ``resolve``."""
        if parameters:
            before = dict(self.per_site)
            self.per_site = {**before, site: {**before.pop(site, {}), **parameters}}

    def noise(self, instances: int, weight: Tensor) -> Inputs:
        """Noise in the shape of the inputs that the sites were found on, of a weight's type and device."""
        noise: Inputs = tree_map_only(Tensor, lambda tensor: _noise(tensor, instances, weight), self.inputs)
        return noise

    def attach_arguments(self) -> dict[str, Any]:
        """Which layers were chosen, as plain JSON values; functions become the names that they chose."""
        self.known()
        state = self.__getstate__()
        layers, exclude = state["layers"], state["exclude"]
        return {"layers": _listed(layers), "exclude": _listed(exclude)}

    def state(self) -> dict[str, Any]:
        """The settings as plain JSON values, with the channels of every site."""
        gate = self.gate
        parameters: dict[str, Any] = {}
        if dataclasses.is_dataclass(gate) and not isinstance(gate, type):
            parameters = dataclasses.asdict(gate)
        return {
            "version": _VERSION,
            "lambda_": self.lambda_,
            "gate": {"type": _gate_type(gate), "parameters": parameters},
            "scope": self.scope,
            "reduction": self.reduction,
            "per_site": {pattern: dict(override) for pattern, override in self.per_site.items()},
            "sites": {site.name: site.channels for site in self.known().sites},
            "references": dict(self.references),
            "calibration": self.calibration,
            "budget": self.budget,
        }

    def restored(self, state: Mapping[str, Any], model: nn.Module) -> "Settings":
        """These settings with the values of a saved state.

        Raises:
            StateMismatchError: Another version, other sites, another scope or an unknown gate.
        """
        here = self.state()
        _require_same_model(here, state)
        settings = dataclasses.replace(
            self,
            lambda_=state["lambda_"],
            gate=self._stored_gate(state["gate"]),
            reduction=state["reduction"],
            per_site={pattern: dict(override) for pattern, override in state["per_site"].items()},
            references=dict(state.get("references", {})),
            calibration=state.get("calibration"),
            budget=state.get("budget"),
        )
        settings.overrides = _by_site(model, settings.known(), settings.per_site)
        settings.require_channels(state.get("min_keep", 0))
        learned = made_learned(model, settings.known().sites, settings._gates(settings.overrides))
        learned = restored_learned(state.get("learned", {}), learned)
        sites = settings.known().sites
        heads = restored(state.get("heads", {}), sites)
        settings.take_heads(heads, restored_followers(state.get("followers", {}), sites, heads))
        settings.learned = put_values(self.learned, learned)
        return settings

    def take_heads(
        self,
        heads: dict[str, Head],
        follow: Mapping[str, str] | None = None,
        unpredicted: Mapping[str, str] | None = None,
    ) -> None:
        """Predict the norms of these sites, let others follow, and measure the rest.

        Raises:
            PredictionError: A gate needs more than norms, or others than readers see the maps.
        """
        if heads:
            self.require_scope_all()
        for site in self.known().sites:
            if site.name in heads:
                require_norms_only(self.lambda_and_gate(self.overrides[site.name])[1], site)
        self.heads, self.followers, self.unpredicted = heads, dict(follow or {}), dict(unpredicted or {})

    def require_scope_all(self) -> None:
        """Raise PredictionError where others than readers see whole maps, so that nothing can be left undone."""
        if self.scope != "all":
            raise PredictionError(
                f'under scope="{self.scope}" others see the whole map, so that none of it can be left undone: attach '
                'with scope="all"'
            )

    def _stored_gate(self, stored: Mapping[str, Any]) -> Gate:
        if stored["type"] == _gate_type(self.gate):
            return with_parameters(self.gate, **stored["parameters"])
        if stored["type"] in BUILT_IN:
            ours: Gate = BUILT_IN[stored["type"]](**stored["parameters"])
            return ours
        gate = stored_gate(stored["type"], stored["parameters"])
        if gate is None:
            raise StateMismatchError(
                f"saved with the gate {stored['type']}, which no installed package offers: attach with that gate first"
            )
        return gate


def choose_gate(gate: Gate | str, alpha: float | None, beta: float | None) -> Gate:
    """The gate that a user means by ``gate=``, ``alpha=`` and ``beta=``.

    Raises:
        SettingError: No gate, a name that no installed package offers, or thresholds of the CV gate beside
            another.
    """
    given = {name: value for name, value in (("alpha", alpha), ("beta", beta)) if value is not None}
    if gate == "cv":
        return CVGate(**given)
    if isinstance(gate, str):
        gate = named_gate(gate)
    if isinstance(gate, type) or not callable(gate):
        raise SettingError(f"gate={gate!r}: 'cv', or a gate such as MinNorm(ratio=0.3)")
    if given:
        raise SettingError(f"{', '.join(given)} set the CV gate, and gate={gate!r} is another: give it its own")
    return gate


def _noise(tensor: Tensor, instances: int, weight: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return torch.randn(instances, *tensor.shape[1:], dtype=weight.dtype, device=weight.device)
    return torch.zeros(instances, *tensor.shape[1:], dtype=tensor.dtype, device=weight.device)


def _listed(patterns: Patterns) -> str | list[str]:
    return patterns if isinstance(patterns, str) else list(patterns)  # type: ignore[arg-type]  # no functions here


def _gate_type(gate: Gate) -> str:
    return str(getattr(gate, "__qualname__", type(gate).__name__))  # a function's own name


def check_lambda(lambda_: float) -> float:
    """It as a float; SettingError unless this can weigh a penalty."""
    meaning = "the weight of the penalty is a finite number, 0 or more"
    number = as_number("lambda_", lambda_, meaning)
    if not (number >= 0 and math.isfinite(number)):
        raise SettingError(f"lambda_={number}: {meaning}")
    return number


def _by_site(model: nn.Module, found: Found, per_site: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What differs at each site; later patterns win."""
    by_layer = {layer: site.name for site in found.sites for layer in site.layers}
    layers = {name: module for name, module in model.named_modules() if name in by_layer}
    overrides: dict[str, dict[str, Any]] = {site.name: {} for site in found.sites}
    for pattern, override in per_site.items():
        for layer in select(layers, pattern, setting="per_site"):
            overrides[by_layer[layer]] |= override
    return overrides


def _require_fixed(before: Mapping[str, Gate], after: Mapping[str, Gate]) -> None:
    """Settings on which the shapes of a gate's parameters depend stay."""
    for site, gate in after.items():
        for name in gate.fixed if isinstance(gate, LearnedGate) and site in before else ():
            if getattr(gate, name) != getattr(before[site], name):
                raise SettingError(
                    f"{name}={getattr(gate, name)!r} at {site}: it is fixed when a pruner is attached, to "
                    f"{getattr(before[site], name)!r} here; remove() and attach with another"
                )


def _require_same_model(here: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    missing = sorted(here.keys() - state.keys() - _ADDED)
    if missing or state["version"] != _VERSION:
        lacking = f", and it has no {', '.join(missing)}" if missing else ""
        raise StateMismatchError(f"no state_dict of version {_VERSION}: version {state.get('version')!r}{lacking}")
    if state["scope"] != here["scope"]:
        raise StateMismatchError(f"saved with scope={state['scope']!r}: attach with that scope first")
    names = dict.fromkeys([*here["sites"], *state["sites"]])
    other = [
        f"{name} has {here['sites'].get(name, 'no')} channels here and {state['sites'].get(name, 'no')} there"
        for name in names
        if here["sites"].get(name) != state["sites"].get(name)
    ]
    if other:
        raise StateMismatchError(f"a state_dict of another model: {'; '.join(other[:5])}")
