"""When the engine's last token came, how long it had nothing to do, and a watchdog over both."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


def watch(
    silent_s: Callable[[], float],
    limit_s: float,
    die: Callable[[str], None],
    closed: threading.Event,
) -> None:
    """Call `die` once when `silent_s` passes the limit; a thread looks until `closed` is set."""

    def look() -> None:
        while not closed.wait(min(5.0, limit_s / 4)):
            silent = silent_s()
            if silent > limit_s:
                die(f"no token for {silent:.0f} s (engine.stall_timeout_s is {limit_s:g})")
                return

    threading.Thread(target=look, name="engine-watchdog", daemon=True).start()


class Meter:
    """When the last token came, and how long the engine had nothing to do."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ready_at = self._changed_at = self._token_at = time.monotonic()
        self._open = 0
        self._idle_s = 0.0
        self._open_s = 0.0

    def ready(self) -> None:
        with self._lock:
            self._ready_at = self._changed_at = self._token_at = time.monotonic()

    def open(self) -> Meter:
        return self

    def __enter__(self) -> None:
        self._change(1)

    def __exit__(self, *exc: object) -> None:
        self._change(-1)

    def token(self) -> None:
        with self._lock:
            self._token_at = time.monotonic()

    def silent_s(self) -> float:
        """Seconds without a token while a request is open; 0 where none is."""
        with self._lock:
            return time.monotonic() - self._token_at if self._open else 0.0

    def usage(self) -> dict[str, float]:
        with self._lock:
            self._settle()
            return {
                "engine_s": self._changed_at - self._ready_at,
                "idle_s": self._idle_s,
                "open_s": self._open_s,
            }

    def _change(self, by: int) -> None:
        with self._lock:
            self._settle()
            if self._open == 0:
                self._token_at = self._changed_at
            self._open += by

    def _settle(self) -> None:
        now = time.monotonic()
        passed = now - self._changed_at
        self._open_s += passed * self._open
        if self._open == 0:
            self._idle_s += passed
        self._changed_at = now
