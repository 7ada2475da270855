"""What is measured, in the order of its value: the headline first, each within one command's time.

A measure is one stream (or one figure of the device) with a name of its own. Neighbours of one engine share
its start, which is what costs: two minutes the first time, one with a warm compile cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from bench.gpu.serving import Setup
from bench.gpu.stream import Pace

# Left alone, vLLM takes FlashAttention 4 on Hopper, and fails where its compiler (CuTe DSL) is missing.
BASE = Setup(
    "base",
    tokenizers=8,
    extra={
        "mm_processor_kwargs": {"max_soft_tokens": 560},
        "attention_backend": "TRITON_ATTN",
    },
)
# One engine for all pictures of one size needs less room.
IMAGES = replace(BASE, modalities=("image",), tokenizers=1)
SETUPS = {
    setup.name: setup
    for setup in (
        BASE,
        replace(
            IMAGES,
            name="fa4",
            needs="cutlass",
            extra=BASE.extra | {"attention_backend": "FLASH_ATTN"},
        ),
        replace(IMAGES, name="fp8", extra=BASE.extra | {"quantization": "fp8"}),
        replace(IMAGES, name="tokens-16384", max_num_batched_tokens=16_384),
        replace(IMAGES, name="tokens-4096", max_num_batched_tokens=4096),
        replace(IMAGES, name="seqs-1024", max_num_seqs=1024),
        replace(IMAGES, name="no-graphs", extra=BASE.extra | {"enforce_eager": True}),
        replace(IMAGES, name="whole-prefill", extra=BASE.extra | {"enable_chunked_prefill": False}),
    )
}


@dataclass(frozen=True)
class Measure:
    """kind says how it is taken (measure.py), the rest what of."""

    name: str
    kind: str
    setup: str | None = "base"
    task: str = "image-280"
    form: str = "ceiling"
    # of the engine's own media processing, or of the pool of the whole way
    threads: int = 1
    embedder: str = "stock"
    uint8: bool = False
    in_flight: int | None = None
    output_tokens: int | None = None
    seconds: float = 50.0


def _ceiling(task: str) -> Measure:
    return Measure(f"{task}/ceiling", "stream", task=task)


def _inputs(task: str, *threads: int) -> list[Measure]:
    """Our inputs, and vLLM's own processor on so many threads."""
    return [
        Measure(f"{task}/prepared", "stream", task=task, form="prepared"),
        *(
            Measure(f"{task}/raw-{count}", "stream", task=task, form="raw", threads=count)
            for count in threads
        ),
    ]


def _embedder(name: str, way: str, *, uint8: bool) -> Measure:
    return Measure(f"image-280/{name}", "stream", embedder=way, uint8=uint8)


def _pool(workers: int) -> Measure:
    return Measure(f"way/{workers}", "way", threads=workers, seconds=90)


# A setting's engine beside base's image-280/ceiling; the first three are worth most.
SETTINGS = ("fa4", "fp8", "tokens-16384", "seqs-1024", "no-graphs", "tokens-4096", "whole-prefill")


def _setting(name: str) -> Measure:
    in_flight = 1280 if SETUPS[name].max_num_seqs > 1000 else None
    return Measure(f"setting/{name}", "stream", setup=name, in_flight=in_flight)


MEASURES = [
    Measure("device/rates", "rates", setup=None, seconds=20),
    Measure("device/embedder", "embedder", setup=None, seconds=20),
    _ceiling("image-280"),
    *_inputs("image-280", 1, 8),
    Measure("image-280/prefill", "stream", output_tokens=1, seconds=35),
    Measure("image-280/decode", "decode", seconds=85),
    _ceiling("audio-15"),
    *_inputs("audio-15", 1, 8),
    _pool(12),
    _ceiling("video-32"),
    *_inputs("video-32", 1, 8),
    _embedder("batched-uint8", "batched", uint8=True),
    # the other sizes' first figure, before the engine has to be started for anything else
    *map(_ceiling, ("image-140", "image-560", "audio-30")),
    *map(_setting, SETTINGS[:3]),
    *_inputs("image-140", 1, 8),
    *_inputs("image-560", 1, 8),
    *_inputs("audio-30", 1, 8),
    Measure("image-280/flight-256", "stream", in_flight=256, seconds=40),
    Measure("image-280/flight-128", "stream", in_flight=128, seconds=35),
    _embedder("batched-bf16", "batched", uint8=False),
    _embedder("loop-uint8", "loop", uint8=True),
    Measure("image-280/raw-4", "stream", form="raw", threads=4),
    Measure("image-280/raw-16", "stream", form="raw", threads=16),
    _pool(8),
    _pool(4),
    *map(_setting, SETTINGS[3:]),
]


@dataclass(frozen=True)
class Scale:
    """How much of everything: the real run, or the dry run on a CPU with the nano checkpoint."""

    load_format: str = "dummy"
    # at most; a task says how many it wants
    in_flight: int = 1280
    window_s: float = 8.0
    windows: int = 3
    warm_limit_s: float = 25.0
    start_s: float = 150.0
    # a measure that hangs must not take the others' time: so many times what it should take
    patience: float = 2.0
    # media of a task at most; None: as many as the task says
    distinct: int | None = None
    output_tokens: int | None = None
    files: int = 1024
    matrix: int = 8192
    copy_bytes: int = 4 << 30
    pictures: int = 27
    workers: int | None = None
    overrides: dict[str, Any] = field(default_factory=dict)

    def pace(self, in_flight: int) -> Pace:
        flight = min(in_flight, self.in_flight)
        return Pace(flight, self.warm_limit_s, self.window_s, self.windows)

    def setup(self, setup: Setup) -> Setup:
        """The engine as it is started: the dry run makes everything small."""
        if not self.overrides:
            return setup
        return replace(
            setup,
            max_num_seqs=min(setup.max_num_seqs, 16),
            max_num_batched_tokens=min(setup.max_num_batched_tokens, 4096),
            extra=setup.extra | self.overrides,
        )


REAL = Scale()
DRY = Scale(
    load_format="auto",
    in_flight=12,
    window_s=2.0,
    windows=2,
    warm_limit_s=8.0,
    start_s=60.0,
    patience=10.0,
    distinct=6,
    output_tokens=4,
    files=12,
    matrix=512,
    copy_bytes=1 << 24,
    pictures=3,
    workers=1,
    overrides={"attention_backend": None, "enforce_eager": True, "kv_cache_memory_bytes": 1 << 28},
)
