"""vLLM's AsyncLLM as the benchmark runs it: one engine, its counters, and what differs between releases.

Works with vLLM 0.26, which is built for torch 2.11, and with 0.32, which the product runs on. Differences:
- 0.26 prepares media on `renderer_num_workers` threads, 0.32 always on one. `prepare_on` sets their number
  on a running engine of either.
- 0.26 stacks the audio of a step into one tensor: windows that run together must have one length.
- operators/engine.py asks for exception classes that 0.26 has not; of the product only what makes a
  request is used here (engine_media), which is what the figures are about.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

MODALITIES = ("image", "audio", "video")


@dataclass(frozen=True)
class Setup:
    """One engine. `extra` goes to vLLM's AsyncEngineArgs as it is."""

    name: str
    max_num_seqs: int = 512
    max_num_batched_tokens: int = 8192
    max_model_len: int = 4096
    modalities: tuple[str, ...] = MODALITIES
    # Tokenizers that are ready for the threads of `prepare_on`. A copy of the real size takes a second of
    # the start, and one that is missing is made when it is asked for.
    tokenizers: int = 1
    # a module without which this engine does not start
    needs: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


# Variables of the engine's processes, set before vLLM is imported.
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    # On CUDA vLLM imports FlashInfer for its sampler and does not start without; answers are greedy.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}


@dataclass
class Counters:
    """What the engine's steps said: running sums, and (seconds, running, waiting, share of KV used)."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    steps: list[tuple[float, int, int, float]] = field(default_factory=list)


class Server:
    """A started engine. Use `await Server.start(...)`, then `ask`; `close` in the end."""

    def __init__(self, llm: Any, setup: Setup, counters: Counters, start_s: float) -> None:
        self.llm = llm
        self.setup = setup
        self.counters = counters
        self.start_s = start_s
        self._ids = itertools.count()
        self._threads: ThreadPoolExecutor | None = None

    @classmethod
    async def start(cls, checkpoint: str, setup: Setup, load_format: str) -> Server:
        """Load, compile, capture. Raises what vLLM raises."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments: dict[str, Any] = {
            "model": checkpoint,
            "load_format": load_format,
            "dtype": "bfloat16",
            "max_model_len": setup.max_model_len,
            "max_num_seqs": setup.max_num_seqs,
            "max_num_batched_tokens": setup.max_num_batched_tokens,
            "limit_mm_per_prompt": {name: int(name in setup.modalities) for name in MODALITIES},
            # Every file comes once: caches would only hash and copy.
            "enable_prefix_caching": False,
            "mm_processor_cache_gb": 0,
            "renderer_num_workers": setup.tokenizers,
            "worker_extension_cls": "bench.gpu.embedder.Embedders",
        }
        counters = Counters()
        started = time.perf_counter()
        llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**(arguments | setup.extra)), stat_loggers=[_logger(counters)]
        )
        return cls(llm, setup, counters, time.perf_counter() - started)

    async def ask(self, prompt: Any, output_tokens: int) -> tuple[int, int]:
        """(tokens of the prompt, tokens of the answer), which has exactly `output_tokens`."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        sampling = SamplingParams(
            temperature=0.0,
            min_tokens=output_tokens,
            max_tokens=output_tokens,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        final = None
        async for output in self.llm.generate(prompt, sampling, str(next(self._ids))):
            final = output
        if final is None or len(final.outputs[0].token_ids) != output_tokens:
            raise RuntimeError(f"the engine did not give {output_tokens} tokens")
        return len(final.prompt_token_ids or []), output_tokens

    def prepare_on(self, threads: int) -> None:
        """So many threads run the engine's own media processing from now on."""
        from vllm.utils.async_utils import make_async

        renderer = self.llm.renderer
        previous, self._threads = self._threads, ThreadPoolExecutor(threads)
        renderer._process_multimodal_async = make_async(
            renderer._process_multimodal, executor=self._threads
        )
        if previous is not None:
            previous.shutdown(wait=False)

    async def use_embedder(self, way: str) -> None:
        await self.llm.collective_rpc("use_embedder", args=(way,))

    @property
    def dead(self) -> bool:
        """Whether the engine's process has ended: it answers nothing any more."""
        return bool(self.llm.errored)

    def kv_cache_tokens(self) -> int | None:
        """How many tokens the KV cache holds, as the engine counts them."""
        cache = self.llm.vllm_config.cache_config
        blocks = cache.num_gpu_blocks
        return None if blocks is None else int(blocks) * int(cache.block_size)

    async def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False)
        self.llm.shutdown()
        self.llm = None
        gc.collect()  # its own clean-up at interpreter exit would find modules gone
        await asyncio.sleep(0)


def _logger(counters: Counters) -> Any:
    from vllm.v1.metrics.loggers import StatLoggerBase

    class CountersLogger(StatLoggerBase):  # type: ignore[misc]
        def __init__(self, vllm_config: object, engine_index: int = 0) -> None:
            pass

        def record(
            self,
            scheduler_stats: Any,
            iteration_stats: Any,
            mm_cache_stats: object = None,
            engine_idx: int = 0,
        ) -> None:
            if iteration_stats is not None:
                counters.prompt_tokens += iteration_stats.num_prompt_tokens
                counters.output_tokens += iteration_stats.num_generation_tokens
                counters.preemptions += iteration_stats.num_preempted_reqs
            if scheduler_stats is not None:
                counters.steps.append(
                    (
                        time.perf_counter(),
                        scheduler_stats.num_running_reqs,
                        scheduler_stats.num_waiting_reqs,
                        scheduler_stats.kv_cache_usage,
                    )
                )

        def log_engine_initialized(self) -> None:
            pass

    return CountersLogger
