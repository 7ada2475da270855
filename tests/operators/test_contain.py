"""A call may hang, crash or eat memory: it costs itself, and the next call works."""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from operators.contain import SLAB_BYTES, Contained, ContainError
from operators.errors import MediaError


@pytest.fixture(scope="module")
def contained() -> Iterator[Contained]:
    contained = Contained(1 << 28, ["numpy"])
    yield contained
    contained.close()


def code(contained: Contained, function: object, *args: object, timeout_s: float = 20) -> str:
    with pytest.raises(MediaError) as failure:
        contained.submit(function, *args, timeout_s=timeout_s).result()
    assert contained.submit(int, "7", timeout_s=5).result() == 7
    return f"{failure.value.code}: {failure.value.message}"


def test_hangs(contained: Contained) -> None:
    started = time.monotonic()
    assert code(contained, time.sleep, 600, timeout_s=0.2) == "decode.timeout: no answer in 0.2 s"
    assert time.monotonic() - started < 5


def test_crashes(contained: Contained) -> None:
    assert code(contained, os.abort) == "decode.crashed: the decoder process was ended by Aborted"
    segfault = "import ctypes; ctypes.string_at(0)"
    assert code(contained, exec, segfault).endswith("was ended by Segmentation fault")
    assert code(contained, os._exit, 3).endswith("left with status 3")


def test_allocates_without_end(contained: Contained) -> None:
    assert code(contained, list, itertools.repeat(0)).startswith("decode.out_of_memory")
    assert code(contained, bytearray, 1 << 29).startswith("decode.out_of_memory")


def test_allocates_within_the_limit(contained: Contained) -> None:
    touched = "b = bytearray(200 << 20)"
    contained.submit(exec, touched, timeout_s=20).result()


def test_killed_from_outside_is_tried_again(contained: Contained, tmp_path: Path) -> None:
    # as the kernel does when another process has eaten the memory
    once = (
        f"import os, pathlib; p = pathlib.Path({str(tmp_path / 'seen')!r});"
        " p.exists() or (p.touch(), os.kill(os.getpid(), 9))"
    )
    contained.submit(exec, once, timeout_s=20).result()
    always = "import os; os.kill(os.getpid(), 9)"
    assert code(contained, exec, always).startswith("decode.crashed: the decoder process was kill")


def test_nursery_killed(contained: Contained) -> None:
    nursery = contained.submit(os.getppid, timeout_s=20).result()
    os.kill(nursery, signal.SIGKILL)
    # The signal takes a moment; until then the child may answer. No call fails.
    end = time.monotonic() + 20
    while contained.submit(os.getppid, timeout_s=20).result() == nursery:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_own_failure_and_own_mistake(contained: Contained) -> None:
    failing = (
        "from operators.errors import MediaError; raise MediaError('decode.corrupt', 'as told')"
    )
    before = contained.submit(os.getpid, timeout_s=5).result()
    assert code(contained, exec, failing) == "decode.corrupt: as told"
    assert contained.submit(os.getpid, timeout_s=5).result() == before
    with pytest.raises(ContainError, match="invalid literal"):
        contained.submit(int, "x", timeout_s=5).result()
    assert contained.submit(int, "7", timeout_s=5).result() == 7


@pytest.mark.parametrize("size", [0, 100, 1 << 20, SLAB_BYTES, SLAB_BYTES + 1])
def test_bytes_of_any_size_arrive(contained: Contained, size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    array = contained.submit(np.frombuffer, data, np.uint8, timeout_s=20).result() if size else None
    assert contained.submit(len, data, timeout_s=20).result() == size
    if array is not None:
        assert array.tobytes() == data


def test_answers_are_the_callers_own(contained: Contained) -> None:
    first = contained.submit(np.full, 100_000, 1, np.uint8, timeout_s=5).result()
    contained.submit(np.full, 100_000, 2, np.uint8, timeout_s=5).result()
    assert (first == 1).all()


def test_callers_thread_is_free_while_a_call_runs(contained: Contained) -> None:
    futures = [contained.submit(time.sleep, 0.2, timeout_s=5) for _ in range(3)]
    assert not futures[0].done()
    started = time.monotonic()
    for future in futures:
        future.result()
    assert time.monotonic() - started > 0.5  # one after the other


def test_child_is_one_thread_without_core_files(contained: Contained) -> None:
    status = contained.submit(Path.read_text, Path("/proc/self/status"), timeout_s=5).result()
    assert "\nThreads:\t1\n" in status
    limits = contained.submit(Path.read_text, Path("/proc/self/limits"), timeout_s=5).result()
    core = next(line for line in limits.splitlines() if line.startswith("Max core"))
    assert core.split()[4:6] == ["0", "0"]


def test_pickled_before_and_after_use(contained: Contained) -> None:
    copy = pickle.loads(pickle.dumps(contained))
    try:
        assert copy.submit(os.getpid, timeout_s=20).result() != os.getpid()
    finally:
        copy.close()


def test_close_ends_a_running_call() -> None:
    own = Contained(1 << 28)
    pid = own.submit(os.getpid, timeout_s=20).result()
    future = own.submit(time.sleep, 600, timeout_s=600)
    while not future.running():
        time.sleep(0.01)
    own.close()
    with pytest.raises(ContainError):
        future.result(timeout=10)
    assert gone(pid)
    with pytest.raises(ContainError):
        own.submit(os.getpid, timeout_s=1)


def test_used_from_a_thread_that_ends() -> None:
    own = Contained(1 << 28)
    pids: list[int] = []
    thread = threading.Thread(
        target=lambda: pids.append(own.submit(os.getpid, timeout_s=20).result())
    )
    thread.start()
    thread.join()
    time.sleep(0.2)
    assert own.submit(os.getpid, timeout_s=20).result() == pids[0]
    own.close()


def test_a_nursery_that_cannot_start_is_a_broken_machine(capfd: pytest.CaptureFixture[str]) -> None:
    own = Contained(1 << 28, ["operators.no_such_module"])
    with pytest.raises(ContainError, match="does not start"):
        own.submit(os.getpid, timeout_s=5).result()
    own.close()
    assert "no_such_module" in capfd.readouterr().err


USER = """
import os, sys, time
from operators.contain import Contained
contained = Contained(1 << 28)
print(*contained.submit(eval, "__import__('os').getpid(), __import__('os').getppid()",
                        timeout_s=20).result(), flush=True)
if sys.argv[1] == "exit":
    sys.exit(0)
contained.submit(time.sleep, 600, timeout_s=600)
time.sleep(600)
"""


@pytest.mark.parametrize("way", ["exit", "kill"])
def test_nothing_outlives_the_worker(way: str, tmp_path: Path) -> None:
    script = tmp_path / "user.py"  # without a __main__ guard
    script.write_text(USER)
    command = [sys.executable, str(script), way]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as user:
        assert user.stdout is not None
        pids = [int(word) for word in user.stdout.readline().split()]
        if way == "kill":
            user.kill()
        _, errors = user.communicate(timeout=20)
    assert errors == b""
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)


def gone(pid: int) -> bool:
    """Within 5 s. A zombie counts: where nobody reaps orphans, that is the container's doing."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False
