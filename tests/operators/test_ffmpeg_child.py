"""Programs at their limits: time, memory, output, and ends of their own."""

from __future__ import annotations

import tracemalloc

import pytest

from operators.errors import MediaError
from operators.ffmpeg_child import run
from operators.settings import AudioSettings

SETTINGS = AudioSettings(timeout_s=60)


def test_a_program_that_takes_too_long() -> None:
    with pytest.raises(MediaError) as error:
        run(["sleep", "30"], AudioSettings(timeout_s=0.2), most_bytes=1)
    assert error.value.code == "decode.timeout"


def test_a_program_that_takes_too_much_memory() -> None:
    greedy = ["python3", "-c", "bytearray(1 << 31)"]
    done = run(greedy, AudioSettings(max_memory_bytes=1 << 28), most_bytes=1)
    assert done.status != 0


def test_a_program_that_crashes() -> None:
    died = run(["sh", "-c", "kill -SEGV $$"], SETTINGS, most_bytes=1)
    assert died.failure().code == "decode.crashed"


def test_what_a_program_writes_is_held_once() -> None:
    """Whole pictures are 256 MB of it."""
    most = 40_000_000
    tracemalloc.start()
    try:
        done = run(["head", "-c", str(most + 5), "/dev/zero"], SETTINGS, most_bytes=most)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (len(done.stdout), done.cut) == (most, True)
    assert peak < 1.5 * most


def test_a_program_that_is_not_there_is_a_broken_machine() -> None:
    done = run(["polyscribe-no-such-program"], SETTINGS, most_bytes=1)
    assert done.status == 127
