"""One text about a whole video: its segments' captions and its transcript as a prompt without media.

A long video has more of both than a prompt holds. What is seen and what is said then get half of the
room each (what one does not need goes to the other); within its half each line is cut to the same
length, and where that would be too short, lines are left out evenly over the video. The prompt says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tokenizers import Tokenizer

from operators.errors import MediaError
from operators.prompt import (
    STAND_IN,
    Preset,
    TokenizerFile,
    control_tokens,
    load_tokenizer,
    parsed_tokenizer,
    render,
)
from operators.prompt_video import stamp
from operators.settings import ModelSettings

SUMMARY = Preset(
    "Write one caption of the whole video, in three to five sentences: what it shows, who does what, and"
    " how it goes on. Say only what these lines say.",
    256,
)
HEADER = "This is what is seen and what is said in one video, in order, each line with its time:"
CUT = "Some lines are shortened or left out."
# A time, a word or two, and enough of a sentence to know what it is about.
LEAST_LINE_TOKENS = 24


class Line(NamedTuple):
    """A caption, or something said, at a time of the video."""

    start_s: float
    text: str
    said: bool = False


@dataclass(frozen=True)
class SummaryPrompt:
    """A rendered prompt with STAND_IN for lines and instruction. Plain data."""

    text: str
    rendered: str
    control_tokens: tuple[str, ...]
    # that the prompt may take
    max_tokens: int
    tokenizer: TokenizerFile

    def window(self, lines: Sequence[Line]) -> list[int]:
        """Token ids of one request, with as much of the lines as there is room for.

        Raises MediaError prepare.too_long where there is no room for any; ValueError for no lines.
        """
        if not lines:
            raise ValueError("a summary of nothing")
        tokenizer = parsed_tokenizer(self.tokenizer)
        texts = [self._shown(line) for line in sorted(lines)]
        said = [line.said for line in sorted(lines)]
        encodings = tokenizer.encode_batch(
            [f"{text}\n" for text in texts], add_special_tokens=False
        )
        lengths = [len(encoding.ids) for encoding in encodings]
        spare = 0
        while True:
            room = self.max_tokens - len(self._ids(tokenizer, [], cut=True)) - spare
            shares = share(lengths, said, max(room, 0))
            if not any(shares):
                raise MediaError(
                    "prepare.too_long",
                    f"no room for a summary's lines beside its instruction in {self.max_tokens} tokens:"
                    " raise model.max_model_len",
                )
            kept = [
                text if take == length else _cut(text, encoding.offsets, take)
                for text, encoding, length, take in zip(
                    texts, encodings, lengths, shares, strict=True
                )
                if take
            ]
            ids = self._ids(tokenizer, kept, cut=shares != lengths)
            if len(ids) <= self.max_tokens:
                return ids
            # a line may take another token where it meets the next
            spare += len(ids) - self.max_tokens

    def _ids(self, tokenizer: Tokenizer, lines: Sequence[str], *, cut: bool) -> list[int]:
        body = "\n".join([HEADER, *lines, *([CUT] if cut else []), "", self.text])
        filled = self.rendered.replace(STAND_IN, body.strip())
        ids: list[int] = tokenizer.encode(filled, add_special_tokens=False).ids
        return ids

    def _shown(self, line: Line) -> str:
        text = line.text
        # A model's answer and a stranger's speech: neither may end a turn. No token has a space in it,
        # so taking one out joins none.
        for token in self.control_tokens:
            text = text.replace(token, " ")
        return f"{stamp(line.start_s)} {'said' if line.said else 'seen'}: {' '.join(text.split())}"


def load_summary_prompt(model: ModelSettings, text: str, answer_tokens: int) -> SummaryPrompt:
    """Render the checkpoint's chat template once. Imports transformers; needs the tokenizer files."""
    tokenizer = load_tokenizer(model)
    return SummaryPrompt(
        text=text,
        rendered=render(model, tokenizer, None),
        control_tokens=control_tokens(tokenizer),
        max_tokens=model.max_model_len - answer_tokens,
        tokenizer=TokenizerFile.of(tokenizer),
    )


def share(lengths: Sequence[int], said: Sequence[bool], room: int) -> list[int]:
    """Tokens for each line, of which it needs `lengths`; in all at most `room`. 0: left out."""
    seen_tokens = sum(length for length, spoken in zip(lengths, said, strict=True) if not spoken)
    said_tokens = sum(lengths) - seen_tokens
    for_seen = min(seen_tokens, max(room // 2, room - said_tokens))
    rooms = {False: for_seen, True: room - for_seen}
    shares = [0] * len(lengths)
    for spoken, part in rooms.items():
        indices = [index for index, kind in enumerate(said) if kind is spoken]
        for index, take in zip(indices, even([lengths[i] for i in indices], part), strict=True):
            shares[index] = take
    return shares


def even(lengths: Sequence[int], room: int) -> list[int]:
    """As `share`, for lines of one kind: all to the same length, or fewer of them, evenly spread."""
    length = _longest(lengths, room)
    if length >= min(LEAST_LINE_TOKENS, max(lengths, default=0)):
        return [min(own, length) for own in lengths]
    least = [min(own, LEAST_LINE_TOKENS) for own in lengths]
    count = room * len(lengths) // sum(least)
    while True:
        kept = [(2 * place + 1) * len(lengths) // (2 * count) for place in range(count)]
        if sum(least[index] for index in kept) <= room:
            break
        count -= 1
    length = _longest([lengths[index] for index in kept], room)
    shares = [0] * len(lengths)
    for index in kept:
        shares[index] = min(lengths[index], length)
    return shares


def _longest(lengths: Sequence[int], room: int) -> int:
    """The greatest length to which all lines may be cut so that they fit into `room`."""
    left, lines = room, len(lengths)
    for length in sorted(lengths):
        if length * lines > left:
            return left // lines
        left -= length
        lines -= 1
    return max(lengths, default=0)


def _cut(text: str, offsets: Sequence[tuple[int, int]], tokens: int) -> str:
    """At most so many tokens of a line: whole words, an ellipsis for the rest, the line's end."""
    start = text[: offsets[max(tokens - 3, 0)][1]]
    whole = start.rpartition(" ")[0] or start
    return whole + "…"
