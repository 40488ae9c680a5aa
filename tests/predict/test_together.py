"""Predicted sites beside everything else that knows sites."""

import warnings
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from isw_plugin import InstanceWisePruner, calibrate, count_macs, evaluate, steer_thresholds
from isw_plugin.calibrate.trial import Measured, Trial
from isw_plugin.functional import coefficient_of_variation
from isw_plugin.report import write
from tests.conftest import Net, made
from tests.predict.nets import PREDICTED, Down, Inverted, Residual, Stack, predicted_by_hand, predicting


def labelled(net: Net, images: int = 64) -> list[tuple[Tensor, Tensor]]:
    """Images, and what the network says of them, so that gates can only lose."""
    with torch.no_grad():
        given = net.images(images)
        return [(given, made(type(net))(given).argmax(1))]


# -- calibration -----------------------------------------------------------------------------------


def test_calibration_judges_predicted_sites_by_predicted_norms() -> None:
    net, pruner = predicting(Stack)
    best = calibrate(pruner, labelled(net), max_drop=0.3)
    with pruner.gating():
        report = evaluate(net, labelled(net))
    assert report.macs == pytest.approx(best.best.macs)
    assert report.accuracy == pytest.approx(best.best.accuracy)
    assert pruner.predicted == ("c2",)


def test_an_alpha_that_no_predicted_cv_exceeds_drops_nothing() -> None:
    """The exact rule goes by the CVs that gates see: of predicted norms where they are predicted."""
    net, pruner = predicting(Stack)
    images = labelled(net)[0][0]
    trial = Trial(pruner, Measured(labelled(net), None, None, False), _Silent())
    trial.reference()
    with pruner.gating(beta=0.0):
        net(images)
        cv = {name: coefficient_of_variation(norms) for name, norms in pruner.norms.items()}
    assert cv.keys() == trial.cv.keys()
    assert all(torch.equal(trial.cv[name], cv[name]) for name in cv)
    above = max(of_site.max().item() for of_site in cv.values())
    for alpha, drops in ((above, False), (above - 1e-3, True)):
        known = trial._known({"alpha": alpha, "beta": 1.9})
        with pruner.gating(alpha=alpha, beta=1.9):
            report = evaluate(net, labelled(net))
        assert (known is None) == drops == (report.prune_ratio > 0)
        if known:
            assert (known.accuracy, known.macs) == (report.accuracy, report.macs)


class _Silent:
    total = 0

    def refresh(self) -> None: ...


def test_sites_are_calibrated_each_for_itself() -> None:
    net, pruner = predicting(Down)
    with warnings.catch_warnings(action="ignore"):
        found = calibrate(pruner, labelled(net), max_drop=0.4, per_site=True)
    with pruner.gating():
        assert evaluate(net, labelled(net)).macs == pytest.approx(found.best.macs)


def test_thresholds_are_steered_by_predicted_norms() -> None:
    net, pruner = predicting(Stack)
    images = net.images(64)
    for _ in range(40):
        net(images)
        steer_thresholds(pruner, {"c2": 0.5}, rate=0.5)
    net(images)
    assert pruner.keep["c2"].float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert pruner.predicted == ("c2",)


# -- the report ------------------------------------------------------------------------------------


def test_a_page_shows_predicted_sites(tmp_path: Path) -> None:
    net, pruner = predicting(Stack)
    report = evaluate(net, labelled(net), records=True)
    write(report, tmp_path)
    assert any("c2" in page.read_text() for page in tmp_path.rglob("*.html"))
    assert report.per_site["c2"].macs_saved != 0
    assert pruner.enabled


# -- accelerate ------------------------------------------------------------------------------------


def assert_accelerated_alike(net: nn.Module, pruner: InstanceWisePruner, images: Tensor) -> None:
    with torch.no_grad():
        expected = net(images)
    keep = pruner.keep
    fast = pruner.accelerate(images, backend="gated")
    assert fast.execution == "accelerated"
    with fast.recording() as record:
        torch.testing.assert_close(fast(images), expected, atol=1e-4, rtol=1e-4)
    differing = sum(int((record.keep[name] != mask).sum()) for name, mask in keep.items())
    assert differing <= 1e-3 * sum(mask.numel() for mask in keep.values())
    assert count_macs(fast, images).gated.mean().item() == pytest.approx(
        count_macs(net, images).gated.mean().item(), rel=1e-3
    )


@pytest.mark.parametrize("kind", PREDICTED)
def test_an_accelerated_copy_decides_alike(kind: type[Net]) -> None:
    net, pruner = predicting(kind)
    assert_accelerated_alike(net, pruner, net.images(8))


def test_an_accelerated_mobilenet_decides_alike() -> None:
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv2_035", num_classes=10)
    model.blocks = model.blocks[:2]  # the rest takes time only
    model.conv_head, model.bn2, model.classifier = nn.Conv2d(8, 32, 1), nn.BatchNorm2d(32), nn.Linear(32, 10)
    images = torch.randn(300, 3, 32, 32)
    model.train()
    with torch.no_grad():
        for part in images.split(100):
            model(part)  # statistics of batch norms
    model.eval()
    pruner = InstanceWisePruner(model, images[:1], alpha=0.0, beta=0.5)
    found = pruner.fit_predictors(images.split(100))
    assert len(found.predicted) >= 3
    pruner.step()
    assert_accelerated_alike(model, pruner, images[:4])


