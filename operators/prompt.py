"""Prompt to token ids: presets, variables, and the checkpoint's own chat template.

`load_prompt` runs once, on the driver: it renders the template around the instruction and the media
placeholder, and reads the token ids. `Prompt.window` runs for each window on CPU workers: it expands
the placeholder to the window's tokens. Neither the template nor a hub is needed there.
Frames of a video have their own form (prompt_video.py), and so has text alone (prompt_summary.py).
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3
from tokenizers import Tokenizer

from operators.errors import MediaError
from operators.settings import AudioSettings, ModelSettings, PromptSettings

VARIABLE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")

VIDEO_PLACEHOLDER = "<|video|>"

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

# About one segment of a video, a few frames with their times.
VIDEO_PRESETS: dict[str, Preset] = {
    "video-describe": Preset("Describe what happens in the video, with times.", 256),
    "video-dense": Preset(
        "Describe the video in detail: the place, the people and objects, what they do in which order,"
        " and any text that is shown. Give the time of each event as mm:ss.",
        512,
    ),
    "video-chapter": Preset("Say what happens in the video in at most ten words.", 48),
    "video-objects": Preset("Name the objects in the video.", 96),
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


def instruction(
    settings: PromptSettings, default_preset: str, presets: Mapping[str, Preset] = PRESETS
) -> Preset:
    """The text and answer length that a job asks for. Raises ValueError for an unknown preset."""
    if settings.text is not None:
        return Preset(settings.text.strip(), CUSTOM_MAX_TOKENS)
    name = settings.preset or default_preset
    if name not in presets:
        raise ValueError(f"prompt.preset: must be one of {', '.join(presets)}; got {name!r}")
    return presets[name]


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
class TokenizerFile:
    """A tokenizer's JSON, as uint8: an array lies in the object store, and a task that is given it
    looks at it there. The 12B's 27 MB as a string took each task 0.15 s of CPU, and 92 MB.
    """

    digest: str
    json: npt.NDArray[np.uint8] = field(compare=False, repr=False)

    @staticmethod
    def of(tokenizer: Any) -> TokenizerFile:  # noqa: ANN401
        """From a transformers tokenizer."""
        json = tokenizer.backend_tokenizer.to_str().encode()
        return TokenizerFile(blake3(json).hexdigest(), np.frombuffer(json, np.uint8))


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
    # only where variables have to be filled in
    tokenizer: TokenizerFile | None = None

    def window(self, media_tokens: int, variables: Mapping[str, str] | None = None) -> list[int]:
        """Token ids of one request with `media_tokens` placeholders.

        Raises MediaError: prepare.bad_variable, prepare.too_long.
        """
        head, tail = self.head, self.tail
        if self.tokenizer is not None:
            tokenizer = parsed_tokenizer(self.tokenizer)
            ids = tokenizer.encode(self.raw(variables), add_special_tokens=False).ids
            head, tail = _split(tuple(ids), self.media_id)
        return fitting(
            [*head, self.begin_id, *[self.media_id] * media_tokens, self.end_id, *tail],
            self.max_tokens,
        )

    @property
    def own_tokens(self) -> int:
        """Tokens beside the media's: the text, and the two marks around them."""
        return len(self.head) + 2 + len(self.tail)

    @property
    def raw_media_id(self) -> int | None:
        """The placeholder's token, where the checkpoint names it."""
        return self.media_id if self.media_id >= 0 else None

    def raw(self, variables: Mapping[str, str] | None = None) -> str:
        """The rendered prompt with its one placeholder, as the engine's own processor wants it."""
        filled = fill(self.text, variables or {}, self.control_tokens, self.max_variable_chars)
        return self.rendered.replace(STAND_IN, filled)

    def placeholder(self, ids: list[int]) -> tuple[int, int]:
        """(offset, length) of the media tokens in `ids`."""
        return ids.index(self.media_id), ids.count(self.media_id)


