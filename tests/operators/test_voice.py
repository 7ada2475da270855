"""Voice activity: speech is found, and nothing else is taken for it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from sound import RATE_HZ, Waveform, spoken, tone

from operators.voice import (
    CHUNK_SAMPLES,
    MARGIN_SAMPLES,
    only_speech,
    speech_probabilities,
    speech_regions,
)

RNG = np.random.default_rng(0)


def chords(duration_s: float) -> Waveform:
    """Decaying chords that change every half second."""
    pieces = []
    for index in range(int(duration_s * 2)):
        root = 110 * 2 ** ((index * 7 % 24) / 12)
        fade = np.exp(-2 * np.arange(RATE_HZ // 2) / RATE_HZ)
        pieces.append(sum(tone(0.5, root * ratio) for ratio in (1, 1.26, 1.5, 2)) / 4 * fade)
    return np.concatenate(pieces).astype(np.float32)


SILENT = {
    "silence": np.zeros(15 * RATE_HZ, np.float32),
    "white noise": RNG.normal(0, 0.1, 15 * RATE_HZ).astype(np.float32),
    "loud noise": np.clip(RNG.normal(0, 0.5, 15 * RATE_HZ), -1, 1).astype(np.float32),
    "faint noise": RNG.normal(0, 1e-4, 15 * RATE_HZ).astype(np.float32),
    "tone": tone(15),
    "hum": tone(15, 50),
    "chords": chords(15),
    "clicks": np.where(np.arange(15 * RATE_HZ) % 8000 == 0, 1, 0).astype(np.float32),
}


@pytest.mark.parametrize("name", SILENT)
def test_nobody_speaks(name: str) -> None:
    sound = SILENT[name]
    assert speech_regions(speech_probabilities(sound), 0.5, len(sound)) == []


def test_every_word_is_kept_and_pauses_become_zeros() -> None:
    recording = spoken(60, gaps_s=(0.9, 2.0))
    found = speech_probabilities(recording.samples)
    regions = speech_regions(found, 0.5, len(recording.samples))
    kept = only_speech(recording.samples, regions)
    for text, start_s, end_s in recording.words:
        start, end = int(start_s * RATE_HZ), int(end_s * RATE_HZ)
        whole = recording.samples[start:end]
        share = np.sum(kept[start:end] ** 2) / np.sum(whole**2)
        assert share > 0.999, (text, start_s)
    assert np.mean(kept == 0) > 0.25
    assert np.array_equal(kept[kept != 0], recording.samples[kept != 0])


def test_a_pure_function_of_its_samples() -> None:
    recording = spoken(20)
    first = speech_probabilities(recording.samples)
    speech_probabilities(RNG.normal(0, 1, 40_000).astype(np.float32))
    assert np.array_equal(first, speech_probabilities(recording.samples.copy()))
    assert len(first) == -(-len(recording.samples) // CHUNK_SAMPLES)
    assert np.array_equal(first * 256, np.round(first * 256))
    assert len(speech_probabilities(recording.samples[:0])) == 0
    assert len(speech_probabilities(recording.samples[:1])) == 1


def test_regions_have_a_least_length_margins_and_faint_neighbours() -> None:
    def regions(*probabilities: float) -> list[tuple[int, int]]:
        values = np.array(probabilities, np.float32)
        return speech_regions(values, 0.5, len(values) * CHUNK_SAMPLES)

    def region(first: int, last: int, count: int) -> tuple[int, int]:
        start, end = first * CHUNK_SAMPLES - MARGIN_SAMPLES, last * CHUNK_SAMPLES + MARGIN_SAMPLES
        return max(0, start), min(count * CHUNK_SAMPLES, end)

    quiet = [0.0] * 20
    assert regions(*quiet) == []
    assert regions(*quiet, 0.9, 0.9, *quiet) == []
    assert regions(*quiet, 0.9, 0.9, 0.9, *quiet) == [region(20, 23, 43)]
    assert regions(*quiet, 0.9, 0.22, 0.9, 0.9, *quiet) == [region(20, 24, 44)]
    # Faint words count beside sure ones, not alone.
    faint, sure = [0.32] * 3, [0.6] * 3
    assert regions(*quiet, *faint, *quiet) == []
    assert regions(*sure, *quiet, *faint, *quiet) == [region(0, 3, 46), region(23, 26, 46)]
    assert regions(*sure, *quiet, 0.32, 0.32, *quiet) == [region(0, 3, 45)]
    assert regions(*quiet, 0.9, 0.9, 0.9) == [region(20, 23, 23)]
    apart = regions(0.9, 0.9, 0.9, *quiet, 0.9, 0.9, 0.9)
    assert apart == [region(0, 3, 26), region(23, 26, 26)]
    near = regions(0.9, 0.9, 0.9, 0.0, 0.0, 0.0, 0.9, 0.9, 0.9)
    assert near == [(0, 9 * CHUNK_SAMPLES)]


def test_without_torch() -> None:
    check = (
        "import sys, numpy; from operators.voice import speech_probabilities;"
        "speech_probabilities(numpy.zeros(512, numpy.float32)); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
