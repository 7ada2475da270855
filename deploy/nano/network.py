"""The training forward pass: the checkpoint's own modules, with branch masks and extra heads.

The heads (what lies in this patch, which word has just ended) shape the middle layers and are
thrown away after training.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Gemma4UnifiedForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma4_unified.modeling_gemma4_unified import apply_rotary_pos_emb

from deploy.nano.batches import (
    EVENT_CLASSES,
    FRAME_CLASSES,
    PATCH_CLASSES,
    PATCH_NUMBERS,
    SECOND_CLASSES,
)
from deploy.nano.model import HIDDEN
from deploy.nano.tokenizer import ID

Tensors = dict[str, Tensor]
# Hidden states after this many layers feed the heads.
_HEAD_LAYER: Final = {
    "colour": 2,
    "shape": 2,
    "order": 4,
    "word": 3,
    "frame_order": 5,
    "event": 4,
    "second": 3,
    "place": 3,
    "moved": 4,
}
# A frame's second is one of 60, and copied from before the picture: it has to be asked for louder.
_HEAD_WEIGHT: Final = {"second": 5.0, "place": 3.0, "moved": 3.0}
# Under any score, and finite: a row of padding may attend to nothing at all.
_MASKED: Final = -3e4
# Queries of a block: fewer make products slow, more see more masked keys.
_QUERIES: Final = 256


@dataclass(frozen=True)
class Seen:
    """What may be attended to: `mask` [b, queries, keys], True for yes, and its blocks.

    A block is (first query, end of queries, first key, end of keys) that any of them sees in any row.
    """

    mask: Tensor
    blocks: tuple[tuple[int, int, int, int], ...]


def cut(mask: Tensor) -> Seen:
    """Cut the queries into blocks; on a GPU all are one."""
    length = mask.shape[1]
    size = _QUERIES if mask.device.type == "cpu" else length
    any_row = mask.any(0)
    blocks = []
    for begin in range(0, length, size):
        keys = any_row[begin : begin + size].any(0).nonzero()[:, 0]
        low, high = (int(keys[0]), int(keys[-1]) + 1) if len(keys) else (0, 1)
        blocks.append((begin, min(begin + size, length), low, high))
    return Seen(mask, tuple(blocks))


def narrowed(seen: Seen, asked: Tensor) -> tuple[Seen, Tensor]:
    """Keep the queries that are asked, [b, t], as few to a row as the row with most of them has.

    Returns what they see and the place of each in b * queries.
    """
    order = asked.cumsum(1) - 1
    queries = int(order.max()) + 1
    rows, length = asked.shape
    row = torch.arange(rows, device=asked.device)[:, None]
    places = (row * queries + order)[asked]
    mask = seen.mask.new_zeros(rows * queries, length)
    mask[places] = seen.mask[asked]
    return cut(mask.view(rows, queries, length)), places


def masks(batch: Tensors, bidirectional: bool, window: int) -> tuple[Seen, Seen]:
    """Return what (full, sliding) layers see.

    Full layers are causal. Sliding ones also see the whole picture they are in, as transformers
    and vLLM on GPUs do, or not, as vLLM on CPUs does: `bidirectional` chooses.
    """
    branch, position, block = batch["branch"], batch["position"], batch["block"]
    length = branch.shape[1]
    index = torch.arange(length, device=branch.device)
    causal = index[:, None] >= index[None, :]
    same = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    full = causal & same
    sliding = full
    if bidirectional:
        sliding = full | ((block[:, None, :] == block[:, :, None]) & (block[:, :, None] >= 0))
    if length > window:
        sliding = sliding & ((position[:, :, None] - position[:, None, :]).abs() < window)
    seen = cut(full)
    return seen, seen if sliding is full else cut(sliding)


class Blocks(torch.autograd.Function):
    """Attention in blocks of queries, each over the keys that it may see at all.

    `query` is [b, queries * heads, d], `key` and `value` are [b, keys, d] for all heads; returns
    [b, queries * heads, d]. Half of a whole product of long clips would be masked.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        query: Tensor,
        key: Tensor,
        value: Tensor,
        seen: Seen,
    ) -> Tensor:
        rows, length, _ = seen.mask.shape
        heads = query.shape[1] // length
        out = torch.empty_like(query)
        shares = []
        for begin, end, low, high in seen.blocks:
            here = slice(begin * heads, end * heads)
            scores = torch.bmm(query[:, here], key[:, low:high].transpose(1, 2))
            hidden = ~seen.mask[:, begin:end, None, low:high]
            scores.view(rows, end - begin, heads, -1).masked_fill_(hidden, _MASKED)
            shares.append(torch.softmax(scores, -1))
            out[:, here] = torch.bmm(shares[-1], value[:, low:high])
        ctx.seen, ctx.heads = seen, heads
        ctx.save_for_backward(query, key, value, *shares)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # noqa: ANN401
        query, key, value, *shares = ctx.saved_tensors
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros_like(each, dtype=torch.float32) for each in (key, value))
        for (begin, end, low, high), share in zip(ctx.seen.blocks, shares, strict=True):
            here = slice(begin * ctx.heads, end * ctx.heads)
            arrived = gradient[:, here]
            of_share = torch.bmm(arrived, value[:, low:high].transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_share, share, -1, share.dtype)
            of_query[:, here] = torch.bmm(of_scores, key[:, low:high])
            of_key[:, low:high] += torch.bmm(of_scores.transpose(1, 2), query[:, here])
            of_value[:, low:high] += torch.bmm(share.transpose(1, 2), arrived)
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None


