"""Random sequences of calls of the public API, beside a model of what must hold after each.

    pytest tests/test_fuzz_api.py                                      # a few sequences, as continuous integration
    ISW_FUZZ_SEQUENCES=10000 pytest -m slow tests/test_fuzz_api.py     # hours; 10000 is also the default

The truth is kept without the package: a bare twin of the network whose weights follow, and settings in plain values.
"""

import copy
import os
import pickle
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pytest
import torch
import torch_pruning as tp
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

from isw_plugin import CVGate, InstanceWisePruner, ISWError, count_macs, evaluate, load_pretrained, steer_thresholds
from isw_plugin.functional import coefficient_of_variation, keep_mask
from tests.conftest import Net, Plain, Residual, Tokens, Touch, hooks_of, made

SEQUENCES = int(os.environ.get("ISW_FUZZ_SEQUENCES", "10000"))


class Grouped(Net):
    """A depthwise layer between two pointwise ones."""

    sites: ClassVar = {"c1": (8, {"c2": (0, 1)}), "c2": (8, {"c3": (0, 1)}), "c3": (6, {"fc": (0, 1)})}

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.act1 = nn.Conv2d(3, 8, 1), nn.ReLU()
        self.c2, self.act2 = nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.ReLU()
        self.c3, self.act3, self.fc = nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Linear(6, 5)

    def run(self, x: Tensor, touch: Touch) -> Tensor:
        x, _ = touch("c1", self.act1(self.c1(x)))
        x, _ = touch("c2", self.act2(self.c2(x)))
        x, _ = touch("c3", self.act3(self.c3(x)))
        return self.fc(x.mean((2, 3)))


class Shared(Net):
    """One layer runs twice; its maps are no sites."""

    sites: ClassVar = {"c1": (4, {"shared": (0, 1)}), "c3": (5, {"fc": (0, 1)})}

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.act1, self.shared = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)
        self.c3, self.act3, self.fc = nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Linear(5, 5)

    def run(self, x: Tensor, touch: Touch) -> Tensor:
        x, _ = touch("c1", self.act1(self.c1(x)))
        x = torch.tanh(self.shared(torch.tanh(self.shared(x))))
        x, _ = touch("c3", self.act3(self.c3(x)))
        return self.fc(x.mean((2, 3)))


class Dropped(Net):
    """A dropout behind the site's activation."""

    sites: ClassVar = {"fc1": (12, {"fc2": (0, 1)})}
    image: ClassVar = (10,)

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.drop, self.fc2 = nn.Linear(10, 12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 5)

    def run(self, x: Tensor, touch: Touch) -> Tensor:
        x, _ = touch("fc1", self.act(self.fc1(x)))
        return self.fc2(self.drop(x))


KINDS = (Plain, Residual, Tokens, Grouped, Shared, Dropped)
ALPHAS, BETAS = st.sampled_from([0.0, 0.2, 0.5, float("inf")]), st.sampled_from([0.0, 0.4, 0.8, 1.2, 1.9])
LAMBDAS = st.sampled_from([0.0, 1e-4, 0.1])
WRONG = {
    "attach twice": lambda m: InstanceWisePruner(m.net, m.images),
    "beta 2": lambda m: m.pruner.enable(beta=2.0),
    "no parameter": lambda m: m.pruner.enable(gamma=1),
    "no layer": lambda m: m.pruner.enable(per_site={"nothing": {"beta": 0.1}}),
    "half wrong": lambda m: m.pruner.enable(beta=0.1, per_site={"*": {"beta": 3.0}}),
    "lambda": lambda m: setattr(m.pruner, "lambda_", -1.0),
    "gating": lambda m: m.pruner.gating(alpha=-1).__enter__(),
    "another model": lambda m: m.pruner.regularize(m.bare, torch.zeros(())),
    "world size": lambda m: m.pruner.regularize(m.net, torch.zeros(()), world_size=0),
    "backend": lambda m: m.pruner.accelerate(m.images, backend="cuda"),
    "state": lambda m: m.pruner.load_state_dict({}),
    "other sites": lambda m: m.pruner.load_state_dict({**m.pruner.state_dict(), "sites": {"x": 1}}),
    "negative lambda": lambda m: m.pruner.load_state_dict({**m.pruner.state_dict(), "lambda_": -1.0}),
    "other gate": lambda m: m.pruner.load_state_dict(
        {**m.pruner.state_dict(), "gate": {"type": "CVGate", "parameters": {"alpha": -1.0}}}
    ),
    "folder": lambda m: m.pruner.save_pretrained(None),
    "steer": lambda m: steer_thresholds(m.pruner, {"nothing": 0.5}),
    "share": lambda m: steer_thresholds(m.pruner, {m.pruner.sites[0].name: 1.5}),
    "budget": lambda m: steer_thresholds(m.pruner, macs_left=45),
    "threshold": lambda m: m.pruner.to_static([m.images], threshold=1.0),
}


