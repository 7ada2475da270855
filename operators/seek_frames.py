"""Seek: pictures from many places of a file by one ffmpeg process, each with its own timestamp.

The process opens the file once for each run of pictures, at the key frame before its first one, and
gives the runs one after the other. Filters print the timestamps to a second pipe.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import ffmpeg
import numpy as np
import numpy.typing as npt

from operators.ffmpeg_child import FORMATS, NOTES, PROTOCOLS, Done, run
from operators.frame_index import US, FrameIndex
from operators.probe_video import VideoFacts
from operators.settings import VideoSettings

# To open one more input costs as much as to decode so much of the stream: 50 to 85 ms and a second of
# 1080p at 25 pictures, for H.264, HEVC, VP9 and AV1.
OPEN_S = 1.0
# A process keeps all its decoders until its end. At 1080p one takes 66 MB of address space (AV1, the
# most): 20 and 22 bytes a pixel.
MOST_INPUTS = 32
INPUT_BYTES = 20 << 20
INPUT_BYTES_A_PIXEL = 24
# of pictures from one process
MOST_BYTES = 1 << 28
# ffmpeg takes 3/23 s off a seek where the container has times of decoding.
SEEK_BACK_US = 140_000
# Where the demuxer cannot find key frames: so far before one.
SEEK_EARLY_US = 500_000
# Containers round times to milliseconds at most.
ROUNDING_US = 500
NOTE = re.compile(rb"pts:(-?\d+)\s+pts_time:\S+\ni=(\d+)\n")

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Run:
    """Places of an index whose pictures are decoded in one go, in order.

    every: all pictures from the first to the last place, which are all that `places` holds.
    """

    places: tuple[int, ...]
    every: bool = False


@dataclass(frozen=True)
class Shape:
    """What comes out of the pipe: rgb24 of this size, made by these filters."""

    width: int
    height: int
    filters: Callable[[Any], Any]

    @property
    def bytes(self) -> int:
        return self.width * self.height * 3


def plan_runs(index: FrameIndex, wanted: Sequence[int]) -> list[Run]:
    """Pictures in runs: on from the picture before, or from a key frame of its own if that is less."""
    runs: list[list[int]] = []
    for place in wanted:
        key = index.start(place)
        if key is None:
            continue
        if runs and index.shown_us[key] - index.shown_us[runs[-1][-1]] <= OPEN_S * US:
            runs[-1].append(place)
        else:
            runs.append([place])
    return [Run(tuple(places)) for places in runs]


def seek_frames(
    path: str,
    facts: VideoFacts,
    index: FrameIndex,
    runs: Sequence[Run],
    shape: Shape,
    settings: VideoSettings,
    ends: float,
    decoder: Mapping[str, str] | None = None,
) -> Iterator[tuple[list[tuple[int, Pixels]], Done]]:
    """([(microseconds, pixels uint8 [height, width, 3])], how it ended) of each process.

    Of a picture that is damaged the next one may come. decoder: further input options. Raises
    MediaError decode.timeout.
    """
    for batch in _batches(runs, facts, settings, max(1, MOST_BYTES // shape.bytes)):
        command = _command(path, facts, index, batch, shape, decoder or {})
        expected = sum(len(part.places) for part in batch) + 2 * len(batch)
        # a file may have more pictures than its packets say: fields, hidden ones
        most = (2 * expected) * shape.bytes + 1
        done = run(command, settings, most_bytes=most, ends=ends)
        yield _pictures(done, shape, index.shift_us), done


def _batches(
    runs: Sequence[Run], facts: VideoFacts, settings: VideoSettings, most_frames: int
) -> Iterator[list[Run]]:
    """Runs in batches, one process each: bounded in inputs and in the bytes that come out."""
    samples = facts.width * facts.height * (2 if facts.bit_depth > 8 else 1)
    fits = settings.max_memory_bytes // (INPUT_BYTES + INPUT_BYTES_A_PIXEL * samples)
    most_inputs = min(MOST_INPUTS, max(1, fits))
    batch: list[Run] = []
    room = most_frames
    for whole in runs:
        for first in range(0, len(whole.places), most_frames):
            part = Run(whole.places[first : first + most_frames], whole.every)
            if batch and (len(batch) == most_inputs or len(part.places) > room):
                yield batch
                batch, room = [], most_frames
            batch.append(part)
            room -= len(part.places)
    if batch:
        yield batch


def _command(
    path: str,
    facts: VideoFacts,
    index: FrameIndex,
    runs: Sequence[Run],
    shape: Shape,
    decoder: Mapping[str, str],
) -> list[str]:
    streams = []
    for number, part in enumerate(runs):
        options = {
            "threads": 1,
            "protocol_whitelist": PROTOCOLS,
            "format_whitelist": FORMATS,
            # a stream that changes its size must not start the filters, and with them the order,
            # again; `scale` takes any size
            "reinit_filter": 0,
            **decoder,
        }
        seek_us = _seek_us(index, part.places[0], facts)
        if seek_us is not None:
            # absolute, and all pictures from the key frame on: `select` takes its own
            options |= {"seek_timestamp": 1, "noaccurate_seek": None, "ss": f"{seek_us / US:.6f}"}
        times_us = [int(index.shown_us[place]) + index.shift_us for place in part.places]
        chosen = f"gte(pts,{times_us[0] - ROUNDING_US})" if part.every else _selection(times_us)
        stream = (
            ffmpeg.input(facts.url(path), **options)[str(facts.index)]
            .filter("settb", "AVTB")
            .filter("trim", end_pts=_end_us(index, part))
            .filter("select", chosen)
            .filter("metadata", mode="add", key="i", value=number)
            .filter("metadata", mode="print", key="i", direct=1, file=NOTES)
        )
        streams.append(shape.filters(stream).filter("format", "rgb24").filter("setsar", 1))
    command: list[str] = (
        ffmpeg.concat(*streams)
        .output("pipe:", format="rawvideo", pix_fmt="rgb24", fps_mode="passthrough")
        .global_args("-nostdin", "-hide_banner", "-v", "error", "-copyts")
        .global_args("-filter_complex_threads", "1", "-max_error_rate", "1")
        .compile()
    )
    return command


def _seek_us(index: FrameIndex, place: int, facts: VideoFacts) -> int | None:
    """Where to seek so that the demuxer ends at the picture's key frame; None: read from the start."""
    key = index.start(place)
    assert key is not None  # noqa: S101
    time_us = int(index.shown_us[key])
    if time_us <= (facts.start_s + facts.origin_s) * US:
        return None
    if not facts.seeks_to_keys:
        return int(index.decoded_us[key]) - SEEK_EARLY_US
    seek_us = time_us + SEEK_BACK_US
    later = np.flatnonzero(index.key[key + 1 :])
    if len(later):
        # well before the next key frame is decoded, which is earlier than it is shown; to land at the
        # key frame before costs time only
        next_us = int(index.decoded_us[key + 1 + later[0]])
        seek_us = min(seek_us, (int(index.decoded_us[key]) + next_us) // 2)
    return seek_us


def _end_us(index: FrameIndex, part: Run) -> int:
    """A run of chosen pictures may give the one behind its last too, in case that one is damaged."""
    last = part.places[-1]
    if not part.every:
        last = min(last + 1, len(index.shown_us) - 1)
    return int(index.shown_us[last]) + index.shift_us + ROUNDING_US


def _selection(times_us: Sequence[int]) -> str:
    """ffmpeg's expression for the first picture at or after each time.

    Register 1 counts the times that are not after a picture, 0 those of the picture before. The count
    is a binary search, as a picture's cost would grow with the number of times.
    """

    def count(first: int, last: int) -> str:
        if first == last:
            return str(first)
        middle = (first + last) // 2
        limit = times_us[middle] - ROUNDING_US
        return f"if(lt(pts,{limit}),{count(first, middle)},{count(middle + 1, last)})"

    return f"gt(st(1,{count(0, len(times_us))}),ld(0))*st(0,ld(1))"


def _pictures(done: Done, shape: Shape, shift_us: int) -> list[tuple[int, Pixels]]:
    # runs come out one after the other; their notes come as they are decoded
    notes = [(int(number), int(time_us)) for time_us, number in NOTE.findall(done.notes)]
    notes.sort(key=itemgetter(0))
    count = len(done.stdout) // shape.bytes
    pixels = np.frombuffer(done.stdout, np.uint8, count * shape.bytes)
    frames = pixels.reshape(count, shape.height, shape.width, 3)
    # a process that died has noted more than it wrote
    return [(time_us - shift_us, frame) for (_, time_us), frame in zip(notes, frames, strict=False)]
