"""Decoding: every format, the recording's own times, and the same samples whoever asks."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sound import FORMATS, RATE_HZ, Spoken, Waveform, spoken, tone, write

from operators.decode_audio import decode_audio, decode_tiles
from operators.errors import MediaError
from operators.frames import frame_count, frames
from operators.probe import probe_audio
from operators.settings import AudioSettings
from operators.windows import grid

SETTINGS = AudioSettings(timeout_s=60)
# An encoder's delay that its container does not note down: AVI, ADTS, MPEG-TS, Matroska. AAC's is
# 1024 samples, 64 ms at 16 kHz.
DELAY_S = 0.07
# Longer than any recording here, in samples.
LONG = 600 * RATE_HZ


@pytest.fixture(scope="module")
def recording() -> Spoken:
    return spoken(40, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, recording: Spoken) -> Path:
    """The recording in every format."""
    folder = tmp_path_factory.mktemp("formats")
    for name, options in FORMATS.items():
        write(folder / name, recording.samples, *options)
    return folder


def decode(path: Path, asked: AudioSettings = SETTINGS, track: str = "mix") -> Waveform:
    sound = probe_audio(str(path), asked)
    return decode_audio(str(path), sound, 0, 0, LONG, asked, track).samples


def shift_s(samples: Waveform, expected: Waveform) -> float:
    """How much later the samples are than expected, by the best match of their loudness."""

    def envelope(values: Waveform) -> np.ndarray:
        power = np.abs(values[: len(values) // 80 * 80]).reshape(-1, 80).mean(axis=1)
        return power - power.mean()

    ours, theirs = envelope(samples), envelope(expected)
    return (int(np.argmax(np.correlate(ours, theirs, "full"))) - len(theirs) + 1) * 80 / RATE_HZ


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_at_its_time(folder: Path, recording: Spoken, name: str) -> None:
    samples = decode(folder / name)
    assert samples.dtype == np.float32
    assert abs(len(samples) / RATE_HZ - 40) < 0.1
    assert abs(shift_s(samples, recording.samples)) <= DELAY_S


@pytest.mark.parametrize("name", FORMATS)
def test_a_seek_lands_where_the_whole_file_is(folder: Path, name: str) -> None:
    """The seam between two blocks. Exact where codec and container are; AVI and the milliseconds of
    Matroska shift AAC's resampling by some samples, which is why a block is decoded in one go."""
    path = str(folder / name)
    sound = probe_audio(path, SETTINGS)
    whole = decode_audio(path, sound, 0, 0, LONG, SETTINGS).samples
    for begin in (5 * RATE_HZ + 123, 17 * RATE_HZ, 33 * RATE_HZ + 7):
        part = decode_audio(path, sound, begin, begin, begin + 4 * RATE_HZ, SETTINGS).samples
        expected = whole[begin : begin + 4 * RATE_HZ]
        assert len(part) == len(expected)
        if name.endswith((".wav", ".flac")):
            assert np.array_equal(part, expected)
            continue
        coarse = name in ("aac.mkv", "a.avi")
        assert abs(shift_s(part, expected)) <= (0.005 if coarse else 0)
        if not coarse:
            assert np.sqrt(np.mean((part - expected) ** 2)) < 0.2 * np.sqrt(np.mean(expected**2))


@pytest.mark.parametrize("name", FORMATS)
def test_samples_depend_on_their_block_only(folder: Path, name: str) -> None:
    path = str(folder / name)
    sound = probe_audio(path, SETTINGS)
    begin = 9 * RATE_HZ
    long = decode_audio(path, sound, begin, begin, begin + 20 * RATE_HZ, SETTINGS).samples
    short = decode_audio(path, sound, begin, begin + 11_111, begin + 60_000, SETTINGS).samples
    assert np.array_equal(short, long[11_111:60_000])


def test_tiles_of_several_blocks(folder: Path) -> None:
    path = str(folder / "a.flac")
    sound = probe_audio(path, SETTINGS)
    short_blocks = grid(sound.duration_s, SETTINGS).__class__(10 * 31, 40, 468, 4, 9, 2)
    whole = decode(folder / "a.flac")
    pieces = decode_tiles(path, sound, short_blocks, range(1, 5), SETTINGS).pieces
    assert len(pieces) == 3
    for start, samples, lost, failure in pieces:
        assert (lost, failure) == ([], None)
        assert np.array_equal(samples, whole[start : start + len(samples)])


@pytest.mark.parametrize("name", ["late.mp4", "late.mkv", "late.mov"])
def test_a_stream_that_starts_late(tmp_path: Path, recording: Spoken, name: str) -> None:
    late = ("-itsoffset", "3.5")
    path = write(tmp_path / name, recording.samples, "-c:a", "aac", before=late)
    sound = probe_audio(str(path), SETTINGS)
    assert abs(sound.start_s - 3.5) < DELAY_S
    samples = decode(path)
    assert not samples[: int(3.4 * RATE_HZ)].any()
    assert abs(shift_s(samples[int(3.5 * RATE_HZ) :], recording.samples)) <= DELAY_S


