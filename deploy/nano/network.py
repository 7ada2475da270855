"""The training forward pass: the checkpoint's own modules, with branch masks and extra heads.

The heads (what lies in this patch, which word has just ended) shape the middle layers and are
thrown away after training.
"""

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Gemma4UnifiedForConditionalGeneration

from deploy.nano.batches import EVENT_CLASSES, FRAME_CLASSES, PATCH_CLASSES
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
}
_AUXILIARY_WEIGHT: Final = 0.3


def masks(batch: Tensors, bidirectional: bool, window: int) -> tuple[Tensor, Tensor]:
    """Return (full, sliding) boolean masks [b, 1, t, t]; True may be attended to.

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
    return full[:, None], sliding[:, None]


class Trainee(nn.Module):
    """The model, its auxiliary heads and the loss of one micro-batch."""

    def __init__(self, model: Gemma4UnifiedForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        classes = {"frame_order": FRAME_CLASSES["order"], "word": FRAME_CLASSES["word"]}
        classes |= PATCH_CLASSES | {"event": EVENT_CLASSES}
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
        hidden = embedded
        rotary = {k: text.rotary_emb(hidden, batch["position"], k) for k in text.unique_layer_types}
        attention = {"full_attention": full, "sliding_attention": sliding}
        states = [hidden]
        for layer, kind in zip(text.layers, text.config.layer_types, strict=True):
            hidden = layer(
                hidden,
                shared_kv_states={},
                position_embeddings=rotary[kind],
                attention_mask=attention[kind],
            )
            states.append(hidden)
        asked = batch["target"] >= 0
        logits = self.model.lm_head(text.norm(hidden[asked]))
        cap = text.config.final_logit_softcapping
        logits = cap * torch.tanh(logits.float() / cap)
        target = batch["target"][asked]
        answer = functional.cross_entropy(logits, target)
        auxiliary = self._auxiliary(batch, states, places)
        return {
            "loss": answer + _AUXILIARY_WEIGHT * auxiliary,
            "answer": answer.detach(),
            "auxiliary": auxiliary.detach(),
            "right": (logits.argmax(-1) == target).float().mean(),
        }

    def _auxiliary(self, batch: Tensors, states: list[Tensor], places: Tensor) -> Tensor:
        pairs = [(k, k) for k in PATCH_CLASSES]
        if "label_event" in batch:
            pairs.append(("event", "event"))
        if "frames" in batch:
            pairs = [("word", "word"), ("frame_order", "order")]
        total = torch.zeros((), device=places.device)
        for head, label in pairs:
            state = states[_HEAD_LAYER[head]][places]
            scale = state.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()
            logits = self.heads[head](state * scale).float()
            labels = batch[f"label_{label}"]
            # Empty patches and frames are many; they weigh a tenth each.
            weight = torch.ones(logits.shape[-1], device=logits.device)
            weight[0] = 0.1
            total = total + functional.cross_entropy(logits, labels, weight=weight, ignore_index=-1)
        return total
