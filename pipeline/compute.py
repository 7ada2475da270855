"""How much of the cluster each stage takes, in one place, with the reason for every number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ray

from operators.patchify import PATCH_VALUES
from operators.settings import ImageSettings
from pipeline.config import EngineConfig, ResourcesConfig

# Blocks of some MB: small enough to flow, large enough that the driver's books stay short.
BLOCK_BYTES = 32 << 20

# A ledger object for each so many rows, but never more objects than a resume can list in seconds.
MIN_ROWS_A_PART, MAX_PARTS = 64, 10_000


@dataclass(frozen=True)
class Compute:
    """What the stages get. `reasons` says why, a line a number."""

    engines: int
    engine_cpus: float
    engine_gpus: float
    calls_per_engine: int
    rows_per_block: int
    media_workers: int | None
    rows_per_part: int
    reasons: tuple[str, ...]


def compute(
    resources: ResourcesConfig,
    engine: EngineConfig,
    image: ImageSettings,
    cluster: dict[str, float],
    spans: int,
) -> Compute:
    """Derive the shares from `cluster` (Ray's resource totals: CPU, GPU, object_store_memory).

    Raises ValueError where the cluster cannot run the job at all.
    """
    cpus, gpus = cluster.get("CPU", 0.0), int(cluster.get("GPU", 0.0))
    if cpus < 1:
        raise ValueError(f"the cluster has {cpus:g} CPUs; fetching and decoding need at least one")
    if resources.engines is not None and gpus and resources.engines > gpus:
        raise ValueError(f"resources.engines is {resources.engines}; the cluster has {gpus} GPUs")
    row_bytes = image.max_soft_tokens * PATCH_VALUES
    rows = resources.rows_per_block or max(1, min(64, BLOCK_BYTES // row_bytes))
    engines = resources.engines or max(1, gpus)
    # Never the media stage's own 1 CPU without a GPU: equal shares would be fused into one actor,
    # and an engine that held the only CPU would starve the stages before it.
    engine_cpus = 1.0 if gpus and cpus >= engines + 1 else 0.5 if cpus >= 2 else 0.0
    wanted = math.ceil(1.25 * engine.max_num_seqs / rows) + 1
    store_bytes = cluster.get("object_store_memory", 0.0)
    # Ray Data gives the engine's operator a share of half the store; a quarter of that is safe.
    room = int(store_bytes / 8 / engines / (rows * row_bytes)) if store_bytes else wanted
    calls = max(2, min(wanted, room))
    reasons = [
        f"engines: {engines} ({'one a GPU' if gpus else 'no GPU: vLLM on the CPU'})",
        f"rows a block: {rows} (at most {row_bytes / 1e6:.1f} MB a row, blocks near"
        f" {BLOCK_BYTES >> 20} MB)",
        f"calls an engine: {calls} x {rows} rows in flight for {engine.max_num_seqs} sequences"
        + ("" if calls == wanted else f" (wanted {wanted}: the object store has no room for more)"),
        f"media workers: {resources.media_workers or 'as CPUs are free'} of {cpus:g} CPUs,"
        f" {engine_cpus * engines:g} kept for engines",
    ]
    return Compute(
        engines=engines,
        engine_cpus=engine_cpus,
        engine_gpus=1.0 if gpus else 0.0,
        calls_per_engine=calls,
        rows_per_block=rows,
        media_workers=resources.media_workers,
        rows_per_part=max(MIN_ROWS_A_PART, math.ceil(spans / MAX_PARTS)),
        reasons=tuple(reasons),
    )


def cluster_resources() -> dict[str, Any]:
    """Ray's totals of the connected cluster."""
    totals: dict[str, Any] = ray.cluster_resources()
    return totals
