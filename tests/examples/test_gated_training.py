"""What training with gates on keeps between epochs, and does where heads do not pay."""

from types import SimpleNamespace

import pytest
import torch
from gated_training import GatedTraining, fit_heads
from images import Images, ImageSplits
from torch import nn

from isw_plugin import InstanceWisePruner
from isw_plugin.errors import PredictionError


def splits() -> ImageSplits:
    images = Images(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
    return ImageSplits("none", ("a", "b"), images, images, images, torch.zeros(3), torch.ones(3), False)


def training() -> GatedTraining:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    pruner = InstanceWisePruner(model, torch.zeros(1, 3, 16, 16), alpha=0.0, beta=0.0)
    return GatedTraining(pruner, splits(), 0.5, 10)


def test_where_no_head_can_be_fitted_none_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*_: object, **__: object) -> None:
        raise PredictionError("too few images")

    heads = {"0": "of the epoch before"}
    pruner = SimpleNamespace(model=nn.Linear(1, 1), fit_predictors=fails, drop_predictors=heads.clear)
    assert fit_heads(pruner, splits()) is False  # type: ignore[arg-type]
    assert heads == {}
    assert capsys.readouterr().out == "norms are measured everywhere: too few images\n"


def test_a_training_that_goes_on_remembers_that_heads_do_not_pay() -> None:
    before, after = training(), training()
    before.predict = False
    before.pruner.set_thresholds(beta=0.25)
    after.restore(*before.state())
    assert after.predict is False
    assert after.pruner.gate == before.pruner.gate
