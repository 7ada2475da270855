"""Two texts to counts of edits: made alike by language, then compared in words and in characters."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple, dataclass
from operator import add

import jiwer
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

ENGLISH = re.compile(r"en|eng|english")
# Written without spaces between words, so that a word error rate says nothing.
UNSPACED = re.compile(
    r"zh|zho|chi|cmn|yue|wuu|nan|chinese|mandarin|cantonese|ja|jpn|japanese|th|tha|thai|lo|lao"
    r"|km|khm|khmer|my|mya|bur|burmese|myanmar|bo|bod|tib|tibetan"
)
UNSPACED_SCRIPTS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
LETTERS_LOOKED_AT = 1000

NORMALISERS: dict[str, Callable[[str], str]] = {
    "english": EnglishTextNormalizer(),
    # marks are kept: Thai and Indic vowels are marks
    "basic": BasicTextNormalizer(preserve_marks=True),
}


@dataclass(frozen=True, slots=True)
class Edits:
    """Counts of words or of characters."""

    reference: int = 0
    answer: int = 0
    substitutions: int = 0
    insertions: int = 0
    deletions: int = 0

    def __add__(self, other: Edits) -> Edits:
        return Edits(*map(add, astuple(self), astuple(other)))

    @property
    def errors(self) -> int:
        return self.substitutions + self.insertions + self.deletions

    @property
    def rate(self) -> float | None:
        """None where the reference is empty."""
        return self.errors / self.reference if self.reference else None


@dataclass(frozen=True, slots=True)
class Measured:
    """Both texts as they were compared."""

    reference: str
    answer: str
    words: Edits
    characters: Edits


def measure(reference: str, answer: str, normaliser: str, unspaced: bool) -> Measured:
    """Either may be empty. `unspaced`: spaces are no characters."""
    said, heard = _normal(reference, normaliser), _normal(answer, normaliser)
    words = _edits(jiwer.process_words(said, heard))
    pair = (said.replace(" ", ""), heard.replace(" ", "")) if unspaced else (said, heard)
    return Measured(said, heard, words, _edits(jiwer.process_characters(*pair)))


def _normal(text: str, how: str) -> str:
    """Words by one space. The English form leaves one dot of three; what holds no letter is no word."""
    words = NORMALISERS[how](text).split()
    return " ".join(word for word in words if any(map(str.isalnum, word)))


def _edits(out: jiwer.WordOutput | jiwer.CharacterOutput) -> Edits:
    right = out.hits + out.substitutions
    counts = (out.substitutions, out.insertions, out.deletions)
    return Edits(right + out.deletions, right + out.insertions, *counts)


def normaliser_for(language: str | None, text: str) -> tuple[str, bool]:
    """(english or basic, no spaces between words). Without a known language the letters decide."""
    name = re.split(r"[^a-z]", (language or "").strip().lower())[0]  # a {variable} has none
    if ENGLISH.fullmatch(name):
        return "english", False
    if name not in ("", "unknown", "und", "auto"):
        return "basic", UNSPACED.fullmatch(name) is not None
    letters = [char for char in text if char.isalpha()][:LETTERS_LOOKED_AT]
    scripts = Counter(unicodedata.name(char, "?").split(" ")[0] for char in letters)
    most = scripts.most_common(1)[0][0] if scripts else "LATIN"
    return ("english" if most == "LATIN" else "basic"), most.startswith(UNSPACED_SCRIPTS)
