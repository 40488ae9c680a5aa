from pathlib import Path

import torch

from isw_plugin.calibrate import Calibration, Candidate
from isw_plugin.measure import Records
from isw_plugin.report import channel_heatmap, frontier

PNG = b"\x89PNG"


def test_frontier_is_drawn(tmp_path: Path) -> None:
    candidates = tuple(Candidate({"beta": b}, 0.9 - b / 10, b, 10.0 - b, b, 0) for b in (0.1, 0.2))
    frontier({"lambda 0": Calibration(candidates[0], candidates, 0.9, 10)}, tmp_path / "f.png", "caption")
    assert (tmp_path / "f.png").read_bytes().startswith(PNG)


def test_heatmap_is_drawn_for_sites_of_any_width_and_absent_classes(tmp_path: Path) -> None:
    records = Records(
        labels=torch.tensor([0, 0, 2]),
        scores=torch.ones(3),
        prune_ratio=torch.zeros(3),
        macs=torch.ones(3),
        keep={"a": torch.rand(3, 4) > 0.5, "b": torch.rand(3, 9) > 0.5},
        cv={},
    )
    channel_heatmap(records, ["cat", "dog", "fox"], tmp_path / "h.png")
    assert (tmp_path / "h.png").read_bytes().startswith(PNG)
