"""Probe: what a video's header says about its pictures. One run of ffprobe, nothing is decoded.

A file whose only picture is a cover is not a video. Times are on the file's own time line (probe.py),
which is that of its sound as well.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from operators.errors import MediaError
from operators.ffmpeg_child import INPUT, run
from operators.probe import (
    REMEMBERED,
    count_packets,
    end_s,
    file_version,
    is_video,
    read_header,
    refuse_years,
    seconds,
    whole,
)
from operators.ranged import Ranged
from operators.settings import VideoSettings

ENTRIES = (
    "format=format_name,start_time,duration"
    ":stream=index,codec_type,codec_name,width,height,sample_aspect_ratio,pix_fmt,field_order"
    ",color_space,color_transfer,color_primaries,has_b_frames,r_frame_rate,avg_frame_rate,start_time,duration"
    ":stream_tags=DURATION:stream_disposition=attached_pic,timed_thumbnails"
    ":stream_side_data=side_data_type,rotation"
)
# Pictures whose values are light, not signals for a display: PQ and HLG.
HDR = frozenset({"smpte2084", "arib-std-b67"})
DEEP = re.compile(r"(?:p0?|gray|gbrp|gbrap)(9|10|12|14|16)(?:le|be)$|^(?:xyz|x2rgb|x2bgr)(\d+)")
# Their demuxers seek to any packet, not to a key frame.
NO_KEY_SEEK = frozenset({"mpegts", "mpeg"})
# In these formats recordings are joined as they are, and then the clock starts again. It does where
# times of decoding go back so far; a packet or two with a damaged time do not count.
RESTART_S = 1.0
OUTLIERS = 2
# The picture that is shown last is among so many that are decoded last.
MOST_REORDER = 16
MOST_PACKET_BYTES = 256 << 20
# Wider pixels than any standard has are a damaged header: 1.0 is assumed.
MOST_ASPECT = 8
# The usual rate, for a header without one.
USUAL_FPS = 25.0


@dataclass(frozen=True)
class VideoFacts:
    """The first track of moving pictures. Seconds on the file's time line, sizes in pixels.

    `origin_s` is that line's zero in the file's timestamps.
    """

    index: int  # of the stream in the file
    codec: str
    width: int  # as decoded
    height: int
    rotation: int  # degrees, clockwise, to be upright
    pixel_aspect: Fraction  # width of a pixel over its height
    nominal_fps: float  # the least rate that all timestamps fit
    average_fps: float
    start_s: float  # of the first picture
    duration_s: float  # where the last picture ends
    origin_s: float
    pixel_format: str
    bit_depth: int
    hdr: bool
    transfer: str  # transfer function, "" where not given
    matrix: str  # YUV matrix, "" where not given
    primaries: str  # "" where not given
    interlaced: bool | None  # None: the header does not say
    held_back: int  # pictures that a decoder keeps, because others come before them
    seeks_to_keys: bool
    # The file has no usable duration: the packets were counted.
    counted: bool
    # Of the file, before its clock starts again: a time of the rest is two pictures'. None: it does not.
    clock_bytes: int | None

    def url(self, path: str) -> str:
        """What ffmpeg opens to read the pictures."""
        if self.clock_bytes is None:
            return f"file:{path}"
        return f"subfile,,start,0,end,{self.clock_bytes},,:file:{path}"

    @property
    def display_size(self) -> tuple[int, int]:
        """(width, height) upright and with square pixels. The longer way is stretched, none shrunk."""
        width, height = Fraction(self.width), Fraction(self.height)
        if self.pixel_aspect >= 1:
            width *= self.pixel_aspect
        else:
            height /= self.pixel_aspect
        if self.rotation % 180 == 90:
            width, height = height, width
        return max(1, round(width)), max(1, round(height))

    @property
    def frame_s(self) -> float:
        """How long a picture is shown, on average."""
        return 1 / self.average_fps


def probe_video(file: str | Ranged, settings: VideoSettings) -> VideoFacts:
    """Of a local path, or of a remote file whose header is enough.

    Raises MediaError: decode.unsupported, no_video, corrupt, and the limits'; and WholeFileError where
    a remote file must be read whole.
    """
    header = read_header(file, settings, ENTRIES)
    stream = next((s for s in header.streams if is_video(s)), None)
    if stream is None:
        raise MediaError("decode.no_video", "the file has no moving pictures")
    if stream.get("codec_name") in (None, "unknown", "none"):
        raise MediaError("decode.unsupported", "the pictures are in no known coding")
    width, height = int(stream.get("width") or 0), int(stream.get("height") or 0)
    if width < 1 or height < 1 or stream.get("pix_fmt") is None:
        raise MediaError("decode.corrupt", "not even the size of the pictures can be read")
    start = seconds(stream.get("start_time"))
    end = end_s(header, stream, alone=True)
    # the end that ffprobe gives for a program stream is that of the last packet with a time
    counted = end is None or header.guessed or "mpeg" in header.formats
    if counted:
        path = whole(file)
        end = header.first_s + count_packets(path, file_version(path), stream["index"], settings)
    assert end is not None  # noqa: S101
    clock = None
    if header.formats & NO_KEY_SEEK:
        path = whole(file)
        clock = _first_clock(path, file_version(path), stream["index"], settings)
        if clock is not None:
            end = clock.end_s
    start_s = max(0.0, (header.first_s if start is None else start) - header.origin_s)
    duration_s = end - header.origin_s
    if duration_s <= start_s:
        raise MediaError("decode.no_video", "the file has no moving pictures: its track is empty")
    refuse_years(duration_s)
    nominal, average = _rate(stream.get("r_frame_rate")), _rate(stream.get("avg_frame_rate"))
    order = stream.get("field_order") or "unknown"
    transfer = _known(stream.get("color_transfer"))
    facts = VideoFacts(
        index=int(stream["index"]),
        codec=stream["codec_name"],
        width=width,
        height=height,
        rotation=_rotation(stream),
        pixel_aspect=_aspect(stream.get("sample_aspect_ratio")),
        nominal_fps=nominal or average or USUAL_FPS,
        average_fps=average or nominal or USUAL_FPS,
        start_s=start_s,
        duration_s=duration_s,
        origin_s=header.origin_s,
        pixel_format=stream["pix_fmt"],
        bit_depth=_bit_depth(stream["pix_fmt"]),
        hdr=transfer in HDR,
        transfer=transfer,
        matrix=_known(stream.get("color_space")),
        primaries=_known(stream.get("color_primaries")),
        interlaced=None if order == "unknown" else order != "progressive",
        held_back=int(stream.get("has_b_frames") or 0),
        seeks_to_keys=not header.formats & NO_KEY_SEEK,
        counted=counted,
        clock_bytes=None if clock is None else clock.bytes,
    )
    width, height = facts.display_size
    if width * height > settings.max_pixels:
        raise MediaError(
            "decode.too_large",
            f"{width}x{height} is {width * height} pixels; video.max_pixels is {settings.max_pixels}",
        )
    return facts


class Clock(NamedTuple):
    """The bytes of a file before its clock starts again, and where their last picture ends: seconds
    in the file's timestamps.
    """

    bytes: int
    end_s: float


@lru_cache(REMEMBERED)
def _first_clock(
    path: str, version: tuple[int, int], index: int, settings: VideoSettings
) -> Clock | None:
    """None where one clock covers all packets of the stream. Reads the file, decodes nothing."""
    command = [
        *("ffprobe", "-v", "error", *INPUT, "-select_streams", str(index)),
        *("-show_entries", "packet=pts_time,dts_time,duration_time,pos"),
        *("-of", "csv=p=0", "-i", f"file:{path}"),
    ]
    lines = run(command, settings, most_bytes=MOST_PACKET_BYTES).stdout.splitlines()
    packets = [line.decode().split(",") for line in lines if line.count(b",") >= 3]
    timed = [packet for packet in packets if seconds(packet[1]) is not None]
    if not timed:
        return None
    decoded_s = np.array([float(packet[1]) for packet in timed])
    around = np.pad(decoded_s, OUTLIERS, mode="edge")
    usual_s = np.median(np.lib.stride_tricks.sliding_window_view(around, 2 * OUTLIERS + 1), axis=1)
    restarts = np.flatnonzero(np.diff(usual_s) < -RESTART_S) + 1
    if not len(restarts):
        return None
    # in MPEG-PS not every packet has a place of its own
    places = [int(packet[3]) for packet in timed[: restarts[0] + 1] if packet[3].isdigit()]
    if len(places) < 2:
        return None
    last = timed[: restarts[0]][-MOST_REORDER:]
    shown = [(seconds(packet[0]), float(packet[1]), seconds(packet[2])) for packet in last]
    ends = [(decoded if at is None else at) + (length or 0.0) for at, decoded, length in shown]
    return Clock(places[-1], max(ends))


def _rotation(stream: dict[str, Any]) -> int:
    """Clockwise, 0 to 359. ffprobe gives the display matrix's angle the other way round."""
    for data in stream.get("side_data_list") or []:
        if data.get("side_data_type") == "Display Matrix" and "rotation" in data:
            return round(-float(data["rotation"])) % 360
    return 0


def _aspect(value: str | None) -> Fraction:
    match = re.fullmatch(r"(\d+):(\d+)", value or "")
    if match is None or not int(match[1]) or not int(match[2]):
        return Fraction(1)
    aspect = Fraction(int(match[1]), int(match[2]))
    return aspect if Fraction(1, MOST_ASPECT) <= aspect <= MOST_ASPECT else Fraction(1)


def _rate(value: str | None) -> float | None:
    match = re.fullmatch(r"(\d+)/(\d+)", value or "")
    if match is None or not int(match[1]) or not int(match[2]):
        return None
    return int(match[1]) / int(match[2])


def _bit_depth(pixel_format: str) -> int:
    match = DEEP.search(pixel_format)
    return int(match[1] or match[2]) if match else 8


def _known(value: str | None) -> str:
    return "" if value in (None, "unknown", "unspecified", "reserved") else str(value)
