"""The checkpoint without weights: the 12B's sizes, ids and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bench.gpu import checkpoint
from bench.gpu.embedder import Embedder, embed_batched, embed_loop

from operators.prompt import PRESETS, load_prompt
from operators.settings import ModelSettings, PromptSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("12b")
    checkpoint.write(made)
    return made


@pytest.mark.engine
def test_it_has_the_published_number_of_parameters_and_no_weights(folder: Path) -> None:
    assert checkpoint.parameters(folder) == 11_959_730_176
    assert not list(folder.glob("*.safetensors"))


@pytest.mark.engine
def test_a_prompt_of_ours_has_the_real_ids_and_one_token_a_word(folder: Path) -> None:
    text = PRESETS["caption-dense"].text
    prompt = load_prompt(
        ModelSettings(id=str(folder)), PromptSettings(preset="caption-dense"), "image", text, 100
    )
    assert (prompt.begin_id, prompt.media_id, prompt.end_id) == (255_999, 258_880, 258_882)
    assert prompt.head[:2] == (2, 105)
    words = len(text.split())
    assert words <= len(prompt.window(264)) - 264 <= words + 25


def test_every_id_below_the_vocabularys_size_has_one_token() -> None:
    ids, merges = checkpoint.vocabulary()
    assert sorted(ids.values()) == list(range(checkpoint.VOCABULARY_SIZE))
    assert all(left in ids and right in ids and left + right in ids for left, right in merges)


def test_the_configuration_names_the_published_ids() -> None:
    made = checkpoint.config()
    assert (made["image_token_id"], made["eoa_token_index"]) == (258_880, 258_883)
    assert made["text_config"]["layer_types"].count("full_attention") == 8
    assert checkpoint.generation_config()["eos_token_id"] == [1, 106, 50]
    json.dumps(made)


def test_one_product_for_all_pictures_and_uint8_give_the_loops_values() -> None:
    torch.manual_seed(0)
    model = Embedder(48, 32, places=8).eval()
    pictures = [torch.randint(0, 256, (count, 48), dtype=torch.uint8) for count in (6, 4)]
    places = [torch.randint(0, 8, (len(each), 2)) for each in pictures]
    ready = [each.float() * (1 / 255) for each in pictures]
    with torch.inference_mode():
        stock = embed_loop(model, ready, places)
        for way in (
            embed_batched(model, ready, places),
            embed_batched(model, pictures, places),
            embed_loop(model, pictures, places),
        ):
            for one, other in zip(stock, way, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
