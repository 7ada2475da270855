"""Index: when the pictures of parts of a video are shown and which are key frames, without decoding.

One run of ffprobe that reads packets. A decoder can start at a key frame only, and the picture of a
moment is known only when the next one's time is: both are needed before anything is decoded, so that
each picture is found by one seek and nothing is decoded twice.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from operators.ffmpeg_child import INPUT, run
from operators.probe_video import VideoFacts
from operators.settings import VideoSettings

US = 1_000_000
# Times so close are read in one go: 10 s of packets are 6 MB at 5 Mbit/s, a seek costs as much.
JOIN_S = 10.0
# A picture may be decoded so much after one that is shown later: 8 pictures and a margin.
REORDER_FRAMES = 8
REORDER_S = 0.5
UNORDERED_FRAMES = 4
# How far before a stretch to look for its key frame, and behind it for the picture that ends its last
# one: nothing where the demuxer finds both; 12 s, which is a usual key frame distance (250 pictures)
# and more; then far, as a slide of a talk may be the only picture for minutes.
REACHES_S = (0.0, 12.0, 120.0, 3600.0)
# A first or last picture so many pictures away from a time still is its picture; headers round.
EDGE_FRAMES = 3
# From so early on the file is read from its start: ffprobe seeks forward to a time that is not after 0.
START_S = 1.0
LINE_BYTES = 64
# 285 years: a damaged header's times may exceed what 64 bits hold.
MOST_US = 1 << 53

Times = npt.NDArray[np.int64]


class Packet(NamedTuple):
    """A picture as the container has it; microseconds."""

    shown_us: int  # when it is decoded, where its time of showing is not given
    length_us: int  # 0 where not given
    decoded_us: int
    key: bool
    visible: bool
    exact: bool  # the time of showing was given


@dataclass(frozen=True)
class FrameIndex:
    """Pictures in the order in which they are shown; microseconds in the file's own timestamps."""

    shown_us: Times  # [n], strictly increasing
    length_us: Times  # [n]; 0 where not given
    decoded_us: Times  # [n], when it is decoded
    key: npt.NDArray[np.bool_]  # [n]
    # shown at all: an edit list may cut pictures off that others need
    visible: npt.NDArray[np.bool_]  # [n]
    # False: some packets have a time of decoding only
    exact: bool
    # ffmpeg's timestamps less ours. AVI has times of decoding only, and that of its n-th packet is when
    # the n-th picture is due; ffmpeg gives a picture that of the packet which made the decoder let it go.
    shift_us: int
    edge_us: int
    # [first, last) of what was asked for: of these no picture is left out
    read_us: tuple[tuple[int, int], ...]

    def picture(self, time_us: int) -> int | None:
        """The picture shown at a time: the last visible one at or before it.

        Just before the first one, or just after the last one's end, that one. One that stands for
        longer only where all up to the next one was read.
        """
        places = np.flatnonzero(self.visible)
        if not len(places):
            return None
        after = int(np.searchsorted(self.shown_us[places], time_us, "right"))
        if after == 0:
            first = int(places[0])
            return first if self.shown_us[first] - time_us <= self.edge_us else None
        place = int(places[after - 1])
        shown_us = int(self.shown_us[place])
        if time_us <= shown_us + max(int(self.length_us[place]), self.edge_us):
            return place
        if after == len(places):
            return None
        next_us = int(self.shown_us[places[after]])
        whole = any(first <= shown_us and next_us < last for first, last in self.read_us)
        return place if whole else None

    def nearest_key(self, time_us: int) -> int | None:
        """The visible key frame next to a time; the earlier one of two."""
        places = np.flatnonzero(self.visible & self.key)
        if not len(places):
            return None
        return int(places[np.argmin(np.abs(self.shown_us[places] - time_us))])

    def start(self, place: int) -> int | None:
        """The key frame from which a picture can be decoded: the last one not shown after it.

        With times of decoding only, some that are due after a key frame are shown before it, and are
        decoded from the one before. Nothing but the first key frame is before those at the start.
        """
        keys = np.flatnonzero(self.key[: place + 1])
        if not len(keys):
            return None
        early = keys[keys <= place - UNORDERED_FRAMES] if self.shift_us else keys
        return int(early[-1] if len(early) else keys[0])


def read_index(
    path: str,
    facts: VideoFacts,
    stretches_s: Sequence[tuple[float, float]],
    settings: VideoSettings,
    ends: float,
) -> FrameIndex:
    """The index of some stretches (start, end in seconds of the time line, in order), each from the
    key frame before it to the picture behind it. What cannot be read is not in it. Raises MediaError
    decode.timeout.
    """
    packets: list[Packet] = []
    read: list[tuple[float, float]] = []
    found = _index(packets, read, facts)
    for reach_s in REACHES_S:
        if not reach_s and not facts.seeks_to_keys:
            continue
        lacking = [
            pair
            for pair in stretches_s
            if not (_reaches(found, pair[0], facts) or _is_before_all(found, pair[0], facts))
        ]
        if not lacking or time.monotonic() > ends:
            break
        behind_s = _margin_s(facts) + (reach_s if read else 0.0)
        joined = _joined([(start_s - reach_s, end_s + behind_s) for start_s, end_s in lacking])
        packets += _read(path, facts, joined, settings, ends)
        read += joined
        found = _index(packets, read, facts)
    return found


