"""Subtitles: segments to cues, cues to WebVTT and SRT.

The libraries for these formats (webvtt-py, srt, pysubs2) write cues but don't make them: breaking
lines, and sharing a segment's time between its cues, would still be here.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from operators.stitch import Segment, plain

# What broadcasters and Netflix's guide agree on.
LINE_WIDTH = 42
LINES = 2
# Of a cue with the spaces that it is counted with; the first of a line is not shown.
MOST_WIDTH = LINES * (LINE_WIDTH + 1)
LEAST_CUE_S = 1.0
MOST_CUE_S = 7.0


@dataclass(frozen=True)
class Cue:
    """One subtitle."""

    start_s: float
    end_s: float
    lines: tuple[str, ...]


@dataclass(frozen=True)
class _Piece:
    """A word, or a part of one that is wider than a line. `glue` is what stands before it."""

    text: str
    glue: str
    width: int


def cues(segments: Sequence[Segment]) -> list[Cue]:
    """Cues in the order of time, none overlapping the next.

    A segment's time goes to its cues by their width. Lines are at most 42 wide (a Chinese character
    counts two), a cue has two at most and stands 1 to 7 s; less only where the next one begins.
    """
    made = [cue for segment in segments for cue in _segment_cues(segment)]
    made.sort(key=lambda cue: cue.start_s)
    if not made:
        return []
    ends = [*(cue.start_s for cue in made[1:]), float("inf")]
    return [
        Cue(cue.start_s, min(max(cue.end_s, cue.start_s + LEAST_CUE_S), end), cue.lines)
        for cue, end in zip(made, ends, strict=True)
    ]


def webvtt(cues: Sequence[Cue]) -> str:
    """A WebVTT file. `&`, `<` and `>` are escaped, which also takes `-->` out of the text."""
    blocks = ["WEBVTT\n"]
    for cue in cues:
        text = "\n".join(cue.lines).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        blocks.append(f"{_time(cue.start_s, '.')} --> {_time(cue.end_s, '.')}\n{text}\n")
    return "\n".join(blocks)


def chapters(captions: Sequence[Segment]) -> str:
    """A WebVTT file of kind chapters: a cue a segment, its whole caption in one line."""
    return webvtt([Cue(one.start_s, one.end_s, (plain(one.text),)) for one in captions])


def srt(cues: Sequence[Cue]) -> str:
    """A SubRip file. It knows no escapes: `-->` in a text, also `--->`, becomes `->`."""
    return "\n".join(
        f"{number}\n{_time(cue.start_s, ',')} --> {_time(cue.end_s, ',')}\n"
        + re.sub("-{2,}>", "->", "\n".join(cue.lines))
        + "\n"
        for number, cue in enumerate(cues, 1)
    )


def _segment_cues(segment: Segment) -> list[Cue]:
    pieces = _pieces(segment.text)
    if not pieces:
        return []
    duration_s = max(0.0, segment.end_s - segment.start_s)
    width = sum(piece.width + len(piece.glue) for piece in pieces)
    # Not one more at a time from 1: an answer that rambled on for 3,000 words took minutes.
    count = max(1, -int(-duration_s // MOST_CUE_S), width // MOST_WIDTH)
    while True:
        parts = _parts(pieces, count)
        lines = [_lines(part) for part in parts]
        # as many parts as pieces always fit: a piece is no wider than a line
        if all(len(part) <= LINES for part in lines):
            break
        count += 1
    widths = [sum(piece.width + len(piece.glue) for piece in part) for part in parts]
    total, passed = sum(widths), 0
    made = []
    for width, part in zip(widths, lines, strict=True):
        start = segment.start_s + duration_s * passed / total
        passed += width
        end = segment.start_s + duration_s * passed / total
        made.append(Cue(start, min(end, start + MOST_CUE_S), tuple(part)))
    return made


def _parts(pieces: list[_Piece], count: int) -> list[list[_Piece]]:
    """Up to `count` parts of about equal width, none empty."""
    ends, passed = [], 0
    for piece in pieces:
        passed += piece.width + len(piece.glue)
        ends.append(passed)
    bounds = [0]
    for number in range(1, count):
        wanted = passed * number / count
        after = bisect_left(ends, wanted)
        around = range(max(0, after - 1), min(after + 1, len(ends)))
        nearest = min(around, key=lambda i: abs(ends[i] - wanted)) + 1
        if bounds[-1] < nearest < len(pieces):
            bounds.append(nearest)
    return [pieces[start:end] for start, end in pairwise([*bounds, len(pieces)])]


def _lines(pieces: list[_Piece]) -> list[str]:
    """As few lines as it takes; two of about equal width where one is not enough."""
    text, width = _text(pieces), _width(_text(pieces))
    if width <= LINE_WIDTH:
        return [text]
    if width > MOST_WIDTH:
        return [piece.text for piece in pieces]
    for split in sorted(
        range(1, len(pieces)), key=lambda at: abs(_width(_text(pieces[:at])) * 2 - width)
    ):
        halves = [_text(pieces[:split]), _text(pieces[split:])]
        if all(_width(half) <= LINE_WIDTH for half in halves):
            return halves
    return [piece.text for piece in pieces]


def _text(pieces: Sequence[_Piece]) -> str:
    return "".join(piece.glue + piece.text for piece in pieces).strip()


def _pieces(text: str) -> list[_Piece]:
    pieces = []
    for word in text.split():
        glue = " "
        while word:
            end = len(word)
            if _width(word) > LINE_WIDTH:
                # a script without spaces may break anywhere: in pieces of half a line
                end = next(
                    at for at in range(1, len(word) + 1) if _width(word[:at]) >= LINE_WIDTH // 2
                )
                while end < len(word) and _belongs(word[end]):
                    end += 1
            pieces.append(_Piece(word[:end], glue, _width(word[:end])))
            word, glue = word[end:], ""
    return pieces


def _belongs(sign: str) -> bool:
    """Whether a sign is one with the letter before it, as vowels and tones of Thai and Indic scripts."""
    return unicodedata.category(sign).startswith("M")


def _width(text: str) -> int:
    return sum(_sign_width(sign) for sign in text)


def _sign_width(sign: str) -> int:
    if unicodedata.category(sign) in ("Mn", "Me"):  # above or below its letter
        return 0
    return 2 if unicodedata.east_asian_width(sign) in "WF" else 1


def _time(seconds: float, mark: str) -> str:
    thousandths = round(max(0.0, seconds) * 1000)
    minutes, rest = divmod(thousandths, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{mark}{rest % 1000:03}"
