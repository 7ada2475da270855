"""Probe: what a media file holds, read from its header by ffprobe. Nothing is decoded.

The time line of a file, for sound and pictures alike, starts where players start it: at the
container's first timestamp, and at zero for MP4 and Matroska, whose timestamps say where a late stream
begins. What is only of pictures is in probe_video.py.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any, BinaryIO

import ffmpeg

from operators.errors import MediaError
from operators.ffmpeg_child import FORMATS, INPUT, PROTOCOLS, REMOTE, run
from operators.ranged import Ranged, WholeFileError
from operators.settings import AudioSettings, VideoSettings

LEAST_S = 0.1
# A damaged header may say anything, and a plan has a row for each span: 30 days are 8,500 of them.
MOST_S = 30 * 86_400.0
# Their first timestamp is an offset that is meant; elsewhere it is where the clock stood.
FROM_ZERO = frozenset({"mov", "mp4", "m4a", "matroska", "webm"})
# One coded frame behind the other, without a container.
UNTIMED = frozenset({"aac", "ac3", "amr", "dts", "eac3", "loas", "mlp", "mp3", "truehd"})
# So many files are not read through again for each of their spans: FLV, films of older mkvmerge and
# recordings of browsers do not say how long their sound is, and a film has 24 spans and 10 GB.
REMEMBERED = 64
# ffprobe guesses from the bit rate where no header says how long the file is.
GUESSED = "Estimating duration from bitrate"
ENTRIES = (
    "format=format_name,start_time,duration"
    ":stream=index,codec_type,channels,start_time,duration:stream_tags=DURATION"
    ":stream_disposition=attached_pic"
)
# Where to look for the data chunk; tags and cue points may stand before it.
WAV_CHUNKS = 64
WAV_NO_LENGTH = 0x7FFFF000
# A page's flags and the number of its stream; one of the flags; more than the longest page.
OGG_PAGE = re.compile(rb"OggS\0(.).{8}(.{4})", re.DOTALL)
OGG_BEGINS = 2
OGG_PAGES_BYTES = 1 << 17
# A tag is anybody's text: of more digits Python makes no number.
CLOCK = re.compile(r"(\d{1,9}):(\d\d):(\d\d(?:\.\d+)?)")


@dataclass(frozen=True)
class Sound:
    """The sound track of a file: the first one, where there are several.

    Seconds on the recording's time line; `origin_s` is that line's zero in the file's timestamps.
    """

    index: int  # of the stream in the file
    start_s: float
    duration_s: float  # where the sound ends
    origin_s: float
    channels: int
    # The file has no usable duration: the packets were counted.
    counted: bool
    # Its packets carry times; elsewhere ffmpeg counts them.
    timed: bool
    # Several Ogg streams one behind the other, as a radio's recorder leaves them.
    chained: bool


def probe_audio(file: str | Ranged, settings: AudioSettings) -> Sound:
    """Of a local path, or of a remote file whose header is enough.

    Raises MediaError: decode.unsupported, no_audio, too_short, corrupt, empty, and the limits'; and
    WholeFileError where a remote file must be read whole.
    """
    header = read_header(file, settings, ENTRIES)
    sound = next((s for s in header.streams if has_sound(s)), None)
    if sound is None:
        raise MediaError("decode.no_audio", "the file has no sound track")
    first, origin = header.first_s, header.origin_s
    start = seconds(sound.get("start_time"))
    # Beside a picture the container's duration may be that of the picture.
    end = end_s(header, sound, alone=not any(map(is_video, header.streams)))
    chained = "ogg" in header.formats and _is_chained(file)
    guessed = end is None or header.guessed or chained
    promised = _wav_length_s(file) if guessed and "wav" in header.formats else None
    counted = guessed and promised is None
    if promised is not None:
        end = first + promised
    elif counted:
        path = whole(file)
        end = first + count_packets(path, file_version(path), sound["index"], settings)
    assert end is not None  # noqa: S101
    start_s = max(0.0, (first if start is None else start) - origin)
    if end - origin - start_s < LEAST_S:
        raise MediaError("decode.too_short", f"{max(0.0, end - origin - start_s):.3f} s of sound")
    refuse_years(end - origin)
    return Sound(
        index=int(sound["index"]),
        start_s=start_s,
        duration_s=end - origin,
        origin_s=origin,
        channels=int(sound["channels"]),
        counted=counted,
        timed=not header.formats & UNTIMED,
        chained=chained,
    )


@dataclass(frozen=True)
class Header:
    """What ffprobe reads of a file; streams as it names their fields."""

    formats: frozenset[str]
    streams: list[dict[str, Any]]
    # The container's first timestamp, and the zero of our time line among the timestamps.
    first_s: float
    origin_s: float
    # What the container says of itself.
    duration_s: float | None
    # Its durations are a guess from the bit rate.
    guessed: bool


def read_header(
    file: str | Ranged, settings: AudioSettings | VideoSettings, entries: str
) -> Header:
    """Raises MediaError where the file cannot be read as media at all, and WholeFileError."""
    where = [*INPUT, "-i", f"file:{file}"] if isinstance(file, str) else [*REMOTE, "-i", file.url]
    command = ["ffprobe", "-v", "warning", "-of", "json", "-show_entries", entries]
    try:
        done = run([*command, *where], settings, most_bytes=1 << 20)
        if isinstance(file, Ranged):
            file.check()
        if done.status != 0:
            raise done.failure()
    except MediaError:
        whole(file)  # of a remote one it may be the store's fault: it took so long
        raise
    try:
        found = json.loads(done.stdout)
    except ValueError:  # more streams than any file has
        raise MediaError("decode.corrupt", "the header has no end") from None
    container: dict[str, Any] = found["format"]
    formats = frozenset(container["format_name"].split(","))
    first = seconds(container.get("start_time")) or 0.0
    return Header(
        formats=formats,
        streams=found.get("streams", []),
        first_s=first,
        origin_s=0.0 if formats & FROM_ZERO else first,
        duration_s=seconds(container.get("duration")),
        guessed=GUESSED in done.message,
    )


def file_version(path: str) -> tuple[int, int]:
    """Bytes and time of change: what is remembered of a path holds as long as both stay."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


