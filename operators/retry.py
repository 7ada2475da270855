"""A second chance for a window of speech: shorter pieces, where the whole one gave no transcript.

The model understands speech best early in its prompt, and a loop often hangs on one stretch of sound,
so a window that looped, was refused, or is said to hold no speech is asked again as two halves.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from operators.prepare_image import media_hash
from operators.prompt import Prompt
from operators.requests import Answer, AudioRequest
from operators.stitch import NOTHING, join, split_translation, with_translation

# What an assistant says instead of a transcript. Nothing that people say to each other: "I'm sorry, I
# can't hear you" is speech.
REFUSAL = re.compile(
    r"\bas an ai(, i\b| (language )?model\b)"
    r"|\b(unable to|not able to|cannot|can't) (process|transcribe|access|hear|provide)"
    r" (this|the|any|a) (audio|speech|recording|sound|transcription)",
    re.IGNORECASE,
)
# A refusal is short; in a long answer the same words are speech.
REFUSAL_CHARS = 240
# Voice detection heard somebody for so long: "no speech" is then an answer to doubt. 25 frames, one
# second; two words with the margins that are kept around speech.
DOUBTED_FRAMES = 25


def is_refusal(text: str) -> bool:
    return len(text) <= REFUSAL_CHARS and REFUSAL.search(text) is not None


def went_wrong(answer: Answer) -> bool:
    """Whether an answer is no transcript, for a reason that other settings may mend."""
    return answer.finish_reason in ("length", "repetition") or is_refusal(answer.text)


def asked_again(request: AudioRequest, answer: Answer, translate_to: str | None) -> bool:
    """Whether a window's answer went wrong, or leaves out what voice detection heard."""
    if went_wrong(answer):
        return True
    said, _ = split_translation(answer.text, translate_to)
    if answer.error_code is not None or said not in NOTHING:
        return False
    return int(np.count_nonzero(request.frames.any(axis=1))) >= DOUBTED_FRAMES


def halves(
    request: AudioRequest, prompt: Prompt, variables: dict[str, str] | None
) -> list[AudioRequest]:
    """The window as two, parted in its middle half where two frames (80 ms) are the most quiet.

    Of equal places the one next to the middle. Running speech has no silent frames, as voice detection
    keeps what is around words, and a word that is cut in two is lost or said twice.
    """
    frames = request.frames
    if len(frames) < 2:
        return []
    middle = len(frames) // 2
    power = np.square(frames, dtype=np.float64).mean(axis=1)
    places = range(len(frames) // 4 + 1, 3 * len(frames) // 4) or (middle,)
    place = min(places, key=lambda at: (power[at - 1] + power[at], abs(at - middle)))
    made = []
    for part in (frames[:place], frames[place:]):
        ids = prompt.window(len(part), variables)
        digest = media_hash(part.tobytes(), len(part), 1)
        made.append(AudioRequest(ids, prompt.placeholder(ids), part, digest, request.max_tokens))
    return made


def joined(whole: Answer, parts: Sequence[Answer], translate_to: str | None) -> Answer:
    """The parts' answers as one, or `whole` where there are none.

    Where one of them went wrong too, the window has: with the fault of `whole`, or with the part's
    where `whole` only said that nobody spoke. Tokens are all counted.
    """
    if not parts:
        return whole
    bad = [part for part in parts if went_wrong(part) or part.error_code]
    if bad:
        said = whole if went_wrong(whole) else bad[0]
    else:
        said = replace(parts[0], text=_joined_text(parts, translate_to))
    answers = [whole, *parts]
    return replace(
        said,
        prompt_tokens=sum(answer.prompt_tokens for answer in answers),
        media_tokens=sum(answer.media_tokens or 0 for answer in answers),
        output_tokens=sum(answer.output_tokens for answer in answers),
    )


def _joined_text(parts: Sequence[Answer], translate_to: str | None) -> str:
    pairs = [split_translation(part.text, translate_to) for part in parts]
    pairs = [(said, translated) for said, translated in pairs if said not in NOTHING]
    translations = [translated for _, translated in pairs if translated]
    said = join([said for said, _ in pairs])
    return with_translation(said, join(translations) if translations else None, translate_to)
