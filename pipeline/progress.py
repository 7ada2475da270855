"""What a run tells while it works: one live line on a terminal, a quiet line now and then elsewhere.

A `Tally` actor adds up what the sink committed and what the engines report; the driver reads it. It
informs only: the accounts come from the ledger.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from rich.console import Console
from rich.live import Live

from pipeline.strikes import beside_driver

QUIET_EVERY_S = 30.0
LIVE_EVERY_S = 0.5
PLANNING_EVERY_S = 5.0

# Below this share of full the engines wait for tensors; above the other, the workers wait for engines.
STARVED, FULL = 0.5, 0.9


class Tally:
    """Sums of a run; run as a Ray actor by `open_tally`."""

    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()  # of floats, which Counter adds as well
        self._engines: dict[str, dict[str, float]] = {}

    def add(self, counts: dict[str, float]) -> None:
        self._sums.update(counts)

    def engine(self, engine_id: str, usage: dict[str, float]) -> None:
        """The latest usage of one engine (operators.engine.Engine.usage)."""
        self._engines[engine_id] = usage

    def read(self) -> dict[str, float]:
        """All sums, and the engines' seconds added up."""
        engines: Counter[str] = Counter({"engines": len(self._engines)})
        for usage in self._engines.values():
            engines.update(usage)
        return {**self._sums, **engines}


def open_tally() -> ray.actor.ActorHandle:
    return ray.remote(Tally).options(num_cpus=0, **beside_driver()).remote()


class Reporter:
    """Sends counts to a tally without waiting; picklable, for sink and engines."""

    def __init__(self, tally: ray.actor.ActorHandle) -> None:
        self._tally = tally

    def counts(self, counts: dict[str, float]) -> None:
        self._tally.add.remote(counts)

    def usage(self, usage: dict[str, float]) -> None:
        context = ray.get_runtime_context()
        self._tally.engine.remote(context.get_worker_id(), usage)


class Progress:
    """Turns readings of the tally into a line."""

    def __init__(self, spans_todo: int, max_num_seqs: int, engines: int) -> None:
        self._todo = spans_todo
        self._engines = engines
        self._max_num_seqs = max_num_seqs
        self._started = time.monotonic()
        self._last: dict[str, float] = {}
        self._first_done: tuple[float, float] | None = None

    def line(self, now: dict[str, float]) -> str:
        """Done, states, rate, time left, and who waits for whom since the last line."""
        passed_s = time.monotonic() - self._started
        done = sum(now.get(state, 0.0) for state in ("ok", "empty", "failed"))
        states = "  ".join(
            f"{state} {now.get(state, 0):,.0f}" for state in ("ok", "empty", "failed")
        )
        text = f"{done:,.0f} / {self._todo:,} spans  {states}"
        if done and self._first_done is None:
            self._first_done = (passed_s, done)
        text += f"  {self._rate(passed_s, done)}  {self._waiting(now)}"
        self._last = now
        return text.rstrip()

    def _rate(self, passed_s: float, done: float) -> str:
        if self._first_done is None or passed_s <= self._first_done[0] or done == 0:
            return f"{passed_s:,.0f} s so far"
        # Measured from the first commit on: a model load must not spoil the estimate.
        since_s, before = self._first_done
        rate = (done - before) / (passed_s - since_s) or done / passed_s
        return f"{rate:,.1f}/s  {clock((self._todo - done) / rate)} left"

    def _waiting(self, now: dict[str, float]) -> str:
        engine_s = now.get("engine_s", 0.0) - self._last.get("engine_s", 0.0)
        if (up := now.get("engines", 0.0)) < self._engines and engine_s <= 0:
            return f"{up:.0f} of {self._engines} engines are up: nodes start, models load"
        if engine_s <= 0:
            return ""
        share = (now["open_s"] - self._last.get("open_s", 0.0)) / engine_s / self._max_num_seqs
        if share < STARVED:
            return "engines wait for media"
        return "media waits for engines" if share > FULL else ""


@contextmanager
def shown(
    tally: ray.actor.ActorHandle, progress: Progress, console: Console
) -> Iterator[Callable[[], dict[str, Any]]]:
    """Show progress until the block ends. Yields a function that reads the tally."""
    stop = threading.Event()

    def read() -> dict[str, Any]:
        reading: dict[str, Any] = ray.get(tally.read.remote())
        return reading

    def watch() -> None:
        if console.is_terminal:
            with Live(console=console, auto_refresh=False, transient=True) as live:
                while not stop.wait(LIVE_EVERY_S):
                    live.update(progress.line(read()), refresh=True)
        else:
            while not stop.wait(QUIET_EVERY_S):
                console.print(progress.line(read()))

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield read
    finally:
        stop.set()
        thread.join(timeout=10)


def planning(console: Console) -> Callable[[int, str], None]:
    """Says how far a plan is, each few seconds: a number, and of what."""
    said = time.monotonic()

    def say(number: int, what: str) -> None:
        nonlocal said
        if time.monotonic() - said >= PLANNING_EVERY_S:
            said = time.monotonic()
            console.print(f"  {number:,} {what} so far")

    return say


def clock(seconds: float) -> str:
    """1:02:03 for people."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
