"""How much of the cluster each stage takes, in one place, with the reason for every number.

What must never happen is a wait without end: so at least one node keeps a whole CPU for media tasks
whatever the engines take, and an engine asks for no more CPU than its own node has for each GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from operators.frames import SAMPLE_RATE_HZ
from operators.patchify import PATCH_VALUES
from operators.windows import STEP
from pipeline.config import ConfigError, Job

# Blocks of some MB: small enough to flow, large enough that the driver's books stay short.
BLOCK_BYTES = 32 << 20

# A ledger object for each so many rows, but never more objects than a resume can list in seconds.
MIN_ROWS_A_PART, MAX_PARTS = 64, 10_000

# CPU milliseconds an image by its megapixels, one core, measured: JPEG decode 1.5 / 9 / 50, then
# resize, patches and hash 1.2 / 2.5 / 7.2.
MEGAPIXELS, MEDIA_MS = (0.3, 2.0, 12.0), (2.7, 11.5, 57.2)
# Where nobody has looked: a photo as the web has them.
USUAL_MEGAPIXELS = 2.0
# CPU seconds an hour of sound, one core, measured: probe, decode and voice activity of eight files
# took 14 to 26; long compressed ones 19 to 26.
SOUND_S_AN_HOUR = 20.0
# CPU milliseconds a second of 720p H.264 that is decoded whole, one core, measured (8.7 s for five
# minutes), and those of a frame that is kept: resize, patches and hash of 1 MP.
VIDEO_MS, FRAME_MS = 29.0, 2.0
# CPU milliseconds to seek and decode one frame of those that lie far apart, one core, measured: 32 of
# five minutes of 720p H.264 took 4.9 s. Nothing between them is decoded.
APART_MS = 150.0

# Tokens a second of one engine, the 12B in bf16 on an 80 GB card. An estimate, not a measurement:
# prefill is 24 GFLOP a token at 400 TFLOPS; a decode step of 256 answers reads 24 GB of weights and
# some 30 GB of KV cache at 3 TB/s, so takes 20 ms.
PREFILL_TOKENS_S, DECODE_TOKENS_S = 16_000, 12_000
# Answers end before their limit; half of it is what dense captions take.
ANSWER_SHARE, PROMPT_TOKENS = 0.5, 50
# A second of sound is 25 frames of 40 ms; of speech, 150 words a minute at 1.4 tokens a word.
FRAMES_S, SPOKEN_TOKENS_S = 25, 3.5

# A GPU that is not there yet costs minutes (a node, an image, 24 GB of weights) before its engine
# answers: it is asked for where it finds at least as much work.
ENGINE_START_S = 600.0

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
class Lengths:
    """Nominal seconds of a job's spans: of the sound to do, or of the pictures of videos."""

    total_s: float
    mean_s: float
    longest_s: float  # of any span, whatever its track


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


@dataclass(frozen=True)
class Load:
    """What one unit of a modality takes: seconds of a core to prepare, seconds of an 80 GB card."""

    rate: str  # how units a second are called
    media_s: float
    engine_s: float
    units_a_span: float
    basis: str


