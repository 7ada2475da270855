"""Images a second of the whole way beside its ceiling: the same engine fed with finished tensors.

    python tests/bench/bench_way.py [--images 400] [--size 640x480]

Prints a Markdown table. One run holds all the figures, because machines are noisy: read the ratios.
    ceiling  everything prepared beforehand, the engine alone
    stock    vLLM's own processor, raw pixels into the same engine
    way      polyscribe run: Ray Data, fetch to ledger, from the first commit to the last
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from operators.decode_image import decode_image
from operators.engine import Engine
from operators.prepare_image import prepare_image
from operators.prompt import Prompt, load_prompt
from operators.requests import Answer, ImageRequest, RawImageRequest, Request
from pipeline.config import Job
from pipeline.graph import vllm_engine
from pipeline.run import run

ROUNDS = 3
CHECKPOINT = Path(__file__).parents[2] / "deploy" / "nano" / "checkpoint"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--images", type=int, default=400)
    options.add_argument("--size", default="640x480")
    options.add_argument("--budget", type=int, default=70)
    given = options.parse_args()
    width, height = map(int, given.size.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in"
        source.mkdir()
        for number in range(given.images):
            picture(width, height, number).save(source / f"{number:05d}.jpg", quality=88)
        job = make_job(source, Path(folder) / "out", given.budget)
        ceiling, stock = engine_alone(job, source)
        way = whole_way(job)
    print(
        "| images/s | ceiling | stock | way | way / ceiling | way / stock |\n|---|---|---|---|---|---|"
    )
    print(
        f"| JPEG {given.size}, {given.budget} tokens | {ceiling:.1f} | {stock:.1f} | {way:.1f} |"
        f" {way / ceiling:.2f} | {way / stock:.2f} |"
    )


def make_job(source: Path, target: Path, budget: int) -> Job:
    return Job.model_validate(
        {
            "task": "caption",
            "input": {"uri": str(source)},
            "output": {"uri": str(target)},
            "model": {"id": str(CHECKPOINT)},
            "image": {"max_soft_tokens": budget},
            "sampling": {"max_tokens": 12, "detect_repetition": False},
            "engine": {
                "max_num_seqs": 32,
                "max_num_batched_tokens": 4096,
                "kv_cache_memory_bytes": 1 << 28,
                "enforce_eager": True,
            },
        }
    )


def picture(width: int, height: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def engine_alone(job: Job, source: Path) -> tuple[float, float]:
    """(ceiling, stock) images a second of one engine."""
    prompt = load_prompt(job.model, job.prompt, "image", job.instruction.text, job.answer_tokens)
    files = [path.read_bytes() for path in sorted(source.iterdir())]
    engine = vllm_engine(job)()
    assert isinstance(engine, Engine)
    prepared: list[Request] = [request(data, job, prompt) for data in files]
    rate(engine, prepared[:32])  # warm-up
    # In turn, because the machine's speed drifts.
    rounds = [
        (rate(engine, prepared), stock_rate(engine, files, job, prompt)) for _ in range(ROUNDS)
    ]
    engine.close()
    return statistics.median(r[0] for r in rounds), statistics.median(r[1] for r in rounds)


def stock_rate(engine: Engine, files: list[bytes], job: Job, prompt: Prompt) -> float:
    """Images a second where the engine's own processor gets decoded pixels."""
    started = time.perf_counter()
    futures: list[Future[Answer]] = []
    for data in files:
        pixels = decode_image(data, job.image).pixels
        futures.append(engine.submit(RawImageRequest(prompt.raw(), pixels, prompt.media_id)))
    for future in futures:
        future.result()
    return len(files) / (time.perf_counter() - started)


def request(data: bytes, job: Job, prompt: Prompt) -> ImageRequest:
    done = prepare_image(data, job.image)
    ids = prompt.window(len(done.media))
    return ImageRequest(
        ids, prompt.placeholder(ids), done.media, done.columns, done.rows, done.media_hash
    )


def rate(engine: Engine, requests: list[Request]) -> float:
    started = time.perf_counter()
    for future in [engine.submit(each) for each in requests]:
        future.result()
    return len(requests) / (time.perf_counter() - started)


def whole_way(job: Job) -> float:
    """Images a second from the first to the last finished span."""
    finished = run(job, Console(file=io.StringIO()))
    report = json.loads(finished.folder.read("report.json"))
    spans = report["accounts"]["spans"]["planned"]
    return spans / float(report["engine"]["seconds"])


if __name__ == "__main__":
    main()
