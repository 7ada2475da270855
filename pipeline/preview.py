"""`polyscribe plan`: what a run would do and what it would take, without an engine."""

from __future__ import annotations

import statistics

import duckdb
from rich.console import Console

from operators.decode_image import probe_image
from operators.errors import MediaError
from operators.fetch import Fetch, Ref
from operators.patchify import tokens
from operators.prompt import load_prompt
from pipeline.compute import cluster_resources, compute
from pipeline.config import Job
from pipeline.plan import MODALITY, make_plan, scratch
from pipeline.progress import listing
from pipeline.run import connected, folder_store, new_run_id

# Headers that are read for the estimate of tokens, and how much of each file.
SAMPLE_FILES, HEADER_BYTES = 32, 256 << 10


def preview(job: Job, console: Console) -> None:
    """Print counts, tokens and shares of a run. Raises SourceError as a run would."""
    with scratch() as db:
        plan = make_plan(job, db, folder_store(job), new_run_id(), listing(console))
        console.print(f"job {job.fingerprint}: {plan.line()}", highlight=False)
        if not plan.spans_todo:
            return
        prompt = load_prompt(
            job.model, job.prompt, MODALITY[job.task], job.instruction.text, job.answer_tokens
        )
        text_tokens = len(prompt.head) + len(prompt.tail) + 2
        sample = _sample_tokens(job, db)
    media_tokens = statistics.fmean(sample) if sample else float(job.image.max_soft_tokens)
    basis = f"{len(sample)} files looked at" if sample else "the budget; no header could be read"
    total = plan.spans_todo * (text_tokens + media_tokens)
    console.print(
        f"tokens in: about {total:,.0f} ({media_tokens:.0f} of the image, from {basis},"
        f" and {text_tokens} of the prompt, a file)\n"
        f"tokens out: at most {plan.spans_todo * job.answer_tokens:,}"
        f" ({job.answer_tokens} an answer)",
        highlight=False,
    )
    with connected():
        shares = compute(job.resources, job.engine, job.image, cluster_resources(), plan.spans_todo)
    for reason in shares.reasons:
        console.print(reason, highlight=False)


def _sample_tokens(job: Job, db: duckdb.DuckDBPyConnection) -> list[int]:
    """Image tokens of some files of the plan, from their headers alone."""
    rows = db.execute(
        f"""SELECT fetch_uri, coalesce(fetch_offset, 0), coalesce(fetch_length, size_bytes) AS size
        FROM todo WHERE size > 0 USING SAMPLE reservoir({SAMPLE_FILES} ROWS) REPEATABLE (1)"""
    ).fetchall()
    fetch = Fetch(job.fetch, job.input.storage_options)
    counts = []
    for uri, offset, size in rows:
        try:
            head = fetch(Ref(uri, offset, min(size, HEADER_BYTES))).data
            width, height = probe_image(head, job.image)
            counts.append(tokens(height, width, job.image.max_soft_tokens))
        except MediaError:
            continue  # it will fail in the run, with its code; here it only thins the sample
    return counts
