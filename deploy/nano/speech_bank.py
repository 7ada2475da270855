"""A bank of spoken words: each word by several espeak-ng voices at several speeds and pitches.

Recording is the slow part (about 10 ms a word), so a bank is kept in one .npz file and the
generators only put recordings together.
"""

import io
import subprocess
import wave
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from deploy.nano.words import SPOKEN

Samples = NDArray[np.int16]

SAMPLE_RATE_HZ: Final = 16_000
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
_QUIET: Final = 0.01


@dataclass(frozen=True)
class Take:
    """How one recording is spoken: speed in words a minute, pitch 0..99."""

    word: str
    voice: str
    speed_wpm: int
    pitch: int


def speak(take: Take) -> Samples:
    """Return the word as int16 at 16 kHz, its silent ends cut off, peak at half of full scale."""
    command = ["espeak-ng", "-v", take.voice, "-s", str(take.speed_wpm), "-p", str(take.pitch)]
    done = subprocess.run(  # noqa: S603
        [*command, "--stdout", take.word], capture_output=True, check=True
    )
    with wave.open(io.BytesIO(done.stdout)) as recording:
        rate = recording.getframerate()
        raw = np.frombuffer(recording.readframes(2**24), dtype=np.int16).astype(np.float32)
    sound = resample(raw, rate, SAMPLE_RATE_HZ)
    loud = np.flatnonzero(np.abs(sound) > _QUIET * np.abs(sound).max())
    sound = sound[loud[0] : loud[-1] + 1]
    loudest: Samples = (sound * (16384.0 / np.abs(sound).max())).astype(np.int16)
    return loudest


def resample(sound: NDArray[np.float32], rate_hz: int, wanted_hz: int) -> NDArray[np.float32]:
    """Resample by cutting or padding the spectrum; meant for recordings of seconds."""
    if rate_hz == wanted_hz:
        return sound
    count = round(len(sound) * wanted_hz / rate_hz)
    spectrum = np.fft.rfft(sound)[: count // 2 + 1]
    return (np.fft.irfft(spectrum, count) * (count / len(sound))).astype(np.float32)


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
    """Speak every take, two at a time."""
    wanted = takes(seed, per_voice)
    with ThreadPoolExecutor(2) as pool:
        sounds = list(pool.map(speak, wanted))
    recordings: dict[str, list[Samples]] = {word: [] for word in SPOKEN}
    for take, sound in zip(wanted, sounds, strict=True):
        recordings[take.word].append(sound)
    return Bank(recordings)


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
    with np.load(path) as stored:
        ends = np.cumsum(stored["lengths"])
        sounds = np.split(stored["samples"], ends[:-1])
        recordings: dict[str, list[Samples]] = {word: [] for word in SPOKEN}
        for word, sound in zip(stored["words"], sounds, strict=True):
            recordings[str(word)].append(sound)
    return Bank(recordings)
