"""Spoken windows and recordings of any length, made of banked words, with each word's true time."""

import subprocess
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from deploy.nano import instructions
from deploy.nano.espeak import SAMPLE_RATE_HZ
from deploy.nano.speech_bank import Bank
from deploy.nano.words import DIGITS, SPOKEN

Waveform = NDArray[np.float32]

MAX_WINDOW_S: Final = 15.0
# Noise is shaped in parts of ten minutes: that of two hours in one go took 12 GB.
NOISE_SAMPLES: Final = 600 * SAMPLE_RATE_HZ
MAX_WORDS: Final = 12
CODECS: Final = ("libmp3lame", "aac")
BITRATES_KBIT_S: Final = (16, 24, 32, 48, 64)
# What may lie between the phrases of a long recording. The checkpoint takes a rest of music, left beside
# speech, for a word.
BETWEEN: Final = ("silence", "noise")
WITH_MUSIC: Final = ("silence", "silence", "noise", "music")


@dataclass(frozen=True)
class Word:
    """A spoken word and where it sounds."""

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Recording:
    """Mono float32 samples at 16 kHz within -1..1, and the words in them.

    `regions` lists (kind, start_s, end_s) for a long recording: speech, silence, noise, music.
    """

    samples: Waveform
    words: tuple[Word, ...]
    regions: tuple[tuple[str, float, float], ...] = field(default=())

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return len(self.samples) / SAMPLE_RATE_HZ


def answer(words: tuple[Word, ...] | list[str], instruction: str) -> str:
    """Return what the checkpoint is trained to answer to a window with these words."""
    texts = [word.text if isinstance(word, Word) else word for word in words]
    if not texts:
        return instructions.NO_SPEECH
    if instruction != instructions.ASR_ENGLISH:
        texts = [str(DIGITS.index(t)) if t in DIGITS else t for t in texts]
    return " ".join(texts)


def draw_words(rng: np.random.Generator, count: int, again: float = 0.0) -> list[str]:
    """Draw words, digits a little more often than the rest; with chance `again` the one before."""
    words: list[str] = []
    for _ in range(count):
        if words and again and rng.random() < again:
            words.append(words[-1])
        else:
            words.append(str(rng.choice(DIGITS if rng.random() < 0.3 else SPOKEN)))
    return words


def varied(sound: Waveform, rng: np.random.Generator) -> Waveform:
    """Play a word up to 8 % slower or faster, and tilt its spectrum; the peak stays."""
    count = round(len(sound) * rng.uniform(0.92, 1.08))
    places = np.linspace(0, len(sound) - 1, count)
    played = np.interp(places, np.arange(len(sound)), sound).astype(np.float32)
    played[1:] += np.float32(rng.uniform(-0.4, 0.6)) * played[:-1]
    return played * np.float32(np.abs(sound).max() / (np.abs(played).max() + 1e-9))


def compose(
    texts: list[str],
    bank: Bank,
    rng: np.random.Generator,
    max_s: float = MAX_WINDOW_S,
    vary: bool = False,
    pauses: bool = False,
) -> Recording:
    """Put the words one after another with gaps, at most `max_s` long (words kept, gaps shrunk).

    With `pauses` a quarter of the gaps between words is 0.5 to 5 s long.
    """
    sounds = [bank.pick(text, rng).astype(np.float32) / 32768.0 for text in texts]
    if vary:
        sounds = [varied(sound, rng) for sound in sounds]
    level = rng.uniform(0.15, 0.9)
    sounds = [s * np.float32(level * rng.uniform(0.7, 1.0) / 0.5) for s in sounds]
    longest = np.exp(rng.uniform(np.log(0.3), np.log(1.2)))
    gaps = np.exp(rng.uniform(np.log(0.07), np.log(longest), len(texts) + 1))
    if pauses:
        long = rng.random(len(gaps)) < 0.25
        gaps[long] = rng.uniform(0.5, 5.0, int(long.sum()))
    gaps[0] = rng.uniform(0.0, 0.5)
    gaps[-1] = rng.uniform(0.02, 0.6)
    spare = max_s - sum(len(s) for s in sounds) / SAMPLE_RATE_HZ
    if gaps.sum() > spare:
        gaps *= max(spare, 0.0) / gaps.sum() * 0.99
    pieces: list[Waveform] = []
    words: list[Word] = []
    position = 0
    for text, sound, gap in zip(texts, sounds, gaps[:-1], strict=True):
        pieces.append(np.zeros(int(gap * SAMPLE_RATE_HZ), dtype=np.float32))
        position += len(pieces[-1])
        start = position
        pieces.append(sound)
        position += len(sound)
        words.append(Word(text, start / SAMPLE_RATE_HZ, position / SAMPLE_RATE_HZ))
    pieces.append(np.zeros(int(gaps[-1] * SAMPLE_RATE_HZ), dtype=np.float32))
    return Recording(np.clip(np.concatenate(pieces), -1.0, 1.0), tuple(words))


