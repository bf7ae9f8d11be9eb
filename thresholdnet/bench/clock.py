"""Time of one step: by the processor's clock, or by events on the GPU; single operations behind a flushed cache."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Step = Callable[[], Any]

FLUSH_FACTOR = 2  # buffer to write between steps, in sizes of the largest cache
UNKNOWN_CACHE = 2**25  # bytes, where the system does not say


class ProcessorClock:
    """perf_counter around a call.

    Args:
        flush: bytes to write before every call, so that it finds nothing of its operands in the caches; none by
            default: caches hold what the step before left in them, as in training.
    """

    def __init__(self, flush: int = 0):
        self.flush = torch.zeros(flush // 4, dtype=torch.int32)

    def __call__(self, step: Step) -> float:
        """Milliseconds of one call."""
        self.flush.add_(1)  # reads too: memory that is only written may bypass the caches
        start = time.perf_counter_ns()
        step()
        return (time.perf_counter_ns() - start) / 1e6


class EventClock:
    """Events on the current stream around a call; the L2 cache is overwritten before it."""

    def __init__(self, device: torch.device):
        size = FLUSH_FACTOR * torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(max(size, 1), dtype=torch.int8, device=device)

    def __call__(self, step: Step) -> float:
        """Milliseconds of one call, the host's work included where the GPU waits for it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda.synchronize()
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)


Clock = ProcessorClock | EventClock


def clock_for(device: torch.device, cold: bool = False) -> Clock:
    """The clock of a device; `cold`: a CPU's caches are flushed before each call, as a GPU's always are."""
    if device.type == "cuda":
        return EventClock(device)
    return ProcessorClock(FLUSH_FACTOR * largest_cache() if cold else 0)


def largest_cache() -> int:
    """Bytes of the first core's largest cache, as Linux tells them."""
    units = {"K": 2**10, "M": 2**20}
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=UNKNOWN_CACHE)


class Neighbours:
    """What other processes took of the CPU between two moments, by /proc/stat; None where there is no such file."""

    def __init__(self) -> None:
        self.machine, self.own = _busy_and_total(), time.process_time()

    def share(self) -> float | None:
        """Their share of all cores' time since this object was made, time stolen by other virtual machines included."""
        now = _busy_and_total()
        if now is None or self.machine is None:
            return None
        busy, total = (later - before for later, before in zip(now, self.machine, strict=True))
        return max(0.0, busy - (time.process_time() - self.own)) / total if total > 0 else 0.0


def _busy_and_total() -> tuple[float, float] | None:
    """Seconds of all cores since the machine started."""
    file = Path("/proc/stat")
    if not file.is_file():
        return None
    fields = [int(field) for field in file.read_text().splitlines()[0].split()[1:9]]
    user, nice, system, idle, waiting, hardware, software, stolen = fields  # guest time is part of user
    second = os.sysconf("SC_CLK_TCK")
    busy = user + nice + system + hardware + software + stolen
    return busy / second, (busy + idle + waiting) / second
