"""The media stage for sound: a span of a sound track to its windows.

A span's windows, each at most audio.window_s long and with zeros where nobody speaks, as frames and
token ids. What a window holds depends on file and settings only (windows.py). A span in which nobody
speaks has no windows, and the model is not asked.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from operators.decode_audio import Stretch, decode_tiles
from operators.errors import MediaError
from operators.frames import SAMPLE_RATE_HZ, Waveform, frames
from operators.prepare_image import media_hash
from operators.prepared import Row, Window, check_division
from operators.probe import Sound, probe_audio
from operators.prompt import Prompt
from operators.settings import AudioSettings
from operators.voice import (
    CHUNK_SAMPLES,
    Probabilities,
    only_speech,
    speech_probabilities,
    speech_regions,
)
from operators.windows import LEADS, Grid, cut, grid

# Headers are this far from the truth without anything being wrong, however long a recording is.
LEAST_MISSING_S = 1.0
# Stretches that a message names; more are counted.
NAMED_STRETCHES = 5


class Tile(NamedTuple):
    """The stretch around a boundary: where it starts (a whole chunk), and what is there."""

    start: int
    samples: Waveform
    probabilities: Probabilities


class Speech(NamedTuple):
    """A window's speech: samples with zeros between the words, and where it starts, in samples."""

    start: int
    samples: Waveform


class Read(NamedTuple):
    """A span's tiles by boundary; in samples, where its sound ended and what of it is lost.

    The tiles may go on in silence behind the end (decode_audio.Decoded).
    """

    tiles: dict[int, Tile]
    end: int
    lost: list[Stretch]


class Heard(NamedTuple):
    """A span: its windows with speech, and the sample at which the last one was cut."""

    windows: list[Speech]
    end: int


class PrepareSpeech:
    """A span of a sound track to its windows (media_files.Prepare)."""

    def __init__(self, audio: AudioSettings, prompt: Prompt) -> None:
        self._audio = audio
        self._prompt = prompt

    def __call__(self, row: Row, path: str, asked: dict[str, Any]) -> None:
        """Raises MediaError where nothing of the span can be had."""
        started = time.perf_counter()
        sound = probe_audio(path, self._audio)
        row.duration_s = sound.duration_s
        found = grid(sound.duration_s, self._audio)
        index, track = asked["track_index"], asked["track"]
        check_division(asked, found.spans)
        read = read_tiles(path, sound, found, found.span(index), self._audio, track)
        row.decode_s = time.perf_counter() - started
        started = time.perf_counter()
        heard = hear(read, found, found.span(index), self._audio)
        row.gap = missing(read, heard.end, sound, found, index)
        variables = json.loads(asked["variables"] or "null")
        row.windows = [self._window(speech, variables) for speech in heard.windows]
        row.prepare_s = time.perf_counter() - started

    def _window(self, speech: Speech, variables: dict[str, str] | None) -> Window:
        framed = frames(speech.samples)
        media = framed.data.cast("B")
        return Window(
            tokens=self._prompt.window(len(framed), variables),
            media=media,
            columns=len(framed),
            rows=1,
            media_hash=media_hash(media, len(framed), 1),
            start_s=speech.start / SAMPLE_RATE_HZ,
            end_s=(speech.start + len(speech.samples)) / SAMPLE_RATE_HZ,
        )


def read_tiles(
    path: str, sound: Sound, grid: Grid, windows: range, settings: AudioSettings, track: str
) -> Read:
    """The tiles that these windows need. Those behind the end of the stream are empty."""
    tiles = range(windows.start, windows.stop + 1)
    decoded = decode_tiles(path, sound, grid, tiles, settings, track)
    found = {}
    for (_, wanted), piece in zip(grid.blocks(tiles), decoded.pieces, strict=True):
        start, samples = piece.start, piece.samples
        for boundary in wanted:
            begin, end = grid.tile(boundary)
            # one and the same at the start of the stream
            leads = {max(0, begin - chunks * CHUNK_SAMPLES) for chunks in LEADS}
            voiced = [
                speech_probabilities(samples[lead - start : end - start])[
                    (begin - lead) // CHUNK_SAMPLES :
                ]
                for lead in leads
            ]
            found[boundary] = Tile(
                begin, samples[begin - start : end - start], np.maximum.reduce(voiced)
            )
    return Read(found, decoded.end, [lost for piece in decoded.pieces for lost in piece.lost])


