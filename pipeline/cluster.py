"""Ray, connected when it is first needed: a run with nothing to do never starts it."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
import ray.data

# A cold start of the 12B (download, load, graph capture) can take a quarter of an hour; Ray's own
# limit of 30 minutes without progress would then end a healthy run.
NO_PROGRESS_TIMEOUT_S = 7200

Connect = Callable[[], None]


@contextmanager
def cluster() -> Iterator[Connect]:
    """Yields `connect`, which may be called often: the cluster whose address the environment gives,
    else one on this machine. What it started ends with the block."""
    mine = False

    def connect() -> None:
        nonlocal mine
        if not ray.is_initialized():
            mine = True
            _start()
        _configure()

    try:
        yield connect
    finally:
        if mine:
            ray.shutdown()


def _start() -> None:
    on_term = signal.getsignal(signal.SIGTERM)
    ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    if callable(on_term) and threading.current_thread() is threading.main_thread():
        # Ray's own would end the process before the lease is given back.
        signal.signal(signal.SIGTERM, on_term)


def _configure() -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT_S
    for handler in logging.getLogger("ray.data").handlers:
        if not isinstance(handler, logging.FileHandler):  # Ray's own files keep everything
            handler.setLevel(logging.CRITICAL)
