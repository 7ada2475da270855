"""Probe: what a media file holds, read from its header by ffprobe. No sound is decoded.

The time line of a recording starts where players start it: at the container's first timestamp, and
at zero for MP4 and Matroska, whose timestamps say where a late stream begins.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import ffmpeg

from operators.errors import MediaError
from operators.ffmpeg_child import FORMATS, INPUT, PROTOCOLS, run
from operators.settings import AudioSettings

LEAST_S = 0.1
# A damaged header may say anything, and a plan has a row for each span: 30 days are 8,500 of them.
MOST_S = 30 * 86_400.0
# Their first timestamp is an offset that is meant; elsewhere it is where the clock stood.
FROM_ZERO = frozenset({"mov", "mp4", "m4a", "matroska", "webm"})
# ffprobe guesses from the bit rate where no header says how long the file is.
GUESSED = "Estimating duration from bitrate"
ENTRIES = (
    "format=format_name,start_time,duration"
    ":stream=index,codec_type,channels,sample_rate,start_time,duration:stream_tags=DURATION"
    ":stream_disposition=attached_pic"
)
# Where to look for the data chunk; tags and cue points may stand before it.
WAV_CHUNKS = 64
WAV_NO_LENGTH = 0x7FFFF000
CLOCK = re.compile(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)")


@dataclass(frozen=True)
class Sound:
    """The sound track of a file: the first one, where there are several.

    Seconds on the recording's time line; `origin_s` is that line's zero in the file's timestamps.
    """

    start_s: float
    duration_s: float  # where the sound ends
    origin_s: float
    channels: int
    sample_rate_hz: int
    # The file has no usable duration: the packets were counted.
    counted: bool


def probe_audio(path: str, settings: AudioSettings) -> Sound:
    """Raises MediaError: decode.unsupported, no_audio, too_short, corrupt, empty, and the limits'."""
    command = ["ffprobe", "-v", "warning", *INPUT, "-of", "json", "-show_entries", ENTRIES]
    done = run([*command, "-i", f"file:{path}"], settings, most_bytes=1 << 20)
    if done.status != 0:
        raise done.failure()
    found = json.loads(done.stdout)
    streams = found.get("streams", [])
    sound = next((s for s in streams if s.get("codec_type") == "audio"), None)
    if sound is None or not int(sound.get("channels") or 0):
        raise MediaError("decode.no_audio", "the file has no sound track")
    container: dict[str, Any] = found["format"]
    names = set(container["format_name"].split(","))
    first = _seconds(container.get("start_time")) or 0.0
    origin = 0.0 if names & FROM_ZERO else first
    start = _seconds(sound.get("start_time"))
    end = _end(container, sound, first, start, alone=not _has_video(streams))
    guessed = end is None or GUESSED in done.message
    promised = _wav_length_s(path) if guessed and "wav" in names else None
    counted = guessed and promised is None
    if promised is not None:
        end = first + promised
    elif counted:
        end = first + count_packets(path, settings)
    assert end is not None  # noqa: S101
    start_s = max(0.0, (first if start is None else start) - origin)
    if end - origin - start_s < LEAST_S:
        raise MediaError("decode.too_short", f"{max(0.0, end - origin - start_s):.3f} s of sound")
    if end - origin > MOST_S:
        days = (end - origin) / 86_400
        raise MediaError("decode.corrupt", f"the header claims {days:.0f} days of sound")
    return Sound(
        start_s=start_s,
        duration_s=end - origin,
        origin_s=origin,
        channels=int(sound["channels"]),
        sample_rate_hz=int(sound.get("sample_rate") or 0),
        counted=counted,
    )


def count_packets(path: str, settings: AudioSettings) -> float:
    """Where the last packet ends, from the first timestamp. Reads all of it, decodes nothing."""
    args = (
        ffmpeg.input(f"file:{path}", format_whitelist=FORMATS, protocol_whitelist=PROTOCOLS)
        .output("pipe:", format="null", map="0:a:0", c="copy")
        .global_args("-nostdin", "-v", "error", "-progress", "pipe:1")
        .compile()
    )
    done = run(args, settings, most_bytes=16 << 20)
    ends = re.findall(rb"out_time_us=(-?\d+)", done.stdout)
    if not ends:
        raise done.failure()
    return int(ends[-1]) / 1e6


def _end(
    container: dict[str, Any],
    sound: dict[str, Any],
    first: float,
    start: float | None,
    *,
    alone: bool,
) -> float | None:
    """Where the sound ends in the file's timestamps, as far as the header says."""
    length = _seconds(sound.get("duration"))
    if length is not None:
        return (first if start is None else start) + length
    tagged = CLOCK.match((sound.get("tags") or {}).get("DURATION", ""))
    if tagged:
        return int(tagged[1]) * 3600 + int(tagged[2]) * 60 + float(tagged[3])
    whole = _seconds(container.get("duration"))
    # Beside a picture the container's duration may be that of the picture.
    return None if whole is None or not alone else first + whole


def _wav_length_s(path: str) -> float | None:
    """What a WAV's own header says, which ffmpeg passes over in silence where the file is cut off.

    None where there is no length: a recorder that writes to a pipe leaves 0 or the largest number.
    """
    rate = 0
    with open(path, "rb") as file:
        if file.read(12)[:4] != b"RIFF":
            return None
        for _ in range(WAV_CHUNKS):
            head = file.read(8)
            if len(head) < 8:
                return None
            size = int.from_bytes(head[4:], "little")
            if head[:4] == b"data":
                return size / rate if rate and 0 < size < WAV_NO_LENGTH else None
            start = file.tell()
            if head[:4] == b"fmt ":
                rate = int.from_bytes(file.read(12)[8:], "little")
            file.seek(start + size + size % 2)
    return None


def _has_video(streams: list[dict[str, Any]]) -> bool:
    return any(
        s.get("codec_type") == "video" and not (s.get("disposition") or {}).get("attached_pic")
        for s in streams
    )


def _seconds(value: str | None) -> float | None:
    try:
        return float(value) if value is not None else None
    except ValueError:
        return None
