"""vLLM's AsyncLLM behind a plain interface: requests in from any thread, futures of answers out.

The event loop that owns AsyncLLM runs on a thread of its own, so that no caller (Ray's queues, a slow
consumer) can freeze it. An engine that is dead, or that gives no token for `stall_timeout_s` while
requests are open, ends the process at once: the task is then retried by whoever started it, and
nobody waits on a dead engine.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from operators.errors import MediaError
from operators.patchify import positions
from operators.requests import Answer, ImageRequest, RawImageRequest, Request
from operators.settings import ModelSettings, SamplingSettings

# A looping answer repeats a phrase of up to 32 tokens. From 3 tokens on and 5 times, so that dotted
# lines and columns of equal numbers in a page's text are not taken for one.
REPETITION = {"max_pattern_size": 32, "min_pattern_size": 3, "min_count": 5}


@dataclass(frozen=True)
class EngineOptions:
    """How vLLM is started; see pipeline/config.py for the reasons behind the numbers."""

    modality: str
    max_soft_tokens: int
    answer_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    kv_cache_memory_bytes: int | None
    enforce_eager: bool
    stall_timeout_s: float
    load_format: str


class Engine:
    """AsyncLLM on a private event loop. Blocks until the model is loaded.

    Works the same on the CPU build and on a GPU. Raises whatever vLLM raises at start-up.
    """

    def __init__(
        self,
        model: ModelSettings,
        sampling: SamplingSettings,
        options: EngineOptions,
        die: Callable[[str], None] | None = None,
    ) -> None:
        self._die = die or end_process
        self._meter = Meter()
        self._closed = threading.Event()
        self._next_id = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()
        self._llm: Any = asyncio.run_coroutine_threadsafe(
            self._start(model, options), self._loop
        ).result()
        self._params = _sampling_params(sampling, options.answer_tokens)
        watch(self._meter.silent_s, options.stall_timeout_s, self._die, self._closed)

    def submit(self, request: Request) -> Future[Answer]:
        """Hand a request over. The future raises MediaError where the engine refuses it."""
        # Tensors are made here, on the caller's thread: 3 ms an image would hold up the loop.
        coroutine = self._generate(request, _engine_input(request))
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def usage(self) -> dict[str, float]:
        """Seconds since ready, of which with no open request, and open request-seconds."""
        return self._meter.usage()

    def close(self) -> None:
        """Shut down in order: the engine process first, then the loop. May be called twice."""
        if self._closed.is_set():
            return
        self._closed.set()
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(timeout=60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    async def _start(self, model: ModelSettings, options: EngineOptions) -> Any:  # noqa: ANN401
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        if options.max_soft_tokens > 1024:
            # vLLM's V2 runner drops bidirectional attention for an image of more than 1024 tokens.
            os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        limits = {name: int(name == options.modality) for name in ("image", "video", "audio")}
        args = AsyncEngineArgs(
            model=model.id,
            revision=model.revision,
            tokenizer_revision=model.revision,
            dtype=model.dtype,
            quantization=model.quantization,
            enable_lora=model.adapter is not None,
            max_model_len=model.max_model_len,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            gpu_memory_utilization=options.gpu_memory_utilization,
            kv_cache_memory_bytes=options.kv_cache_memory_bytes,
            enforce_eager=options.enforce_eager,
            load_format=options.load_format,
            limit_mm_per_prompt=limits,
            mm_processor_kwargs=(
                {"max_soft_tokens": options.max_soft_tokens}
                if options.modality == "image"
                else None
            ),
            # Every file comes once: caches would only hash and copy.
            enable_prefix_caching=False,
            mm_processor_cache_gb=0,
            disable_log_stats=False,
        )
        llm = AsyncLLM.from_engine_args(args, stat_loggers=[_meter_logger(self._meter)])
        self._lora = _lora_request(model)
        self._meter.ready()
        return llm

    async def _stop(self) -> None:
        self._llm.shutdown(timeout=30)
        self._llm = None
        gc.collect()  # its own clean-up at interpreter exit would find modules gone

    async def _generate(self, request: Request, engine_input: object) -> Answer:
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError

        self._next_id += 1
        final = None
        with self._meter.open():
            try:
                async for output in self._llm.generate(
                    engine_input,
                    self._params,
                    str(self._next_id),
                    lora_request=self._lora,
                ):
                    final = output
            except EngineDeadError as error:
                if not self._closed.is_set():
                    self._die(f"the engine died: {error}")
                raise
            except (ValueError, VLLMClientError) as error:
                raise MediaError("generate.rejected", str(error)) from error
        if final is None or not final.finished:
            raise MediaError("generate.rejected", "the engine gave no answer")
        completion = final.outputs[0]
        prompt_ids = final.prompt_token_ids or []
        media_tokens = None
        if not isinstance(request, RawImageRequest):
            media_tokens = request.placeholder[1]
        elif request.media_id is not None:
            media_tokens = prompt_ids.count(request.media_id)
        return Answer(
            text=completion.text,
            finish_reason=completion.finish_reason,
            prompt_tokens=len(prompt_ids),
            media_tokens=media_tokens,
            output_tokens=len(completion.token_ids),
        )


def watch(
    silent_s: Callable[[], float],
    limit_s: float,
    die: Callable[[str], None],
    closed: threading.Event,
) -> None:
    """Call `die` once when `silent_s` passes the limit; a thread looks until `closed` is set."""

    def look() -> None:
        while not closed.wait(min(5.0, limit_s / 4)):
            silent = silent_s()
            if silent > limit_s:
                die(f"no token for {silent:.0f} s (engine.stall_timeout_s is {limit_s:g})")
                return

    threading.Thread(target=look, name="engine-watchdog", daemon=True).start()


class Meter:
    """When the last token came, and how long the engine had nothing to do."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ready_at = self._changed_at = self._token_at = time.monotonic()
        self._open = 0
        self._idle_s = 0.0
        self._open_s = 0.0

    def ready(self) -> None:
        with self._lock:
            self._ready_at = self._changed_at = self._token_at = time.monotonic()

    def open(self) -> Meter:
        return self

    def __enter__(self) -> None:
        self._change(1)

    def __exit__(self, *exc: object) -> None:
        self._change(-1)

    def token(self) -> None:
        with self._lock:
            self._token_at = time.monotonic()

    def silent_s(self) -> float:
        """Seconds without a token while a request is open; 0 where none is."""
        with self._lock:
            return time.monotonic() - self._token_at if self._open else 0.0

    def usage(self) -> dict[str, float]:
        with self._lock:
            self._settle()
            return {
                "engine_s": self._changed_at - self._ready_at,
                "idle_s": self._idle_s,
                "open_s": self._open_s,
            }

    def _change(self, by: int) -> None:
        with self._lock:
            self._settle()
            if self._open == 0:
                self._token_at = self._changed_at
            self._open += by

    def _settle(self) -> None:
        now = time.monotonic()
        passed = now - self._changed_at
        self._open_s += passed * self._open
        if self._open == 0:
            self._idle_s += passed
        self._changed_at = now


