"""Feature decay in timm's training tasks, and in a script that makes its task as timm's does."""

import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from isw_plugin import InstanceWisePruner
from isw_plugin.errors import AttachError, MissingExtraError, SettingError
from tests.conftest import Net, Plain, made

pytest.importorskip("isw_plugin.toolkits.timm", reason="needs timm 1.0.27", exc_type=MissingExtraError)
from timm.task import ClassificationTask, LogitDistillationTask

from isw_plugin.toolkits.timm import add_feature_decay, main

LAMBDA = 1e-2
LABELS = torch.tensor([0, 1, 2, 3])


def task_of(net: nn.Module) -> ClassificationTask:
    task = ClassificationTask(net, nn.CrossEntropyLoss(), verbose=False)
    for module in task.modules():
        module.training = not isinstance(module, nn.BatchNorm2d)
    return task


def losses(net: Net) -> tuple[Tensor, Tensor]:
    bare: Net = made(Plain)
    return nn.functional.cross_entropy(bare(net.images()), LABELS), bare.penalty_by_hand(net.images(), LAMBDA)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_tasks_loss_has_the_penalty(plain: Net, steps: int) -> None:
    pruner = InstanceWisePruner(plain, plain.images(1), lambda_=LAMBDA)
    task = task_of(plain)
    add_feature_decay(task, pruner, accumulation_steps=steps)
    result = task(plain.images(), LABELS)
    loss, penalty = losses(plain)
    torch.testing.assert_close(result["loss"], loss + steps * penalty)
    torch.testing.assert_close(result["feature_decay"], steps * penalty)
    assert result["output"].shape == (4, 5)


def test_nothing_is_added_in_eval_mode_or_without_gradients(plain: Net) -> None:
    pruner = InstanceWisePruner(plain, plain.images(1), lambda_=LAMBDA)
    task = task_of(plain)
    add_feature_decay(task, pruner)
    with torch.no_grad():
        assert "feature_decay" not in task(plain.images(), LABELS)
    torch.testing.assert_close(task.eval()(plain.images(), LABELS)["loss"], losses(plain)[0])


def test_an_averaged_copy_and_a_pickled_task_work(plain: Net) -> None:
    pruner = InstanceWisePruner(plain, plain.images(1), lambda_=LAMBDA)
    task = task_of(plain)
    add_feature_decay(task, pruner)
    copied = pickle.loads(pickle.dumps(task))
    loss, penalty = losses(plain)
    torch.testing.assert_close(copied(plain.images(), LABELS)["loss"], loss + penalty)
    task.setup_ema(decay=0.5)
    task(plain.images(), LABELS)["loss"].backward()
    task.update_ema()
    assert InstanceWisePruner.of(task.get_trainable_module(ema=True).module).model is not plain


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the graph breaks there
def test_a_compiled_task_has_the_penalty(plain: Net) -> None:
    """As timm's script has it with --torchcompile."""
    pruner = InstanceWisePruner(plain, plain.images(1), lambda_=LAMBDA)
    task = task_of(plain)
    add_feature_decay(task, pruner, accumulation_steps=2)
    loss, penalty = losses(plain)
    result = torch.compile(task, backend="eager")(plain.images(), LABELS)
    torch.testing.assert_close(result["loss"], loss + 2 * penalty)
    result["loss"].backward()
    assert plain.c1.weight.grad.any()


def test_what_cannot_be_is_said(plain: Net) -> None:
    pruner = InstanceWisePruner(plain, plain.images(1))
    with pytest.raises(AttachError, match="another model"):
        add_feature_decay(task_of(made(Plain)), pruner)
    with pytest.raises(SettingError, match="1 or more"):
        add_feature_decay(task_of(plain), pruner, accumulation_steps=0)


SCRIPT = """
import argparse, json, torch, timm
from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask, MultiLabelClassificationTask

parser = argparse.ArgumentParser()
parser.add_argument("out")
parser.add_argument("-c", "--config")
parser.add_argument("--grad-accum-steps", type=int, default=1)
parser.add_argument("--task", default="ClassificationTask")
args = parser.parse_args()


class OwnTask(ClassificationTask):
    def __init__(self, model, verbose):
        super().__init__(model, verbose=verbose)
        self.own = True


torch.manual_seed(0)
model = timm.create_model("test_resnet", num_classes=5)
teacher = [timm.create_model("test_resnet", num_classes=5)] if "Distillation" in args.task else []
task = globals()[args.task](model, *teacher, verbose=False)
torch.manual_seed(1)
labels = torch.eye(5)[:2] if "Multi" in args.task else torch.tensor([0, 1])
result = task(torch.randn(2, 3, 32, 32), labels)
values = {name: float(value.detach()) for name, value in result.items() if name != "output"}
assert __name__ == "__main__"
with open(args.out, "w") as file:
    json.dump(values, file)
"""


def run(tmp_path: Path, *arguments: str, settings: str = "lambda_: 1.0e-3\nlayers: 'layer*'\n") -> dict[str, float]:
    import json

    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "decay.yaml").write_text(settings)
    main(["--isw", str(tmp_path / "decay.yaml"), str(tmp_path / "train.py"), str(tmp_path / "out.json"), *arguments])
    found: dict[str, float] = json.loads((tmp_path / "out.json").read_text())
    return found


def test_a_script_gets_feature_decay_by_one_file(tmp_path: Path) -> None:
    made_before, argv = ClassificationTask.__init__, list(sys.argv)
    one = run(tmp_path)
    assert one["feature_decay"] > 0
    (tmp_path / "args.yaml").write_text("grad_accum_steps: 4\n")
    assert run(tmp_path, "--grad-accum-steps", "3")["feature_decay"] == pytest.approx(3 * one["feature_decay"])
    assert run(tmp_path, "-c", str(tmp_path / "args.yaml"))["feature_decay"] == pytest.approx(4 * one["feature_decay"])
    assert ClassificationTask.__init__ is made_before
    assert sys.argv == argv


@pytest.mark.parametrize(
    "task", ["MultiLabelClassificationTask", "LogitDistillationTask", "FeatureDistillationTask", "OwnTask"]
)
def test_every_task_that_a_script_makes_gets_it_once(tmp_path: Path, task: str) -> None:
    inits = {cls: cls.__init__ for cls in (ClassificationTask, LogitDistillationTask)}
    pattern = "student.layer*" if task == "FeatureDistillationTask" else "layer*"
    found = run(tmp_path, "--task", task, settings=f"lambda_: 1.0e-3\nlayers: '{pattern}'\n")
    assert found["feature_decay"] == pytest.approx(run(tmp_path)["feature_decay"], rel=1e-5)
    assert all(cls.__init__ is init for cls, init in inits.items())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("1.0e-3", "expected lines such as"),
        ("lamda_: 1.0e-3", "takes no 'lamda_'; did you mean lambda_?"),
        ("lambda_: 1e-3", "lambda_: 1e-3 is text to YAML; a number has a point, such as 1.0e-6"),
    ],
)
def test_a_file_that_holds_no_settings(tmp_path: Path, settings: str, said: str) -> None:
    with pytest.raises(SettingError, match=re.escape(said)):
        run(tmp_path, settings=settings)
    assert not (tmp_path / "out.json").exists()


def test_a_script_without_tasks_is_refused_before_it_runs(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("raise AssertionError('it ran')\n")
    (tmp_path / "decay.yaml").write_text("lambda_: 1.0e-3\n")
    with pytest.raises(SettingError, match=r"train\.py does not use timm\.task, so it would train without"):
        main(["--isw", str(tmp_path / "decay.yaml"), str(tmp_path / "train.py")])