def _margin_s(facts: VideoFacts) -> float:
    """Packets of pictures that are shown up to a time come at most so much later."""
    return REORDER_S + REORDER_FRAMES * facts.frame_s


def _from_start(start_s: float, facts: VideoFacts) -> bool:
    return start_s <= facts.start_s + START_S


def _reaches(index: FrameIndex, start_s: float, facts: VideoFacts) -> bool:
    """Whether the picture at a time is known, and can be decoded."""
    time_us = round((start_s + facts.origin_s) * US)
    place = index.picture(time_us)
    if place is None or index.start(place) is None:
        return False
    # a seek by times of decoding may land at a key frame that is shown later
    begins_us = round((facts.start_s + facts.origin_s) * US) + index.edge_us
    return bool(index.shown_us[place] <= max(time_us, begins_us))


def _is_before_all(index: FrameIndex, start_s: float, facts: VideoFacts) -> bool:
    """Whether no picture at a time can be decoded, wherever one looks: the file was read up to it from its
    start on, and has no key frame there. Its pictures start late, or between two key frames.
    """
    time_us = round((start_s + facts.origin_s) * US)
    read = any(first == -MOST_US and time_us < last for first, last in index.read_us)
    return read and not np.any(index.shown_us[index.key] <= time_us)


def _joined(stretches_s: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    joined: list[tuple[float, float]] = []
    for start_s, end_s in stretches_s:
        if joined and start_s <= joined[-1][1] + JOIN_S:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end_s))
        else:
            joined.append((start_s, end_s))
    return joined


def _read(
    path: str,
    facts: VideoFacts,
    stretches_s: Sequence[tuple[float, float]],
    settings: VideoSettings,
    ends: float,
) -> list[Packet]:
    intervals = []
    for start_s, end_s in stretches_s:
        begin = "" if _from_start(start_s, facts) else f"{start_s + facts.origin_s:.6f}"
        intervals.append(f"{begin}%{end_s + facts.origin_s:.6f}")
    command = [
        *("ffprobe", "-v", "error", *INPUT, "-select_streams", str(facts.index)),
        *("-show_entries", "packet=pts_time,dts_time,duration_time,flags"),
        *("-of", "csv=p=0", "-read_intervals", ",".join(intervals), "-i", facts.url(path)),
    ]
    wanted_s = sum(end_s - start_s for start_s, end_s in stretches_s)
    # ten times what the rate says: a wrong rate is a header's usual fault
    most = int(1e6 + 10 * LINE_BYTES * wanted_s * max(facts.nominal_fps, facts.average_fps, 60))
    done = run(command, settings, most_bytes=min(most, 256 << 20), ends=ends)
    return [packet for line in done.stdout.splitlines() if (packet := _packet(line)) is not None]


def _packet(line: bytes | bytearray) -> Packet | None:
    """None without any time, or with one that cannot be."""
    parts = line.split(b",")
    if len(parts) < 4:
        return None
    shown, decoded, length = (_microseconds(part) for part in parts[:3])
    if any(abs(given) > MOST_US for given in (shown, decoded, length) if given is not None):
        return None
    if shown is None and decoded is None:
        return None
    time_us = decoded if shown is None else shown
    assert time_us is not None  # noqa: S101
    flags = parts[3]
    return Packet(
        time_us,
        length or 0,
        time_us if decoded is None else decoded,
        b"K" in flags,
        b"D" not in flags,
        shown is not None,
    )


def _microseconds(text: bytes | bytearray) -> int | None:
    try:
        return round(float(text) * US)
    except ValueError:
        return None


def _index(
    packets: list[Packet], read_s: Sequence[tuple[float, float]], facts: VideoFacts
) -> FrameIndex:
    # of two packets with one time the key frame
    kept = {packet.shown_us: packet for packet in sorted(packets, key=attrgetter("key"))}
    ordered = [kept[shown] for shown in sorted(kept)]
    exact = all(packet.exact for packet in packets)
    ordered_times = exact or any(p.exact and p.shown_us != p.decoded_us for p in packets)
    return FrameIndex(
        shown_us=np.array([packet.shown_us for packet in ordered], np.int64),
        length_us=np.array([packet.length_us for packet in ordered], np.int64),
        decoded_us=np.array([packet.decoded_us for packet in ordered], np.int64),
        key=np.array([packet.key for packet in ordered], np.bool_),
        visible=np.array([packet.visible for packet in ordered], np.bool_),
        exact=exact,
        edge_us=round(EDGE_FRAMES * facts.frame_s * US),
        shift_us=0 if ordered_times else round(facts.held_back * facts.frame_s * US),
        read_us=tuple(
            (
                -MOST_US if _from_start(start_s, facts) else round((start_s + facts.origin_s) * US),
                round((end_s + facts.origin_s) * US),
            )
            for start_s, end_s in read_s
        ),
    )
