"""Voice activity: where in a waveform somebody speaks.

Silero VAD's own "sequence" export, all chunks of a stretch in one call: 420 times real time on one
core, where its streaming model makes 190. Each stretch is heard twice (windows.LEADS). onnxruntime
and not the package's torch loader, because the media worker holds no torch: 75 MB resident instead
of 300. The package is there for the model file, whose version is thereby pinned.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from operators.frames import SAMPLE_RATE_HZ, Waveform

# What the model sees at once, after the 64 samples before it.
CHUNK_SAMPLES = 512
CONTEXT_SAMPLES = 64
STATE_SHAPE = (1, 1, 128)
# Of the threshold: what reaches this much is kept where the threshold itself is reached nearby. Silero
# hears a word in a thousand only faintly, isolated ones after music first of all.
FAINT = 0.6
# Of the threshold: where a stretch of speech ends.
ENDED = 0.4
# A shorter burst is a click: 96 ms. The shortest word of the speech bank takes 150.
LEAST_SPEECH_CHUNKS = 3
# Kept on both sides of speech: the model starts late on soft consonants and stops early.
MARGIN_SAMPLES = SAMPLE_RATE_HZ // 5

Probabilities = npt.NDArray[np.float32]
Region = tuple[int, int]


def speech_probabilities(samples: Waveform) -> Probabilities:
    """float32 [n] at 16 kHz -> [ceil(n / 512)], from a clean state.

    Rounded to 1/256, so that the last bits of another processor's arithmetic don't move a cut.
    """
    count = -(-len(samples) // CHUNK_SAMPLES)
    if count == 0:
        return np.zeros(0, np.float32)
    padded = np.zeros(CONTEXT_SAMPLES + count * CHUNK_SAMPLES, np.float32)
    padded[CONTEXT_SAMPLES : CONTEXT_SAMPLES + len(samples)] = samples
    chunks = np.lib.stride_tricks.sliding_window_view(padded, CONTEXT_SAMPLES + CHUNK_SAMPLES)
    state = np.zeros(STATE_SHAPE, np.float32)
    (found, *_) = _session().run(
        ["speech_probs"],
        {"input": np.ascontiguousarray(chunks[::CHUNK_SAMPLES]), "h": state, "c": state},
    )
    rounded: Probabilities = np.asarray(found, np.float32).reshape(-1)
    np.round(rounded * 256, out=rounded)
    rounded /= 256
    return rounded


def speech_regions(probabilities: Probabilities, threshold: float, samples: int) -> list[Region]:
    """(start, end) in samples of each stretch of speech, with its margin; overlapping ones joined.

    Chunk 0 starts at sample 0; regions lie within 0..samples. Faint stretches count where one
    reaches the threshold; where none does, nobody speaks.
    """
    runs = [
        run
        for run in _runs(probabilities, threshold)
        if _lasts(probabilities, run, FAINT * threshold)
    ]
    if not any(_lasts(probabilities, run, threshold) for run in runs):
        return []
    regions: list[Region] = []
    for first, last in runs:
        start = max(0, first * CHUNK_SAMPLES - MARGIN_SAMPLES)
        end = min(samples, last * CHUNK_SAMPLES + MARGIN_SAMPLES)
        if start >= end:
            continue
        if regions and start <= regions[-1][1]:
            start = regions.pop()[0]
        regions.append((start, end))
    return regions


def only_speech(samples: Waveform, regions: list[Region]) -> Waveform:
    """A copy with zeros outside the regions."""
    kept = np.zeros_like(samples)
    for start, end in regions:
        kept[start:end] = samples[start:end]
    return kept


def _runs(probabilities: Probabilities, threshold: float) -> list[Region]:
    """Chunks [first, last) of each stretch, from where it is faint until it has ended."""
    runs = []
    first: int | None = None
    for index, probability in enumerate(probabilities):
        if first is None:
            if probability >= FAINT * threshold:
                first = index
        elif probability < ENDED * threshold:
            runs.append((first, index))
            first = None
    if first is not None:
        runs.append((first, len(probabilities)))
    return runs


def _lasts(probabilities: Probabilities, run: Region, level: float) -> bool:
    return int(np.count_nonzero(probabilities[slice(*run)] >= level)) >= LEAST_SPEECH_CHUNKS


@cache
def _session() -> Any:  # noqa: ANN401
    import onnxruntime

    # Not `import silero_vad`: that imports torch.
    package = find_spec("silero_vad")
    if package is None or package.origin is None:
        raise ImportError("silero-vad is not installed")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    model = Path(package.origin).parent / "data" / "silero_vad_16k_sequence.onnx"
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
