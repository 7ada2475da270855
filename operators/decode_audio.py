"""Decode: a stretch of a recording to mono float32 at 16 kHz, on the recording's own time line.

Blocks of about five minutes (windows.Grid.blocks) are decoded in one go, from a whole second at
least two seconds before their first sample. A stretch is always cut out of its blocks, so its samples
are the same whoever decodes it, for every codec and container: after a seek MP3, AAC and Vorbis do
not repeat themselves bit for bit, and Matroska's milliseconds shift the resampler's phase.
"""

from __future__ import annotations

import ffmpeg
import numpy as np

from operators.ffmpeg_child import FORMATS, PROTOCOLS, run
from operators.frames import SAMPLE_RATE_HZ, Waveform
from operators.probe import Sound
from operators.settings import AudioSettings
from operators.tracks import channel
from operators.voice import CHUNK_SAMPLES
from operators.windows import LEAD_CHUNKS, Grid

# A decoder starts without its past: MP3's bit reservoir, AAC's overlap, Opus's 80 ms.
PREROLL_S = 2
SAMPLE_BYTES = 4


def decode_tiles(
    path: str, sound: Sound, grid: Grid, tiles: range, settings: AudioSettings, track: str = "mix"
) -> list[tuple[int, Waveform]]:
    """(first sample, samples) for each block of `tiles`, with LEAD_CHUNKS before its first tile.

    A stream that ends early gives less, or nothing. Raises MediaError where the first decoder call
    fails without a sample.
    """
    lead = LEAD_CHUNKS * CHUNK_SAMPLES
    pieces = []
    for block, wanted in grid.blocks(tiles):
        begin = max(0, grid.tile(block)[0] - lead)
        start = max(0, grid.tile(wanted.start)[0] - lead)
        stop = grid.tile(wanted.stop - 1)[1]
        pieces.append((start, decode_audio(path, sound, begin, start, stop, settings, track)))
    return pieces


def decode_audio(
    path: str,
    sound: Sound,
    begin: int,
    start: int,
    stop: int,
    settings: AudioSettings,
    track: str = "mix",
) -> Waveform:
    """Samples [start, stop) of a track, decoded from `begin` on (positions in samples, begin <= start).

    Where the stream starts late or has a hole there is silence, so a position is a time. Samples
    depend on `begin`, not on start and stop. Raises MediaError decode.* where nothing comes out
    and ffmpeg says that it failed.
    """
    seek_s = max(0, begin // SAMPLE_RATE_HZ - PREROLL_S)
    source = ffmpeg.input(
        f"file:{path}",
        # absolute, so that the time line's zero is ours and not ffmpeg's
        seek_timestamp=1,
        ss=f"{sound.origin_s + seek_s:.6f}",
        threads=1,
        protocol_whitelist=PROTOCOLS,
        format_whitelist=FORMATS,
    )
    # One filter string: ffmpeg-python's own filters would choose the stream themselves.
    command = (
        ffmpeg.output(
            source,
            "pipe:",
            map="0:a:0",
            af=",".join((*_mono(sound, track), *RESAMPLE)),
            f="f32le",
            c="pcm_f32le",
            t=f"{stop / SAMPLE_RATE_HZ - seek_s + 1:.3f}",
            sn=None,
            dn=None,
            vn=None,
        )
        .global_args("-nostdin", "-hide_banner", "-v", "error")
        .compile()
    )
    done = run(
        command,
        settings,
        most_bytes=(stop - start) * SAMPLE_BYTES,
        skip_bytes=(start - seek_s * SAMPLE_RATE_HZ) * SAMPLE_BYTES,
    )
    if not done.stdout and done.status != 0:
        raise done.failure()
    whole = len(done.stdout) // SAMPLE_BYTES
    samples: Waveform = np.frombuffer(done.stdout, "<f4", count=whole)
    # A float file may hold anything, and the model's front end is no place for it.
    return np.clip(np.nan_to_num(samples, posinf=1.0, neginf=-1.0), -1.0, 1.0)


# async: silence in holes and before a late start, nothing stretched
RESAMPLE = (
    f"aresample={SAMPLE_RATE_HZ}:async=1:first_pts=0",
    "aformat=sample_fmts=flt:channel_layouts=mono",
)


def _mono(sound: Sound, track: str) -> tuple[str, ...]:
    if sound.channels == 1:
        return ()  # is left as well as right
    if track == "mix":
        # ffmpeg's own mix of float samples may pass 1.0; the model does not hear loudness
        share = f"{1 / sound.channels:.6f}"
        mixed = "+".join(f"{share}*c{index}" for index in range(sound.channels))
        return (f"pan=mono|c0={mixed}",)
    index = {"left": 0, "right": 1}.get(track, channel(track))
    return (f"pan=mono|c0=c{index}",)