def test_sound_that_starts_after_the_picture(tmp_path: Path, recording: Spoken) -> None:
    wav = write(tmp_path / "a.wav", recording.samples)
    path = tmp_path / "a.mp4"
    subprocess.run(
        [
            *("ffmpeg", "-v", "error", "-f", "lavfi", "-i", "testsrc=d=50:s=64x64:r=5"),
            *("-itsoffset", "2", "-i", str(wav), "-map", "0:v", "-map", "1:a", str(path)),
        ],
        check=True,
    )
    sound = probe_audio(str(path), SETTINGS)
    assert abs(sound.duration_s - 42) < 0.2
    assert abs(shift_s(decode(path)[2 * RATE_HZ :], recording.samples)) <= DELAY_S


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("hole.mkv", "pcm_s16le"),
        ("hole.mkv", "aac"),
        ("hole.mkv", "libopus"),
        # ffmpeg would take so long a leap in these for a new clock
        ("hole.ts", "aac"),
        ("hole.opus", "libopus"),
    ],
)
def test_a_hole_in_the_stream_stays_a_hole(
    tmp_path: Path, recording: Spoken, name: str, codec: str
) -> None:
    """Packets of 10 s to 25 s are missing from the file; what follows is at its time."""
    wav = write(tmp_path / "a.wav", recording.samples)
    path = tmp_path / name
    drop = "aselect='not(between(t,10,25))'"
    subprocess.run(
        ["ffmpeg", "-v", "error", "-i", str(wav), "-af", drop, "-c:a", codec, str(path)],
        check=True,
    )
    sound = probe_audio(str(path), SETTINGS)
    samples = decode(path)
    assert abs(len(samples) / RATE_HZ - 40) < 0.1
    assert not samples[int(10.2 * RATE_HZ) : int(24.8 * RATE_HZ)].any()
    later = slice(int(25.2 * RATE_HZ), None)
    assert abs(shift_s(samples[later], recording.samples[later])) <= DELAY_S
    # and after a seek to behind it, and into it
    for start in (30 * RATE_HZ, 15 * RATE_HZ):
        part = decode_audio(str(path), sound, start, start, start + 10 * RATE_HZ, SETTINGS).samples
        expected = recording.samples[start : start + 10 * RATE_HZ].copy()
        if start < 25 * RATE_HZ:
            expected[: 25 * RATE_HZ - start] = 0
        assert abs(shift_s(part, expected)) <= DELAY_S or not expected.any()


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("a.mp3", ("-ac", "2"), ("-ac", "1")),
        ("a.mp3", ("-ac", "1", "-ar", "22050"), ("-ac", "1", "-ar", "44100")),
        ("a.aac", ("-ac", "1"), ("-ac", "2")),
    ],
)
def test_channels_or_rate_change_inside_of_a_stream(
    tmp_path: Path, name: str, first: tuple[str, ...], second: tuple[str, ...]
) -> None:
    """An advertisement in front of a broadcast: both at their times, nothing in between."""
    head, body = spoken(10, seed=1).samples, spoken(20, seed=2).samples
    plain = ("-write_xing", "0", "-id3v2_version", "0") if name == "a.mp3" else ()
    parts = [
        write(tmp_path / f"{index}-{name}", samples, "-ar", "44100", *plain, *options)
        for index, samples, options in ((0, head, first), (1, body, second))
    ]
    path = tmp_path / name
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    samples = decode(path)
    assert abs(len(samples) / RATE_HZ - 30) < 0.3
    sound = probe_audio(str(path), SETTINGS)
    until = decode_audio(str(path), sound, 0, 0, 15 * RATE_HZ, SETTINGS).samples
    assert np.array_equal(until, samples[: 15 * RATE_HZ])
    # each part has its codec's delay, and its last frame is filled up
    assert abs(shift_s(samples[: 10 * RATE_HZ], head)) <= DELAY_S
    assert abs(shift_s(samples[10 * RATE_HZ :], body)) <= 2 * DELAY_S


