"""A checkpoint folder with the published configuration of the 12B and no weights.

    python tests/bench/gpu/checkpoint.py DIR

vLLM's load_format="dummy" draws the weights on the GPU, so that the same kernels run on the same shapes.
Processor, chat template and the names of the special tokens are those of the nano checkpoint, which has
them from the same source. The tokenizer is of the real size, with the real ids of the special tokens:
a byte-pair encoding that knows each word of our own prompts as one token, and fills up with pairs of
characters. What it decodes is gibberish, at the usual cost.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from operators import prompt  # noqa: E402

NANO = ROOT / "deploy" / "nano" / "checkpoint"
TAKEN_OVER = ("chat_template.jinja", "processor_config.json", "preprocessor_config.json")

VOCABULARY_SIZE = 262_144
LAYERS = 48
# google/gemma-4-12B-it, config.json
TEXT = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 3840,
    "intermediate_size": 15_360,
    "num_hidden_layers": LAYERS,
    "layer_types": [
        "full_attention" if (layer + 1) % 6 == 0 else "sliding_attention" for layer in range(LAYERS)
    ],
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 1,
    "head_dim": 256,
    "global_head_dim": 512,
    "attention_k_eq_v": True,
    "sliding_window": 1024,
    "max_position_embeddings": 262_144,
    "final_logit_softcapping": 30.0,
    "use_bidirectional_attention": "vision",
}
VISION = {
    "mm_embed_dim": 3840,
    "mm_posemb_size": 1120,
    "output_proj_dims": 3840,
    "num_soft_tokens": 280,
}
AUDIO = {"audio_embed_dim": 640}
# Those that the configuration or the generation defaults name (258880.., 1, 50, 106) are the published
# ids; the others have a free place near them.
SPECIAL = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<|tool_response>": 50,
    "<|think|>": 98,
    "<|channel>": 100,
    "<channel|>": 101,
    "<|turn>": 105,
    "<turn|>": 106,
    "<|image>": 255_999,
    "<|audio>": 256_000,
    "<|image|>": 258_880,
    "<|audio|>": 258_881,
    "<image|>": 258_882,
    "<audio|>": 258_883,
    "<|video|>": 258_884,
}
IDS = {
    "image_token_id": "<|image|>",
    "audio_token_id": "<|audio|>",
    "video_token_id": "<|video|>",
    "boi_token_id": "<|image>",
    "eoi_token_id": "<image|>",
    "boa_token_id": "<|audio>",
    "eoa_token_index": "<audio|>",
}
TEMPLATE_WORDS = ("user", "model", "thought")
# 512 characters have enough pairs for every place that is left.
FILLER = [chr(0x4E00 + offset) for offset in range(512)]


def config() -> dict[str, Any]:
    """config.json: the nano checkpoint's switches with the 12B's sizes and ids."""
    made: dict[str, Any] = json.loads((NANO / "config.json").read_text())
    # the sizes above say the same, in the published form
    made["text_config"].pop("per_layer_config", None)
    made["text_config"] |= TEXT | {
        f"{name}_token_id": SPECIAL[f"<{name}>"] for name in ("pad", "bos", "eos")
    }
    made["vision_config"] |= VISION
    made["audio_config"] |= AUDIO
    return made | {key: SPECIAL[token] for key, token in IDS.items()}


def generation_config() -> dict[str, Any]:
    """generation_config.json: where an answer ends, and the tokens that are never drawn."""
    made: dict[str, Any] = json.loads((NANO / "generation_config.json").read_text())
    return made | {
        "bos_token_id": SPECIAL["<bos>"],
        "pad_token_id": SPECIAL["<pad>"],
        "eos_token_id": [SPECIAL[name] for name in ("<eos>", "<turn|>", "<|tool_response>")],
        "suppress_tokens": [SPECIAL["<audio|>"], SPECIAL["<image|>"]],
    }


def known_words() -> list[str]:
    """The words of our own instructions: a request's text then has as many tokens as with the 12B's."""
    texts = [preset.text for preset in (*prompt.PRESETS.values(), *prompt.VIDEO_PRESETS.values())]
    texts += [prompt.SPOKEN, prompt.FORMATTING, prompt.ONLY, prompt.DIGITS, prompt.UNKNOWN_LANGUAGE]
    texts += ["English into text"]
    return sorted({word for text in texts for word in re.findall("[A-Za-z]+", text)})


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Id by token, and the merges that lead to each token of several characters."""
    ids = dict(SPECIAL)
    taken = set(ids.values())
    free = (place for place in range(VOCABULARY_SIZE) if place not in taken)
    merges: list[tuple[str, str]] = []
    for token in (
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *("▁", "\n", *map(chr, range(33, 127)), *FILLER),
    ):
        ids[token] = next(free)
    for left, right in _pairs():
        if left + right not in ids:
            place = next(free, None)
            if place is None:
                return ids, merges
            ids[left + right] = place
            merges.append((left, right))
    raise AssertionError("the filler does not fill the vocabulary")


def _pairs() -> Iterator[tuple[str, str]]:
    """Each word grows from its left end, those after a space first: nothing else can cut into them.

    Without a space stand only a text's first word and the template's own.
    """
    words = known_words()
    first = [word for word in words if word[0].isupper()]
    for word in (*(f"▁{word}" for word in words), *TEMPLATE_WORDS, *first):
        for end in range(1, len(word)):
            yield word[:end], word[end]
    for left in FILLER:
        for right in FILLER:
            yield left, right


def write_tokenizer(path: Path) -> None:
    """tokenizer.json of VOCABULARY_SIZE tokens, about 17 MB."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    ids, merges = vocabulary()
    core = Tokenizer(BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    core.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    core.save(str(path))


def write(folder: Path) -> None:
    """The whole folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TAKEN_OVER:
        shutil.copyfile(NANO / name, folder / name)
    settings = json.loads((NANO / "tokenizer_config.json").read_text())
    for name, content in (
        ("config.json", config()),
        ("generation_config.json", generation_config()),
        ("tokenizer_config.json", settings | {"model_max_length": 262_144}),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    write_tokenizer(folder / "tokenizer.json")


def parameters(folder: Path) -> int:
    """Parameters of the model that transformers builds from `folder`, on meta tensors."""
    import torch
    from transformers import AutoConfig, Gemma4UnifiedForConditionalGeneration

    with torch.device("meta"):
        model = Gemma4UnifiedForConditionalGeneration(AutoConfig.from_pretrained(folder))
    return sum(each.numel() for each in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    write(folder)
    print(f"{folder}: {parameters(folder):,} parameters, no weights")


if __name__ == "__main__":
    main()