def compute(
    job: Job,
    nodes: Sequence[Node],
    spans: int,
    megapixels: float | None = None,
    lengths: Lengths | None = None,
) -> Compute:
    """Derive the shares from the nodes that are there now.

    `megapixels`: the mean of the input, where it is known; `lengths` likewise, else spans are taken for
    as long as they may be. Raises ConfigError where the cluster cannot run the job at all.
    """
    resources, engine = job.resources, job.engine
    gpus = sum(node.gpus for node in nodes)
    on_gpu = gpus > 0 if resources.accelerator == "auto" else resources.accelerator == "gpu"
    load = LOADS[job.modality](job, megapixels, None if lengths is None else lengths.mean_s)
    units = spans * load.units_a_span if lengths is None else lengths.total_s
    engines, why = _engines(job, gpus, on_gpu, units * load.engine_s)
    engine_cpus = _engine_cpus(nodes, engines, on_gpu)
    row_bytes, windows = _row(job, lengths)
    rows = resources.rows_per_block or max(1, min(64, BLOCK_BYTES // row_bytes))
    wanted = math.ceil(1.25 * engine.max_num_seqs / (rows * windows)) + 1
    in_flight_bytes = _in_flight_bytes(nodes, engines, on_gpu)
    room = int(in_flight_bytes / (rows * row_bytes)) if in_flight_bytes else wanted
    calls = max(2, min(wanted, room))
    cpus = sum(node.cpus for node in nodes)
    if on_gpu:  # whole CPUs: what is left beside an engine is room for commits, not for media
        left = float(sum(math.floor(node.cpus - node.gpus * engine_cpus) for node in nodes))
    else:
        left = cpus - engine_cpus * engines
    workers = min(left, resources.media_workers or left)
    reasons = [
        f"engines: {engines} ({why}), {engine_cpus:g} CPU each",
        f"rows a block: {rows} (some {row_bytes / 1e6:.1f} MB a row, blocks near"
        f" {BLOCK_BYTES >> 20} MB)",
        f"calls an engine: {calls} x {rows} rows of {windows} windows in flight for"
        f" {engine.max_num_seqs} sequences"
        + ("" if calls == wanted else f" (wanted {wanted}: the object store has no room for more)"),
        f"media workers: {resources.media_workers or 'as CPUs are free'}; {left:g} of {cpus:g} CPUs"
        " are theirs",
    ]
    warnings = []
    if on_gpu:
        media_rate, rate = workers / load.media_s, engines / load.engine_s
        # what people decide by, so no "0.0" of a small job
        hours = math.ceil(units / min(media_rate, rate) / 360) / 10
        reasons.append(
            f"media: about {media_rate:,.0f} {load.rate} from {workers:g} CPUs ({load.basis});"
            f" engines: about {rate:,.0f} (an estimate for an 80 GB card); in all some {hours:,.1f} hours"
            f" of {engines} GPUs, their start not counted"
        )
        if media_rate < rate:
            warnings.append(
                f"warning: the CPUs cannot feed the GPUs: about {media_rate:,.0f} {load.rate} prepared,"
                f" {rate:,.0f} wanted. {engines} engines need some"
                f" {math.ceil(load.media_s * rate)} CPUs for media, there are {workers:g}"
                + (" (resources.media_workers)" if workers < left else " now")
            )
    elif resources.accelerator == "auto" and len(nodes) > 1:
        warnings.append(
            "warning: no GPU in the cluster, so vLLM runs on the CPU, which is for trials. Where an"
            " autoscaler brings GPUs, set resources.accelerator to gpu and resources.engines to how"
            " many; where none is meant, set resources.accelerator to cpu"
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


def image_load(job: Job, megapixels: float | None, mean_s: float | None) -> Load:
    """An image: decode, resize and patches; prefill of its tokens and half of the longest answer."""
    mean = megapixels or USUAL_MEGAPIXELS
    prefill_s = (job.image.max_soft_tokens + PROMPT_TOKENS) / PREFILL_TOKENS_S
    return Load(
        rate="images/s",
        media_s=float(np.interp(mean, MEGAPIXELS, MEDIA_MS)) / 1000,
        engine_s=prefill_s + ANSWER_SHARE * job.answer_tokens / DECODE_TOKENS_S,
        units_a_span=1.0,
        basis=f"{mean:.1f} MP {'of the files looked at' if megapixels else 'assumed'}",
    )


def audio_load(job: Job, megapixels: float | None, mean_s: float | None) -> Load:
    """A second of sound, as if somebody spoke all the time: where nobody does, engines idle sooner."""
    prefill_s = (FRAMES_S + PROMPT_TOKENS / job.audio.window_s) / PREFILL_TOKENS_S
    return Load(
        rate="hours of sound an hour",
        media_s=SOUND_S_AN_HOUR / 3600,
        engine_s=prefill_s + SPOKEN_TOKENS_S / DECODE_TOKENS_S,
        units_a_span=job.audio.span_s,
        basis="somebody speaks all the time",
    )


def video_load(job: Job, megapixels: float | None, mean_s: float | None) -> Load:
    """A second of 720p, its shots of middling length; with its sound, where that is asked for."""
    video = job.video
    segments_s = {
        "shots": (video.min_s + video.max_s) / 2,
        "fixed": video.max_s,
        "whole": mean_s or video.span_s,
    }
    segment_s = segments_s[video.segment]
    fps = min(video.fps, video.max_frames / segment_s)
    decode_ms = VIDEO_MS if video.segment == "shots" else min(VIDEO_MS, fps * APART_MS)
    media_s = (decode_ms + fps * FRAME_MS) / 1000
    prefill_s = (fps * video.max_soft_tokens + PROMPT_TOKENS / segment_s) / PREFILL_TOKENS_S
    engine_s = prefill_s + ANSWER_SHARE * job.answer_tokens / segment_s / DECODE_TOKENS_S
    if video.transcribe:
        sound = audio_load(job, None, None)
        media_s, engine_s = media_s + sound.media_s, engine_s + sound.engine_s
    return Load(
        rate="hours of video an hour",
        media_s=media_s,
        engine_s=engine_s,
        units_a_span=video.span_s,
        basis="720p, every frame decoded"
        if decode_ms == VIDEO_MS
        else "720p, single frames decoded",
    )


# What a unit of each modality takes.
LOADS: dict[str, Callable[[Job, float | None, float | None], Load]] = {
    "image": image_load,
    "audio": audio_load,
    "video": video_load,
}


def _engines(job: Job, gpus: int, on_gpu: bool, work_s: float) -> tuple[int, str]:
    """How many, and why. `work_s`: seconds that one engine would take for all of it."""
    asked = job.resources.engines
    if not on_gpu:
        return asked or 1, "no GPU: vLLM on the CPU"
    if asked is None:
        if gpus == 0:
            raise ConfigError(
                "resources.engines: say how many; the cluster has no GPU now, so with"
                " resources.accelerator gpu nobody can tell how many the autoscaler may bring"
            )
        return gpus, "one a GPU"
    if asked <= gpus:
        return asked, "one a GPU" if asked == gpus else f"resources.engines, of {gpus} GPUs"
    if job.resources.accelerator == "auto":
        raise ConfigError(
            f"resources.engines is {asked}; the cluster has {gpus} GPUs. Where the"
            " autoscaler brings more, set resources.accelerator to gpu"
        )
    worth = max(gpus, 1, math.ceil(work_s / ENGINE_START_S))
    if worth < asked:
        return worth, (
            f"not {asked}: the work is some {work_s / 60:,.0f} minutes of one GPU, and a further one"
            f" takes {ENGINE_START_S / 60:.0f} to start; {gpus} GPUs are there now"
        )
    return asked, f"{gpus} GPUs are there now, the rest comes with the autoscaler"


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


def _in_flight_bytes(nodes: Sequence[Node], engines: int, on_gpu: bool) -> float:
    """What an engine's rows in flight may take of the object stores; 0 where nobody knows them."""
    # Ray Data gives the engine's operator a share of half the store; a quarter of that is safe.
    shared = _store_bytes(nodes, engines if on_gpu else 0) / 8 / engines
    if not on_gpu:
        return shared
    # They also lie on the engine's node, five times: in its store, and as bfloat16 in the actor and in
    # the engine's process. A store is some 30 % of a node's memory, so a quarter of it is 40 % in all.
    own = [node.object_store_bytes / node.gpus / 4 for node in nodes if node.gpus]
    return min([shared, *own])


def _store_bytes(nodes: Sequence[Node], engines: int) -> float:
    """Object stores of the nodes, those of GPU nodes that are still to come included."""
    there = sum(node.object_store_bytes for node in nodes)
    with_gpu = [node for node in nodes if node.gpus]
    gpus = sum(node.gpus for node in with_gpu)
    if not gpus or engines <= gpus:
        return there
    return there + (engines - gpus) * sum(node.object_store_bytes for node in with_gpu) / gpus


def _row(job: Job, lengths: Lengths | None) -> tuple[int, int]:
    """(bytes, windows) of a row: an image, a span of speech without a pause, or of video without a cut.

    Bytes of the longest, for memory; windows of the mean, for the engine: of clips of 5 s, 13 rows of
    the longest span's windows kept 13 of 256 sequences busy.
    """
    if job.modality == "audio":
        longest_s, mean_s = _span_s(job.audio.span_s, lengths)
        windows = max(1, round(mean_s / (STEP * job.audio.window_s)))
        return max(1, round(longest_s * SAMPLE_RATE_HZ)) * 4, windows
    if job.modality == "video":
        video = job.video
        whole = video.segment == "whole"
        # one span then, however long
        most_s = lengths.longest_s if whole and lengths is not None else video.span_s
        longest_s, mean_s = _span_s(most_s, lengths)
        most, windows = (
            1 if whole else max(1, round(seconds / video.max_s)) for seconds in (longest_s, mean_s)
        )
        frames = max(1, min(math.ceil(longest_s * video.fps), most * video.max_frames))
        return frames * video.max_soft_tokens * PATCH_VALUES, windows
    return job.image.max_soft_tokens * PATCH_VALUES, 1


def _span_s(most_s: float, lengths: Lengths | None) -> tuple[float, float]:
    """(longest, mean) span; a video's sound may have longer ones than its pictures, and is smaller."""
    if lengths is None:
        return most_s, most_s
    return min(most_s, lengths.longest_s), min(most_s, lengths.mean_s)
