"""What the device can do: matrix rate, bandwidth, and the embedder's ways on the 12B's shapes.

The two ceilings of roofline.py, measured on the machine itself with random data, and four ways from a
batch of pictures on the host to their embeddings:
    loop-bf16        vLLM's way: the front process sends bf16, each picture is embedded alone
    batched-bf16     one product for all pictures of a step
    loop-uint8       the front process sends uint8, a quarter of the float32 and half of the bf16
    batched-uint8    both
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from bench.gpu.embedder import Embedder, embed_batched, embed_loop


def seconds(work: Callable[[], Any], device: torch.device, rounds: int = 15) -> float:
    """Median seconds of one call, warm."""
    for _ in range(3):
        work()
    taken = []
    for _ in range(rounds):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device: torch.device, size: int) -> float:
    """FLOP/s of a square bf16 product of random matrices."""
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return 2 * size**3 / seconds(lambda: left @ right, device)


def bandwidth(device: torch.device, count: int) -> float:
    """Bytes a second, read and written, of a copy of `count` bytes."""
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * count / seconds(lambda: target.copy_(source), device)


def layer_rate(device: torch.device, tokens: int, hidden: int, feed_forward: int) -> float:
    """FLOP/s of the feed-forward's first product at the model's own shape."""
    rows = torch.randn(tokens, hidden, device=device).bfloat16()
    weight = torch.randn(2 * feed_forward, hidden, device=device).bfloat16()
    work = 2 * tokens * hidden * 2 * feed_forward
    return work / seconds(lambda: torch.nn.functional.linear(rows, weight), device)


def embedder_ms(
    device: torch.device, pictures: int, patches: int, values: int, hidden: int
) -> dict[str, float]:
    """Milliseconds from `pictures` on the host to embeddings, by way; and of the copy alone."""
    embedder = Embedder(values, hidden).to(device, torch.bfloat16)
    raw = [torch.randint(0, 256, (patches, values), dtype=torch.uint8) for _ in range(pictures)]
    bf16 = [(each.float() / 255).bfloat16() for each in raw]
    if device.type == "cuda":
        raw, bf16 = ([each.pin_memory() for each in some] for some in (raw, bf16))
    places = torch.stack([torch.arange(patches) % 22, torch.arange(patches) // 22], dim=1)
    grids = [places.to(device) for _ in range(pictures)]

    def sent(some: list[torch.Tensor]) -> list[torch.Tensor]:
        return [each.to(device, non_blocking=True) for each in some]

    with torch.inference_mode():
        ways: dict[str, Callable[[], Any]] = {
            "copy-bf16": lambda: sent(bf16),
            "copy-uint8": lambda: sent(raw),
            "loop-bf16": lambda: embed_loop(embedder, sent(bf16), grids),
            "batched-bf16": lambda: embed_batched(embedder, sent(bf16), grids),
            "loop-uint8": lambda: embed_loop(embedder, sent(raw), grids),
            "batched-uint8": lambda: embed_batched(embedder, sent(raw), grids),
        }
        return {name: 1e3 * seconds(work, device) for name, work in ways.items()}