def test_the_centre_of_a_programme_that_becomes_surround(tmp_path: Path) -> None:
    """Stereo first, then 5.1 with speech in the centre only."""
    said = spoken(8, seed=2).samples
    nothing = np.zeros_like(said)
    stereo = write(tmp_path / "2.ac3", np.stack([said, said], axis=1), "-ar", "48000")
    around = np.stack([nothing, nothing, said, nothing, nothing, nothing], axis=1)
    layout = ("-channel_layout", "5.1")
    surround = write(tmp_path / "6.ac3", around, "-ar", "48000", before=layout)
    joined = tmp_path / "a.ac3"
    joined.write_bytes(stereo.read_bytes() + surround.read_bytes())
    path = tmp_path / "a.ts"
    copy = ["-i", str(joined), "-c", "copy", str(path)]
    subprocess.run(["ffmpeg", "-v", "error", *copy], check=True)
    assert probe_audio(str(path), SETTINGS).channels == 2
    samples = decode(path)
    assert abs(shift_s(samples[8 * RATE_HZ :], said)) <= DELAY_S
    loud = [np.sqrt(np.mean(part**2)) for part in np.split(samples[: 16 * RATE_HZ], 2)]
    assert loud[1] == pytest.approx(loud[0] / 6, rel=0.1)


def test_a_clock_that_wraps(tmp_path: Path, recording: Spoken) -> None:
    """MPEG-TS counts to 2^33 at 90 kHz, 26.5 hours, and begins anew: here after 10 s."""
    clock = ("-output_ts_offset", str(2**33 / 90_000 - 10))
    path = write(tmp_path / "a.ts", recording.samples, "-c:a", "aac", *clock)
    sound = probe_audio(str(path), SETTINGS)
    assert abs(sound.duration_s - 40) < 0.2
    assert abs(shift_s(decode(path), recording.samples)) <= DELAY_S


@pytest.mark.parametrize("codec", ["libopus", "libvorbis"])
def test_ogg_streams_one_behind_the_other(tmp_path: Path, codec: str) -> None:
    parts = [spoken(10, seed=seed).samples for seed in (1, 2)]
    path = tmp_path / "a.ogg"
    path.write_bytes(
        b"".join(
            write(tmp_path / f"{index}.ogg", part, "-c:a", codec).read_bytes()
            for index, part in enumerate(parts)
        )
    )
    sound = probe_audio(str(path), SETTINGS)
    assert (sound.chained, sound.counted) == (True, True)
    assert abs(sound.duration_s - 20) < 0.2
    whole = decode(path)
    for index, part in enumerate(parts):
        there = whole[index * 10 * RATE_HZ : (index + 1) * 10 * RATE_HZ]
        assert abs(shift_s(there, part)) <= DELAY_S
    begin = 13 * RATE_HZ
    later = decode_audio(str(path), sound, begin, begin, begin + 5 * RATE_HZ, SETTINGS).samples
    # where parts meet, the count of samples and the times differ by a packet at most
    assert abs(shift_s(later, whole[begin : begin + 5 * RATE_HZ])) <= 0.02


def test_the_stream_that_was_probed_is_decoded(tmp_path: Path) -> None:
    """A broadcast's first track is announced and never comes."""
    path = tmp_path / "a.ts"
    wav = write(tmp_path / "a.wav", spoken(6, seed=1).samples)
    both = ("-map", "0:a", "-map", "0:a", "-c:a", "mp2", "-ar", "48000")
    subprocess.run(["ffmpeg", "-v", "error", "-i", str(wav), *both, str(path)], check=True)
    data = path.read_bytes()
    packets = [data[place : place + 188] for place in range(0, len(data), 188)]
    first = 0x100
    path.write_bytes(b"".join(each for each in packets if (each[1] & 0x1F) << 8 | each[2] != first))
    assert probe_audio(str(path), SETTINGS).index == 1
    assert len(decode(path)) > 5 * RATE_HZ


def test_channels(tmp_path: Path) -> None:
    left, right = tone(2, 300), tone(2, 2000)
    path = write(tmp_path / "a.wav", np.stack([left, right], axis=1))
    tracks = {"left": left, "right": right, "mix": (left + right) / 2, "c0": left, "c1": right}
    for track, expected in tracks.items():
        assert np.allclose(decode(path, track=track), expected, atol=1e-3), track
    mono = write(tmp_path / "b.wav", left)
    for track in ("left", "right", "mix", "c0"):
        assert np.allclose(decode(mono, track=track), left, atol=1e-3), track


def test_channels_that_are_each_others_opposite_are_no_silence(tmp_path: Path) -> None:
    """From 6 s on, as behind a cable that was soldered the wrong way: their sum is nothing."""
    said = tone(12, 300)
    other = np.where(np.arange(len(said)) < 6 * RATE_HZ, said, -said)
    path = write(tmp_path / "a.wav", np.stack([said, other], axis=1))
    assert np.allclose(decode(path), said, atol=1e-3)
    # and whatever part of its block is asked for
    sound = probe_audio(str(path), SETTINGS)
    begin = 2 * RATE_HZ
    long = decode_audio(str(path), sound, begin, begin, 12 * RATE_HZ, SETTINGS).samples
    for stop in (97_001, 99_999, 100_001):
        short = decode_audio(str(path), sound, begin, begin + 777, stop, SETTINGS)
        assert np.array_equal(short.samples, long[777 : stop - begin])
        assert short.end == stop


