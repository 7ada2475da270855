"""Prompt to token ids: presets, variables, and the checkpoint's own chat template.

`load_prompt` runs once, on the driver: it renders the template around the instruction and the media
placeholder, and reads the token ids. `Prompt.window` runs for each window on CPU workers: it expands
the placeholder to the window's tokens. Neither the template nor a hub is needed there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

from operators.errors import MediaError
from operators.settings import AudioSettings, ModelSettings, PromptSettings

VARIABLE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")

# Stands for the instruction while the template is rendered: one word, and no text of any template.
STAND_IN = "PolyscribeInstructionStandIn"


@dataclass(frozen=True)
class Preset:
    """An instruction of ours and the answer length that it needs."""

    text: str
    max_tokens: int


PRESETS: dict[str, Preset] = {
    "caption-short": Preset("Describe the image in one short sentence.", 64),
    "caption-dense": Preset(
        "Describe the image in detail: every object, its colour, its position relative to the"
        " others, and the background.",
        512,
    ),
    "alt-text": Preset(
        "Write alt text for the image: one sentence of at most 125 characters that says what a"
        " reader who cannot see it needs to know. Do not begin with 'Image of'.",
        80,
    ),
    "ocr": Preset(
        "Transcribe all text in the image exactly as written, in reading order, one line of text a"
        " line. Only output the transcription.",
        1024,
    ),
    "tags": Preset(
        "List up to ten tags for the image, in lower case, separated by commas.",
        96,
    ),
}

# The model's own words for speech (its card, "audio"); FACTS of its failures: keep it short, no system
# turn, the sound after the text.
SPOKEN = "Transcribe the following speech segment in {source}"
FORMATTING = " Follow these specific instructions for formatting the answer:"
ONLY = "\n* Only output the transcription, with no newlines."
DIGITS = (
    "\n* When transcribing numbers, write the digits, i.e. write 1.7 and not one point seven, and write"
    " 3 instead of three."
)
VOCABULARY = "\n* These names and terms may occur: {terms}."
TRANSLATE = (
    ", then translate it into {target}.\nWhen formatting the answer, first output the transcription in"
    " {source}, then one newline, then output the string '{target}: ', then the translation in {target}."
)
UNKNOWN_LANGUAGE = "its original language"
# About 100 tokens, in every window's prompt.
MAX_VOCABULARY_CHARS = 400
# Fast speech has 5 words a second; 3 tokens a word are enough for long words and rare scripts. An
# answer that is longer loops.
ANSWER_TOKENS_PER_S = 16

# For an own prompt without sampling.max_tokens.
CUSTOM_MAX_TOKENS = 512


def instruction(settings: PromptSettings, default_preset: str) -> Preset:
    """The text and answer length that a job asks for. Raises ValueError for an unknown preset."""
    if settings.text is not None:
        return Preset(settings.text.strip(), CUSTOM_MAX_TOKENS)
    name = settings.preset or default_preset
    if name not in PRESETS:
        raise ValueError(f"prompt.preset: must be one of {', '.join(PRESETS)}; got {name!r}")
    return PRESETS[name]


def transcribe_instruction(audio: AudioSettings) -> Preset:
    """The instruction for speech. audio.language may be a {variable} of the manifest.

    Raises ValueError for a vocabulary that is too long, or that is not plain text.
    """
    source = audio.language or UNKNOWN_LANGUAGE
    tokens = math.ceil(audio.window_s * ANSWER_TOKENS_PER_S)
    text = SPOKEN.format(source=source)
    rules = (DIGITS if audio.digits else "") + _vocabulary(audio.vocabulary)
    if audio.translate_to is not None:
        text += TRANSLATE.format(source=source, target=audio.translate_to)
        return Preset(text + rules, 2 * tokens)
    into = f" into {source} text." if audio.language else "."
    return Preset(text + into + FORMATTING + ONLY + rules, tokens)


def _vocabulary(terms: Sequence[str]) -> str:
    if not terms:
        return ""
    joined = ", ".join(term.strip() for term in terms)
    if len(joined) > MAX_VOCABULARY_CHARS:
        raise ValueError(
            f"audio.vocabulary: {len(joined)} characters; at most {MAX_VOCABULARY_CHARS}, since they"
            " stand in the prompt of every window"
        )
    bad = next((term for term in terms if not term.strip() or set(term) & set("{}<>|\n\r")), None)
    if bad is not None:
        raise ValueError(
            f"audio.vocabulary: must be words without {{}}<>| and newlines; got {bad!r}"
        )
    return VOCABULARY.format(terms=joined)


def variables_in(text: str) -> set[str]:
    """Names that `text` uses as {name}."""
    return set(VARIABLE.findall(text))


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt with one media placeholder. Plain data: it travels to the CPU workers.

    `rendered` is the template's output for `text` with STAND_IN in the instruction's place;
    `head` and `tail` are its token ids around the placeholder where no variable has to be filled in.
    """

    text: str
    rendered: str
    head: tuple[int, ...]
    tail: tuple[int, ...]
    begin_id: int
    media_id: int
    end_id: int
    control_tokens: tuple[str, ...]
    max_variable_chars: int
    # tokens that prompt and media may take together
    max_tokens: int
    # the tokenizer as JSON, only where variables have to be filled in (the 12B's is 33 MB)
    tokenizer_json: str | None = None

    def window(self, media_tokens: int, variables: Mapping[str, str] | None = None) -> list[int]:
        """Token ids of one request with `media_tokens` placeholders.

        Raises MediaError: prepare.bad_variable, prepare.too_long.
        """
        head, tail = self.head, self.tail
        if self.tokenizer_json is not None:
            tokenizer = _tokenizer(self.tokenizer_json)
            filled = self.rendered.replace(STAND_IN, self._fill(variables or {}))
            head, tail = _split(
                tuple(tokenizer.encode(filled, add_special_tokens=False).ids), self.media_id
            )
        ids = [*head, self.begin_id, *[self.media_id] * media_tokens, self.end_id, *tail]
        if len(ids) > self.max_tokens:
            raise MediaError(
                "prepare.too_long",
                f"prompt and media take {len(ids)} tokens; {self.max_tokens} are left beside the"
                " answer: raise model.max_model_len, or shorten the prompt",
            )
        return ids

    @property
    def raw_media_id(self) -> int | None:
        """The placeholder's token, where the checkpoint names it."""
        return self.media_id if self.media_id >= 0 else None

    def raw(self, variables: Mapping[str, str] | None = None) -> str:
        """The rendered prompt with its one placeholder, for the engine's own processor."""
        return self.rendered.replace(STAND_IN, self._fill(variables or {}))

    def placeholder(self, ids: list[int]) -> tuple[int, int]:
        """(offset, length) of the media tokens in `ids`."""
        return ids.index(self.media_id), ids.count(self.media_id)

    def _fill(self, variables: Mapping[str, str]) -> str:
        def value(match: re.Match[str]) -> str:
            name = match.group(1)
            if name not in variables:
                raise MediaError("prepare.bad_variable", f"the manifest row has no {name}")
            text = variables[name]
            if len(text) > self.max_variable_chars:
                raise MediaError(
                    "prepare.bad_variable",
                    f"{name} has {len(text)} characters; prompt.max_variable_chars is"
                    f" {self.max_variable_chars}",
                )
            for token in self.control_tokens:
                if token in text:
                    raise MediaError("prepare.bad_variable", f"{name} holds the token {token}")
            return text

        # The template trims the instruction, so the filled one is trimmed as well.
        return VARIABLE.sub(value, self.text).strip()


