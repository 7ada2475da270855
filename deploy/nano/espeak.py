"""Speak words with one espeak-ng voice: `python deploy/nano/espeak.py VOICE < takes.json > sounds.npz`.

In: a JSON list of [word, words a minute, pitch 0..99]. Out: `samples` int16 at 16 kHz, one recording
after the other, and `lengths`. The library is a tenth of the work of the espeak-ng program, which loads
its voice anew for each word. It keeps state from voice to voice, so each voice has a process of its own.
"""

import ctypes
import io
import json
import sys
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.int16]

SAMPLE_RATE_HZ: Final = 16_000
_QUIET: Final = 0.01
# Of speak_lib.h.
_LIBRARY: Final = "libespeak-ng.so.1"
_SYNCHRONOUS: Final = 2
_RATE, _PITCH = 1, 3
_POS_CHARACTER: Final = 1
# UTF-8, phonemes in double brackets and the pause at a sentence's end: as the program asks.
_FLAGS: Final = 0x0001 | 0x0100 | 0x1000
_ON_SAMPLES: Final = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


class _Properties(ctypes.Structure):
    """espeak_VOICE, by which a voice is looked for that is not found by its name."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("languages", ctypes.c_char_p),
        ("identifier", ctypes.c_char_p),
        ("gender", ctypes.c_ubyte),
        ("age", ctypes.c_ubyte),
        ("variant", ctypes.c_ubyte),
        ("xx1", ctypes.c_ubyte),
        ("score", ctypes.c_int),
        ("spare", ctypes.c_void_p),
    )


class Voice:
    """A voice of the library; the process's only one. Raises RuntimeError where there is no such voice."""

    def __init__(self, name: str) -> None:
        self._library: Any = ctypes.CDLL(_LIBRARY)
        self._pieces: list[Samples] = []
        self._keep = _ON_SAMPLES(self._take)
        self._rate_hz = self._library.espeak_Initialize(_SYNCHRONOUS, 0, None, 0)
        self._library.espeak_SetSynthCallback(self._keep)
        if self._library.espeak_SetVoiceByName(name.encode()) != 0:
            properties = _Properties(languages=name.encode())
            if self._library.espeak_SetVoiceByProperties(ctypes.byref(properties)) != 0:
                raise RuntimeError(f"espeak-ng has no voice {name}")

    def speak(self, word: str, speed_wpm: int, pitch: int) -> Samples:
        """Return the word as int16 at 16 kHz, its silent ends cut off, peak at half of full scale."""
        self._pieces.clear()
        self._library.espeak_SetParameter(_RATE, speed_wpm, 0)
        self._library.espeak_SetParameter(_PITCH, pitch, 0)
        text = word.encode() + b"\0"
        self._library.espeak_Synth(text, len(text), 0, _POS_CHARACTER, 0, _FLAGS, None, None)
        raw = np.concatenate(self._pieces).astype(np.float32)
        return trimmed(resample(raw, self._rate_hz, SAMPLE_RATE_HZ))

    def _take(self, samples: Any, count: int, _events: object) -> int:  # noqa: ANN401
        if samples and count:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0


def resample(sound: NDArray[np.float32], rate_hz: int, wanted_hz: int) -> NDArray[np.float32]:
    """Resample by cutting or padding the spectrum; meant for recordings of seconds."""
    if rate_hz == wanted_hz:
        return sound
    count = round(len(sound) * wanted_hz / rate_hz)
    spectrum = np.fft.rfft(sound)[: count // 2 + 1]
    return (np.fft.irfft(spectrum, count) * (count / len(sound))).astype(np.float32)


def trimmed(sound: NDArray[np.float32]) -> Samples:
    """Cut off silent ends and bring the peak to half of full scale, int16."""
    loud = np.flatnonzero(np.abs(sound) > _QUIET * np.abs(sound).max())
    sound = sound[loud[0] : loud[-1] + 1]
    loudest: Samples = (sound * (16384.0 / np.abs(sound).max())).astype(np.int16)
    return loudest


def main() -> None:
    """Speak what comes in."""
    voice = Voice(sys.argv[1])
    sounds = [voice.speak(*take) for take in json.load(sys.stdin)]
    out = io.BytesIO()
    np.savez(out, samples=np.concatenate(sounds), lengths=[len(sound) for sound in sounds])
    sys.stdout.buffer.write(out.getvalue())


if __name__ == "__main__":
    main()
