"""`polyscribe plan`: what a run would do and what it would take, without an engine."""

from __future__ import annotations

import statistics

import duckdb
from rich.console import Console

from operators.decode_image import probe_image
from operators.errors import MediaError
from operators.fetch import Fetch, Ref
from operators.patchify import tokens
from pipeline.cluster import cluster
from pipeline.compute import cluster_nodes, compute
from pipeline.config import Job
from pipeline.graph import load_prompts
from pipeline.plan import make_plan, scratch
from pipeline.progress import listing
from pipeline.run import folder_store, new_run_id

# Headers that are read for the estimate of tokens, and how much of each file.
SAMPLE_FILES, HEADER_BYTES = 32, 256 << 10


def preview(job: Job, console: Console) -> None:
    """Print counts, tokens and shares of a run. Raises SourceError as a run would."""
    with scratch() as db, cluster() as connect:
        plan = make_plan(job, db, folder_store(job), new_run_id(), connect, listing(console))
        console.print(f"job {job.fingerprint}: {plan.line()}", highlight=False)
        if not plan.spans_todo:
            return
        prompt = load_prompts(job)[job.modality]
        text_tokens = len(prompt.head) + len(prompt.tail) + 2
        sizes = _sample_sizes(job, db) if job.modality == "image" else []
        _say_tokens(job, plan.spans_todo, text_tokens, sizes, console)
        connect()
        pixels = statistics.fmean(width * height for width, height in sizes) if sizes else None
        megapixels = None if pixels is None else pixels / 1e6
        shares = compute(job, cluster_nodes(), plan.spans_todo, megapixels)
    for reason in (*shares.reasons, *shares.warnings):
        console.print(reason, highlight=False)


def _say_tokens(
    job: Job, spans: int, text_tokens: int, sizes: list[tuple[int, int]], console: Console
) -> None:
    """Tokens of an image job, from the files that were looked at."""
    if job.modality == "audio":
        console.print(
            f"tokens in: 25 a second of speech, and {text_tokens} of the prompt a window of at most"
            f" {job.audio.window_s:g} s; tokens out: at most {job.answer_tokens} a window",
            highlight=False,
        )
        return
    budget = job.image.max_soft_tokens
    counts = [tokens(height, width, budget) for width, height in sizes]
    media_tokens = statistics.fmean(counts) if counts else float(budget)
    basis = f"{len(counts)} files looked at" if counts else "the budget; no header could be read"
    console.print(
        f"tokens in: about {spans * (text_tokens + media_tokens):,.0f} ({media_tokens:.0f} of the"
        f" image, from {basis}, and {text_tokens} of the prompt, a file)\n"
        f"tokens out: at most {spans * job.answer_tokens:,} ({job.answer_tokens} an answer)",
        highlight=False,
    )


def _sample_sizes(job: Job, db: duckdb.DuckDBPyConnection) -> list[tuple[int, int]]:
    """(width, height) of some files of the plan, from their headers alone."""
    rows = db.execute(
        f"""SELECT fetch_uri, coalesce(fetch_offset, 0), coalesce(fetch_length, size_bytes) AS size
        FROM todo WHERE size > 0 USING SAMPLE reservoir({SAMPLE_FILES} ROWS) REPEATABLE (1)"""
    ).fetchall()
    fetch = Fetch(job.fetch, job.input.storage_options)
    sizes = []
    for uri, offset, size in rows:
        try:
            head = fetch(Ref(uri, offset, min(size, HEADER_BYTES))).data
            sizes.append(probe_image(head, job.image))
        except MediaError:
            continue  # it will fail in the run, with its code; here it only thins the sample
    return sizes
