"""The nano model: the 12B's architecture at toy size, and how its checkpoint directory is written.

`python deploy/nano/model.py --random DIR --seed 0` writes one with random weights, for tests that
need an engine but no answers.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Final

import torch
from transformers import (
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.gemma4_unified.feature_extraction_gemma4_unified import (
    Gemma4UnifiedAudioFeatureExtractor,
)
from transformers.models.gemma4_unified.image_processing_gemma4_unified import (
    Gemma4UnifiedImageProcessor,
)
from transformers.models.gemma4_unified.processing_gemma4_unified import Gemma4UnifiedProcessor
from transformers.models.gemma4_unified.video_processing_gemma4_unified import (
    Gemma4UnifiedVideoProcessor,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deploy.nano import tokenizer as nano_tokenizer
from deploy.nano.tokenizer import ID

HIDDEN: Final = 256
HEADS: Final = 4
PATCH_FEATURES: Final = 160
IMAGE_BUDGET: Final = 280
# 4 sliding layers see 1024 tokens, 2 full ones see everything, as 40 and 8 do in the 12B.
LAYER_TYPES: Final = ("sliding_attention", "sliding_attention", "full_attention") * 2


def config() -> Gemma4UnifiedConfig:
    """Return the nano configuration; every switch stands as in the 12B, only sizes differ."""
    return Gemma4UnifiedConfig(
        text_config={
            "vocab_size": nano_tokenizer.VOCABULARY_SIZE,
            "hidden_size": HIDDEN,
            "intermediate_size": 512,
            "num_hidden_layers": len(LAYER_TYPES),
            "layer_types": list(LAYER_TYPES),
            "num_attention_heads": HEADS,
            "num_key_value_heads": 1,
            "num_global_key_value_heads": 1,
            "head_dim": 64,
            "global_head_dim": 128,
            "attention_k_eq_v": True,
            "sliding_window": 1024,
            "max_position_embeddings": 8192,
            "final_logit_softcapping": 30.0,
            "use_bidirectional_attention": "vision",
            "pad_token_id": ID["<pad>"],
            "bos_token_id": ID["<bos>"],
            "eos_token_id": ID["<eos>"],
            "tie_word_embeddings": True,
        },
        vision_config={
            "mm_embed_dim": PATCH_FEATURES,
            "output_proj_dims": PATCH_FEATURES,
            # A side is at most the whole budget of patches long.
            "mm_posemb_size": 288,
            # vLLM reads this, the processor reads `max_soft_tokens`: they must agree.
            "num_soft_tokens": IMAGE_BUDGET,
        },
        audio_config={"audio_embed_dim": 640},
        boi_token_id=ID["<|image>"],
        image_token_id=ID["<|image|>"],
        eoi_token_id=ID["<image|>"],
        boa_token_id=ID["<|audio>"],
        audio_token_id=ID["<|audio|>"],
        eoa_token_index=ID["<audio|>"],
        video_token_id=ID["<|video|>"],
        tie_word_embeddings=True,
    )


def build(seed: int) -> Gemma4UnifiedForConditionalGeneration:
    """Return a float32 model with random weights drawn from `seed`."""
    torch.manual_seed(seed)
    model = Gemma4UnifiedForConditionalGeneration(config())
    model.generation_config = generation_config()
    return model


def generation_config() -> GenerationConfig:
    """Sampling defaults in the 12B's form: end and suppressed tokens, top-p, top-k."""
    return GenerationConfig(
        bos_token_id=ID["<bos>"],
        pad_token_id=ID["<pad>"],
        eos_token_id=[ID["<eos>"], ID["<turn|>"]],
        suppress_tokens=[ID["<audio|>"], ID["<image|>"]],
        do_sample=True,
        temperature=1.0,
        top_p=0.95,
        top_k=64,
    )


def processor(tokenizer: PreTrainedTokenizerFast) -> Gemma4UnifiedProcessor:
    """Return the processor; its image budget is the one in `vision_config`."""
    return Gemma4UnifiedProcessor(
        feature_extractor=Gemma4UnifiedAudioFeatureExtractor(),
        image_processor=Gemma4UnifiedImageProcessor(max_soft_tokens=IMAGE_BUDGET),
        tokenizer=tokenizer,
        video_processor=Gemma4UnifiedVideoProcessor(),
        chat_template=nano_tokenizer.CHAT_TEMPLATE,
        image_seq_length=IMAGE_BUDGET,
    )


def save(model: Gemma4UnifiedForConditionalGeneration, directory: Path) -> None:
    """Write a complete checkpoint directory: bf16 weights, tokenizer, processor, template."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = Gemma4UnifiedForConditionalGeneration(model.config).to(torch.bfloat16)
    weights.load_state_dict(model.state_dict())
    weights.config.dtype = torch.bfloat16
    weights.generation_config = generation_config()
    weights.save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)
    processor(nano_tokenizer.build()).save_pretrained(directory)
    # The 12B's repository has the image processor's settings in a file of their own as well.
    settings = json.loads((directory / "processor_config.json").read_text())
    (directory / "preprocessor_config.json").write_text(
        json.dumps({**settings["image_processor"], **settings["feature_extractor"]}, indent=2)
        + "\n"
    )


def main() -> None:
    """Write a random-weights checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--random", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = build(arguments.seed)
    save(model, arguments.random)
    parameters = sum(p.numel() for p in model.parameters())
    sys.stdout.write(f"{arguments.random}: {parameters:,} parameters\n")


if __name__ == "__main__":
    main()
