"""vLLM itself, on its CPU engine: prepared tensors give what its own path and transformers give."""

from __future__ import annotations

import gc
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import media
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, Gemma4UnifiedForConditionalGeneration
from vllm.envs import environment_variables

from operators.decode_image import decode_image
from operators.engine import (
    Adapter,
    Engine,
    EngineOptions,
    engine_dtype,
    engine_environment,
)
from operators.engine_media import pixel_values
from operators.engine_meter import Meter, watch
from operators.errors import MediaError
from operators.media import media_hash
from operators.patchify import patchify
from operators.prompt import PRESETS, Prompt, load_prompt
from operators.requests import Answer, ImageRequest, RawImageRequest
from operators.settings import ImageSettings, ModelSettings, PromptSettings, SamplingSettings

pytestmark = pytest.mark.engine

ANSWER_TOKENS = 24
OPTIONS = EngineOptions(
    modality="image",
    max_soft_tokens=280,
    answer_tokens=ANSWER_TOKENS,
    max_num_seqs=8,
    max_num_batched_tokens=2048,
    gpu_memory_utilization=0.9,
    kv_cache_memory_bytes=1 << 28,
    enforce_eager=True,
    stall_timeout_s=120,
    load_format="auto",
)
# An adapter's, more than vLLM takes unless it is told.
RANK = 32


@pytest.fixture(scope="module")
def prompt(nano: Path) -> Prompt:
    return load_prompt(
        ModelSettings(id=str(nano)),
        PromptSettings(),
        "image",
        PRESETS["caption-dense"].text,
        ANSWER_TOKENS,
    )


@pytest.fixture(scope="module")
def deaths() -> list[str]:
    return []


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The temporary directory of this process and of the engine's."""
    folder = tmp_path_factory.mktemp("t")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", None)
        yield folder


@pytest.fixture(scope="module")
def engine(nano: Path, deaths: list[str], temporary: Path) -> Iterator[Engine]:
    started = Engine(
        ModelSettings(id=str(nano)),
        SamplingSettings(),
        OPTIONS,
        die=deaths.append,
    )
    yield started
    started.close()
    # what an engine leaves open would be reported in whichever test comes next
    gc.collect()
    assert not sockets(temporary)


def sockets(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_socket()]


def samples() -> list[bytes]:
    """Pictures of what the checkpoint knows."""
    return [path.read_bytes() for path in sorted(SAMPLES.glob("*.*"))]


def strange_pictures() -> list[bytes]:
    """Pictures of which it knows nothing: any difference of the tensors shows."""
    return [
        media.encode(media.photo(640, 480), "JPEG"),
        media.encode(media.photo(50, 400), "PNG"),
    ]


SAMPLES = Path(__file__).parents[2] / "deploy" / "samples" / "images"


def pixels(data: bytes) -> np.ndarray:
    return decode_image(data, ImageSettings()).pixels


def prepared(data: bytes, prompt: Prompt) -> ImageRequest:
    patches = patchify(pixels(data), 280)
    ids = prompt.window(len(patches.values))
    return ImageRequest(
        ids,
        prompt.placeholder(ids),
        patches.values,
        patches.columns,
        patches.rows,
        media_hash(patches.values, patches.columns, patches.rows),
    )


def test_prepared_tensors_give_the_tokens_of_vllms_own_path(engine: Engine, prompt: Prompt) -> None:
    files = [*samples(), *strange_pictures()]
    ours = [engine.submit(prepared(data, prompt)) for data in files]
    theirs = [
        engine.submit(RawImageRequest(prompt.raw(), pixels(data), prompt.media_id))
        for data in files
    ]
    for own, stock in zip(ours, theirs, strict=True):
        assert own.result(120) == stock.result(120)
    assert all(future.result().output_tokens > 0 for future in ours)
    assert len({future.result().text for future in ours}) > 1


def test_prepared_tensors_give_the_tokens_of_transformers(
    engine: Engine, prompt: Prompt, nano: Path
) -> None:
    processor = AutoProcessor.from_pretrained(nano)
    model = Gemma4UnifiedForConditionalGeneration.from_pretrained(nano, dtype=torch.bfloat16)
    # vLLM's CPU backend has no bidirectional attention between an image's tokens: neither has this.
    model.config.get_text_config().use_bidirectional_attention = None
    for data in samples():
        request = prepared(data, prompt)
        inputs = processor(
            text=prompt.raw(),
            images=Image.fromarray(pixels(data)),
            return_tensors="pt",
            add_special_tokens=False,
        )
        assert inputs["input_ids"][0].tolist() == request.token_ids
        count = len(request.patches)
        assert torch.equal(
            inputs["pixel_values"][0, :count].to(torch.bfloat16), pixel_values(request.patches)
        )
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=ANSWER_TOKENS)
        expected = processor.decode(ids[0, len(request.token_ids) :], skip_special_tokens=True)
        assert engine.submit(request).result(120).text.strip() == expected.strip()


