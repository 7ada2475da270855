"""How much of the cluster each stage takes, in one place, with the reason for every number.

What must never happen is a wait without end: so at least one node keeps a whole CPU for media tasks
whatever the engines take, and an engine asks for no more CPU than its own node has for each GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import ray

from operators.frames import SAMPLE_RATE_HZ
from operators.patchify import PATCH_VALUES
from operators.windows import STEP
from pipeline.config import ConfigError, Job, ResourcesConfig

# Blocks of some MB: small enough to flow, large enough that the driver's books stay short.
BLOCK_BYTES = 32 << 20

# A ledger object for each so many rows, but never more objects than a resume can list in seconds.
MIN_ROWS_A_PART, MAX_PARTS = 64, 10_000

# CPU milliseconds an image by its megapixels, one core, measured: JPEG decode 1.5 / 9 / 50, then
# resize, patches and hash 1.2 / 2.5 / 7.2.
MEGAPIXELS, MEDIA_MS = (0.3, 2.0, 12.0), (2.7, 11.5, 57.2)
# Where nobody has looked: a photo as the web has them.
USUAL_MEGAPIXELS = 2.0

# Tokens a second of one engine, the 12B in bf16 on an 80 GB card. An estimate, not a measurement:
# prefill is 24 GFLOP a token at 400 TFLOPS; a decode step of 256 answers reads 24 GB of weights and
# some 30 GB of KV cache at 3 TB/s, so takes 20 ms.
PREFILL_TOKENS_S, DECODE_TOKENS_S = 16_000, 12_000
# Answers end before their limit; half of it is what dense captions take.
ANSWER_SHARE, PROMPT_TOKENS = 0.5, 50

# CPUs for an engine, best first. With a GPU its front process and the tensors fill most of one; the
# quarter that is left lets answers be committed on the engine's own node, where media tasks hold every
# other CPU. Without, never 1: the media stage asks for 1 CPU, and equal shares would be fused.
GPU_ENGINE_CPUS, CPU_ENGINE_CPUS = (0.75, 0.5, 0.25, 0.1, 0.0), (0.5, 0.3, 0.1, 0.0)


@dataclass(frozen=True)
class Node:
    """What one node of the cluster gives."""

    cpus: float
    gpus: int
    object_store_bytes: float = 0.0


@dataclass(frozen=True)
class Compute:
    """What the stages get. `reasons` says why, a line a number; `warnings` what will be slow."""

    engines: int
    engine_cpus: float
    engine_gpus: float
    calls_per_engine: int
    rows_per_block: int
    media_workers: int | None
    rows_per_part: int
    reasons: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def compute(
    job: Job, nodes: Sequence[Node], spans: int, megapixels: float | None = None
) -> Compute:
    """Derive the shares from the nodes that are there now.

    `megapixels`: the mean of the input, where it is known. Raises ConfigError where the cluster
    cannot run the job at all.
    """
    resources, engine, image = job.resources, job.engine, job.image
    gpus = sum(node.gpus for node in nodes)
    on_gpu = gpus > 0 if resources.accelerator == "auto" else resources.accelerator == "gpu"
    engines = _engines(resources, gpus, on_gpu)
    engine_cpus = _engine_cpus(nodes, engines, on_gpu)
    row_bytes, windows = _row(job)
    rows = resources.rows_per_block or max(1, min(64, BLOCK_BYTES // row_bytes))
    wanted = math.ceil(1.25 * engine.max_num_seqs / (rows * windows)) + 1
    store_bytes = sum(node.object_store_bytes for node in nodes)
    # Ray Data gives the engine's operator a share of half the store; a quarter of that is safe.
    room = int(store_bytes / 8 / engines / (rows * row_bytes)) if store_bytes else wanted
    calls = max(2, min(wanted, room))
    cpus = sum(node.cpus for node in nodes)
    if on_gpu:  # whole CPUs: what is left beside an engine is room for commits, not for media
        left = float(sum(math.floor(node.cpus - node.gpus * engine_cpus) for node in nodes))
    else:
        left = cpus - engine_cpus * engines
    workers = min(left, resources.media_workers or left)
    where = "one a GPU" if on_gpu else "no GPU: vLLM on the CPU"
    if on_gpu and engines > gpus:
        where = f"{gpus} GPUs are there now, the rest comes with the autoscaler"
    reasons = [
        f"engines: {engines} ({where}), {engine_cpus:g} CPU each",
        f"rows a block: {rows} (at most {row_bytes / 1e6:.1f} MB a row, blocks near"
        f" {BLOCK_BYTES >> 20} MB)",
        f"calls an engine: {calls} x {rows} rows of {windows} windows in flight for"
        f" {engine.max_num_seqs} sequences"
        + ("" if calls == wanted else f" (wanted {wanted}: the object store has no room for more)"),
        f"media workers: {resources.media_workers or 'as CPUs are free'}; {left:g} of {cpus:g} CPUs"
        " are theirs",
    ]
    warnings = []
    if on_gpu and job.modality == "image":
        mean = megapixels or USUAL_MEGAPIXELS
        media_rate = workers * 1000 / float(np.interp(mean, MEGAPIXELS, MEDIA_MS))
        rate = engines * _images_s(image.max_soft_tokens, job.answer_tokens)
        basis = "of the files looked at" if megapixels else "assumed"
        reasons.append(
            f"media: about {media_rate:,.0f} images/s from {workers:g} CPUs ({mean:.1f} MP {basis});"
            f" engines: about {rate:,.0f} images/s (an estimate for an 80 GB card)"
        )
        if media_rate < rate:
            needed = math.ceil(workers * rate / media_rate)
            warnings.append(
                f"warning: the CPUs cannot feed the GPUs: about {media_rate:,.0f} images/s prepared,"
                f" {rate:,.0f} wanted. {engines} engines need some {needed} CPUs for media, there"
                f" are {workers:g}" + (" (resources.media_workers)" if workers < left else "")
            )
    return Compute(
        engines=engines,
        engine_cpus=engine_cpus,
        engine_gpus=1.0 if on_gpu else 0.0,
        calls_per_engine=calls,
        rows_per_block=rows,
        media_workers=resources.media_workers,
        rows_per_part=max(MIN_ROWS_A_PART, math.ceil(spans / MAX_PARTS)),
        reasons=tuple(reasons),
        warnings=tuple(warnings),
    )


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


def _engines(resources: ResourcesConfig, gpus: int, on_gpu: bool) -> int:
    if not on_gpu:
        return resources.engines or 1
    if resources.engines is None:
        if gpus == 0:
            raise ConfigError(
                "resources.engines: say how many; the cluster has no GPU now, so with"
                " resources.accelerator gpu nobody can tell how many the autoscaler may bring"
            )
        return gpus
    if resources.accelerator == "auto" and resources.engines > gpus:
        raise ConfigError(
            f"resources.engines is {resources.engines}; the cluster has {gpus} GPUs. Where the"
            " autoscaler brings more, set resources.accelerator to gpu"
        )
    return resources.engines


def _engine_cpus(nodes: Sequence[Node], engines: int, on_gpu: bool) -> float:
    """The largest share with which all engines fit and a whole CPU is left on some node."""
    for share in GPU_ENGINE_CPUS if on_gpu else CPU_ENGINE_CPUS:
        if on_gpu:
            left = [node.cpus - node.gpus * share for node in nodes]
        else:  # all of them may end up on the largest node
            left = [max((node.cpus for node in nodes), default=0.0) - engines * share]
        if min(left, default=0) >= 0 and max(left, default=0) >= 1:
            return share
    cpus = sum(node.cpus for node in nodes)
    raise ConfigError(
        f"the cluster has {cpus:g} CPUs on {len(nodes)} nodes and no node with a whole one to give;"
        " fetching and decoding need at least that"
    )


def _row(job: Job) -> tuple[int, int]:
    """(bytes, windows) that a row may have: an image, or a span of speech without a pause."""
    if job.modality == "audio":
        windows = max(1, round(job.audio.span_s / (STEP * job.audio.window_s)))
        return round(job.audio.span_s * SAMPLE_RATE_HZ) * 4, windows
    return job.image.max_soft_tokens * PATCH_VALUES, 1


def _images_s(media_tokens: int, answer_tokens: int) -> float:
    """Images a second of one engine, by the constants above."""
    prefill_s = (media_tokens + PROMPT_TOKENS) / PREFILL_TOKENS_S
    return 1 / (prefill_s + ANSWER_SHARE * answer_tokens / DECODE_TOKENS_S)
