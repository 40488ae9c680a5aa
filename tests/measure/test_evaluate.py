import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from isw_plugin import InstanceWisePruner, evaluate
from isw_plugin.accelerate import choose, fit
from isw_plugin.accelerate.accelerated import Accelerated
from isw_plugin.errors import AttachError, NonFiniteFeatureError, ProbeError, SettingError
from tests.accelerate.nets import clock, whole_clock


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )


def batches(sizes: tuple[int, ...] = (4, 4, 2)) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 3, 6, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator)) for n in sizes
    ]


def gated() -> tuple[nn.Module, InstanceWisePruner]:
    model = net()
    pruner = InstanceWisePruner(model, torch.zeros(1, 3, 6, 6), alpha=0.0, beta=0.9)
    pruner.step()
    return model, pruner


def test_accuracy_is_top_1() -> None:
    model = net()
    loader = batches()
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in loader)
    report = evaluate(model, loader)
    assert report.instances == 10
    assert report.accuracy == pytest.approx(right / 10)
    assert (report.prune_ratio, report.macs_saved, report.execution) == (0, 0, "dense")


def test_ratio_and_macs_are_means_over_instances() -> None:
    model, pruner = gated()
    dropped = []
    for images, _ in batches():
        model(images)
        dropped.append((~pruner.keep["0"]).double().mean(1))
    report = evaluate(model, batches(), records=True)
    assert report.records is not None
    assert torch.allclose(report.records.prune_ratio, torch.cat(dropped))
    assert report.prune_ratio == pytest.approx(torch.cat(dropped).mean().item())
    assert report.prune_ratio > 0
    assert report.execution == "masked"
    assert report.macs_saved == pytest.approx(sum(site.macs_saved for site in report.per_site.values()))
    assert report.per_site["0"].keep_ratio == pytest.approx(1 - report.prune_ratio)


def test_classes_add_up_to_the_whole() -> None:
    model, _ = gated()
    report = evaluate(model, batches())
    counts = [c.instances for c in report.per_class.values()]
    assert sum(counts) == report.instances
    for name in ("accuracy", "prune_ratio", "macs_saved"):
        mean = sum(getattr(c, name) * c.instances for c in report.per_class.values()) / report.instances
        assert mean == pytest.approx(getattr(report, name))


def test_records_keep_every_decision() -> None:
    model, _ = gated()
    records = evaluate(model, batches(), records=True).records
    assert records is not None
    assert records.keep["0"].shape == (10, 8)
    assert records.cv["0"].shape == (10,)
    assert torch.equal(records.labels, torch.cat([labels for _, labels in batches()]))
    assert evaluate(model, batches()).records is None


def test_emptied_maps_are_counted() -> None:
    model = net()
    InstanceWisePruner(model, torch.zeros(1, 3, 6, 6), gate=lambda feature, norms: norms < 0).step()
    assert evaluate(model, batches()).emptied == 10


def test_images_of_several_sizes() -> None:
    model, _ = gated()
    loader = [(torch.randn(2, 3, side, side), torch.zeros(2).long()) for side in (6, 12)]
    report = evaluate(model, loader)
    conv, linear = 3 * 8 * 9, 8 * 3
    assert report.dense_macs == pytest.approx(conv * (36 + 144) / 2 + linear)


def test_metric_and_forward_can_be_given() -> None:
    report = evaluate(
        net(),
        batches(),
        forward=lambda model, images: model(images * 2),
        metric=lambda outputs, labels: torch.full((len(labels),), 0.25),
    )
    assert report.accuracy == pytest.approx(0.25)


def test_the_model_is_left_in_its_mode() -> None:
    model, _ = gated()
    model.train()
    model[1].eval()
    evaluate(model, batches())
    assert model.training
    assert not model[1].training


def test_non_finite_features_name_the_site() -> None:
    model, _ = gated()
    images, labels = batches()[0]
    images[1, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteFeatureError, match="feature map of 0 "):
        evaluate(model, [(images, labels)])


def test_an_empty_loader_is_refused() -> None:
    with pytest.raises(SettingError, match="no batch"):
        evaluate(net(), [])


def test_a_report_is_json_and_one_line() -> None:
    model, _ = gated()
    report = evaluate(model, batches(), records=True)
    stored = json.loads(json.dumps(report.to_dict()))
    assert stored["accuracy"] == report.accuracy
    assert set(stored["per_class"]) <= {"0", "1", "2"}
    assert "records" not in stored
    assert "masked" in str(report)
    assert "\n" not in str(report)


