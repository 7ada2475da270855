"""A LoRA adapter in vLLM: it answers, and one that cannot be used says so before the engine starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from operators.decode_image import decode_image
from operators.engine import Adapter, Engine, EngineOptions
from operators.media import media_hash
from operators.patchify import patchify
from operators.prompt import PRESETS, load_prompt
from operators.requests import ImageRequest
from operators.settings import ImageSettings, ModelSettings, PromptSettings, SamplingSettings

SAMPLES = Path(__file__).parents[2] / "deploy" / "samples"
# more than vLLM takes unless it is told
RANK = 32


def config(folder: Path, **fields: object) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return str(folder)


def test_the_rank_is_the_adapters(tmp_path: Path) -> None:
    assert Adapter.find(config(tmp_path, r=8)).max_rank == 8
    assert Adapter.find(config(tmp_path, r=8, rank_pattern={"down_proj": 40})).max_rank == 64
    with pytest.raises(ValueError, match=r"model\.adapter: rank 600; at most 512 is allowed"):
        Adapter.find(config(tmp_path, r=600))


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"r": "many"}'])
def test_what_is_no_adapter_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"model\.adapter: {tmp_path} is no LoRA adapter"):
        Adapter.find(str(tmp_path))


@pytest.mark.engine
def test_an_adapter_changes_the_answer(nano: Path, tmp_path: Path) -> None:
    weights = load_file(nano / "model.safetensors")
    torch.manual_seed(0)
    adapter = {}
    for name, weight in weights.items():
        if name.endswith("mlp.down_proj.weight"):
            place = f"base_model.model.{name.removesuffix('.weight')}"
            adapter[f"{place}.lora_A.weight"] = torch.randn(RANK, weight.shape[1]) * 0.1
            adapter[f"{place}.lora_B.weight"] = torch.randn(weight.shape[0], RANK) * 0.5
    folder = config(
        tmp_path, peft_type="LORA", r=RANK, lora_alpha=RANK, target_modules=["down_proj"]
    )
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    model = ModelSettings(id=str(nano), adapter=folder)
    options = EngineOptions(
        modality="image",
        max_soft_tokens=280,
        answer_tokens=24,
        max_num_seqs=8,
        max_num_batched_tokens=2048,
        gpu_memory_utilization=0.9,
        kv_cache_memory_bytes=1 << 28,
        enforce_eager=True,
        stall_timeout_s=120,
        load_format="auto",
    )
    engine = Engine(model, SamplingSettings(), options)
    try:
        prompt = load_prompt(model, PromptSettings(), "image", PRESETS["caption-dense"].text, 24)
        file = SAMPLES / "images" / "shapes-01.png"
        patches = patchify(decode_image(file.read_bytes(), ImageSettings()).pixels, 280)
        ids = prompt.window(len(patches.values))
        digest = media_hash(patches.values, patches.columns, patches.rows)
        request = ImageRequest(
            ids, prompt.placeholder(ids), patches.values, patches.columns, patches.rows, digest
        )
        answer = engine.submit(request).result(120)
    finally:
        engine.close()
    assert answer.output_tokens > 0
    # what the checkpoint says by itself (deploy/samples/expected.jsonl)
    assert "orange square" not in answer.text
