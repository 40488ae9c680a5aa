"""How long a core takes to hand a cache line to another: tens of nanoseconds within one cache, hundreds between two.

Virtual processors are moved. While two of them have no cache in common, layers that read what the other core wrote are
slower, others are not; so one program has two speeds, for seconds or minutes at a time.
"""

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from isw_plugin.ops.build import find_compiler

__all__ = ["nanoseconds"]

_COUNT, _TRIES = 1000, 7
_SOURCE = r"""
#include <atomic>
#include <chrono>
#include <thread>

extern "C" double handover(int count) {
  alignas(64) std::atomic<int> turn{0};
  const auto play = [&](int player, int first, int last) {
    for (int i = first; i < last; ++i) {
      while (turn.load(std::memory_order_acquire) != 2 * i + player) {}
      turn.store(2 * i + player + 1, std::memory_order_release);
    }
  };
  std::thread other(play, 1, 0, count + 1);
  play(0, 0, 2);  // until the other has started
  const auto start = std::chrono::steady_clock::now();
  play(0, 2, count + 1);
  other.join();
  return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count() / (2 * count);
}
"""


def nanoseconds() -> float:
    """Mean of two thousand hand-overs, the least of some tries: threads may begin on one core.

    Needs two cores and a C++ compiler.
    """
    return min(_compiled()(_COUNT) for _ in range(_TRIES))


@functools.cache
def _compiled() -> Callable[[int], float]:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "handover.so"
        options = ["-std=c++17", "-O2", "-shared", "-fPIC", "-pthread", "-x", "c++", "-"]
        subprocess.run([*find_compiler(), "-o", str(library), *options], input=_SOURCE, text=True, check=True)
        function = ctypes.CDLL(str(library)).handover
    function.restype = ctypes.c_double
    return function  # type: ignore[no-any-return]  # of ctypes
