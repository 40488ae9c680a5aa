"""What computes here."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = ["hardware", "own_version"]


def hardware(device: torch.device | None = None) -> str:
    """Name of the GPU, or of the CPU."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def own_version() -> str:
    """Of this package."""
    try:
        return version("isw_plugin")
    except PackageNotFoundError:  # run from its sources
        return "(not installed)"