def hear(read: Read, grid: Grid, windows: range, settings: AudioSettings) -> Heard:
    """Cut the windows out of their tiles, and keep what is speech."""
    tiles, end = read.tiles, read.end

    def boundary(index: int) -> int:
        if index == 0:
            return 0
        if index == grid.windows:
            return end
        tile = tiles[index]
        return cut(grid, index, tile.probabilities, tile.samples, settings.speech_threshold)

    found: list[Speech] = []
    stop = 0
    for window in windows:
        start, stop = boundary(window), min(boundary(window + 1), end)
        # only where the stream goes on behind the end that its header gives
        stop = min(stop, start + grid.longest * CHUNK_SAMPLES)
        if stop > start:
            speech = _speech(tiles[window], tiles[window + 1], start, stop, settings)
            found.extend(speech)
    return Heard(found, stop)


def missing(read: Read, heard: int, sound: Sound, grid: Grid, index: int) -> MediaError | None:
    """What of a span is not in its windows, which end at the sample `heard`.

    Raises MediaError decode.corrupt where nothing of the span is there.
    """
    step_s = grid.step * CHUNK_SAMPLES / SAMPLE_RATE_HZ
    windows = grid.span(index)
    last = windows.stop == grid.windows
    begins = windows.start * step_s
    wanted = sound.duration_s if last else windows.stop * step_s
    end_s = read.end / SAMPLE_RATE_HZ
    inside = [
        (max(begins, first / SAMPLE_RATE_HZ), min(wanted, end_s, stop / SAMPLE_RATE_HZ))
        for first, stop in read.lost
    ]
    silent = [(first_s, stop_s) for first_s, stop_s in inside if first_s < stop_s]
    if wanted - end_s > LEAST_MISSING_S:
        silent.append((max(begins, end_s), wanted))
    said = []
    if silent:
        named = [f"{first_s:.1f} s to {stop_s:.1f} s" for first_s, stop_s in silent]
        shown = ", ".join(named[:NAMED_STRETCHES])
        more = len(named) - NAMED_STRETCHES
        shown += f" and {more} more" if more > 0 else ""
        said.append(f"no sound from {shown}: the file is damaged or ends early")
    # what the last window cannot hold is cut off, and so is what no tile reaches
    if last and (read.end > heard or read.end >= grid.tile(grid.windows)[1]):
        said.append(f"the stream goes on behind its given end at {wanted:.1f} s")
    if not said:
        return None
    gap = MediaError("decode.corrupt", "; ".join(said))
    if end_s <= begins:
        raise gap
    return gap


def _speech(
    left: Tile, right: Tile, start: int, stop: int, settings: AudioSettings
) -> Iterator[Speech]:
    """The window's speech, from its first word to its last; nothing where nobody speaks."""
    first = start // CHUNK_SAMPLES
    chunks = range(first, -(-stop // CHUNK_SAMPLES))
    joint = right.start // CHUNK_SAMPLES - left.start // CHUNK_SAMPLES
    offset = left.start // CHUNK_SAMPLES
    voiced = np.concatenate((left.probabilities[:joint], right.probabilities))
    sound = np.concatenate((left.samples[: right.start - left.start], right.samples))
    regions = speech_regions(
        voiced[chunks.start - offset : chunks.stop - offset],
        settings.speech_threshold,
        len(chunks) * CHUNK_SAMPLES,
    )
    # from chunks to the window, which may begin and end inside of one
    shift = first * CHUNK_SAMPLES - start
    inside = [
        (max(0, begin + shift), min(stop - start, end + shift))
        for begin, end in regions
        if min(stop - start, end + shift) > max(0, begin + shift)
    ]
    if inside:
        kept = only_speech(sound[start - left.start : stop - left.start], inside)
        yield Speech(start + inside[0][0], kept[inside[0][0] : inside[-1][1]])
