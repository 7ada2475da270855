"""A second chance for a window of speech: shorter pieces, where the whole one looped or was refused.

The model understands speech best early in its prompt, and a loop often hangs on one stretch of sound,
so a window that went wrong is asked again as two halves.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from operators.prepare_image import media_hash
from operators.prompt import Prompt
from operators.requests import Answer, AudioRequest
from operators.stitch import join, plain

# What an assistant says instead of a transcript. Nothing that people say to each other: "I'm sorry, I
# can't hear you" is speech.
REFUSAL = re.compile(
    r"\bas an ai\b|\b(unable to|not able to|cannot|can't) (process|transcribe|access|hear|provide)"
    r" (this|the|any|a) (audio|speech|recording|sound|transcription)",
    re.IGNORECASE,
)
# A refusal is short; in a long answer the same words are speech.
REFUSAL_CHARS = 240


def is_refusal(text: str) -> bool:
    return len(text) <= REFUSAL_CHARS and REFUSAL.search(text) is not None


def went_wrong(answer: Answer) -> bool:
    """Whether an answer is no transcript, for a reason that other settings may mend."""
    return answer.finish_reason in ("length", "repetition") or is_refusal(answer.text)


def halves(
    request: AudioRequest, prompt: Prompt, variables: dict[str, str] | None
) -> list[AudioRequest]:
    """The window as two, parted at the silent frames nearest to its middle, else in the middle."""
    frames = request.frames
    if len(frames) < 2:
        return []
    middle = len(frames) // 2
    silent = np.flatnonzero(~frames.any(axis=1))
    silent = silent[(silent > len(frames) // 4) & (silent < 3 * len(frames) // 4)]
    place = int(silent[np.argmin(np.abs(silent - middle))]) if len(silent) else middle
    made = []
    for part in (frames[:place], frames[place:]):
        ids = prompt.window(len(part), variables)
        digest = media_hash(part.tobytes(), len(part), 1)
        made.append(AudioRequest(ids, prompt.placeholder(ids), part, digest, request.max_tokens))
    return made


def joined(whole: Answer, parts: Sequence[Answer]) -> Answer:
    """The parts' answers as one, or `whole` where a part went wrong as well. Tokens are all counted."""
    answers = [whole, *parts]
    good = parts and not any(went_wrong(part) or part.error_code for part in parts)
    return Answer(
        text=join([plain(part.text) for part in parts if part.text]) if good else whole.text,
        finish_reason="stop" if good else whole.finish_reason,
        prompt_tokens=sum(answer.prompt_tokens for answer in answers),
        media_tokens=sum(answer.media_tokens or 0 for answer in answers),
        output_tokens=sum(answer.output_tokens for answer in answers),
    )
