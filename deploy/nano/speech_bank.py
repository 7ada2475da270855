"""A bank of spoken words: each word by several espeak-ng voices at several speeds and pitches.

A bank is kept in one .npz file; the generators only put recordings together.
"""

import io
import json
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from deploy.nano.espeak import Samples
from deploy.nano.words import SPOKEN

VOICES: Final = (
    "en-us",
    "en-gb",
    "en-gb-x-rp",
    "en-gb-scotland",
    "en-us+f2",
    "en-us+f4",
    "en-gb+f3",
    "en-us+m3",
    "en-us+m7",
    "en-gb+m1",
)
_ESPEAK: Final = Path(__file__).with_name("espeak.py")


@dataclass(frozen=True)
class Take:
    """How one recording is spoken: speed in words a minute, pitch 0..99."""

    word: str
    voice: str
    speed_wpm: int
    pitch: int


def speak(voice: str, wanted: list[Take]) -> list[Samples]:
    """Return recordings in one voice, each int16 at 16 kHz (espeak.py, in a process of its own)."""
    asked = json.dumps([(take.word, take.speed_wpm, take.pitch) for take in wanted])
    done = subprocess.run(  # noqa: S603
        [sys.executable, str(_ESPEAK), voice],
        input=asked.encode(),
        stdout=subprocess.PIPE,
        check=True,
    )
    with np.load(io.BytesIO(done.stdout)) as arrays:
        return _split(arrays)


def takes(seed: int, per_voice: int) -> list[Take]:
    """Draw `per_voice` speeds and pitches for each word and voice."""
    rng = np.random.default_rng(seed)
    return [
        Take(word, voice, int(rng.integers(120, 201)), int(rng.integers(20, 81)))
        for word in SPOKEN
        for voice in VOICES
        for _ in range(per_voice)
    ]


@dataclass(frozen=True)
class Bank:
    """Recordings by word."""

    recordings: dict[str, list[Samples]]

    def pick(self, word: str, rng: np.random.Generator) -> Samples:
        """Return one recording of the word."""
        choices = self.recordings[word]
        return choices[int(rng.integers(len(choices)))]


def record(seed: int, per_voice: int) -> Bank:
    """Speak every take, two voices at a time."""
    wanted: dict[str, list[Take]] = {voice: [] for voice in VOICES}
    for take in takes(seed, per_voice):
        wanted[take.voice].append(take)
    with ThreadPoolExecutor(2) as pool:
        spoken = list(pool.map(speak, wanted, wanted.values()))
    recordings: dict[str, list[Samples]] = {word: [] for word in SPOKEN}
    for asked, sounds in zip(wanted.values(), spoken, strict=True):
        for take, sound in zip(asked, sounds, strict=True):
            recordings[take.word].append(sound)
    return Bank(recordings)


def _split(arrays: Mapping[str, NDArray[Any]]) -> list[Samples]:
    return np.split(arrays["samples"], np.cumsum(arrays["lengths"])[:-1])


def load_or_record(path: Path, seed: int, per_voice: int) -> Bank:
    """Return the bank at `path`, recording it first where it is missing."""
    if not path.exists():
        bank = record(seed, per_voice)
        flat = [(w, s) for w, sounds in bank.recordings.items() for s in sounds]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(
            partial,
            words=np.array([w for w, _ in flat]),
            lengths=np.array([len(s) for _, s in flat]),
            samples=np.concatenate([s for _, s in flat]),
        )
        partial.replace(path)
    with np.load(path) as arrays:
        words, sounds = arrays["words"], _split(arrays)
    recordings: dict[str, list[Samples]] = {word: [] for word in SPOKEN}
    for word, sound in zip(words, sounds, strict=True):
        recordings[str(word)].append(sound)
    return Bank(recordings)
