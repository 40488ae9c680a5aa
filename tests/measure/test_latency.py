import pytest
import torch

from isw_plugin.measure import latency
from isw_plugin.measure.latency import compare, hardware, summarize, timed

CPU = torch.device("cpu")


def test_the_first_batch_warms_up_and_a_short_one_is_left_out() -> None:
    latency = summarize([9.0, 0.1, 0.2, 0.3, 0.4], [10, 10, 10, 10, 5], CPU)
    assert latency.batches == 3
    assert latency.ms_per_image == pytest.approx(20)
    assert 10 <= latency.low <= latency.ms_per_image <= latency.high <= 30
    assert latency.batch == 10


def test_a_single_batch_is_its_own_median() -> None:
    latency = summarize([0.5], [50], CPU)
    assert (latency.low, latency.ms_per_image, latency.high) == pytest.approx((10, 10, 10))


def test_a_time_names_its_machine() -> None:
    text = str(summarize([0.5], [50], CPU))
    assert hardware() in text
    assert f"{torch.get_num_threads()} threads" in text


def test_timed_gives_the_result_back() -> None:
    result, seconds = timed(lambda: 42, CPU)
    assert result == 42
    assert seconds >= 0


def test_compare_runs_in_turn_and_counts_no_first_call_after_a_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's threads took 13 ms to wake for a network of 2 ms."""
    order: list[str] = []
    threads = torch.get_num_threads()
    monkeypatch.setattr(latency.time, "sleep", lambda seconds: order.append("rest"))
    monkeypatch.setattr(latency, "timed", lambda run, device: (order.append("timed"), 0.0 * (run() or 0)))
    torch.set_num_threads(2)
    try:
        latencies = compare({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 1, 3, CPU)
    finally:
        torch.set_num_threads(threads)
    assert order == ["rest", "a", "timed", "a", "rest", "b", "timed", "b"] * 4
    assert latencies["a"].batches == 3