def test_a_wrapped_model_is_measured_as_what_it_wraps() -> None:
    model, _ = gated()
    plain = evaluate(model, batches())
    compiled = evaluate(torch.compile(model, backend="eager"), batches())
    assert (compiled.execution, compiled.prune_ratio, compiled.macs) == ("masked", plain.prune_ratio, plain.macs)


def test_a_part_with_a_pruner_is_refused() -> None:
    model, _ = gated()
    with pytest.raises(AttachError, match="a part of this model"):
        evaluate(nn.Sequential(nn.Identity(), model), batches())


def test_a_forward_that_runs_the_model_in_parts_is_refused() -> None:
    model, _ = gated()

    def halves(model: nn.Module, images: Tensor) -> Tensor:
        return torch.cat([model(half) for half in images.chunk(2)])

    with pytest.raises(SettingError, match="decided for 2 instances of a batch of 4"):
        evaluate(model, batches(), forward=halves)


def test_the_last_decisions_stay_readable() -> None:
    model, pruner = gated()
    evaluate(model, batches())
    assert len(pruner.keep["0"]) == 2
    assert pruner.enabled


# -- accelerated models ----------------------------------------------------------------------------


def as_timed(winner: str, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, Accelerated]:
    """A gated model, and its accelerated copy under a clock that says who is faster."""
    monkeypatch.setattr(fit, "seconds_in_place", clock(winner))
    monkeypatch.setattr(choose, "take_turns", whole_clock(winner))
    model, pruner = gated()
    return model, pruner.accelerate(batches()[0][0])


def test_an_accelerated_model_reports_what_the_masked_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model, fast = as_timed("gated", monkeypatch)
    masked, report = evaluate(model, batches(), records=True), evaluate(fast, batches(), records=True)
    assert (masked.execution, report.execution) == ("masked", "accelerated")
    assert "accelerated" in str(report)
    assert report.prune_ratio > 0
    for name in ("instances", "accuracy", "prune_ratio", "dense_macs", "macs", "macs_saved", "gate_macs", "emptied"):
        assert getattr(report, name) == getattr(masked, name), name
    assert masked.records is not None
    assert report.records is not None
    assert torch.equal(report.records.keep["0"], masked.records.keep["0"])
    assert torch.allclose(report.records.cv["0"], masked.records.cv["0"])
    assert report.per_site["0"].macs_saved == masked.per_site["0"].macs_saved


def test_one_that_runs_dense_saves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, fast = as_timed("dense", monkeypatch)
    report = evaluate(fast, batches())
    assert (report.execution, report.prune_ratio, report.macs_saved, report.gate_macs) == ("dense", 0, 0, 0)
    InstanceWisePruner.of(model).disable()
    bare = evaluate(model, batches())
    assert (report.accuracy, report.dense_macs, report.macs) == (bare.accuracy, bare.dense_macs, bare.macs)


def test_one_that_could_not_be_exported_is_masked() -> None:
    model = net()
    gate = lambda feature, norms: torch.ones(len(norms), norms.shape[1]).cumsum(1) > 3  # noqa: E731
    pruner = InstanceWisePruner(model, torch.zeros(1, 3, 6, 6), gate=gate)
    report = evaluate(pruner.accelerate(batches()[0][0]), batches())
    assert (report.execution, report.prune_ratio) == ("masked", 3 / 8)


def test_an_accelerated_model_names_sites_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast = as_timed("gated", monkeypatch)
    images, labels = batches()[0]
    images[1, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteFeatureError, match="feature map of 0 "):
        evaluate(fast, [(images, labels)])


def test_a_recording_around_an_evaluation_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast = as_timed("gated", monkeypatch)
    with fast.recording():
        assert evaluate(fast, batches()).instances == 10
    assert not fast.training


# -- batches, outputs and labels of any form -------------------------------------------------------


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor | None = None


class Pair(NamedTuple):
    logits: Tensor
    aux: Tensor


OUTPUTS: dict[str, Any] = {
    "dataclass": Output,
    "named tuple": lambda logits: Pair(-logits, logits)._replace(logits=logits),
    "tuple": lambda logits: (logits, -logits),
    "logits of a dict": lambda logits: {"loss": None, "logits": logits},
    "out of a dict": lambda logits: {"out": logits, "aux": -logits},
    "a dict of one": lambda logits: {"scores": logits},
}


class Packed(nn.Module):
    """A network that takes named inputs and packs its outputs."""

    def __init__(self, kind: str = "dataclass") -> None:
        super().__init__()
        self.net, self.kind = net(), kind

    def forward(self, pixel_values: Tensor, scale: Tensor | None = None) -> Any:
        return OUTPUTS[self.kind](self.net(pixel_values))


