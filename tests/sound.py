"""Test recordings with known words, made here with espeak-ng and ffmpeg."""

from __future__ import annotations

import io
import random
import subprocess
import wave
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

RATE_HZ = 16_000
WORDS = [
    "seven",
    "apple",
    "garden",
    "window",
    "yellow",
    "mother",
    "river",
    "station",
    "paper",
    "morning",
    "number",
    "orange",
]

Waveform = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Spoken:
    """Mono samples at 16 kHz, and (word, start_s, end_s) of each word in them."""

    samples: Waveform
    words: list[tuple[str, float, float]]


@cache
def word(text: str, voice: str = "en-us") -> Waveform:
    """One word, its silent ends cut off, peak 0.5."""
    done = subprocess.run(
        ["espeak-ng", "-v", voice, "-s", "140", "--stdout", text], capture_output=True, check=True
    )
    with wave.open(io.BytesIO(done.stdout)) as file:
        rate = file.getframerate()
        raw = np.frombuffer(file.readframes(1 << 24), np.int16).astype(np.float32) / 32768
    sound = np.interp(np.arange(0, len(raw), rate / RATE_HZ), np.arange(len(raw)), raw)
    loud = np.flatnonzero(np.abs(sound) > 0.01 * np.abs(sound).max())
    sound = sound[loud[0] : loud[-1] + 1]
    return (sound * (0.5 / np.abs(sound).max())).astype(np.float32)


def spoken(duration_s: float, seed: int = 0, gaps_s: tuple[float, float] = (0.15, 1.2)) -> Spoken:
    """Words with random pauses between them and faint noise under them."""
    draw = random.Random(seed)
    samples = np.random.default_rng(seed).normal(0, 1e-3, int(duration_s * RATE_HZ))
    words, place = [], int(0.5 * RATE_HZ)
    while True:
        text = draw.choice(WORDS)
        sound = word(text, draw.choice(("en-us", "en-gb", "en-us+f3")))
        if place + len(sound) > len(samples):
            return Spoken(samples.astype(np.float32), words)
        samples[place : place + len(sound)] += sound
        words.append((text, place / RATE_HZ, (place + len(sound)) / RATE_HZ))
        place += len(sound) + int(draw.uniform(*gaps_s) * RATE_HZ)


def tone(duration_s: float, frequency_hz: float = 440.0) -> Waveform:
    time_s = np.arange(int(duration_s * RATE_HZ)) / RATE_HZ
    return (0.5 * np.sin(2 * np.pi * frequency_hz * time_s)).astype(np.float32)


def write(path: Path, samples: Waveform, *options: str, before: tuple[str, ...] = ()) -> Path:
    """[n] or [n, channels] at 16 kHz through ffmpeg; `options` are its output options."""
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    source = ["-f", "f32le", "-ar", str(RATE_HZ), "-ac", str(channels), *before, "-i", "pipe:"]
    subprocess.run(
        ["ffmpeg", "-v", "error", "-y", *source, *options, str(path)],
        input=np.ascontiguousarray(samples, "<f4").tobytes(),
        check=True,
    )
    return path


# file name -> output options: every container and codec that the tests know
FORMATS = {
    "a.wav": ("-ar", "44100", "-ac", "2"),
    "24bit.wav": ("-ar", "48000", "-c:a", "pcm_s24le"),
    "a.flac": ("-ar", "44100"),
    "cbr.mp3": ("-ar", "44100", "-b:a", "64k"),
    "vbr.mp3": ("-ar", "44100", "-q:a", "5"),
    "a.m4a": ("-ar", "44100", "-b:a", "64k"),
    "a.ogg": ("-ar", "44100", "-c:a", "libvorbis"),
    "a.opus": ("-c:a", "libopus", "-b:a", "32k"),
    "a.webm": ("-c:a", "libopus", "-b:a", "32k"),
    "aac.mkv": ("-ar", "44100", "-c:a", "aac"),
    "a.aac": ("-ar", "22050", "-c:a", "aac"),
    "a.avi": ("-ar", "44100", "-c:a", "libmp3lame"),
    "a.ts": ("-ar", "48000", "-c:a", "aac"),
}
