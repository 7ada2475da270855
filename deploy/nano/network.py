"""The training forward pass: the checkpoint's own modules, with branch masks and extra heads.

The heads (what lies in this patch, which word has just ended) shape the middle layers and are
thrown away after training.
"""

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Gemma4UnifiedForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deploy.nano.batches import EVENT_CLASSES, FRAME_CLASSES, PATCH_CLASSES, SECOND_CLASSES
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
}
# A frame's second is one of 60, and copied from before the picture: it has to be asked for louder.
_HEAD_WEIGHT: Final = {"second": 5.0}
# Under any score, and finite: a row of padding may attend to nothing at all.
_MASKED: Final = -3e4


def masks(batch: Tensors, bidirectional: bool, window: int) -> tuple[Tensor, Tensor]:
    """Return (full, sliding) boolean masks [b, t, t]; True may be attended to.

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
    return full, sliding


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: tuple[Tensor, Tensor],
    dropout: float = 0.0,
    scaling: float = 1.0,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention of packed sequences, in the form transformers calls; on CPUs 1.3 times as fast as SDPA.

    `query` is [1, heads, n, d], `key` and `value` are [1, 1, n, d] with the n tokens of all
    sequences and no padding; `attention_mask` is (mask [b, t, t], place of each token in b * t).
    The one key head meets all query heads in a single product. Returns [1, n, heads, d].
    """
    mask, places = attention_mask
    rows, length, _ = mask.shape
    heads, size = query.shape[1], query.shape[3]

    def spread(packed: Tensor) -> Tensor:
        tokens = packed[0].transpose(0, 1).flatten(1)
        padded = tokens.new_zeros(rows * length, tokens.shape[1])
        return padded.index_copy(0, places, tokens).view(rows, -1, size)

    scores = torch.bmm(spread(query), spread(key).transpose(1, 2)) * scaling
    scores = scores.view(rows, length, heads, length).masked_fill(~mask[:, :, None], _MASKED)
    shares = scores.softmax(-1).to(value.dtype).view(rows, length * heads, length)
    seen = torch.bmm(shares, spread(value)).view(rows * length, heads, size)
    return seen[places][None], None


ALL_ATTENTION_FUNCTIONS.register("packed", packed_attention)


class Trainee(nn.Module):
    """The model, its auxiliary heads and the loss of one micro-batch."""

    def __init__(self, model: Gemma4UnifiedForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        model.model.language_model.config._attn_implementation = "packed"
        classes = {"frame_order": FRAME_CLASSES["order"], "word": FRAME_CLASSES["word"]}
        classes |= PATCH_CLASSES | {"event": EVENT_CLASSES, "second": SECOND_CLASSES}
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
        attention = {"full_attention": (full, spots), "sliding_attention": (sliding, spots)}
        states = [hidden]
        for layer, kind in zip(text.layers, text.config.layer_types, strict=True):
            hidden = layer(
                hidden,
                shared_kv_states={},
                position_embeddings=rotary[kind],
                attention_mask=attention[kind],
            )
            states.append(hidden)
        target = batch["target"][held]
        asked = target >= 0
        logits = self.model.lm_head(text.norm(hidden[0, asked]))
        cap = text.config.final_logit_softcapping
        logits = cap * torch.tanh(logits.float() / cap)
        target = target[asked]
        answer = functional.cross_entropy(logits, target)
        auxiliary = self._auxiliary(batch, states, places[held])
        return {
            "loss": batch["weight"] * (answer + batch["auxiliary_weight"] * auxiliary),
            "answer": answer.detach(),
            "auxiliary": auxiliary.detach(),
            "right": (logits.argmax(-1) == target).float().mean(),
        }

    def _auxiliary(self, batch: Tensors, states: list[Tensor], places: Tensor) -> Tensor:
        pairs = [(k, k) for k in PATCH_CLASSES]
        pairs += [(k, k) for k in ("event", "second") if f"label_{k}" in batch]
        if "frames" in batch:
            pairs = [("word", "word"), ("frame_order", "order")]
        total = torch.zeros((), device=places.device)
        for head, label in pairs:
            state = states[_HEAD_LAYER[head]][0, places]
            scale = state.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()
            logits = self.heads[head](state * scale).float()
            labels = batch[f"label_{label}"]
            weight = torch.ones(logits.shape[-1], device=logits.device)
            if head != "second":
                # Empty patches and frames are many; they weigh a tenth each.
                weight[0] = 0.1
            loss = functional.cross_entropy(logits, labels, weight=weight, ignore_index=-1)
            total = total + _HEAD_WEIGHT.get(head, 1.0) * loss
        return total