@pytest.mark.parametrize("kind", PREDICTED)
def test_an_exported_program_predicts(kind: type[Net]) -> None:
    net, pruner = predicting(kind)
    images, batch = net.images(4), torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(net, (net.images(3),), dynamic_shapes=({0: batch},)).module()
    expected, _ = predicted_by_hand(made(kind), pruner, images)
    for some in (images, images[:1]):
        torch.testing.assert_close(program(some), expected[: len(some)])


# -- static pruners --------------------------------------------------------------------------------


def test_frequencies_are_those_of_predicted_decisions() -> None:
    pytest.importorskip("torch_pruning")
    from isw_plugin.toolkits.torch_pruning import InstanceFrequencyImportance

    net, pruner = predicting(Stack)
    images = net.images(32)
    read: list[Tensor] = []
    handle = net.fc.register_forward_pre_hook(lambda module, args: read.append(args[0].ne(0)))
    net(images)
    handle.remove()
    assert not (read[0] & ~pruner.keep["c2"]).any()
    used = InstanceFrequencyImportance(pruner, [images]).columns["fc"].used
    assert used.tolist() == read[0].sum(0).tolist()
    assert pruner.predicted == ("c2",)


def test_heads_go_through_nni() -> None:
    """Training by its evaluator, whose penalty is of measured norms, and small models from its masks."""
    pytest.importorskip("nni", reason="needs isw_plugin[nni]")
    from isw_plugin.toolkits.nni import InstanceWisePruner as Pruner
    from isw_plugin.toolkits.nni import compact
    from tests.toolkits.test_nni import ALL, LAMBDA, evaluator, task_loss

    net, images = made(Residual), made(Residual).images()
    losses: list[Tensor] = []
    pruner = Pruner(net, ALL, evaluator(net, losses), lambda_=LAMBDA, alpha=0.0, beta=0.6)
    heads = predicting(Residual)[1].state_dict()["heads"]
    pruner.gates.load_state_dict(pruner.gates.state_dict() | {"heads": heads})
    pruner.gates.step()
    pruner.compress(max_steps=1)
    pruner.gates.step()
    assert losses[0] > task_loss(net.eval()(images))  # by the penalty
    pruner.unwrap_model()
    pruner.gates.step()
    expected, kept = predicted_by_hand(made(Residual), pruner.gates, images)
    torch.testing.assert_close(net(images), expected)
    assert all(torch.equal(pruner.gates.keep[name], mask) for name, mask in kept.items())
    silent = torch.ones_like(net.block.c1.weight)
    silent[:2] = 0
    with torch.no_grad():
        net.block.bn1.bias[:2] = -9.0
    pruner.gates.disable()
    with pytest.warns(UserWarning, match=r"^block\.c1, block\.c2: measured again"):
        compact(net, {"block.c1": {"weight": silent, "bias": None}}, images)
    assert net.block.c1.out_channels == 4
    assert pruner.gates.predicted == ()


def test_heads_see_the_masks_of_nni() -> None:
    """Wrapped by NNI, where layers compute with masked weights: what is fitted, and what is predicted."""
    pytest.importorskip("nni", reason="needs isw_plugin[nni]")
    from nni.compression.pruning import L1NormPruner

    from isw_plugin.toolkits.nni import InstanceWisePruner as Pruner
    from tests.toolkits.test_nni import ALL

    net, images = made(Residual), made(Residual).images(240)
    static = L1NormPruner(net, [{"op_names": ["block.c1"], "sparse_ratio": 0.5}])
    _, masks = static.compress()
    gates = Pruner.from_compressor(static, ALL, alpha=0.0, beta=0.6, example_inputs=images[:1]).gates
    bare = made(Residual)
    with torch.no_grad():
        for key, mask in masks["block.c1"].items():
            bare.block.c1.get_parameter(key).mul_(mask)
    twin = InstanceWisePruner(bare, images[:1], alpha=0.0, beta=0.6)
    assert gates.fit_predictors(images.split(48)) == twin.fit_predictors(images.split(48))
    heads = predicting(Residual)[1].state_dict()["heads"]
    gates.load_state_dict(gates.state_dict() | {"heads": heads, "enabled": True})
    with torch.no_grad():
        given = net(images)
    twin.remove()
    expected, kept = predicted_by_hand(bare, gates, images)
    torch.testing.assert_close(given, expected)
    assert all(torch.equal(gates.keep[name], mask) for name, mask in kept.items())


def test_torch_pruning_drops_heads_of_what_it_changes() -> None:
    pruning = pytest.importorskip("torch_pruning")
    net, pruner = predicting(Inverted)
    pruner.disable()
    graph = pruning.DependencyGraph().build_dependency(net, example_inputs=net.images(1))
    graph.get_pruning_group(net.pw, pruning.prune_conv_out_channels, idxs=[0, 3]).prune()
    with pytest.warns(UserWarning, match=r"^pw, dw, pwl: measured again"):
        pruner.update_regularizer()
    pruner.step()
    net(net.images())
    assert pruner.predicted == ()
