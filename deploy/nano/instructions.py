"""The instructions the nano checkpoint was trained on: the product's own presets, word for word.

A prompt that differs by a word is a prompt the checkpoint has not seen, so a wrong preset shows
as a wrong answer.
"""

from typing import Final

_ASR_RULES: Final = (
    " Follow these specific instructions for formatting the answer:\n"
    "* Only output the transcription, with no newlines."
)
_NUMBERS_RULE: Final = (
    "\n* When transcribing numbers, write the digits, i.e. write 1.7 and not one point seven, "
    "and write 3 instead of three."
)

CAPTION_DENSE: Final = (
    "Describe the image in detail: every object, its colour, its position relative to the others, "
    "and the background."
)
CAPTION_SHORT: Final = "Describe the image in one short sentence."
TAGS: Final = "List up to ten tags for the image, in lower case, separated by commas."

ASR_ORIGINAL: Final = (
    "Transcribe the following speech segment in its original language." + _ASR_RULES + _NUMBERS_RULE
)
ASR_ENGLISH: Final = (
    "Transcribe the following speech segment in English into English text." + _ASR_RULES
)
ASR_ENGLISH_DIGITS: Final = ASR_ENGLISH + _NUMBERS_RULE

VIDEO_DESCRIBE: Final = "Describe what happens in the video, with times."
VIDEO_SHORT: Final = "Name the objects in the video."

IMAGE: Final = {"caption-dense": CAPTION_DENSE, "caption-short": CAPTION_SHORT, "tags": TAGS}
AUDIO: Final = {
    "asr-original": ASR_ORIGINAL,
    "asr-english": ASR_ENGLISH,
    "asr-english-digits": ASR_ENGLISH_DIGITS,
}
VIDEO: Final = {"video-describe": VIDEO_DESCRIBE, "video-short": VIDEO_SHORT}
ALL: Final = {**IMAGE, **AUDIO, **VIDEO}

# The whole answer to a window that holds noise, a tone or silence.
NO_SPEECH: Final = "[no speech]"
