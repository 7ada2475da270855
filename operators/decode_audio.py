"""Decode: a stretch of a recording to mono float32 at 16 kHz, on the recording's own time line.

Blocks of about five minutes (windows.Grid.blocks) are decoded in one go, from a whole second at
least two seconds before their first sample. A stretch is always cut out of its blocks, so its samples
are the same whoever decodes it, for every codec and container: after a seek MP3, AAC and Vorbis do
not repeat themselves bit for bit, and Matroska's milliseconds shift the resampler's phase.

ffmpeg says when each packet of samples sounds, and they are laid at their times here: its own filters
begin anew where rate or channels of a stream change, and would make silence of hours in memory.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import ffmpeg
import numpy as np
import numpy.typing as npt

from operators.errors import MediaError
from operators.ffmpeg_child import FORMATS, NOTES, PROTOCOLS, Done, run
from operators.frames import SAMPLE_RATE_HZ, Waveform
from operators.probe import Sound
from operators.settings import AudioSettings
from operators.tracks import channel
from operators.voice import CHUNK_SAMPLES
from operators.windows import LEAD_CHUNKS, Grid

# A decoder starts without its past: MP3's bit reservoir, AAC's overlap, Opus's 80 ms.
PREROLL_S = 2
SAMPLE_BYTES = 4
# Times may be so far from the count of samples: a clock that drifts, a container's milliseconds.
# ffmpeg's own resampler allows as much.
JUMP_SAMPLES = SAMPLE_RATE_HZ // 10
# A hole is one where more is missing than a jump that makes up for a drift.
HOLE_SAMPLES = SAMPLE_RATE_HZ // 5
# Of what is asked: where times step back, samples are dropped, and more may come.
MOST_DROPPED = 1
# The two channels of a "mix" may be each other's opposite, as a cable soldered the wrong way makes them, and
# their sum is silence. So their difference comes along, and is taken for each quarter of a second in which
# it has so many times the power of the sum. It holds whole blocks: they begin at a whole second.
OPPOSITE_SAMPLES = SAMPLE_RATE_HZ // 4
OPPOSITE_POWER = 30.0
# Whoever is not sure that a stream goes on asks for so much of its end.
LAST_SAMPLES = 2 * SAMPLE_RATE_HZ
# A line of ffmpeg's framecrc: stream, dts, pts, duration, bytes, sum. Its time base is the sample.
PACKET = re.compile(rb"^0,[^,]+,\s*(-?\d+),[^,]+,\s*(\d+),", re.MULTILINE)
# As many as ffmpeg's pan knows; channels that are not there have no share.
EVERY_CHANNEL = "+".join(f"c{index}" for index in range(64))
# ffmpeg takes a leap of over 10 s in streams of broadcasters and in Ogg for a new clock, and closes it;
# a seek behind it goes by the true times. Steps back are a new clock as ever.
LEAP_S = 1e9
# Lines that say nothing of the sound: decoders of pictures, and what follows either kind.
OF_OTHERS = re.compile(
    r"\[(h26[1-6]\w*|hevc|vvc|mpeg\dvideo|m?s?mpeg4\w*|vp\d\w*|av1|libdav1d|vc1|wmv\d|mjpeg|png|theora"
    r"|prores|dvvideo|rv\d0|flv|cavs) @|\[ogg @ \w+\] failed to create or replace stream"
    r"|\s*Last message repeated"
)

Stretch = tuple[int, int]


class Piece(NamedTuple):
    """Samples from `start` on, float32 [n], with silence where the stream has a hole.

    lost: [first, last) positions without sound, where ffmpeg met something that it cannot read.
    failure: why ffmpeg ended before its time, if it did.
    """

    start: int
    samples: Waveform
    lost: list[Stretch]
    failure: MediaError | None = None

    @property
    def end(self) -> int:
        return self.start + len(self.samples)


class Decoded(NamedTuple):
    """A piece for each block, and where sound ended, in samples; behind that a piece is silent."""

    pieces: list[Piece]
    end: int


def decode_tiles(
    path: str, sound: Sound, grid: Grid, tiles: range, settings: AudioSettings, track: str = "mix"
) -> Decoded:
    """The blocks of `tiles`, with LEAD_CHUNKS before their first tile.

    A block that ends early goes on in silence as far as the header says that there is sound. Where a
    stream ends, the blocks behind are empty. Raises MediaError where no block gives a sample and
    ffmpeg says that it failed.
    """
    lead = LEAD_CHUNKS * CHUNK_SAMPLES
    until = int(sound.duration_s * SAMPLE_RATE_HZ)
    read: list[Piece] = []
    stops: list[int] = []
    for block, wanted in grid.blocks(tiles):
        begin = max(0, grid.tile(block)[0] - lead)
        start = max(0, grid.tile(wanted.start)[0] - lead)
        stop = grid.tile(wanted.stop - 1)[1]
        read.append(decode_audio(path, sound, begin, start, stop, settings, track))
        stops.append(min(stop, until))
    end = max((piece.end for piece in read if len(piece.samples)), default=0)
    failure = next((piece.failure for piece in read if piece.failure), None)
    if not end and failure:
        raise failure
    # A hole that reaches over a block looks like an end, unless the stream has an end elsewhere.
    if sound.timed and stops[-1] - end > HOLE_SAMPLES and not read[-1].lost:
        begin = max(0, until - LAST_SAMPLES)
        last = decode_audio(path, sound, begin, begin, until, settings, track)
        if len(last.samples):
            end = max(end, min(stops[-1], last.end))
    pieces = []
    for piece, stop in zip(read, stops, strict=True):
        short = stop - piece.end
        if short > 0 and (len(piece.samples) or piece.end < end):
            piece = piece._replace(samples=np.pad(piece.samples, (0, short)))
        pieces.append(piece)
    return Decoded(pieces, end)


def decode_audio(
    path: str,
    sound: Sound,
    begin: int,
    start: int,
    stop: int,
    settings: AudioSettings,
    track: str = "mix",
) -> Piece:
    """Samples [start, stop) of a track, decoded from `begin` on (positions in samples, begin <= start).

    Where the stream starts late or has a hole there is silence, so a position is a time. Samples
    depend on `begin`, not on start and stop. Raises MediaError decode.timeout.
    """
    seek_s = max(0, begin // SAMPLE_RATE_HZ - PREROLL_S)
    zero = seek_s * SAMPLE_RATE_HZ
    command = _command(path, sound, seek_s, stop, track)
    most = (1 + MOST_DROPPED * sound.timed) * (stop - zero + SAMPLE_RATE_HZ)
    width = 2 if _is_pair(sound, track) else 1
    done = run(command, settings, most_bytes=most * SAMPLE_BYTES * width)
    faulty = (done.cut and sound.timed) or done.status != 0 or _of_sound(done.message)
    # whole quarters of a second, so that what is chosen does not depend on stop
    count = -(-(stop - zero) // OPPOSITE_SAMPLES) * OPPOSITE_SAMPLES
    samples, holes = _lay(done, count, JUMP_SAMPLES if sound.timed else None, width)
    # A late start is none, and where ffmpeg has nothing to say a hole is one of the recording's own.
    first = max(start, int(sound.start_s * SAMPLE_RATE_HZ))
    until = min(stop, int(sound.duration_s * SAMPLE_RATE_HZ))
    stretches = [
        (max(first, left + zero), min(until, right + zero))
        for left, right in (*holes, (len(samples), stop - zero))
    ]
    lost = [each for each in stretches if faulty and each[1] - each[0] > HOLE_SAMPLES]
    failure = done.failure() if done.status != 0 else None
    # A float file may hold anything, and the model's front end is no place for it.
    found = np.clip(np.nan_to_num(samples, posinf=1.0, neginf=-1.0), -1.0, 1.0)
    return Piece(start, _one(found)[start - zero : stop - zero], lost, failure)


def _command(path: str, sound: Sound, seek_s: int, stop: int, track: str) -> list[str]:
    """ffmpeg from second seek_s to just behind the sample `stop`: samples out, a line a packet to NOTES."""
    # In what was appended each part counts its times from zero: it is read from the start, and the
    # clock goes on only there.
    sought = {"itsoffset": -sound.origin_s} if sound.chained else {"ss": sound.origin_s + seek_s}
    dropped = {"ss": seek_s} if sound.chained else {}
    # where times are a count a changed rate makes them leap: there the bytes are the limit
    limit = {"t": f"{stop / SAMPLE_RATE_HZ - seek_s + 1:.3f}"} if sound.timed else {}
    source = ffmpeg.input(
        f"file:{path}",
        # absolute, so that the time line's zero is ours and not ffmpeg's
        seek_timestamp=1,
        **{name: f"{value:.6f}" for name, value in sought.items()},
        threads=1,
        protocol_whitelist=PROTOCOLS,
        format_whitelist=FORMATS,
    )
    # One filter string: ffmpeg-python's own filters would choose the stream themselves.
    layout = "stereo" if _is_pair(sound, track) else "mono"
    form = f"aformat=sample_fmts=flt:channel_layouts={layout}"
    command: list[str] = (
        ffmpeg.output(
            source,
            f"[f=f32le]pipe:1|[f=framecrc]{NOTES}",
            map=f"0:{sound.index}",
            af=",".join((_channels(sound, track), f"aresample={SAMPLE_RATE_HZ}", form)),
            f="tee",
            c="pcm_f32le",
            **dropped,
            **limit,
            sn=None,
            dn=None,
            vn=None,
        )
        .global_args("-nostdin", "-hide_banner", "-v", "error")
        .global_args("-dts_delta_threshold", f"{LEAP_S:g}")
        .compile()
    )
    return command


def _of_sound(message: str) -> bool:
    """Whether ffmpeg said anything that is not of pictures, or of a stream of chained Ogg that begins."""
    return any(line and not OF_OTHERS.match(line) for line in message.splitlines())


def _is_pair(sound: Sound, track: str) -> bool:
    """Whether a track comes as sum and difference of two channels."""
    return sound.channels == 2 and track == "mix"


def _one(samples: npt.NDArray[np.float32]) -> Waveform:
    """Sum, or sum and difference, [n, 1 or 2], to one channel, [n]."""
    total = samples[:, 0]
    if samples.shape[1] == 1 or not len(samples):
        return total
    power = np.add.reduceat(np.square(samples), np.arange(0, len(samples), OPPOSITE_SAMPLES))
    opposite = power[:, 1] > OPPOSITE_POWER * power[:, 0]
    if not opposite.any():
        return np.ascontiguousarray(total)
    return np.where(np.repeat(opposite, OPPOSITE_SAMPLES)[: len(total)], samples[:, 1], total)


def _channels(sound: Sound, track: str) -> str:
    """The filter for a track. Its channels are those of each moment, whatever the header says."""
    # ffmpeg's own mix of float samples may pass 1.0; the model does not hear loudness
    if _is_pair(sound, track):
        return f"pan=stereo|c0<{EVERY_CHANNEL}|c1<c0-c1"
    if sound.channels == 1 or track == "mix":  # a single one is left as well as right
        return f"pan=mono|c0<{EVERY_CHANNEL}"
    index = {"left": 0, "right": 1}.get(track, channel(track))
    return f"pan=mono|c0=c{index}"


def _lay(
    done: Done, count: int, jump: int | None, width: int
) -> tuple[npt.NDArray[np.float32], list[Stretch]]:
    """A run's samples at their times, [at most `count`, width], and its [first, last) holes.

    Packets follow each other without a seam as long as their times agree with the count of samples to
    `jump`. None: times are themselves a count, in which a leap is packets that gave nothing. What is
    before zero, or before a sample that is there, is dropped.
    """
    whole = len(done.stdout) // (SAMPLE_BYTES * width)
    heard = np.frombuffer(done.stdout, "<f4", count=whole * width).reshape(-1, width)
    packets = np.array(PACKET.findall(done.notes), np.int64).reshape(-1, 2)
    # where each packet lies in `heard`, and how much later that is on the time line
    lengths = packets[:, 1] // (SAMPLE_BYTES * width)
    ends = np.cumsum(lengths)
    places = ends - lengths
    later = packets[:, 0] - places
    if jump is None and len(later):
        # Packets that gave nothing are a leap that stays; one that is taken back is a rate that changed.
        leaps = np.diff(later, prepend=later[0])
        least = np.minimum.accumulate(later[::-1])[::-1]  # of what follows
        stays = (leaps > JUMP_SAMPLES) & (later - least <= JUMP_SAMPLES)
        later = later[0] + np.cumsum(np.where(stays, leaps, 0))
        jump = JUMP_SAMPLES
    laid = np.zeros((count, width), np.float32)
    holes: list[Stretch] = []
    end = index = 0
    while index < len(packets) and places[index] < whole and end < count:
        following = len(packets)
        if jump is not None:
            jumps = np.flatnonzero(np.abs(later[index:] - later[index]) > jump)
            following = index + int(jumps[0]) if len(jumps) else following
        shift, stop = int(later[index]), min(int(ends[following - 1]), whole)
        if following == len(packets):
            stop = whole  # a decoder that died could not note down its last packets
        first, last = max(end, int(places[index]) + shift), min(stop + shift, count)
        if first > end:
            holes.append((end, min(first, count)))
        if last > first:
            laid[first:last] = heard[first - shift : last - shift]
        end = max(end, min(first, count), last)
        index = following
    return laid[:end], holes