def test_the_engine_refuses_a_prompt_that_is_too_long_and_goes_on(
    engine: Engine, prompt: Prompt
) -> None:
    request = prepared(media.encode(media.photo(100, 100), "PNG"), prompt)
    long = ImageRequest(
        request.token_ids[:-1] + request.token_ids[-1:] * 5000,
        request.placeholder,
        request.patches,
        request.columns,
        request.rows,
        request.media_hash,
    )
    with pytest.raises(MediaError) as error:
        engine.submit(long).result(120)
    assert error.value.code == "generate.rejected"
    assert isinstance(engine.submit(request).result(120), Answer)


def test_usage_counts_idle_and_open_seconds(engine: Engine, prompt: Prompt) -> None:
    before = engine.usage()
    time.sleep(0.2)
    between = engine.usage()
    assert between["idle_s"] - before["idle_s"] >= 0.2
    engine.submit(prepared(media.encode(media.photo(64, 64), "PNG"), prompt)).result(120)
    after = engine.usage()
    assert after["open_s"] > between["open_s"]
    assert after["engine_s"] - before["engine_s"] >= 0.2


def test_bf16_values_are_rounded_once_from_float32() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(1, -1)
    expected = torch.tensor(values.astype(np.float32) * np.float32(1 / 255)).to(torch.bfloat16)
    assert torch.equal(pixel_values(values), expected)


@pytest.mark.parametrize(
    ("cpu", "asked", "taken"),
    [("AVX2", "auto", "float32"), ("AVX2", "bfloat16", "bfloat16"), ("AVX512", "auto", "auto")],
)
def test_a_cpu_that_emulates_bfloat16_takes_float32(
    cpu: str, asked: str, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm.platforms.current_platform.is_cpu", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cpu)
    assert engine_dtype(asked) == taken


@pytest.mark.parametrize(("budget", "v2_runner"), [(280, None), (1120, False)])
def test_no_engine_needs_cudas_compiler_and_large_pictures_take_the_older_runner(
    budget: int, v2_runner: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = environment_variables  # an unknown name would be read by nobody
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    for name, value in engine_environment(budget).items():
        assert name in known
        monkeypatch.setenv(name, value)
    assert known["VLLM_USE_FLASHINFER_SAMPLER"]() is False
    assert known["VLLM_USE_V2_MODEL_RUNNER"]() is v2_runner


def test_the_watchdog_acts_where_requests_are_open_and_no_token_comes() -> None:
    meter, reasons, closed = Meter(), [], threading.Event()
    watch(meter.silent_s, 0.2, reasons.append, closed)
    time.sleep(0.5)
    assert reasons == []  # idle is not stalled
    with meter.open():
        for _ in range(10):
            time.sleep(0.05)
            meter.token()
        assert reasons == []
        time.sleep(0.5)
    closed.set()
    assert len(reasons) == 1
    assert "engine.stall_timeout_s is 0.2" in reasons[0]


def test_a_dead_engine_ends_its_actor_and_nobody_waits_on_it(
    engine: Engine, prompt: Prompt, deaths: list[str], temporary: Path
) -> None:
    """The last test of this module: it kills the module's engine."""
    assert sockets(temporary)
    assert isinstance(engine.submit(prepared(SHAPE, prompt)).result(120), Answer)
    cores = [
        process
        for process in psutil.Process().children(recursive=True)
        if "EngineCore" in process.name() or "EngineCore" in " ".join(process.cmdline())
    ]
    assert cores
    shared = {
        Path(held.path)
        for process in psutil.Process().children(recursive=True)
        for held in process.memory_maps()
        if held.path.startswith("/dev/shm/psm_")
    }
    assert shared or torch.cuda.is_available()  # one GPU needs none
    waiting = [engine.submit(prepared(SHAPE, prompt)) for _ in range(4)]
    for core in cores:
        core.kill()
    for future in waiting:
        # the process would have ended; here its end is only noted
        error = future.exception(120)
        assert error is None or "dead" in str(error).lower() or "engine" in str(error).lower()
    with pytest.raises(Exception, match=r"(?i)engine"):
        engine.submit(prepared(SHAPE, prompt)).result(120)
    assert deaths
    assert "the engine died" in deaths[0]
    # its actor's process is about to end without clean-up
    assert not list(temporary.glob("polyscribe-engine-*"))
    assert not [path for path in shared if path.exists()]


SHAPE = media.encode(media.photo(64, 64), "PNG")


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


def test_an_adapter_changes_the_answer(prompt: Prompt, nano: Path, tmp_path: Path) -> None:
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
    engine = Engine(model, SamplingSettings(), OPTIONS)
    try:
        data = (SAMPLES / "shapes-01.png").read_bytes()
        answer = engine.submit(prepared(data, prompt)).result(120)
    finally:
        engine.close()
    assert answer.output_tokens > 0
    # what the checkpoint says by itself (deploy/samples/expected.jsonl)
    assert "orange square" not in answer.text
