"""A segment's frames as token ids: each frame's placeholders behind its time, then the instruction.

    mm:ss <|image> N x <|video|> <image|> mm:ss <|image> ...

as transformers' Gemma4UnifiedProcessor writes it. Minutes go on behind 59 (75:03, 100:00): there are
no hours. Frames that travel as images are the same text with <|image|> for <|video|>.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from operators.errors import MediaError
from operators.prompt import (
    STAND_IN,
    VARIABLE,
    VIDEO_PLACEHOLDER,
    TokenizerFile,
    control_tokens,
    fill,
    fitting,
    load_tokenizer,
    media_token_ids,
    parsed_tokenizer,
    render,
)
from operators.settings import ModelSettings, PromptSettings

# Minutes that a clock knows: 100 hours.
MINUTES = 6000
# Tokens of ` mmm:ss ` where each character is one, and the two marks around a frame.
STAMP_TOKENS = 8
MARK_TOKENS = 2

Ids = tuple[int, ...]
Encode = Callable[[Sequence[str]], list[Ids]]


def stamp(time_s: float) -> str:
    """mm:ss, seconds cut down. A time before the start counts as the start."""
    seconds = max(0.0, time_s)
    return f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"


def most_tokens(frames: int, max_soft_tokens: int) -> int:
    """At most so many prompt tokens do frames take, with their marks and times."""
    return frames * (max_soft_tokens + MARK_TOKENS + STAMP_TOKENS)


@dataclass(frozen=True)
class Clock:
    """Token ids of every time, in parts, so that workers need no tokenizer (the 12B's takes 0.3 GB).

    `first` holds `mm` where it follows the text before the frames, `later` ` mm`, `seconds` `:ss `.
    """

    first: tuple[Ids, ...]
    later: tuple[Ids, ...]
    seconds: tuple[Ids, ...]

    def ids(self, time_s: float, *, first: bool) -> Ids:
        """Raises MediaError prepare.too_long behind the last minute."""
        minutes, seconds = map(int, stamp(time_s).split(":"))
        if minutes >= MINUTES:
            raise MediaError(
                "prepare.too_long",
                f"a frame at {time_s / 3600:.0f} h; times in the prompt end at {MINUTES // 60} h:"
                " set video.stamps: segment",
            )
        return (self.first if first else self.later)[minutes] + self.seconds[seconds]


@dataclass(frozen=True)
class VideoPrompt:
    """A rendered prompt with one placeholder for all frames. Plain data: it travels to CPU workers.

    `before` and `after` are the template's text around the placeholder, with STAND_IN for the
    instruction; `head` and `tail` their token ids where no variable has to be filled in.
    """

    text: str
    before: str
    after: str
    head: Ids
    tail: Ids
    begin_id: int
    media_id: int
    end_id: int
    # frames travel as images of their own, not as one video
    as_images: bool
    control_tokens: tuple[str, ...]
    max_variable_chars: int
    # tokens that prompt and frames may take together
    max_tokens: int
    # the tokenizer only where variables have to be filled in, or where a time is more than its parts
    times: Clock | TokenizerFile

    def window(
        self, patches: int, times_s: Sequence[float], variables: Mapping[str, str] | None = None
    ) -> list[int]:
        """Token ids of one request: a frame of `patches` placeholders at each of `times_s`.

        Raises MediaError: prepare.bad_variable, prepare.too_long.
        """
        stamps, tail = self._stamps(times_s, variables or {})
        frame = (self.begin_id, *(self.media_id,) * patches, self.end_id)
        ids: list[int] = []
        for before in stamps:
            ids += before
            ids += frame
        return fitting([*ids, *tail], self.max_tokens)

    def _stamps(
        self, times_s: Sequence[float], variables: Mapping[str, str]
    ) -> tuple[list[Ids], Ids]:
        """What stands before each frame, and behind the last."""
        if isinstance(self.times, Clock):
            later = [self.times.ids(time_s, first=False) for time_s in times_s[1:]]
            return [self.head + self.times.ids(times_s[0], first=True), *later], self.tail
        filled = fill(self.text, variables, self.control_tokens, self.max_variable_chars)
        encode = encoder(parsed_tokenizer(self.times))
        *before, after = encode(
            [
                self.before.replace(STAND_IN, filled) + f"{stamp(times_s[0])} ",
                *(f" {stamp(time_s)} " for time_s in times_s[1:]),
                self.after.replace(STAND_IN, filled),
            ]
        )
        return before, after


def load_video_prompt(
    model: ModelSettings,
    settings: PromptSettings,
    text: str,
    answer_tokens: int,
    *,
    as_images: bool,
) -> VideoPrompt:
    """Render the checkpoint's chat template once. Imports transformers; needs the tokenizer files.

    Raises ValueError where the checkpoint has no template or no placeholder for frames.
    """
    tokenizer = load_tokenizer(model)
    begin_id, media_id, end_id = media_token_ids(tokenizer, "image" if as_images else "video")
    if min(begin_id, media_id, end_id) < 0:
        raise ValueError(f"{model.id}: its tokenizer names no tokens for the frames of a video")
    placeholder = getattr(tokenizer, "video_token", None) or VIDEO_PLACEHOLDER
    parts = render(model, tokenizer, "video").split(placeholder)
    if len(parts) != 2:
        raise ValueError(f"{model.id}: its chat template does not show a video once")
    encode = encoder(tokenizer.backend_tokenizer)
    head, tail = encode([part.replace(STAND_IN, text) for part in parts])
    clock = None
    if VARIABLE.search(text) is None:
        clock = make_clock(encode, parts[0].replace(STAND_IN, text))
    return VideoPrompt(
        text=text,
        before=parts[0],
        after=parts[1],
        head=head,
        tail=tail,
        begin_id=begin_id,
        media_id=media_id,
        end_id=end_id,
        as_images=as_images,
        control_tokens=tuple(sorted({*control_tokens(tokenizer), placeholder})),
        max_variable_chars=settings.max_variable_chars,
        max_tokens=model.max_model_len - answer_tokens,
        times=clock or TokenizerFile.of(tokenizer),
    )


def make_clock(encode: Encode, before: str) -> Clock | None:
    """The clock for frames behind the text `before`; None where a time is more than its parts."""
    (head,) = encode([before])
    (hour,) = encode([" 00"])
    seconds = tuple(ids[len(hour) :] for ids in encode([f" 00:{s:02d} " for s in range(60)]))
    end = len(seconds[0])
    later = tuple(ids[:-end] for ids in encode([f" {m:02d}:00 " for m in range(MINUTES)]))
    first = tuple(
        ids[len(head) : -end] for ids in encode([f"{before}{m:02d}:00 " for m in range(MINUTES)])
    )
    # Whatever is joined is joined within four neighbours: 99 minutes show it.
    tried = list(product(range(100), range(60)))
    whole = encode([f" {m:02d}:{s:02d} " for m, s in tried])
    whole_first = encode([f"{before}{m:02d}:{s:02d} " for m, s in tried])
    parts = [later[m] + seconds[s] for m, s in tried]
    parts_first = [head + first[m] + seconds[s] for m, s in tried]
    return Clock(first, later, seconds) if (whole, whole_first) == (parts, parts_first) else None


def encoder(tokenizer: Any) -> Encode:  # noqa: ANN401
    """Texts to token ids, nothing added."""

    def encode(texts: Sequence[str]) -> list[Ids]:
        return [tuple(e.ids) for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    return encode
