"""The structured start: what the first layers would have to find out anyway is written in.

* Patches: the projection is a low-frequency DCT of luma and two colour differences, position
  tables are waves. The DCT stays frozen, so training may store 160 features a patch instead of
  6912 values.
* Audio: the projection is a bank of windowed cosine/sine pairs, and the first layer's gated MLP
  forms their squares: gelu(x) x + gelu(-x) (-x) = x^2, so band energies exist at step 0.
* q/k norms start at d^-1/4: Gemma 4 has no 1/sqrt(d), so logits of unit spread need it.
"""

import math
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Gemma4UnifiedForConditionalGeneration

from deploy.nano.model import HIDDEN, PATCH_FEATURES
from deploy.nano.words import SPOKEN

PATCH_PX: Final = 48
FRAME_SAMPLES: Final = 640
_SAMPLE_RATE_HZ: Final = 16_000
_LUMA_ORDER: Final = 12
_CHROMA_ORDER: Final = 6
# Dims of the patch features that no DCT coefficient uses: one constant, twelve for positions.
_SPARE: Final = 13
_POSITION_PERIODS: Final = (36.0, 13.0, 5.0)
_FULL_FRAME_FILTERS: Final = 16
_HALF_FRAME_FILTERS: Final = 32


def patch_projection() -> tuple[Tensor, Tensor]:
    """Return weight [160, 6912] and bias [160] of the patch projection, rounded to bf16.

    A patch's values are ordered (row, column, channel).
    """
    n = PATCH_PX
    k, i = torch.arange(n)[:, None], torch.arange(n)[None, :]
    dct = torch.cos(math.pi * (i + 0.5) * k / n) * math.sqrt(2 / n)
    dct[0] /= math.sqrt(2)
    colours = {
        "luma": torch.tensor([1.0, 1.0, 1.0]) / math.sqrt(3),
        "red_green": torch.tensor([1.0, -1.0, 0.0]) / math.sqrt(2),
        "yellow_blue": torch.tensor([1.0, 1.0, -2.0]) / math.sqrt(6),
    }
    rows = []
    for name, mix in colours.items():
        order = _LUMA_ORDER if name == "luma" else _CHROMA_ORDER
        for v in range(order + 1):
            for u in range(order + 1 - v):
                if name == "luma" and u == v == 0:
                    continue  # the layer norm before has removed the mean
                # Edges fall off with frequency; lift them so that shapes count beside hue.
                gain = (1 + u + v) ** 0.7
                wave = dct[v][:, None, None] * dct[u][None, :, None] * mix
                rows.append((gain * wave).reshape(-1))
    # 0.5: measured feature spread on generated pictures is then near 1.
    basis = torch.stack(rows) * 0.5 * math.sqrt(PATCH_FEATURES / (n * n * 3))
    if len(basis) + _SPARE > PATCH_FEATURES:
        raise ValueError(f"{len(basis)} coefficients leave no room in {PATCH_FEATURES}")
    weight = torch.zeros(PATCH_FEATURES, n * n * 3)
    weight[: len(basis)] = basis
    bias = torch.zeros(PATCH_FEATURES)
    bias[-1] = 1.0
    return weight.bfloat16().float(), bias


def audio_filters() -> Tensor:
    """Return cosine/sine pairs [2 * 80, 640], each of unit norm, ordered cos, sin, cos, sin.

    16 filters over the whole frame below 900 Hz, then 32 mel-spaced ones over each half frame.
    """
    time = torch.arange(FRAME_SAMPLES) / _SAMPLE_RATE_HZ
    rows = []

    def pair(window: Tensor, hz: float) -> None:
        for wave in (torch.cos, torch.sin):
            row = window * wave(2 * math.pi * hz * time)
            rows.append(row / row.norm())

    whole = torch.hann_window(FRAME_SAMPLES)
    for index in range(_FULL_FRAME_FILTERS):
        pair(whole, 120.0 + index * 780.0 / (_FULL_FRAME_FILTERS - 1))
    half = FRAME_SAMPLES // 2
    mel = np.linspace(_to_mel(900.0), _to_mel(7200.0), _HALF_FRAME_FILTERS)
    for first in (0, half):
        window = torch.zeros(FRAME_SAMPLES)
        window[first : first + half] = torch.hann_window(half)
        for hz in _to_hz(mel):
            pair(window, float(hz))
    return torch.stack(rows)