@pytest.mark.parametrize("kind", OUTPUTS)
def test_logits_are_found_in_any_output(kind: str) -> None:
    expected = evaluate(net(), batches())
    assert evaluate(Packed(kind), batches()).accuracy == expected.accuracy


def test_batches_of_any_form_give_the_same_report() -> None:
    model = Packed()
    InstanceWisePruner(model, torch.zeros(1, 3, 6, 6), alpha=0.0, beta=0.9).step()
    expected = evaluate(model, batches())
    assert expected.prune_ratio > 0
    for form in (
        lambda x, y: {"pixel_values": x, "labels": y, "index": y},
        lambda x, y: {"image": x, "label": y.tolist()},
        lambda x, y: ({"pixel_values": x}, y.numpy()),
        lambda x, y: ((x, torch.ones(len(x))), y.float()),
        lambda x, y: (x, y.int(), torch.ones(len(x))),
    ):
        report = evaluate(model, (form(x, y) for x, y in batches()))
        for name in ("accuracy", "prune_ratio", "macs", "per_class"):
            assert getattr(report, name) == getattr(expected, name), name


@pytest.mark.parametrize(
    "labels",
    [torch.ones(4, 5, 5).long(), torch.ones(4, 7), {"masks": torch.ones(4, 2)}, [{"boxes": torch.ones(1)}] * 4],
    ids=["dense", "multi-label", "dict", "targets"],
)
def test_a_metric_takes_labels_as_they_are(labels: Any) -> None:
    images = batches()[0][0]
    seen = []

    def metric(outputs: Output, given: Any) -> Tensor:
        seen.append((type(outputs), type(given)))
        return outputs.logits.softmax(1)[:, 0]

    report = evaluate(Packed(), [(images, labels)], metric=metric, records=True)
    assert seen == [(Output, type(labels))]
    assert report.accuracy == pytest.approx(net()(images).softmax(1)[:, 0].mean().item())
    assert report.per_class == {}
    assert report.records is not None
    assert report.records.labels.tolist() == [-1] * 4
    assert evaluate(Packed(), [(images, labels)], metric=lambda o, y: [1.0, 0, 0, 1]).accuracy == 0.5


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.eye(3)[[0, 1, 2, 0]], r"\(4, 3\).*one-hot"),
        (torch.zeros(4, 1), r"squeeze\(1\)"),
        (torch.zeros(4, 6, 6).long(), "metric="),
        (torch.tensor([0, 1, 3, 0]), "label 3 is none of the 3 classes"),
        (torch.tensor([0, -100, 1, 0]), "label -100"),
        (torch.tensor([0.5, 0, 0, 0]), "number of a class"),
        (["cat", "dog", "cat", "dog"], "a list of 4 str"),
        (torch.zeros(3).long(), "for 3 labels"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        evaluate(net(), [(batches()[0][0], labels)])


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.tensor(0.5), r"shape \(\) for 4 instances"),
        (0.5, "for 4 instances"),
        (torch.ones(4, 3), r"shape \(4, 3\)"),
        (torch.tensor([1.0, float("nan"), 0, 0]), "nan for instance 1"),
        ({"f1": 0.5}, "a dict"),
        (None, "a NoneType"),
    ],
)
def test_a_metric_gives_a_score_of_each_instance(result: Any, message: str) -> None:
    model, pruner = gated()
    before = pruner.state_dict()
    with pytest.raises(SettingError, match=message):
        evaluate(model, batches(), metric=lambda outputs, labels: result)
    assert pruner.state_dict() == before


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda logits: {"boxes": logits, "masks": logits}, "a dict of boxes, masks, without logits"),
        (lambda logits: logits[:, :, None, None], r"\(4, 3, 1, 1\).*metric="),
        (lambda logits: logits[:, :1], r"\(4, 1\).*metric="),
        (lambda logits: None, "without logits"),
    ],
)
def test_outputs_without_class_scores_are_refused(outputs: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        evaluate(net(), batches(), forward=lambda model, images: outputs(model(images)))


def test_a_model_that_fails_on_the_first_batch_says_how_it_was_called() -> None:
    with pytest.raises(ProbeError, match=r"model\(\(4, 1, 6, 6\)\).*pass forward="):
        evaluate(net(), [(torch.zeros(4, 1, 6, 6), torch.zeros(4).long())])


def test_what_was_read_before_is_empty() -> None:
    once = (batch for batch in batches())
    evaluate(net(), once)
    with pytest.raises(SettingError, match="gives its batches once"):
        evaluate(net(), once)


def test_a_pruner_is_no_model() -> None:
    _, pruner = gated()
    with pytest.raises(SettingError, match=r"pass pruner\.model"):
        evaluate(pruner, batches())  # type: ignore[arg-type]
