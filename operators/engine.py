"""vLLM's AsyncLLM behind a plain interface: requests in from any thread, futures of answers out.

The event loop that owns AsyncLLM runs on a thread of its own, so that no caller (Ray's queues, a slow
consumer) can freeze it. An engine that is dead, or that gives no token for `stall_timeout_s` while
requests are open, ends the process at once: the task is then retried by whoever started it, and
nobody waits on a dead engine.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from operators.engine_folder import EngineFolder
from operators.engine_media import EngineMedia, engine_media
from operators.engine_meter import Meter, watch
from operators.errors import MediaError
from operators.prepare_video import as_images
from operators.requests import (
    Answer,
    RawImageRequest,
    Request,
    TextRequest,
    VideoRequest,
)
from operators.settings import ModelSettings, SamplingSettings

# A looping answer repeats a phrase of up to 32 tokens. From 3 tokens on and 5 times, so that dotted
# lines and columns of equal numbers in a page's text are not taken for one.
REPETITION = {"max_pattern_size": 32, "min_pattern_size": 3, "min_count": 5}

# What vLLM takes as max_lora_rank.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class EngineOptions:
    """How vLLM is started; see pipeline/config.py for the reasons behind the numbers.

    `modality` is what an asset is; of a video the engine gets frames and sound. `max_soft_tokens` is
    of an image or a frame.
    """

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
    # of a video request
    max_frames: int = 32


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
        self._end = die or end_process
        self._meter = Meter()
        self._closed = threading.Event()
        self._next_id = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()
        self._folder = EngineFolder()
        try:
            with self._folder.used():
                self._llm: Any = asyncio.run_coroutine_threadsafe(
                    self._start(model, options), self._loop
                ).result()
            self._folder.note_memory()
        except BaseException:
            self._folder.remove()
            raise
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
        self._folder.remove()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()
        gc.collect()

    async def _start(self, model: ModelSettings, options: EngineOptions) -> Any:  # noqa: ANN401
        for name, value in engine_environment(options.max_soft_tokens).items():
            os.environ.setdefault(name, value)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        limits = media_limits(options)
        adapter = None if model.adapter is None else Adapter.find(model.adapter)
        args = AsyncEngineArgs(
            model=model.id,
            revision=model.revision,
            tokenizer_revision=model.revision,
            dtype=engine_dtype(model.dtype),
            quantization=model.quantization,
            enable_lora=adapter is not None,
            max_lora_rank=adapter.max_rank if adapter else LORA_RANKS[0],
            max_model_len=model.max_model_len,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            gpu_memory_utilization=options.gpu_memory_utilization,
            kv_cache_memory_bytes=options.kv_cache_memory_bytes,
            enforce_eager=options.enforce_eager,
            load_format=options.load_format,
            limit_mm_per_prompt=limits,
            mm_processor_kwargs=(
                {"max_soft_tokens": options.max_soft_tokens} if limits["image"] else None
            ),
            # Every file comes once: caches would only hash and copy.
            enable_prefix_caching=False,
            mm_processor_cache_gb=0,
            disable_log_stats=False,
        )
        llm = AsyncLLM.from_engine_args(args, stat_loggers=[_meter_logger(self._meter)])
        self._lora = adapter.request() if adapter else None
        if adapter is not None:
            # Now: an adapter that does not fit would kill the engine with its first request.
            await llm.add_lora(self._lora)
        self._meter.ready()
        return llm

    async def _stop(self) -> None:
        self._llm.shutdown(timeout=30)
        # vLLM leaves its ZeroMQ context open, whether the engine lives or has died: the garbage
        # collector would close it at a time of its own, with a warning. It ends when its sockets are
        # closed, which a dead engine's own clean-up may not have come to yet.
        resources = self._llm.engine_core.resources
        for socket in (resources.input_socket, resources.output_socket):
            socket.close(linger=0)
        resources.ctx.term()
        # Its tasks hold it. At interpreter exit its own clean-up would find modules gone.
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._llm = None

    def _die(self, reason: str) -> None:
        self._folder.remove()
        self._end(reason)

    def _params_for(self, request: Request) -> Any:  # noqa: ANN401
        if request.max_tokens in (None, self._params.max_tokens):
            return self._params
        params = self._params.clone()
        params.max_tokens = request.max_tokens
        return params

    async def _generate(self, request: Request, engine_input: object) -> Answer:
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        self._next_id += 1
        final = None
        with self._meter.open():
            try:
                async for output in self._llm.generate(
                    engine_input,
                    self._params_for(request),
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
            except EngineGenerateError as error:
                # what its own processor says of a picture, wrapped
                if isinstance(error.__cause__, ValueError):
                    raise MediaError("generate.rejected", str(error.__cause__)) from error
                raise
        if final is None or not final.finished:
            raise MediaError("generate.interrupted", "the engine gave no answer")
        completion = final.outputs[0]
        if completion.finish_reason in ("abort", "error"):
            raise MediaError(
                "generate.interrupted", f"the engine's reason: {completion.finish_reason}"
            )
        prompt_ids = final.prompt_token_ids or []
        return Answer(
            text=completion.text,
            finish_reason=completion.finish_reason,
            prompt_tokens=len(prompt_ids),
            media_tokens=_media_tokens(request, prompt_ids),
            output_tokens=len(completion.token_ids),
        )


def emulated_bfloat16() -> bool:
    """Whether this is x86 without AVX-512: its products of bfloat16 take eight times those of float32."""
    import torch

    capability: str = torch.backends.cpu.get_cpu_capability()
    return capability == "AVX2"


def engine_dtype(dtype: str) -> str:
    """float32 for "auto" where the engine would run on a CPU that only emulates bfloat16.

    Anything else is left to vLLM, which takes the checkpoint's.
    """
    from vllm.platforms import current_platform

    slow = dtype == "auto" and current_platform.is_cpu() and emulated_bfloat16()
    return "float32" if slow else dtype


def end_process(reason: str) -> None:
    """End this process without clean-up: the way out of a dead engine that Ray recovers from."""
    print(f"polyscribe: {reason}; ending this engine actor", file=sys.stderr, flush=True)
    os._exit(1)


def engine_environment(max_soft_tokens: int) -> dict[str, str]:
    """What vLLM reads from the environment, here and in its own process, unless somebody has set it."""
    environment = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        # FlashInfer compiles its sampler on the machine, with CUDA's compiler, and vLLM tries it at
        # each start: where there is only the driver, no engine would start. No request would take
        # it either: all are greedy or have a seed.
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
    }
    if max_soft_tokens > 1024:
        # vLLM's V2 runner drops bidirectional attention for an image of more than 1024 tokens.
        environment["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    return environment


def media_limits(options: EngineOptions) -> dict[str, int]:
    """How much of each medium a request may hold. What a job does not use would only cost memory.

    With video allowed, vLLM wants max_num_batched_tokens of at least 2496 (32 frames of 78 tokens).
    """
    limits = {"image": 0, "video": 0, "audio": 0}
    if options.modality != "video":
        return limits | {options.modality: 1}
    limits["audio"] = 1
    if as_images(options.max_soft_tokens):
        return limits | {"image": options.max_frames}
    return limits | {"video": 1}


def _media_tokens(request: Request, prompt_ids: list[int]) -> int | None:
    if isinstance(request, TextRequest):
        return 0
    if isinstance(request, (VideoRequest, RawImageRequest)):
        return None if request.media_id is None else prompt_ids.count(request.media_id)
    return request.placeholder[1]


def _engine_input(request: Request) -> Any:  # noqa: ANN401
    if isinstance(request, RawImageRequest):
        from PIL import Image

        return {
            "prompt": request.prompt,
            "multi_modal_data": {"image": Image.fromarray(request.pixels)},
        }
    if isinstance(request, TextRequest):
        from vllm.inputs.engine import tokens_input

        return tokens_input(request.token_ids)
    return media_input(request.token_ids, engine_media(request))


def media_input(token_ids: list[int], media: EngineMedia) -> Any:  # noqa: ANN401
    """vLLM's own input of a prompt and its media."""
    from vllm.inputs.engine import mm_input
    from vllm.multimodal.inputs import (
        MultiModalFieldConfig,
        MultiModalKwargsItems,
        PlaceholderRange,
    )

    fields = dict.fromkeys(media.tensors, MultiModalFieldConfig.batched(media.modality))
    if media.frame_counts is not None:
        counts = media.tensors[media.frame_counts]
        by_frame = MultiModalFieldConfig.flat_from_sizes(media.modality, counts)
        fields = dict.fromkeys(media.tensors, by_frame)
        fields[media.frame_counts] = MultiModalFieldConfig.batched(media.modality, keep_on_cpu=True)
    return mm_input(
        token_ids,
        MultiModalKwargsItems.from_hf_inputs(media.tensors, fields),
        {media.modality: media.hashes},
        {media.modality: [PlaceholderRange(*place) for place in media.places]},
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


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on this machine's disk, and the least of vLLM's ranks that holds it."""

    path: str
    max_rank: int

    @staticmethod
    def find(name: str) -> Adapter:
        """The adapter of a folder or hub id. Raises ValueError where it is none that vLLM takes."""
        from vllm.lora.utils import get_adapter_absolute_path

        path = get_adapter_absolute_path(name)
        try:
            config = json.loads((Path(path) / "adapter_config.json").read_text())
            ranks = [int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"model.adapter: {name} is no LoRA adapter: {error!r}") from error
        fitting = [rank for rank in LORA_RANKS if rank >= max(ranks)]
        if not fitting:
            raise ValueError(
                f"model.adapter: rank {max(ranks)}; at most {LORA_RANKS[-1]} is allowed"
            )
        return Adapter(path, fitting[0])

    def request(self) -> Any:  # noqa: ANN401
        from vllm.lora.request import LoRARequest

        return LoRARequest("adapter", 1, self.path)


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
