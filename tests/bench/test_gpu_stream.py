"""The stream: what is asked, and from when it counts."""

from __future__ import annotations

import asyncio
from typing import Any

from bench.gpu.serving import Counters
from bench.gpu.stream import Pace, stream
from bench.gpu.telemetry import GpuMeter

COMPILING_S = 0.3


class SlowAtFirst:
    """An engine whose first requests wait for a kernel."""

    def __init__(self) -> None:
        self.counters = Counters()
        self.asked: list[int] = []
        self._ready: asyncio.Task[None] | None = None

    async def ask(self, prompt: int, output_tokens: int) -> tuple[int, int]:
        self.asked.append(prompt)
        if self._ready is None:
            self._ready = asyncio.create_task(asyncio.sleep(COMPILING_S))
        await asyncio.shield(self._ready)
        await asyncio.sleep(0.001)
        return 300, output_tokens


def test_the_warm_up_holds_the_making_of_media_and_the_first_kernels() -> None:
    made: list[int] = []

    async def source(number: int) -> int:
        made.append(number)
        return number

    async def run() -> dict[str, Any]:
        pace = Pace(in_flight=4, warm_limit_s=0.01, window_s=0.02, windows=2)
        return await stream(server, source, 7, pace, GpuMeter())  # type: ignore[arg-type]

    server = SlowAtFirst()
    figures = asyncio.run(run())
    # the first is made before any is asked for, and is no request
    assert made[0] == 0
    assert 0 not in server.asked
    # a window that began before the kernel was there would have waited for it
    assert figures["warm_s"] >= COMPILING_S
    assert (figures["prompt_tokens"], figures["output_tokens"]) == (300, 7)
