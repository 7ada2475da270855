"""`polyscribe plan`: what a run would do and what it would take, without an engine."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator

import duckdb
from rich.console import Console

from operators.decode_image import probe_image
from operators.errors import MediaError
from operators.fetch import Fetch, Ref
from operators.patchify import tokens
from operators.prompts import Prompts
from pipeline.cluster import cluster, cluster_nodes
from pipeline.compute import compute
from pipeline.config import Job
from pipeline.plan import make_plan, scratch
from pipeline.progress import clock, planning
from pipeline.prompts import job_prompts
from pipeline.run import folder_store, look_at_output, new_run_id
from pipeline.store import Store

# Headers that are read for the estimate of tokens, and how much of each file.
SAMPLE_FILES, HEADER_BYTES = 32, 256 << 10


def preview(job: Job, console: Console) -> None:
    """Print counts, tokens and shares of a run. Raises what a run would."""
    look_at_output(job)
    with scratch() as db, cluster(job.limits.wait_for_workers_s, console.print) as connect:
        folder = folder_store(job)
        plan = make_plan(job, db, folder, new_run_id(), connect, planning(console))
        console.print(f"job {job.fingerprint}: {plan.line()}")
        if not plan.spans_todo:
            return
        prompts = job_prompts(job)
        sizes = _sample_sizes(job, db) if job.modality == "image" else []
        for line in _tokens(job, plan.spans_todo, prompts, sizes):
            console.print(line)
        connect()
        pixels = statistics.fmean(width * height for width, height in sizes) if sizes else None
        megapixels = None if pixels is None else pixels / 1e6
        shares = compute(job, cluster_nodes(), plan.spans_todo, megapixels, plan.lengths)
        pace = _pace(folder, plan.spans_todo, shares.engines)
    for line in (*shares.reasons, *shares.warnings, *pace):
        console.print(line)


def _pace(folder: Store, spans: int, engines: int) -> Iterator[str]:
    """What the spans take at the pace of the job's last run, where there was one that worked."""
    try:
        report = json.loads(folder.read("report.json"))
    except FileNotFoundError:
        return
    engine, done = report["engine"], report["accounts"]["done_now"]
    if not done or not engine["seconds"]:
        return
    hours = engine["seconds"] / 3600
    needed = hours * spans / done
    yield (
        f"run {report['run_id']} took {hours:,.2f} engine hours for {done:,} spans, models' loading apart"
        f" (engines waited {engine['waiting_share']:.0%} of it): at its pace {needed:,.1f} engine hours,"
        f" {clock(3600 * needed / engines)} with {engines}"
    )


def _tokens(job: Job, spans: int, prompts: Prompts, sizes: list[tuple[int, int]]) -> Iterator[str]:
    """What goes in and comes out; of an image job in all, from the files that were looked at."""
    longest = {kind: asked.max_tokens for kind, asked in job.instructions.items()}
    if image := prompts.get("image"):
        budget = job.image.max_soft_tokens
        counts = [tokens(height, width, budget) for width, height in sizes]
        mean = statistics.fmean(counts) if counts else float(budget)
        basis = (
            f"{len(counts)} files looked at" if counts else "the budget; no header could be read"
        )
        yield (
            f"tokens in: about {spans * (image.own_tokens + mean):,.0f} ({mean:.0f} of the image, from"
            f" {basis}, and {image.own_tokens} of the prompt, a file)"
        )
        yield f"tokens out: at most {spans * longest['image']:,} ({longest['image']} an answer)"
    if video := prompts.get("video"):
        settings, text_tokens = job.video, len(video.head) + len(video.tail)
        yield (
            f"tokens in: at most {settings.max_soft_tokens} and a time for each of up to"
            f" {settings.max_frames} frames ({settings.fps:g} a second), and {text_tokens} of the"
            f" prompt, a segment of at most {settings.max_s:g} s; tokens out: at most"
            f" {longest['video']} a segment"
        )
    if audio := prompts.get("audio"):
        yield (
            f"tokens in: 25 a second of speech, and {audio.own_tokens} of the prompt a window of at most"
            f" {job.audio.window_s:g} s; tokens out: at most {longest['audio']} a window"
        )
    if "text" in prompts:
        room = job.model.max_model_len - longest["text"]
        yield (
            f"tokens in: at most {room:,} of captions and transcript a summary; tokens out: at most"
            f" {longest['text']}"
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
            # WebP, AVIF and HEIF say how long they are, and are refused where the end is not there.
            whole = head.ljust(min(size, job.fetch.max_bytes), b"\0")
            sizes.append(probe_image(whole, job.image))
        except MediaError:
            continue  # it will fail in the run, with its code; here it only thins the sample
    return sizes