def fill(
    text: str, variables: Mapping[str, str], control_tokens: Sequence[str], max_chars: int
) -> str:
    """`text` with its {names} filled in. Raises MediaError prepare.bad_variable."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in variables:
            raise MediaError("prepare.bad_variable", f"the manifest row has no {name}")
        given = variables[name]
        if len(given) > max_chars:
            raise MediaError(
                "prepare.bad_variable",
                f"{name} has {len(given)} characters; prompt.max_variable_chars is {max_chars}",
            )
        return given

    # The template trims the instruction, so the filled one is trimmed as well.
    filled = VARIABLE.sub(value, text).strip()
    for token in control_tokens:
        # in the whole, since <{name}> and |image| make one together
        if filled.count(token) > text.count(token):
            names = ", ".join(sorted({match.group(1) for match in VARIABLE.finditer(text)}))
            raise MediaError(
                "prepare.bad_variable", f"with {names} the prompt holds the token {token}"
            )
    return filled


def fitting(ids: list[int], max_tokens: int) -> list[int]:
    """`ids`, where they leave room for the answer. Raises MediaError prepare.too_long."""
    if len(ids) > max_tokens:
        raise MediaError(
            "prepare.too_long",
            f"prompt and media take {len(ids)} tokens; {max_tokens} are left beside the"
            " answer: raise model.max_model_len, or shorten the prompt",
        )
    return ids


def load_prompt(
    model: ModelSettings, settings: PromptSettings, modality: str, text: str, answer_tokens: int
) -> Prompt:
    """Render the checkpoint's chat template once. Imports transformers; needs the tokenizer files.

    An image stands before the text, audio after it (FACTS: the model's own order).
    Raises ValueError where the checkpoint has no template or no placeholder for `modality`.
    """
    tokenizer = load_tokenizer(model)
    begin_id, media_id, end_id = media_token_ids(tokenizer, modality)
    if media_id < 0 and model.render == "prepared":
        raise ValueError(
            f"{model.id}: its tokenizer names no {modality} token; it needs model.render: engine"
        )
    rendered = render(model, tokenizer, modality)
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
        control_tokens=control_tokens(tokenizer),
        max_variable_chars=settings.max_variable_chars,
        max_tokens=model.max_model_len - answer_tokens,
        tokenizer=TokenizerFile.of(tokenizer) if VARIABLE.search(text) else None,
    )


def load_tokenizer(model: ModelSettings) -> Any:  # noqa: ANN401
    """The checkpoint's own tokenizer, with its chat template. Imports transformers."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model.id, revision=model.revision)


def render(model: ModelSettings, tokenizer: Any, modality: str | None) -> str:  # noqa: ANN401
    """The template's text around STAND_IN and one medium (None: text alone), up to the answer.

    Image and video stand before the text, audio after it (FACTS: the model's own order).
    """
    words = {"type": "text", "text": STAND_IN}
    media = [] if modality is None else [{"type": modality}]
    content = [words, *media] if modality == "audio" else [*media, words]
    rendered: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    if rendered.count(STAND_IN) != 1:
        raise ValueError(f"{model.id}: its chat template does not show the user's text once")
    return rendered


def control_tokens(tokenizer: Any) -> tuple[str, ...]:  # noqa: ANN401
    """What no text from outside may hold: it would end a turn or stand for a medium."""
    special = (token for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(sorted(str(token) for token in special))


def media_token_ids(tokenizer: Any, modality: str) -> tuple[int, int, int]:  # noqa: ANN401
    """(begin, soft, end) token ids of a modality, from the tokenizer's own attributes; -1 without."""
    names = {
        "image": ("boi_token", "image_token", "eoi_token"),
        "video": ("boi_token", "video_token", "eoi_token"),
        "audio": ("boa_token", "audio_token", "eoa_token"),
    }[modality]
    ids = []
    for name in names:
        # transformers' own processor adds <|video|> to a tokenizer that does not name it
        default = VIDEO_PLACEHOLDER if name == "video_token" else None
        token = getattr(tokenizer, name, None) or default
        found = None if token is None else tokenizer.convert_tokens_to_ids(token)
        ids.append(-1 if found in (None, tokenizer.unk_token_id) else int(found))
    return ids[0], ids[1], ids[2]


def _split(ids: tuple[int, ...], media_id: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if ids.count(media_id) != 1:
        raise ValueError("the rendered prompt must hold the media placeholder once")
    place = ids.index(media_id)
    return ids[:place], ids[place + 1 :]


_parsed: dict[str, Tokenizer] = {}
_parsing = threading.Lock()


def parsed_tokenizer(file: TokenizerFile) -> Tokenizer:
    """Parsed once in a process, whatever the thread: the 12B's takes 0.25 GB and 3 s."""
    with _parsing:
        if file.digest not in _parsed:
            _parsed[file.digest] = Tokenizer.from_buffer(file.json.tobytes())
        return _parsed[file.digest]
