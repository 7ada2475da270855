"""Stitch: the answers to an asset's windows become one transcript.

Cuts lie in pauses and windows share no sample, so joining is putting one after the other: no word is
looked for twice, and none is taken out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

# What a model may answer to a window without speech that voice detection let through.
NOTHING = frozenset({"", "[no speech]"})
# Scripts that write no spaces: Chinese and Japanese, Thai, Lao, Khmer, Burmese.
SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uff00-\uff9f]"
)
# Gaps that a message names; more are counted.
NAMED_GAPS = 5


@dataclass(frozen=True)
class Heard:
    """The outcome of one window, or of a stretch that gave none: a text, or a failure's code."""

    start_s: float
    end_s: float
    text: str | None
    failure: str | None = None


@dataclass(frozen=True)
class Segment:
    """What was said from here to there, in seconds of the asset's time line."""

    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True)
class Transcript:
    """text: all segments. gaps: what failed, neighbouring stretches with the same code as one."""

    text: str
    segments: list[Segment] = field(default_factory=list)
    gaps: list[Heard] = field(default_factory=list)

    def gap_message(self, done: str) -> str | None:
        """For people: where something was not `done`, and why. None without any gap."""
        if not self.gaps:
            return None
        return f"not {done}: {named(self.gaps)}"


def stitch(windows: Iterable[Heard]) -> Transcript:
    """Windows in any order -> the transcript in the order of time."""
    segments: list[Segment] = []
    gaps: list[Heard] = []
    for window in sorted(windows, key=lambda window: (window.start_s, window.end_s)):
        if window.failure is not None:
            before = gaps[-1] if gaps else None
            after_text = bool(segments) and before and segments[-1].start_s >= before.end_s
            if before and before.failure == window.failure and not after_text:
                gaps[-1] = Heard(
                    before.start_s, max(before.end_s, window.end_s), None, before.failure
                )
            else:
                gaps.append(window)
            continue
        text = plain(window.text or "")
        if text not in NOTHING:
            segments.append(Segment(window.start_s, window.end_s, text))
    return Transcript(join([segment.text for segment in segments]), segments, gaps)


def named(gaps: Sequence[Heard]) -> str:
    """The first gaps with their times and failures, and how many more there are."""
    shown = [f"{clock(gap.start_s)}-{clock(gap.end_s)} {gap.failure}" for gap in gaps[:NAMED_GAPS]]
    more = len(gaps) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def plain(text: str) -> str:
    """One line, without doubled spaces."""
    return " ".join(text.split())


def join(texts: Sequence[str]) -> str:
    """One after the other, with a space where the script writes spaces."""
    joined = ""
    for text in texts:
        spaceless = joined and SPACELESS.match(joined[-1]) and SPACELESS.match(text[:1])
        joined += text if not joined or spaceless else f" {text}"
    return joined


def split_translation(text: str, target: str | None) -> tuple[str, str | None]:
    """An answer -> what was said, and its translation, if there is one and `target` was asked for."""
    if target is None:
        return plain(text), None
    said, mark, translated = text.partition(f"\n{target}:")
    return plain(said), plain(translated) if mark else None


def with_translation(said: str, translated: str | None, target: str | None) -> str:
    """What `split_translation` takes apart."""
    return said if translated is None else f"{said}\n{target}: {translated}"


def clock(seconds: float) -> str:
    """h:mm:ss.s"""
    tenths = round(max(0.0, seconds) * 10)
    return f"{tenths // 36000}:{tenths // 600 % 60:02}:{tenths // 10 % 60:02}.{tenths % 10}"
