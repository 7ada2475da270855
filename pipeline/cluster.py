"""Ray, connected when it is first needed: a run with nothing to do never starts it.

A cluster may be there before its workers are: their pool starts at zero, a spot node was taken away, or
`ray start` of the head comes first. So what a run needs is asked for and waited for, in words and not
without end.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from glob import glob
from pathlib import Path

import ray
import ray.data
import ray.exceptions
from ray.data.exceptions import ExecutionTimeoutError

from pipeline.compute import Node

# A cold start of the 12B (download, load, graph capture) can take a quarter of an hour; Ray's own
# limit of 30 minutes without progress would then end a healthy run.
NO_PROGRESS_TIMEOUT_S = 7200
# How often a run that waits for workers says so, and looks.
SAY_EVERY_S, LOOK_EVERY_S = 30.0, 0.5
# What an error shows of each of a worker's files: a Python error with its last frames.
LAST_BYTES = 2000

Connect = Callable[[], None]
Say = Callable[[str], None]


class BrokenRunError(Exception):
    """A machine, the cluster or our own code is broken, not a file. The message says what to do."""


@contextmanager
def broken_run() -> Iterator[None]:
    """Work that the cluster gave up, or that stood still for too long, as a BrokenRunError."""
    try:
        yield
    except (ray.exceptions.RayError, ExecutionTimeoutError) as error:
        raise BrokenRunError(
            f"{error}\nThe run broke: see above. What was finished is in the ledger; put it right and run"
            " the job again"
        ) from error


def own_log() -> str:
    """A glob of the files, on this node, of what this worker and processes that it starts print."""
    context = ray.get_runtime_context()
    folder = Path(context.get_temp_dir(), context.get_session_name(), "logs")
    return f"{folder}/worker-{context.get_worker_id()}-*"


def last_words(log: str) -> str:
    """The end of each file that the glob `log` finds, under its path."""
    said = []
    for name in sorted(glob(log)):
        with Path(name).open("rb") as file:
            file.seek(max(0, Path(name).stat().st_size - LAST_BYTES))
            said.append(f"{name}:\n{file.read().decode(errors='replace').strip()}")
    return "\n".join(said)


@contextmanager
def cluster(wait_s: float, say: Say) -> Iterator[Connect]:
    """Yields `connect`, which may be called often: the cluster whose address the environment gives,
    else one on this machine, with at least one node that has a CPU to give. What it started ends with
    the block. `connect` raises BrokenRunError when no such node came within `wait_s`.
    """
    mine = False

    def connect() -> None:
        nonlocal mine
        if not ray.is_initialized():
            mine = True
            _start()
        _configure()
        await_nodes("CPU", 1, wait_s, say)

    try:
        yield connect
    finally:
        if mine:
            ray.shutdown()


def await_nodes(resource: str, units: int, wait_s: float, say: Say) -> tuple[Node, ...]:
    """The nodes of the cluster, once one of them has a whole CPU or GPU to give.

    Where none has, `units` of it are asked for: tasks that wait for a place are what an autoscaler goes
    by, and unlike `request_resources` they do not overwrite what Ray Data or another job asks for. They
    do nothing when they get one, but are over before this returns: an autoscaler that saw an engine wait
    for the GPU that such a task holds would start another node.
    """
    nodes = cluster_nodes()
    if _has(resource, nodes):
        return nodes
    say(f"no node with a {resource} yet: asking for {units}, waiting at most {wait_s:g} s")
    began = said = time.monotonic()
    share = {"num_gpus": 1, "num_cpus": 0} if resource == "GPU" else {"num_cpus": 1}
    ask = ray.remote(_nothing).options(max_retries=-1, **share)
    asked = [ask.remote() for _ in range(units)]
    while waiting := ray.wait(asked, num_returns=units, timeout=LOOK_EVERY_S)[1]:
        now = time.monotonic()
        if now - began > wait_s:
            for task in waiting:  # never one that has ended: Ray 2.60 may abort the process
                ray.cancel(task)
            raise BrokenRunError(
                f"no node with a {resource} to give joined the cluster within {wait_s:g} s"
                " (limits.wait_for_workers_s). `ray status` on the head says what its autoscaler"
                " is waiting for. Nothing is lost: run the job again"
            )
        if now - said > SAY_EVERY_S:
            said = now
            say(
                f"still no node with a {resource} to give after {now - began:.0f} s:"
                f" {_sum_of(cluster_nodes())}"
            )
    nodes = cluster_nodes()
    say(f"workers after {time.monotonic() - began:.0f} s: {_sum_of(nodes)}")
    return nodes


def cluster_nodes() -> tuple[Node, ...]:
    """The nodes of the connected cluster that are alive now."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return tuple(
        Node(
            cpus=resources.get("CPU", 0.0),
            gpus=int(resources.get("GPU", 0.0)),
            object_store_bytes=resources.get("object_store_memory", 0.0),
        )
        for resources in alive
    )


def _nothing() -> None:
    """Waits for its share of a node, and has no other purpose."""


def _has(resource: str, nodes: Sequence[Node]) -> bool:
    return any((node.gpus if resource == "GPU" else node.cpus) >= 1 for node in nodes)


def _sum_of(nodes: Sequence[Node]) -> str:
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    return f"{len(nodes)} nodes with {cpus:g} CPUs and {gpus} GPUs are there"


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