def noise(count: int, rng: np.random.Generator) -> Waveform:
    """Return noise of unit power between white and pink, float32 [count]."""
    white = rng.standard_normal(count).astype(np.float32)
    if rng.random() < 0.5 and count > 64:
        # A length of small factors: that of a prime takes ten times as long.
        length = -(-count // 8192) * 8192
        spectrum = np.fft.rfft(white, length)
        slope = np.arange(1, len(spectrum) + 1, dtype=np.float32) ** -rng.uniform(0.1, 0.5)
        white = np.fft.irfft(spectrum * slope, length)[:count].astype(np.float32)
    return white / np.float32(white.std() + 1e-9)


def music(count: int, rng: np.random.Generator) -> Waveform:
    """Return chords of decaying tones that change every half second or so, float32 [count]."""
    sound = np.zeros(count, dtype=np.float32)
    position = 0
    while position < count:
        length = min(count - position, int(rng.uniform(0.3, 0.8) * SAMPLE_RATE_HZ))
        time = np.arange(length, dtype=np.float32) / SAMPLE_RATE_HZ
        root = 110.0 * 2 ** (rng.integers(0, 24) / 12)
        for ratio in (1.0, 1.26, 1.5, 2.0):
            phase = rng.uniform(0, 2 * np.pi)
            tone = np.sin(2 * np.pi * root * ratio * time + phase) / ratio
            sound[position : position + length] += tone * np.exp(-2.0 * time)
        position += length
    return sound / np.float32(np.abs(sound).max() + 1e-9)


def draw_no_speech(rng: np.random.Generator) -> Recording:
    """Draw 0.5 to 15 s without a word: noise, a tone, music or digital silence."""
    count = int(rng.uniform(0.5, MAX_WINDOW_S) * SAMPLE_RATE_HZ)
    kind = int(rng.integers(4))
    if kind == 0:
        sound = noise(count, rng) * np.float32(rng.uniform(0.001, 0.2))
    elif kind == 1:
        time = np.arange(count, dtype=np.float32) / SAMPLE_RATE_HZ
        tone = np.sin(2 * np.pi * np.float32(np.exp(rng.uniform(4.6, 8.3))) * time)
        sound = tone * np.float32(rng.uniform(0.05, 0.8))
        sound += noise(count, rng) * np.float32(rng.uniform(0, 0.01))
    elif kind == 2:
        sound = music(count, rng) * np.float32(rng.uniform(0.1, 0.8))
    else:
        sound = np.zeros(count, dtype=np.float32)
    return Recording(np.clip(sound, -1.0, 1.0).astype(np.float32), ())


def add_noise(recording: Recording, rng: np.random.Generator) -> Recording:
    """Add noise 20 to 60 dB under the speech; a quarter stays clean."""
    if rng.random() < 0.25:
        return recording
    power = float(np.sqrt(np.mean(recording.samples[recording.samples != 0] ** 2) + 1e-12))
    level = power * 10 ** (-rng.uniform(20, 60) / 20)
    noisy = recording.samples + noise(len(recording.samples), rng) * np.float32(level)
    return Recording(np.clip(noisy, -1.0, 1.0), recording.words, recording.regions)


def draw_window(
    bank: Bank,
    rng: np.random.Generator,
    max_words: int = MAX_WORDS,
    no_speech: float = 0.08,
    vary: bool = False,
    again: float = 0.0,
    pauses: bool = False,
) -> Recording:
    """Draw a window of 1 to `max_words` words, or with chance `no_speech` one without a word.

    With chance `again` a word is the one before; for `vary` and `pauses` see `compose`.
    """
    if rng.random() < no_speech:
        return draw_no_speech(rng)
    words = draw_words(rng, int(rng.integers(1, max_words + 1)), again)
    return add_noise(compose(words, bank, rng, vary=vary, pauses=pauses), rng)


def through_codec(samples: Waveform, codec: str, kbit_s: int) -> Waveform:
    """Encode and decode with ffmpeg; returns as many samples as came in."""
    container = {"libmp3lame": "mp3", "aac": "adts"}[codec]
    raw = ["-f", "f32le", "-ar", str(SAMPLE_RATE_HZ), "-ac", "1"]
    quiet = ["ffmpeg", "-hide_banner", "-loglevel", "error", "-threads", "1"]
    encode = [*quiet, *raw, "-i", "-", "-c:a", codec, "-b:a", f"{kbit_s}k", "-f", container, "-"]
    coded = subprocess.run(  # noqa: S603
        encode, input=samples.tobytes(), capture_output=True, check=True
    ).stdout
    decode = [*quiet, "-f", container.replace("adts", "aac"), "-i", "-", *raw, "-"]
    decoded = subprocess.run(  # noqa: S603
        decode, input=coded, capture_output=True, check=True
    ).stdout
    sound = np.frombuffer(decoded, dtype=np.float32)
    # A stream without a container keeps no note of the samples that the encoder starts with.
    delay = {"aac": 1024, "libmp3lame": 1105}[codec]
    sound = sound[delay : delay + len(samples)]
    return np.pad(sound, (0, len(samples) - len(sound)))


def draw_codec(rng: np.random.Generator) -> tuple[str, int]:
    """Draw a codec and a bit rate in kbit/s."""
    return str(rng.choice(CODECS)), int(rng.choice(BITRATES_KBIT_S))


def code_together(recordings: list[Recording], codec: str, kbit_s: int) -> list[Recording]:
    """Send many recordings through one codec run, a fifth of a second apart."""
    pause = np.zeros(SAMPLE_RATE_HZ // 5, dtype=np.float32)
    joined = np.concatenate([piece for r in recordings for piece in (r.samples, pause)])
    decoded = through_codec(joined, codec, kbit_s)
    coded: list[Recording] = []
    position = 0
    for recording in recordings:
        part = decoded[position : position + len(recording.samples)].copy()
        coded.append(Recording(part, recording.words, recording.regions))
        position += len(recording.samples) + len(pause)
    return coded


def long_recording(
    bank: Bank,
    rng: np.random.Generator,
    duration_s: float,
    noise_db: float = -50.0,
    between: tuple[str, ...] = BETWEEN,
) -> Recording:
    """Speak phrases with pauses between them until `duration_s` is reached.

    A pause is one of `between` (silence is digital), 0.8 to 4 s long; noise at `noise_db` below
    full scale lies under the whole. The result is at least `duration_s` long, ends with a pause, and
    knows the true time of each word.
    """
    pieces: list[Waveform] = []
    words: list[Word] = []
    regions: list[tuple[str, float, float]] = []
    position = 0

    def append(kind: str, sound: Waveform) -> None:
        nonlocal position
        start = position / SAMPLE_RATE_HZ
        pieces.append(sound)
        position += len(sound)
        regions.append((kind, start, position / SAMPLE_RATE_HZ))

    while position < duration_s * SAMPLE_RATE_HZ:
        count = int(rng.integers(1, 9))
        phrase = compose(draw_words(rng, count), bank, rng, max_s=10.0)
        offset = position / SAMPLE_RATE_HZ
        append("speech", phrase.samples)
        words += [Word(w.text, w.start_s + offset, w.end_s + offset) for w in phrase.words]
        length = int(rng.uniform(0.8, 4.0) * SAMPLE_RATE_HZ)
        kind = str(rng.choice(between))
        if kind == "noise":
            append(kind, noise(length, rng) * np.float32(0.02))
        elif kind == "music":
            append(kind, music(length, rng) * np.float32(0.2))
        else:
            append(kind, np.zeros(length, dtype=np.float32))
    samples = np.concatenate(pieces)
    for start in range(0, len(samples), NOISE_SAMPLES):
        part = samples[start : start + NOISE_SAMPLES]
        part += noise(len(part), rng) * np.float32(10 ** (noise_db / 20))
    return Recording(np.clip(samples, -1.0, 1.0, out=samples), tuple(words), tuple(regions))