def load_prompt(
    model: ModelSettings, settings: PromptSettings, modality: str, text: str, answer_tokens: int
) -> Prompt:
    """Render the checkpoint's chat template once. Imports transformers; needs the tokenizer files.

    Image and video stand before the text, audio after it (FACTS: the model's own order).
    Raises ValueError where the checkpoint has no template or no placeholder for `modality`.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model.id, revision=model.revision)
    begin_id, media_id, end_id = media_token_ids(tokenizer, modality)
    if media_id < 0 and model.render == "prepared":
        raise ValueError(
            f"{model.id}: its tokenizer names no {modality} token; it needs model.render: engine"
        )
    words = {"type": "text", "text": STAND_IN}
    media = {"type": modality}
    content = [words, media] if modality == "audio" else [media, words]
    rendered: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    if rendered.count(STAND_IN) != 1:
        raise ValueError(f"{model.id}: its chat template does not show the user's text once")
    plain: tuple[int, ...] = tuple(
        tokenizer.encode(rendered.replace(STAND_IN, text), add_special_tokens=False)
    )
    head, tail = _split(plain, media_id) if media_id >= 0 else ((), ())
    return Prompt(
        text=text,
        rendered=rendered,
        head=head,
        tail=tail,
        begin_id=begin_id,
        media_id=media_id,
        end_id=end_id,
        control_tokens=tuple(
            sorted(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        ),
        max_variable_chars=settings.max_variable_chars,
        max_tokens=model.max_model_len - answer_tokens,
        tokenizer_json=(
            tokenizer.backend_tokenizer.to_str() if VARIABLE.search(text) is not None else None
        ),
    )


def media_token_ids(tokenizer: Any, modality: str) -> tuple[int, int, int]:  # noqa: ANN401
    """(begin, soft, end) token ids of a modality, from the tokenizer's own attributes; -1 without."""
    names = {
        "image": ("boi_token", "image_token", "eoi_token"),
        "audio": ("boa_token", "audio_token", "eoa_token"),
    }[modality]
    ids = []
    for name in names:
        token = getattr(tokenizer, name, None)
        ids.append(-1 if token is None else int(tokenizer.convert_tokens_to_ids(token)))
    return ids[0], ids[1], ids[2]


def _split(ids: tuple[int, ...], media_id: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if ids.count(media_id) != 1:
        raise ValueError("the rendered prompt must hold the media placeholder once")
    place = ids.index(media_id)
    return ids[:place], ids[place + 1 :]


@lru_cache(maxsize=2)
def _tokenizer(json: str) -> Tokenizer:
    return Tokenizer.from_str(json)