class Api(RuleBasedStateMachine):
    @initialize(kind=st.sampled_from(KINDS), seed=st.integers(0, 3))
    def start(self, kind: type[Net], seed: int) -> None:
        self.net, self.bare, self.kind = made(kind, seed), made(kind, seed), kind
        self.images = self.net.images(3, seed)
        self.pruner: InstanceWisePruner | None = None
        self.reset()

    def reset(self) -> None:
        self.enabled, self.references = False, {}
        self.truth: dict[str, Any] = {}

    # -- what must hold ----------------------------------------------------------------------------

    def parameters(self, site: str) -> dict[str, float]:
        return {"alpha": self.truth["alpha"], "beta": self.truth["beta"]} | self.truth["per_site"].get(site, {})

    def by_hand(self, model: Net, images: Tensor, keep: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The output under these masks, in plain PyTorch, and every site's map before its mask."""
        maps: dict[str, Tensor] = {}

        def touch(name: str, feature: Tensor) -> tuple[Tensor, Tensor]:
            maps[name] = feature
            if name not in keep:
                return feature, feature
            shape = (*keep[name].shape, 1, 1) if feature.dim() == 4 else (len(feature), *[1] * (feature.dim() - 2), -1)
            masked = torch.where(keep[name].view(shape), feature, torch.zeros(()))
            return masked, masked if self.truth["scope"] == "all" else feature

        return model.run(images, touch), maps

    @staticmethod
    def norms(feature: Tensor) -> Tensor:
        channels = feature.movedim(1, -1) if feature.dim() == 4 else feature
        return channels.double().reshape(len(feature), -1, channels.shape[-1]).square().sum(1).sqrt()

    def check_decisions(self, maps: dict[str, Tensor]) -> None:
        for site, keep in self.pruner.keep.items():
            norms = self.pruner.norms[site]
            torch.testing.assert_close(norms.double(), self.norms(maps[site]), rtol=1e-4, atol=1e-6)
            expected = keep_mask(norms, **{k: v for k, v in self.parameters(site).items() if k != "lambda_"})
            if self.truth["min_keep"] and self.parameters(site)["beta"]:
                largest = norms.topk(min(self.truth["min_keep"], norms.shape[1]), dim=1).indices
                expected = expected.scatter(1, largest, True)
            assert torch.equal(keep, expected), site

    @invariant()
    @torch.no_grad()
    def outputs(self) -> None:
        output = self.net(self.images)
        if not self.enabled:
            assert torch.equal(output, self.bare(self.images))
            return
        keep = self.pruner.keep
        assert set(keep) == set(self.truth["sites"])
        expected, maps = self.by_hand(self.bare, self.images, keep)
        assert torch.equal(output, expected)
        self.check_decisions(maps)
        near = self.near_a_threshold()
        for index, image in enumerate(self.images.split(1)):
            alone = self.net(image)
            if not near:
                assert all(torch.equal(self.pruner.keep[site], keep[site][index : index + 1]) for site in keep)
                torch.testing.assert_close(alone, output[index : index + 1], rtol=1e-4, atol=1e-5)

    def near_a_threshold(self) -> bool:
        """Whether another order of summation may decide otherwise."""
        for site, norms in self.pruner.norms.items():
            alpha, beta, mean = *map(self.parameters(site).get, ("alpha", "beta")), norms.mean(1, keepdim=True)
            cv = coefficient_of_variation(norms)
            if (cv - alpha).abs().min() < 1e-4 or ((norms - beta * mean).abs() < 1e-4 * mean).any():
                return True
        return False

    @invariant()
    def settings_and_weights(self) -> None:
        here, there = self.net.state_dict(), self.bare.state_dict()
        assert list(here) == list(there)
        assert all(torch.equal(here[key], there[key]) for key in here)
        if self.pruner is None:
            assert not any(any(hooks) for hooks in hooks_of(self.net).values())
            return
        assert self.pruner.enabled is self.enabled
        assert self.pruner.gate == CVGate(self.truth["alpha"], self.truth["beta"])
        assert self.pruner.lambda_ == self.truth["lambda_"]
        assert self.pruner.per_site == {site: o for site, o in self.truth["per_site"].items() if o}
        assert [site.name for site in self.pruner.sites] == self.truth["sites"]
        assert InstanceWisePruner.of(self.net).state_dict() == self.pruner.state_dict()

    def attached(self) -> bool:
        return self.pruner is not None

    # -- attach and remove -------------------------------------------------------------------------

    @precondition(lambda self: not self.attached())
    @rule(
        alpha=ALPHAS,
        beta=BETAS,
        lambda_=LAMBDAS,
        scope=st.sampled_from(["all", "consumers"]),
        reduction=st.sampled_from(["sum", "mean", "relative"]),
        min_keep=st.integers(0, 3),
        pattern=st.sampled_from(["*", "first", "last", "re:", "function"]),
        own=st.none() | BETAS,
        late=st.booleans(),
        on=st.booleans(),
    )
    def attach(self, pattern: str, own: float | None, late: bool, on: bool, **given: Any) -> None:
        names = list(self.kind.sites)
        if self.kind is Shared and given["scope"] == "consumers":
            names.remove("c1")  # its reader runs twice
        chosen = {"first": names[:1], "last": names[-1:]}.get(pattern, names)
        layers = {"*": "*", "re:": "re:.*", "function": lambda name, _: True}.get(pattern, chosen)
        per_site = {} if own is None else {chosen[0]: {"beta": own, "lambda_": 0.01}}
        self.pruner = InstanceWisePruner(
            self.net, None if late else self.images[:1], layers=layers, per_site=per_site, **given
        )
        if late:
            with torch.no_grad():
                self.net(self.images)
        self.truth = {**given, "per_site": per_site, "sites": chosen}
        if on:
            self.pruner.step()
        self.enabled = on

    @precondition(attached)
    @rule()
    def remove(self) -> None:
        self.pruner.remove()
        self.pruner.remove()
        self.pruner = None
        self.reset()

    # -- gates -------------------------------------------------------------------------------------

    @precondition(attached)
    @rule(beta=st.none() | BETAS, alpha=st.none() | ALPHAS, own=st.none() | BETAS)
    def enable(self, own: float | None, **given: float | None) -> None:
        parameters = {name: value for name, value in given.items() if value is not None}
        per_site = None if own is None else {self.truth["sites"][-1]: {"beta": own}}
        self.pruner.enable(per_site=per_site, **parameters)
        self.enabled = True
        self.truth |= parameters | ({} if per_site is None else {"per_site": per_site})

    @precondition(attached)
    @rule()
    def disable(self) -> None:
        self.pruner.disable()
        self.enabled = False

    @precondition(attached)
    @rule(beta=BETAS, own=st.booleans(), fails=st.booleans())
    def gating(self, beta: float, own: bool, fails: bool) -> None:
        before = self.pruner.state_dict()
        per_site = {"*": {"beta": beta}} if own else None
        with (
            pytest.raises(ZeroDivisionError) if fails else torch.no_grad(),
            self.pruner.gating(beta=beta, per_site=per_site),
        ):
            self.net(self.images)
            if fails:
                raise ZeroDivisionError
        assert self.pruner.state_dict() == before

    @precondition(attached)
    @rule(name=st.sampled_from(sorted(WRONG)))
    def wrong(self, name: str) -> None:
        before, hooks = self.pruner.state_dict(), hooks_of(self.net)
        with pytest.raises(ISWError):
            WRONG[name](self)
        assert self.pruner.state_dict() == before
        assert hooks_of(self.net) == hooks

    @rule()
    def fail_inside(self) -> None:
        with pytest.raises(RuntimeError):
            self.net(torch.zeros(2, 2, 2, 2, 2))

    # -- training ----------------------------------------------------------------------------------

    @precondition(attached)
    @rule(lambda_=st.none() | LAMBDAS, forwards=st.integers(1, 2))
    def train(self, lambda_: float | None, forwards: int) -> None:
        if lambda_ is not None:
            self.pruner.lambda_ = self.truth["lambda_"] = lambda_
        twin = copy.deepcopy(self.bare).train()
        self.net.train()
        penalty = torch.zeros((), dtype=torch.float64)
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01)
        loss = torch.zeros(())
        for turn in range(forwards):
            torch.manual_seed(turn)
            loss = loss + self.net(self.images).square().mean()
            torch.manual_seed(turn)
            _, maps = self.by_hand(twin, self.images, self.pruner.keep if self.enabled else {})
            penalty = penalty + self.penalty_by_hand(maps)
        total = self.pruner.regularize(self.net, loss)
        torch.testing.assert_close((total - loss).double(), penalty.detach(), rtol=1e-3, atol=1e-6)
        total.backward()
        optimizer.step()
        self.net.eval()
        self.bare.load_state_dict(self.net.state_dict())

    def penalty_by_hand(self, maps: dict[str, Tensor]) -> Tensor:
        lambdas = {
            site: self.truth["per_site"].get(site, {}).get("lambda_", self.truth["lambda_"])
            for site in self.truth["sites"]
        }
        norms = {site: self.norms(maps[site]) for site in lambdas}
        if self.truth["reduction"] == "relative":
            decaying = [site for site in lambdas if lambdas[site]]
            for site in decaying:
                if site not in self.references and norms[site].mean() > 0:
                    self.references[site] = norms[site].mean().item()
            known = [site for site in decaying if site in self.references]
            terms = [lambdas[site] * norms[site].mean() / self.references[site] for site in known]
            return sum(terms, torch.zeros(())).double() / max(1, len(decaying))
        total = sum((lambdas[site] * norms[site].sum() for site in lambdas), torch.zeros(()).double())
        return total / (len(self.images) if self.truth["reduction"] == "mean" else 1)

    @precondition(lambda self: self.attached() and self.enabled)
    @rule(share=st.sampled_from([0.3, 0.7, 1.0]))
    def steer(self, share: float) -> None:
        steer_thresholds(self.pruner, dict.fromkeys(self.truth["sites"], share), rate=0.5)
        self.truth["per_site"] = self.pruner.per_site
        assert all(0 <= o.get("beta", 0) < 2 for o in self.truth["per_site"].values())

    # -- copies ------------------------------------------------------------------------------------

    def take(self, net: nn.Module) -> None:
        """Go on with a copy; what happens to it must not reach the original, nor the other way round."""
        if self.pruner is not None:
            pruner = InstanceWisePruner.of(net)
            assert pruner.state_dict() == self.pruner.state_dict()
            self.pruner.enable(alpha=0.3, beta=0.3)
            self.pruner.remove()
            self.pruner = pruner
        self.net = net

    @rule(pickled=st.booleans())
    def copied(self, pickled: bool) -> None:
        self.take(pickle.loads(pickle.dumps(self.net)) if pickled else copy.deepcopy(self.net))

    @rule()
    def averaged(self) -> None:
        average = torch.optim.swa_utils.AveragedModel(self.net)
        average.update_parameters(self.net)
        average.module.load_state_dict(self.net.state_dict())
        self.take(average.module.eval())

    @precondition(attached)
    @rule()
    def restored_state(self) -> None:
        state = self.pruner.state_dict()
        self.pruner.enable(alpha=0.1, beta=0.1, per_site={"*": {"beta": 0.2}})
        self.pruner.lambda_ = 7.0
        self.pruner.load_state_dict(state)
        assert self.pruner.state_dict() == state

    @precondition(attached)
    @rule(seed=st.integers(4, 5))
    def saved(self, seed: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.pruner.save_pretrained(folder)
            restored = load_pretrained(folder, made(self.kind, seed))
        assert restored.per_site == self.pruner.per_site
        self.pruner.remove()
        self.pruner, self.net = restored, restored.model

    # -- measuring, static pruning, the engine -----------------------------------------------------

    @precondition(attached)
    @rule()
    def measured(self) -> None:
        report = count_macs(self.net, self.images)
        assert ((report.gated > 0) & (report.gated <= report.dense)).all()
        found = evaluate(self.net, [(self.images, torch.zeros(len(self.images), dtype=torch.long))])
        assert 0 <= found.prune_ratio <= 1

    @precondition(lambda self: self.kind in (Plain, Residual, Grouped))
    @rule()
    def slimmed(self) -> None:
        for model in (self.net, self.bare):
            tp.pruner.BasePruner(
                model, self.images, tp.importance.MagnitudeImportance(), pruning_ratio=0.2, ignored_layers=[model.fc]
            ).step()
            model.eval()
        if self.pruner is not None:
            before = {site.name: site.channels for site in self.pruner.sites}
            self.pruner.update_regularizer()
            after = {site.name: site.channels for site in self.pruner.sites}
            self.references = {site: r for site, r in self.references.items() if before[site] == after[site]}

    @precondition(attached)
    @rule()
    def replaced(self) -> None:
        for name, module in list(self.net.named_children()):
            if isinstance(module, nn.ReLU):
                setattr(self.net, name, nn.ReLU())
        self.pruner.update_regularizer()

    @precondition(lambda self: self.attached() and self.enabled and self.truth["scope"] == "all")
    @rule()
    @torch.no_grad()
    def threads(self) -> None:
        expected = self.net(self.images)
        with ThreadPoolExecutor(2) as pool:
            outputs = list(pool.map(lambda _: self.net(self.images), range(4)))
        assert all(torch.equal(output, expected) for output in outputs)

    @precondition(lambda self: self.attached() and self.enabled)
    @rule(chance=st.integers(0, 19), backend=st.sampled_from(["gated", "dense"]))
    @torch.no_grad()
    def accelerated(self, chance: int, backend: str) -> None:
        if chance != 19:  # seconds
            return
        fast = self.pruner.accelerate(self.images, backend=backend)
        expected = self.net(self.images) if backend == "gated" else self.bare(self.images)
        if backend == "dense" or not self.near_a_threshold():
            torch.testing.assert_close(fast(self.images), expected, rtol=1e-3, atol=1e-4)


def run(sequences: int, steps: int, **options: Any) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    run_state_machine_as_test(
        Api,
        settings=settings(
            max_examples=sequences, stateful_step_count=steps, deadline=None, suppress_health_check=checks, **options
        ),
    )


def test_a_few_sequences() -> None:
    run(12, 8, derandomize=True, database=None)


@pytest.mark.slow
def test_many_sequences() -> None:
    run(SEQUENCES, 20)
