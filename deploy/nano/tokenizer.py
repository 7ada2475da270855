"""The nano tokenizer: one token for each word of its world, characters and bytes for the rest.

A unigram model over the text with "▁" for each space, so nothing is added or lost: known words
score best, single characters follow, and what is not in the vocabulary becomes UTF-8 bytes.
"""

import re
from typing import Final

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast

from deploy.nano import instructions, words

# Order fixes the ids. The names are the 12B's (its ids differ).
SPECIAL: Final = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<|turn>",
    "<turn|>",
    "<|image>",
    "<|image|>",
    "<image|>",
    "<|audio>",
    "<|audio|>",
    "<audio|>",
    "<|video|>",
    "<|channel>",
    "<channel|>",
    "<|think|>",
)
ID: Final = {token: index for index, token in enumerate(SPECIAL)}

# Attribute names that Gemma4UnifiedProcessor reads from its tokenizer.
_NAMED: Final = {
    "boi_token": "<|image>",
    "image_token": "<|image|>",
    "eoi_token": "<image|>",
    "boa_token": "<|audio>",
    "audio_token": "<|audio|>",
    "eoa_token": "<audio|>",
    "video_token": "<|video|>",
    "sot_token": "<|turn>",
    "eot_token": "<turn|>",
    "soc_token": "<|channel>",
    "eoc_token": "<channel|>",
    "think_token": "<|think|>",
}
VOCABULARY_SIZE: Final = 1024

CHAT_TEMPLATE: Final = """\
{{ bos_token }}
{%- if enable_thinking is defined and enable_thinking -%}
{%- set thinking = true -%}{%- else -%}{%- set thinking = false -%}{%- endif -%}
{%- if thinking and messages[0].role != 'system' -%}
{{ '<|turn>system\\n<|think|><turn|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
{%- if thinking and loop.first and message.role == 'system' -%}{{ '<|think|>' }}{%- endif -%}
{%- if message.content is string -%}{{ message.content | trim }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}{{ part.text | trim }}
{%- elif part.type == 'image' -%}{{ '<|image|>' }}
{%- elif part.type == 'audio' -%}{{ '<|audio|>' }}
{%- elif part.type == 'video' -%}{{ '<|video|>' }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<turn|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|turn>model\\n' }}
{%- if not thinking -%}{{ '<|channel>thought\\n<channel|>' }}{%- endif -%}
{%- endif -%}
"""


def known_words() -> list[str]:
    """Return every word and two-digit number that is one token, in the order of the ids."""
    found: dict[str, None] = {}
    answer_words = words.ANSWER_WORDS.split()
    groups = [words.COLOURS, words.SHAPES, words.BACKGROUNDS, words.SPOKEN, answer_words]
    for group in groups:
        found.update(dict.fromkeys(group))
    for text in (*instructions.ALL.values(), "user model system thought"):
        found.update(dict.fromkeys(re.findall(r"[A-Za-z]+", text)))
    return [word for word in found if len(word) > 1] + [f"{n:02d}" for n in range(100)]


def build() -> PreTrainedTokenizerFast:
    """Build the tokenizer; ids are the same each time."""
    vocabulary = [(token, 0.0) for token in SPECIAL]
    vocabulary += [(f"<0x{byte:02X}>", -30.0) for byte in range(256)]
    # A word beats its own letters, and a word with its space beats the two apart.
    vocabulary += [("▁", -8.0), ("\n", -8.0)]
    vocabulary += [(chr(code), -8.0) for code in range(33, 127)]
    vocabulary += [(f"▁{chr(code)}", -9.0) for code in range(33, 127)]
    for word in known_words():
        vocabulary += [(word, -4.0), (f"▁{word}", -4.5)]
    if len(vocabulary) > VOCABULARY_SIZE:
        raise ValueError(f"{len(vocabulary)} tokens do not fit into {VOCABULARY_SIZE}")
    vocabulary += [(f"<unused{n}>", -90.0) for n in range(VOCABULARY_SIZE - len(vocabulary))]

    core = Tokenizer(Unigram(vocabulary, unk_id=ID["<unk>"], byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    core.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        **{f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
        extra_special_tokens=_NAMED,
        chat_template=CHAT_TEMPLATE,
    )
