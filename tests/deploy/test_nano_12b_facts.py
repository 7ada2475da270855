"""What the project assumes of the 12B, checked on meta tensors: no weights are needed for it."""

from collections.abc import Iterator

import pytest
import torch
from bench.gpu.checkpoint import AUDIO, TEXT, VISION
from transformers import Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration

from operators.patchify import tokens

# Width, height: tokens at 70, 140, 280, 560 and 1120.
TOKENS = {
    (1920, 1080): (66, 120, 264, 527, 1100),
    (640, 480): (63, 130, 266, 540, 1064),
    (512, 512): (64, 121, 256, 529, 1089),
}


@pytest.fixture(scope="module")
def model() -> Iterator[Gemma4UnifiedForConditionalGeneration]:
    config = Gemma4UnifiedConfig(
        text_config=TEXT | {"tie_word_embeddings": True}, vision_config=VISION, audio_config=AUDIO
    )
    with torch.device("meta"):
        yield Gemma4UnifiedForConditionalGeneration(config)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_in_all(model: Gemma4UnifiedForConditionalGeneration) -> None:
    assert round(count(model) / 1e9, 2) == 11.96


def test_five_sliding_layers_then_a_full_one(model: Gemma4UnifiedForConditionalGeneration) -> None:
    kinds = model.config.text_config.layer_types
    assert kinds == (["sliding_attention"] * 5 + ["full_attention"]) * 8


def test_vision_embedder_is_35_million_parameters_before_the_last_projection(
    model: Gemma4UnifiedForConditionalGeneration,
) -> None:
    vision = model.model.embed_vision
    projection = count(vision.multimodal_embedder)
    assert projection == 3840 * 3840
    assert round((count(vision) - projection) / 1e6) == 35


def test_shapes_of_the_projections(model: Gemma4UnifiedForConditionalGeneration) -> None:
    vision, audio = model.model.embed_vision, model.model.embed_audio
    assert tuple(vision.patch_dense.weight.shape) == (3840, 48 * 48 * 3)
    assert tuple(vision.pos_embedding.shape) == (1120, 2, 3840)
    assert tuple(audio.embedding_projection.weight.shape) == (3840, 640)


def test_attention_of_the_two_kinds(model: Gemma4UnifiedForConditionalGeneration) -> None:
    sliding, full = (model.model.language_model.layers[index].self_attn for index in (0, 5))
    assert tuple(sliding.k_proj.weight.shape) == (8 * 256, 3840)
    assert tuple(full.k_proj.weight.shape) == (512, 3840)
    assert full.v_proj is None


@pytest.mark.parametrize("size", TOKENS)
def test_tokens_of_an_image(size: tuple[int, int]) -> None:
    width, height = size
    budgets = (70, 140, 280, 560, 1120)
    assert tuple(tokens(height, width, budget) for budget in budgets) == TOKENS[size]