@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: tuple[Seen, Tensor, Tensor],
    dropout: float = 0.0,
    scaling: float = 1.0,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention of packed sequences, in the form transformers calls.

    `query` is [1, heads, n, d], `key` and `value` are [1, 1, m, d] with the tokens of all sequences
    and no padding; `attention_mask` is (what is seen, place of each query in b * queries, place of
    each key in b * keys). The one key head meets all query heads in a single product. Returns
    [1, n, heads, d].
    """
    seen, asking, held = attention_mask
    rows, queries, keys = seen.mask.shape
    heads, size = query.shape[1], query.shape[3]
    on = query.device.type
    kind = torch.get_autocast_dtype(on) if torch.is_autocast_enabled(on) else query.dtype

    def spread(packed: Tensor, places: Tensor, length: int) -> Tensor:
        tokens = packed[0].transpose(0, 1).flatten(1).to(kind)
        padded = tokens.new_zeros(rows * length, tokens.shape[1])
        return padded.index_copy(0, places, tokens).view(rows, -1, size)

    with torch.autocast(on, enabled=False):
        out = Blocks.apply(
            spread(query * scaling, asking, queries),
            spread(key, held, keys),
            spread(value, held, keys),
            seen,
        )
    return out.view(rows * queries, heads, size)[asking][None], None


ALL_ATTENTION_FUNCTIONS.register("packed", packed_attention)


class Trainee(nn.Module):
    """The model, its auxiliary heads and the loss of one micro-batch."""

    def __init__(self, model: Gemma4UnifiedForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        text = model.model.language_model
        text.config._attn_implementation = "packed"
        # Full layers use keys as values; the last one is given both (see `_last`), by no other layer.
        text.layers[-1].self_attn.is_kv_shared_layer = True
        for layer in text.layers:
            layer.self_attn.store_full_length_kv = False
        classes = {"frame_order": FRAME_CLASSES["order"], "word": FRAME_CLASSES["word"]}
        classes |= PATCH_CLASSES | {"event": EVENT_CLASSES, "second": SECOND_CLASSES}
        classes |= dict.fromkeys(PATCH_NUMBERS, 2)
        self.heads = nn.ModuleDict({k: nn.Linear(HIDDEN, n) for k, n in classes.items()})

    def _embed(self, batch: Tensors) -> tuple[Tensor, Tensor]:
        """Return inputs [b, t, hidden] and the mask of media places [b, t]."""
        inner = self.model.model
        ids = batch["ids"]
        if "frames" in batch:
            places = ids == ID["<|audio|>"]
            media = inner.embed_audio(inputs_embeds=batch["frames"])
        else:
            places = (ids == ID["<|image|>"]) | (ids == ID["<|video|>"])
            vision = inner.embed_vision
            # `features` are past the frozen layer norm and projection (see start.py).
            hidden = vision.patch_ln2(batch["features"].float())
            table = vision.pos_embedding
            hidden = hidden + table[batch["xy"][:, 0], 0] + table[batch["xy"][:, 1], 1]
            media = vision.multimodal_embedder(vision.pos_norm(hidden))
        embedded = inner.get_input_embeddings()(ids.masked_fill(places, ID["<pad>"]))
        embedded = embedded.masked_scatter(places[..., None], media.to(embedded.dtype))
        return embedded, places

    def forward(self, batch: Tensors, bidirectional: bool) -> Tensors:
        """Return {"loss": to minimise, "answer": cross-entropy, "right": share of tokens}."""
        embedded, places = self._embed(batch)
        text = self.model.model.language_model
        full, sliding = masks(batch, bidirectional, text.config.sliding_window)
        # Not `text(...)`: its wrapper collects outputs through hooks, these lines are its body.
        # Padding is left out of all but attention: a third of the tokens of spoken windows.
        held = batch["branch"] >= 0
        spots = held.flatten().nonzero()[:, 0]
        hidden = embedded[held][None]
        position = batch["position"][held][None]
        rotary = {k: text.rotary_emb(hidden, position, k) for k in text.unique_layer_types}
        attention = {
            "full_attention": (full, spots, spots),
            "sliding_attention": (sliding, spots, spots),
        }
        states = [hidden]
        # Never read, but of the form that the last layer is given: where a layer is compiled anew, torch
        # looks why the code of the others does not fit, and fails where it finds nothing.
        unshared = dict.fromkeys(text.unique_layer_types, (None, None))
        for layer, kind in zip(text.layers[:-1], text.config.layer_types[:-1], strict=True):
            hidden = layer(
                hidden,
                shared_kv_states=unshared,
                position_embeddings=rotary[kind],
                attention_mask=attention[kind],
            )
            states.append(hidden)
        asked = batch["target"] >= 0
        hidden = self._last(hidden, rotary, full, spots, asked)
        logits = self.model.lm_head(text.norm(hidden[0]))
        cap = text.config.final_logit_softcapping
        logits = cap * torch.tanh(logits.float() / cap)
        target = batch["target"][asked]
        answer = functional.cross_entropy(logits, target)
        auxiliary = self._auxiliary(batch, states, places[held])
        return {
            "loss": batch["weight"] * (answer + batch["auxiliary_weight"] * auxiliary),
            "answer": answer.detach(),
            "auxiliary": auxiliary.detach(),
            "right": (logits.argmax(-1) == target).float().mean(),
        }

    def _last(
        self,
        hidden: Tensor,
        rotary: dict[str, tuple[Tensor, Tensor]],
        full: Seen,
        spots: Tensor,
        asked: Tensor,
    ) -> Tensor:
        """Return the last layer's output [1, n, hidden] where an answer is asked for, and nowhere else.

        Nothing reads the rest, which is nine of ten tokens: it only gives them keys and values.
        """
        text = self.model.model.language_model
        layer, kind = text.layers[-1], text.config.layer_types[-1]
        attention = layer.self_attn
        cos, sin = rotary[kind]
        shared = attention.k_proj(layer.input_layernorm(hidden)).unflatten(-1, (1, -1))
        key = apply_rotary_pos_emb(attention.k_norm(shared), cos, sin, unsqueeze_dim=2)
        value = attention.v_norm(shared)
        chosen = asked.flatten()[spots]
        seen, places = narrowed(full, asked)
        out: Tensor = layer(
            hidden[:, chosen],
            shared_kv_states={kind: (key.transpose(1, 2), value.transpose(1, 2))},
            position_embeddings=(cos[:, chosen], sin[:, chosen]),
            attention_mask=(seen, places, spots),
        )
        return out

    def _auxiliary(self, batch: Tensors, states: list[Tensor], places: Tensor) -> Tensor:
        vision = (*PATCH_CLASSES, "event", "second", *PATCH_NUMBERS)
        pairs = [(k, k) for k in vision if f"label_{k}" in batch]
        if "frames" in batch:
            pairs = [("word", "word"), ("frame_order", "order")]
        total = torch.zeros((), device=places.device)
        for head, label in pairs:
            state = states[_HEAD_LAYER[head]][0, places]
            scale = state.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()
            asked = self.heads[head](state * scale).float()
            labels = batch[f"label_{label}"]
            if head in PATCH_NUMBERS:
                known = ~labels[:, 0].isnan()
                # Of none the mean would be NaN.
                loss = functional.smooth_l1_loss(
                    asked[known], labels[known], reduction="sum", beta=0.25
                ) / known.sum().mul(2).clamp(min=1)
            else:
                weight = torch.ones(asked.shape[-1], device=asked.device)
                if head != "second":
                    # Empty patches and frames are many; they weigh a tenth each.
                    weight[0] = 0.1
                loss = functional.cross_entropy(asked, labels, weight=weight, ignore_index=-1)
            total = total + _HEAD_WEIGHT.get(head, 1.0) * loss
        return total
