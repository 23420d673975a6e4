"""Time calls with device events, add up their kernels, and weigh their memory.

A figure is of whole calls after warm-up.  Fixes no clocks and hides no launch gaps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[int], object]  # takes the number of the call, to rotate among input sets

WARM_UP = 2  # calls after the first, which may compile
FEWEST, MOST = 5, 50
PROFILED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Milliseconds a call: the median, the extremes, how many calls, and the first call ever."""

    median: float
    least: float
    most: float
    calls: int
    first: float


def time_calls(call: Call, device: str, seconds: float) -> Timing:
    """Time a call over and over for about `seconds`, but FEWEST to MOST times."""
    first = _clock(call, device, range(1))
    warm = _clock(call, device, range(1, 1 + WARM_UP)) / WARM_UP
    count = max(FEWEST, min(MOST, round(seconds * 1e3 / max(warm, 1e-6))))
    numbers = range(1 + WARM_UP, 1 + WARM_UP + count)
    if device == "cuda":
        times = _by_events(call, numbers)
    else:
        times = [_clock(call, device, [number]) for number in numbers]
    median = statistics.median(times)
    return Timing(median=median, least=min(times), most=max(times), calls=count, first=first)


def samples(call: Call, device: str, count: int) -> list[float]:
    """Milliseconds of each of `count` calls."""
    if device == "cuda":
        return _by_events(call, range(count))
    return [_clock(call, device, [number]) for number in range(count)]


def in_turn(calls: Sequence[Call], device: str, seconds: float) -> list[list[float]]:
    """Milliseconds of each of several calls, one after the other in rounds, for about `seconds`.

    Whatever the card does in the meantime, it does to all of them.
    """
    for call in calls:
        _clock(call, device, range(1 + WARM_UP))
    once = sum(_clock(call, device, range(1)) for call in calls)
    rounds = max(FEWEST, min(MOST, round(seconds * 1e3 / max(once, 1e-6))))
    found: list[list[float]] = [[] for _ in calls]
    if device == "cuda":
        count = len(calls)
        times = _by_events(lambda n: calls[n % count](n // count), range(rounds * count))
        return [times[turn::count] for turn in range(count)]
    for number in range(rounds):
        for times, call in zip(found, calls, strict=True):
            times.append(_clock(call, device, [number]))
    return found


def time_once(call: Call, device: str) -> Timing:
    """Time one call, the first: where a second says no more."""
    once = _clock(call, device, range(1))
    return Timing(median=once, least=once, most=once, calls=1, first=once)


def kernel_times(call: Call) -> dict[str, float]:
    """Milliseconds a call by kernel name, longest first; a kernel launched twice counts twice."""
    call(0)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for number in range(PROFILED):
            call(number)
        torch.cuda.synchronize()
    found = {
        event.key: event.self_device_time_total / 1e3 / PROFILED
        for event in seen.key_averages()
        if event.self_device_time_total > 0
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def peak_memory(call: Call) -> int:
    """Bytes that a call holds at its peak, above what was held before: its output and scratch."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _by_events(call: Call, numbers: range) -> list[float]:
    """Milliseconds of each call, between two events around it."""
    events = []
    for number in numbers:
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        call(number)
        pair[1].record()
        events.append(pair)
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _clock(call: Call, device: str, numbers: range | list[int]) -> float:
    """Milliseconds of all calls together, by the host's clock."""
    start = time.perf_counter()
    for number in numbers:
        call(number)
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3
