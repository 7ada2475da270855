"""What the 12B must do at least: FLOPs and bytes counted from its configuration. Pure arithmetic.

A step of the engine cannot be quicker than its FLOPs at the machine's matrix rate, nor than its bytes at
the machine's bandwidth; `Machine` holds both as measured by device.py. Counted are the matrix products
(two FLOPs a parameter and token), attention's two products, and as bytes each weight once a step and each
sequence's keys and values once a step. Norms, activations and positions are left out: below 1 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BF16_BYTES = 2


@dataclass(frozen=True)
class Machine:
    """flops_s: FLOP/s of a large bf16 product. bytes_s: bytes read or written a second."""

    flops_s: float
    bytes_s: float


@dataclass(frozen=True)
class Layers:
    """`count` equal layers. `window`: how many keys a token sees; None: all before it."""

    count: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    # keys serve as values: one projection less
    shared_kv: bool


@dataclass(frozen=True)
class Model:
    """The sizes that count, in elements."""

    hidden: int
    feed_forward: int
    vocabulary: int
    patch_values: int
    patch_features: int
    layers: tuple[Layers, ...]

    @property
    def layer_parameters(self) -> int:
        """Parameters of all layers' matrices: what each token of a prompt and an answer goes through."""
        return sum(
            each.count
            * (
                2 * self.hidden * each.heads * each.head_dim
                + (1 if each.shared_kv else 2) * self.hidden * each.kv_heads * each.head_dim
                + 3 * self.hidden * self.feed_forward
            )
            for each in self.layers
        )

    @property
    def head_parameters(self) -> int:
        """Parameters of the output matrix, which is the tied embedding."""
        return self.hidden * self.vocabulary

    @property
    def embedder_parameters(self) -> int:
        """Parameters of the two matrices that each patch goes through."""
        return self.patch_values * self.patch_features + self.patch_features * self.hidden


def model_of(config: dict[str, Any]) -> Model:
    """The sizes in a config.json of Gemma 4 Unified, in the published form or in transformers' own."""
    text, vision = config["text_config"], config["vision_config"]
    full = text["layer_types"].count("full_attention")
    overrides: dict[str, Any] = next(iter(text.get("per_layer_config", {}).values()), {})
    kv_heads = text["num_key_value_heads"]
    return Model(
        hidden=text["hidden_size"],
        feed_forward=text["intermediate_size"],
        vocabulary=text["vocab_size"],
        patch_values=3 * (vision["patch_size"] * vision["pooling_kernel_size"]) ** 2,
        patch_features=vision["mm_embed_dim"],
        layers=(
            Layers(
                count=len(text["layer_types"]) - full,
                heads=text["num_attention_heads"],
                kv_heads=kv_heads,
                head_dim=text["head_dim"],
                window=text["sliding_window"],
                shared_kv=False,
            ),
            Layers(
                count=full,
                heads=text["num_attention_heads"],
                kv_heads=text.get("num_global_key_value_heads")
                or overrides.get("num_key_value_heads", kv_heads),
                head_dim=text.get("global_head_dim") or overrides.get("head_dim", 512),
                window=None,
                shared_kv=text["attention_k_eq_v"],
            ),
        ),
    )


def seen(tokens: int, window: int | None) -> int:
    """Keys that the `tokens` of a prompt see together, each itself and those before it."""
    full = tokens if window is None else min(tokens, window)
    return full * (full + 1) // 2 + (tokens - full) * full


def prefill_flops(model: Model, tokens: int, patches: int = 0) -> float:
    """FLOPs of one prompt up to its first sampled token."""
    attention = sum(
        4 * each.count * each.heads * each.head_dim * seen(tokens, each.window)
        for each in model.layers
    )
    matrices = tokens * model.layer_parameters + patches * model.embedder_parameters
    return float(2 * (matrices + model.head_parameters) + attention)


def kv_bytes(model: Model, context: int) -> int:
    """Bytes of keys and values of one sequence, as vLLM stores them (both, also where they are equal)."""
    return sum(
        2
        * BF16_BYTES
        * each.count
        * each.kv_heads
        * each.head_dim
        * (context if each.window is None else min(context, each.window))
        for each in model.layers
    )


def decode_flops(model: Model, context: int) -> float:
    """FLOPs of one sequence's next token."""
    attention = sum(
        4
        * each.count
        * each.heads
        * each.head_dim
        * (context if each.window is None else min(context, each.window))
        for each in model.layers
    )
    return float(2 * (model.layer_parameters + model.head_parameters) + attention)


def decode_step_s(
    model: Model, machine: Machine, sequences: int, context: int, weight_bytes: float = BF16_BYTES
) -> float:
    """Seconds of one step that gives each of `sequences` a token, at least."""
    weights = (model.layer_parameters * weight_bytes) + model.head_parameters * BF16_BYTES
    moved = weights + sequences * kv_bytes(model, context)
    return max(moved / machine.bytes_s, sequences * decode_flops(model, context) / machine.flops_s)


def item_s(
    model: Model,
    machine: Machine,
    prompt_tokens: int,
    patches: int,
    output_tokens: int,
    sequences: int,
) -> float:
    """Seconds of the machine that one item takes at least, where `sequences` are decoded together."""
    prefill = prefill_flops(model, prompt_tokens, patches) / machine.flops_s
    context = prompt_tokens + output_tokens // 2
    step = decode_step_s(model, machine, sequences, context)
    return prefill + (output_tokens - 1) * step / sequences
