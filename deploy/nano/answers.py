"""Ask a checkpoint: through transformers' `generate`, and through vLLM with prepared inputs."""

import asyncio
import os
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoTokenizer, Gemma4UnifiedForConditionalGeneration

from deploy.nano.prepare import Prepared, for_engine, for_transformers
from operators.engine import engine_dtype

# 12 words or the longest caption (33 tokens) fit with room to spare.
MAX_TOKENS: Final = 48


class Transformers:
    """The checkpoint in transformers, float32, greedy, one request at a time.

    With `causal` a picture's patches do not see the later ones, as in vLLM on CPUs.
    """

    def __init__(self, checkpoint: Path, causal: bool = False) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self._model = Gemma4UnifiedForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32
        )
        if causal:
            self._model.config.get_text_config().use_bidirectional_attention = None

    def answer(self, request: Prepared) -> str:
        """Return the answer without special tokens."""
        inputs = for_transformers(request)
        with torch.no_grad():
            ids = self._model.generate(
                **inputs, max_new_tokens=MAX_TOKENS, do_sample=False, top_k=None, top_p=None
            )
        said: str = self._tokenizer.decode(
            ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return said


async def _ask_engine(checkpoint: Path, requests: list[Prepared], dtype: str) -> list[str]:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model=str(checkpoint),
        dtype=engine_dtype(dtype),
        max_model_len=4096,
        max_num_seqs=16,
        max_num_batched_tokens=4096,
        gpu_memory_utilization=0.1,
        enforce_eager=True,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        limit_mm_per_prompt={"image": 1, "video": 1, "audio": 1},
    )
    engine: Any = AsyncLLM.from_engine_args(arguments)
    sampling = SamplingParams(
        temperature=0.0, max_tokens=MAX_TOKENS, output_kind=RequestOutputKind.FINAL_ONLY
    )
    room = asyncio.Semaphore(32)

    async def ask(number: int, request: Prepared) -> str:
        async with room:
            text = ""
            async for output in engine.generate(for_engine(request), sampling, str(number)):
                text = output.outputs[0].text
            return text

    try:
        return await asyncio.gather(*(ask(n, r) for n, r in enumerate(requests)))
    finally:
        engine.shutdown()
        engine = None  # its clean-up at interpreter exit would find modules gone


def ask_engine(checkpoint: Path, requests: list[Prepared], dtype: str = "auto") -> list[str]:
    """Start vLLM (some 20 s), answer all requests greedily, shut it down."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    return asyncio.run(_ask_engine(checkpoint, requests, dtype))