def test_eight_channels_and_eight_kilohertz(tmp_path: Path) -> None:
    many = np.repeat(tone(1)[:, None], 8, axis=1)
    assert len(decode(write(tmp_path / "a.wav", many))) == RATE_HZ
    path = write(tmp_path / "b.wav", tone(1), "-ar", "8000", "-c:a", "pcm_mulaw")
    assert np.allclose(decode(path)[2000:14_000], tone(1)[2000:14_000], atol=0.05)


def test_no_sample_is_out_of_range(tmp_path: Path) -> None:
    wild = tone(1).copy()
    wild[100:200] = [np.nan, np.inf, -np.inf, 50.0] * 25
    path = write(tmp_path / "a.wav", wild, "-c:a", "pcm_f32le")
    found = decode(path)
    assert np.isfinite(found).all()
    assert np.abs(found).max() <= 1


def test_a_decoder_that_takes_too_long(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", tone(1))
    sound = probe_audio(str(path), SETTINGS)
    hasty = AudioSettings(timeout_s=0.001)
    with pytest.raises(MediaError) as error:
        decode_audio(str(path), sound, 0, 0, 16_000, hasty)
    assert error.value.code == "decode.timeout"


@pytest.mark.parametrize("name", ["a.m3u8", "a.ffconcat", "a.sdp", "a.mpd", "a.txt"])
def test_playlists_open_nothing(tmp_path: Path, name: str) -> None:
    target = write(tmp_path / "secret.wav", tone(2))
    text = {
        "a.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{target}\n#EXT-X-ENDLIST\n",
        "a.ffconcat": "ffconcat version 1.0\nfile secret.wav\n",
        "a.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
        "a.mpd": f"<MPD><Period><BaseURL>file://{target}</BaseURL></Period></MPD>",
        "a.txt": "nothing but words\n",
    }[name]
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(MediaError) as error:
        probe_audio(str(path), SETTINGS)
    assert error.value.code == "decode.unsupported"


def test_a_wav_inside_of_a_file_name_with_colons_and_dashes(tmp_path: Path) -> None:
    path = write(tmp_path / "plain.wav", tone(1))
    strange = path.rename(tmp_path / "-i http:%d 'quoted' [a],b;c.wav")
    assert len(decode(strange)) == RATE_HZ


def test_a_file_of_a_speech_corpus(tmp_path: Path) -> None:
    """NIST SPHERE, as TIMIT and Switchboard come, often with the name of a WAV."""
    sound = (tone(4, 300.0) * 32767).astype("<i2")
    fields = f"sample_count -i {len(sound)}\nsample_rate -i 16000\nchannel_count -i 1\n"
    fields += "sample_n_bytes -i 2\nsample_byte_format -s2 01\nend_head\n"
    path = tmp_path / "SA1.WAV"
    path.write_bytes(f"NIST_1A\n   1024\n{fields}".ljust(1024).encode() + sound.tobytes())
    probed = probe_audio(str(path), SETTINGS)
    assert probed.duration_s == 4
    piece = decode_audio(str(path), probed, 48_000, 48_000, 56_000, SETTINGS)
    assert np.array_equal(piece.samples * 32768, sound[48_000:56_000])


def test_a_wav_without_a_length(tmp_path: Path) -> None:
    """As a recorder leaves it that was writing to a pipe."""
    path = write(tmp_path / "a.wav", tone(3))
    data = bytearray(path.read_bytes())
    place = data.index(b"data")
    data[place + 4 : place + 8] = struct.pack("<I", 0xFFFFFFFF)
    path.write_bytes(data)
    sound = probe_audio(str(path), SETTINGS)
    assert sound.duration_s == pytest.approx(3, abs=0.01)
    assert len(decode(path)) == 3 * RATE_HZ


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1600, 60_000),
    st.sampled_from([8000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000, 96_000]),
    st.integers(1, 3),
)
def test_lengths_agree_at_every_rate(count: int, rate_hz: int, channels: int) -> None:
    """Of samples, frames and durations, to one sample of resampling."""
    with TemporaryDirectory() as folder:
        sound = np.repeat(tone(4)[:count, None], channels, axis=1)
        path = write(Path(folder) / "a.wav", sound, "-ar", str(rate_hz))
        duration_s = probe_audio(str(path), SETTINGS).duration_s
        samples = decode(path)
        assert abs(len(samples) - duration_s * RATE_HZ) <= 2
        assert abs(len(samples) - count) <= 1 + RATE_HZ / rate_hz
        framed = frames(samples)
        assert len(framed) == frame_count(len(samples)) == -(-len(samples) // 640)
