"""A steady stream of requests into one engine, and what it gave in a few windows of time.

Requests are held in flight above what the engine runs at once, until as many have ended as are in flight
(so that the first wave has passed); then windows are measured one after the other. Figures are medians
over windows. What is in flight at the end is cancelled: nothing waits for it.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from bench.gpu.serving import Server
from bench.gpu.telemetry import GpuMeter, children_cpu_s, front_cpu_s

# a window in which nothing ended goes on, so many times its length
LONGER = 9

Source = Callable[[int], Awaitable[Any]]


@dataclass(frozen=True)
class Pace:
    """How long is looked. The warm-up ends when `in_flight` items have ended, or so long after the first."""

    in_flight: int
    warm_limit_s: float = 25.0
    window_s: float = 8.0
    windows: int = 3


class _Mark(NamedTuple):
    at_s: float
    items: int
    prompt_tokens: int
    output_tokens: int
    front_cpu_s: float
    engine_cpu_s: float


async def stream(
    server: Server, source: Source, output_tokens: int, pace: Pace, gpu: GpuMeter
) -> dict[str, Any]:
    """Figures of one stream. `source(n)` makes the n-th prompt. Raises what a request raises."""
    counters = server.counters
    numbers = itertools.count()
    done = 0
    ended_s: list[float] = []
    prompt_tokens = 0

    async def client() -> None:
        nonlocal done, prompt_tokens
        while True:
            prompt = await source(next(numbers))
            asked = time.perf_counter()
            prompt_tokens, _ = await server.ask(prompt, output_tokens)
            ended_s.append(time.perf_counter() - asked)
            done += 1

    def mark() -> _Mark:
        return _Mark(
            time.perf_counter(),
            done,
            counters.prompt_tokens,
            counters.output_tokens,
            front_cpu_s(),
            children_cpu_s(),
        )

    # Media are made when they are first asked for, which takes seconds that are no warm-up.
    await source(next(numbers))
    clients = [asyncio.create_task(client()) for _ in range(pace.in_flight)]
    try:
        started = time.perf_counter()
        # An engine's first requests wait for kernels that are compiled when they are first needed.
        while not done:
            await _sleep(0.1, clients)
        first = time.perf_counter()
        while done < pace.in_flight and time.perf_counter() - first < pace.warm_limit_s:
            await _sleep(0.1, clients)
        warm_s = time.perf_counter() - started
        marks = [mark()]
        for _ in range(pace.windows):
            await _sleep(pace.window_s, clients)
            for _ in range(LONGER):
                if done > marks[-1].items:
                    break
                await _sleep(pace.window_s, clients)
            marks.append(mark())
    finally:
        for each in clients:
            each.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    if marks[-1].items == marks[0].items:
        raise RuntimeError(f"no item ended in {marks[-1].at_s - marks[0].at_s:.0f} s")
    start, end = marks[0].at_s, marks[-1].at_s
    steps = [each for each in counters.steps if start <= each[0] <= end]
    figures = {
        **_rates(marks),
        "in_flight": pace.in_flight,
        "warm_s": warm_s,
        "latency_s": statistics.median(ended_s) if ended_s else None,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "running": statistics.fmean(each[1] for each in steps) if steps else None,
        "kv_used": max((each[3] for each in steps), default=None),
        "kv_used_series": [round(each[3], 3) for each in steps[:: max(1, len(steps) // 30)]],
        "preemptions": counters.preemptions,
        **gpu.between(start, end),
    }
    counters.steps.clear()
    return figures


def _rates(marks: list[_Mark]) -> dict[str, Any]:
    """Items and tokens a second, and CPU seconds an item, from the marks around the windows."""
    pairs = list(itertools.pairwise(marks))
    per_s = [(after.items - before.items) / (after.at_s - before.at_s) for before, after in pairs]
    first, last = marks[0], marks[-1]
    items = last.items - first.items
    return {
        "items_s": statistics.median(per_s),
        "items_s_windows": per_s,
        "items": items,
        "prefill_tokens_s": (last.prompt_tokens - first.prompt_tokens) / (last.at_s - first.at_s),
        "decode_tokens_s": (last.output_tokens - first.output_tokens) / (last.at_s - first.at_s),
        "front_cpu_s_item": (last.front_cpu_s - first.front_cpu_s) / items,
        "engine_cpu_s_item": (last.engine_cpu_s - first.engine_cpu_s) / items,
    }


async def _sleep(seconds: float, clients: list[asyncio.Task[None]]) -> None:
    """Sleep, and raise what a client raised meanwhile."""
    ended, _ = await asyncio.wait(clients, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for each in ended:
        each.result()


async def decode_rate(
    server: Server, source: Source, sequences: int, tokens: int, rounds: int = 3
) -> dict[str, float]:
    """Seconds of one step that gives each of `sequences` a token.

    The difference of two runs with the same prompts, one with `tokens` more in each answer: prefill,
    ramp and tail fall out.
    """
    short = 8

    async def run(output_tokens: int) -> float:
        prompts = [await source(number) for number in range(sequences)]
        started = time.perf_counter()
        await asyncio.gather(*(server.ask(prompt, output_tokens) for prompt in prompts))
        return time.perf_counter() - started

    await run(short)
    taken = [(await run(short + tokens)) - (await run(short)) for _ in range(rounds)]
    step_s = statistics.median(taken) / tokens
    return {"sequences": sequences, "step_s": step_s, "decode_tokens_s": sequences / step_s}