def _to_mel(hz: float) -> float:
    return 2595.0 * math.log10(1 + hz / 700.0)


def _to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    return 700.0 * (10 ** (mel / 2595.0) - 1)


@torch.no_grad()
def apply(model: Gemma4UnifiedForConditionalGeneration) -> None:
    """Write the structured start into a fresh float32 model, in place."""
    inner = model.model
    text = inner.language_model
    _start_text(text)

    vision = inner.embed_vision
    weight, bias = patch_projection()
    vision.patch_dense.weight.copy_(weight)
    vision.patch_dense.bias.copy_(bias)
    vision.patch_ln1.weight.fill_(1.0)
    vision.patch_ln1.bias.zero_()
    positions = vision.pos_embedding
    positions.normal_(0, 0.02)
    steps = torch.arange(positions.shape[0])
    for axis in range(2):
        for index, period in enumerate(_POSITION_PERIODS):
            angle = 2 * math.pi * steps / period
            column = PATCH_FEATURES - _SPARE + axis * 6 + 2 * index
            positions[:, axis, column] = 1.5 * torch.cos(angle)
            positions[:, axis, column + 1] = 1.5 * torch.sin(angle)
    projection = vision.multimodal_embedder.embedding_projection.weight
    torch.nn.init.orthogonal_(projection, gain=math.sqrt(HIDDEN / PATCH_FEATURES))

    filters = audio_filters()
    audio = inner.embed_audio.embedding_projection.weight
    audio.normal_(0, 0.002)
    audio[: len(filters)] += filters
    _start_energies(text.layers[0].mlp, len(filters))


def _start_text(text: torch.nn.Module) -> None:
    """Scale norms and embeddings so that logits and residual updates start at a useful size."""
    for layer in text.layers:
        attention = layer.self_attn
        attention.q_norm.weight.fill_(attention.head_dim**-0.25)
        attention.k_norm.weight.fill_(attention.head_dim**-0.25)
        layer.post_attention_layernorm.weight.fill_(0.6)
        layer.post_feedforward_layernorm.weight.fill_(0.6)
        for name, matrix in layer.named_parameters():
            if matrix.ndim == 2 and "proj" in name:
                matrix.normal_(0, matrix.shape[1] ** -0.5)
    text.layers[0].post_attention_layernorm.weight.fill_(0.15)
    text.layers[0].post_feedforward_layernorm.weight.fill_(1.0)
    text.norm.weight.fill_(1.0)
    # Rows of unit norm: times sqrt(hidden) they enter the model at unit spread.
    text.embed_tokens.weight.normal_(0, HIDDEN**-0.5)


def _start_energies(mlp: torch.nn.Module, filter_rows: int) -> None:
    """Set the first units of the first MLP to square each filter and add its pair up."""
    for row in range(filter_rows):
        for sign in (0, 1):
            unit = 2 * row + sign
            mlp.gate_proj.weight[unit].zero_()
            mlp.up_proj.weight[unit].zero_()
            mlp.gate_proj.weight[unit, row] = 1.0 - 2.0 * sign
            mlp.up_proj.weight[unit, row] = 1.0 - 2.0 * sign
            mlp.down_proj.weight[:, unit].zero_()
            mlp.down_proj.weight[filter_rows + row // 2, unit] = 1.0
    mlp.down_proj.weight[:, 2 * filter_rows :] *= 0.3


def share_word_rows(embedding: Tensor, token_ids: dict[str, int]) -> None:
    """Start "word" and "▁word" from the same row, in place."""
    with torch.no_grad():
        for token, index in token_ids.items():
            spaced = token_ids.get(f"▁{token}")
            if spaced is not None and (token in SPOKEN or len(token) > 1):
                embedding[spaced] = 0.9 * embedding[index] + 0.44 * embedding[spaced]