def end_process(reason: str) -> None:
    """End this process without clean-up: the way out of a dead engine that Ray recovers from."""
    print(f"polyscribe: {reason}; ending this engine actor", file=sys.stderr, flush=True)
    os._exit(1)


def pixel_values(patches: np.ndarray) -> Any:  # noqa: ANN401
    """bf16 tensor [n, 6912] of patches / 255, from uint8 [n, 6912].

    In float32 first, as transformers rescales, then rounded to bf16, as vLLM casts.
    """
    import torch

    return torch.from_numpy(patches.astype(np.float32)).mul_(1 / 255).to(torch.bfloat16)


def _engine_input(request: Request) -> Any:  # noqa: ANN401
    if isinstance(request, RawImageRequest):
        from PIL import Image

        return {
            "prompt": request.prompt,
            "multi_modal_data": {"image": Image.fromarray(request.pixels)},
        }
    import torch
    from vllm.inputs.engine import mm_input
    from vllm.multimodal.inputs import (
        MultiModalFieldConfig,
        MultiModalKwargsItems,
        PlaceholderRange,
    )

    if isinstance(request, ImageRequest):
        modality = "image"
        grid = torch.from_numpy(positions(request.columns, request.rows))
        fields = {"pixel_values": pixel_values(request.patches), "pixel_position_ids": grid}
    else:
        modality = "audio"
        # a copy: the object store's memory is read-only, and torch warns of that
        frames = torch.from_numpy(request.frames.copy())
        valid = torch.ones(len(frames), dtype=torch.bool)
        fields = {"input_features_padded": frames, "input_features_mask": valid}
    items = MultiModalKwargsItems.from_hf_inputs(
        {name: field[None] for name, field in fields.items()},
        {name: MultiModalFieldConfig.batched(modality) for name in fields},
    )
    offset, length = request.placeholder
    return mm_input(
        request.token_ids,
        items,
        {modality: [request.media_hash]},
        {modality: [PlaceholderRange(offset=offset, length=length)]},
    )


def _sampling_params(sampling: SamplingSettings, answer_tokens: int) -> Any:  # noqa: ANN401
    from vllm.sampling_params import (
        RepetitionDetectionParams,
        RequestOutputKind,
        SamplingParams,
    )

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed if sampling.temperature > 0 else None,
        max_tokens=answer_tokens,
        output_kind=RequestOutputKind.FINAL_ONLY,
        repetition_detection=(
            RepetitionDetectionParams(**REPETITION) if sampling.detect_repetition else None
        ),
    )


def _lora_request(model: ModelSettings) -> Any:  # noqa: ANN401
    if model.adapter is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest("adapter", 1, model.adapter)


def _meter_logger(meter: Meter) -> Any:  # noqa: ANN401
    """A vLLM stat logger that notes each step that gave tokens."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class MeterLogger(StatLoggerBase):  # type: ignore[misc]
        def __init__(self, vllm_config: object, engine_index: int = 0) -> None:
            pass

        def record(
            self,
            scheduler_stats: object,
            iteration_stats: Any,  # noqa: ANN401
            mm_cache_stats: object = None,
            engine_idx: int = 0,
        ) -> None:
            if iteration_stats is not None and iteration_stats.num_generation_tokens:
                meter.token()

        def log_engine_initialized(self) -> None:
            pass

    return MeterLogger