@lru_cache(REMEMBERED)
def count_packets(
    path: str, version: tuple[int, int], index: int, settings: AudioSettings | VideoSettings
) -> float:
    """Where the last packet ends, from the first timestamp. Reads all, decodes nothing."""
    args = (
        ffmpeg.input(f"file:{path}", format_whitelist=FORMATS, protocol_whitelist=PROTOCOLS)
        .output("pipe:", format="null", map=f"0:{index}", c="copy")
        .global_args("-nostdin", "-v", "error", "-progress", "pipe:1")
        .compile()
    )
    done = run(args, settings, most_bytes=16 << 20)
    ends = re.findall(rb"out_time_us=(-?\d+)", done.stdout)
    if not ends:
        raise done.failure()
    return int(ends[-1]) / 1e6


def end_s(header: Header, stream: dict[str, Any], *, alone: bool) -> float | None:
    """Where a stream ends in the file's timestamps, as far as the header says.

    alone: the container's duration is that of the stream.
    """
    start, length = seconds(stream.get("start_time")), seconds(stream.get("duration"))
    if length is not None:
        return (header.first_s if start is None else start) + length
    tagged = CLOCK.match((stream.get("tags") or {}).get("DURATION", ""))
    if tagged:
        return int(tagged[1]) * 3600 + int(tagged[2]) * 60 + float(tagged[3])
    if header.duration_s is None or not alone:
        return None
    return header.first_s + header.duration_s


def whole(file: str | Ranged) -> str:
    """The path of a file that is here. Raises WholeFileError for a remote one."""
    if isinstance(file, Ranged):
        raise WholeFileError
    return file


def refuse_years(duration_s: float) -> None:
    """Raises MediaError decode.corrupt for a length that no file has."""
    if duration_s > MOST_S:
        raise MediaError("decode.corrupt", f"the header claims {duration_s / 86_400:.0f} days")


def has_sound(stream: dict[str, Any]) -> bool:
    """A sound track that has channels."""
    return stream.get("codec_type") == "audio" and int(stream.get("channels") or 0) > 0


def is_video(stream: dict[str, Any]) -> bool:
    """Moving pictures: not the cover of an album."""
    asked = stream.get("disposition") or {}
    still = asked.get("attached_pic") or asked.get("timed_thumbnails")
    return stream.get("codec_type") == "video" and not still


def seconds(value: str | None) -> float | None:
    """A number as ffprobe prints it."""
    try:
        return float(value) if value is not None else None
    except ValueError:
        return None


def _opened(file: str | Ranged) -> BinaryIO:
    return open(file, "rb") if isinstance(file, str) else file.open()


def _is_chained(file: str | Ranged) -> bool:
    """Whether the last page of an Ogg file belongs to none of the streams that it starts with."""
    with _opened(file) as data:
        first = data.read(OGG_PAGES_BYTES)
        data.seek(max(0, data.seek(0, os.SEEK_END) - OGG_PAGES_BYTES))
        last = [found[2] for found in OGG_PAGE.finditer(data.read())]
    # all streams of a link begin before the first of them goes on
    begins = takewhile(lambda found: found[1][0] & OGG_BEGINS, OGG_PAGE.finditer(first))
    begun = {found[2] for found in begins}
    return bool(last) and last[-1] not in begun


def _wav_length_s(file: str | Ranged) -> float | None:
    """What a WAV's own header says, which ffmpeg passes over in silence where the file is cut off.

    None where there is no length: a recorder that writes to a pipe leaves 0 or the largest number.
    """
    rate = 0
    with _opened(file) as data:
        if data.read(12)[:4] != b"RIFF":
            return None
        for _ in range(WAV_CHUNKS):
            head = data.read(8)
            if len(head) < 8:
                return None
            size = int.from_bytes(head[4:], "little")
            if head[:4] == b"data":
                return size / rate if rate and 0 < size < WAV_NO_LENGTH else None
            start = data.tell()
            if head[:4] == b"fmt ":
                rate = int.from_bytes(data.read(12)[8:], "little")
            data.seek(start + size + size % 2)
    return None
