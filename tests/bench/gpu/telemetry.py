"""What the machine does meanwhile: GPU load, power, memory and clock over time, and CPU seconds.

Read with NVML (package nvidia-ml-py), four times a second. Without a GPU there are no samples.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import psutil

PERIOD_S = 0.25


class Sample(NamedTuple):
    """at_s is time.perf_counter(). busy: share of the period in which a kernel ran."""

    at_s: float
    busy: float
    power_w: float
    memory_gb: float
    clock_mhz: float


class GpuMeter:
    """Samples the first GPU on a thread from start to close."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.name: str | None = None
        self._end = threading.Event()
        self._nvml, self._handle = _first_gpu()
        if self._nvml is not None:
            self.name = str(self._nvml.nvmlDeviceGetName(self._handle))
            threading.Thread(target=self._run, name="gpu-meter", daemon=True).start()

    def between(self, start_s: float, end_s: float) -> dict[str, Any]:
        """Means over a stretch of perf_counter, and the series, one value a second."""
        found = [each for each in self.samples if start_s <= each.at_s <= end_s]
        if not found:
            return {}
        return {
            "gpu_busy": statistics.fmean(each.busy for each in found),
            "gpu_power_w": statistics.fmean(each.power_w for each in found),
            "gpu_clock_mhz": statistics.fmean(each.clock_mhz for each in found),
            "gpu_memory_gb": max(each.memory_gb for each in found),
            "gpu_busy_series": _each_second(found, start_s, "busy"),
            "gpu_power_w_series": _each_second(found, start_s, "power_w"),
        }

    def close(self) -> None:
        self._end.set()

    def _run(self) -> None:
        while not self._end.wait(PERIOD_S):
            nvml, gpu = self._nvml, self._handle
            self.samples.append(
                Sample(
                    time.perf_counter(),
                    nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
                    nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
                    nvml.nvmlDeviceGetMemoryInfo(gpu).used / 1e9,
                    nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
                )
            )


def _first_gpu() -> tuple[Any, Any]:
    try:
        import pynvml
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
    except pynvml.NVMLError:
        return None, None


def _each_second(samples: Iterable[Sample], start_s: float, field: str) -> list[float]:
    by_second: dict[int, list[float]] = {}
    for sample in samples:
        by_second.setdefault(int(sample.at_s - start_s), []).append(getattr(sample, field))
    return [round(statistics.fmean(values), 3) for _, values in sorted(by_second.items())]


def front_cpu_s() -> float:
    """CPU seconds of this process, all threads."""
    return time.process_time()


def children_cpu_s(pids: Iterable[int] | None = None) -> float:
    """CPU seconds of the living processes below this one, or of `pids`."""
    total = 0.0
    for process in _processes(pids):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def _processes(pids: Iterable[int] | None) -> list[psutil.Process]:
    if pids is None:
        return psutil.Process(os.getpid()).children(recursive=True)
    return [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
