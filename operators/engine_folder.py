"""A folder of an engine's own for its sockets and its shared memory's names, gone when the engine is.

vLLM binds unix sockets with random names in the temporary directory and leaves them there: seven an
engine. Where its workers are processes (on CPUs, and several GPUs an engine) they share 160 MB of
/dev/shm, which stay when they are killed, and Ray kills an actor's children before the actor may close
anything. A process that is killed cannot clean up, so the next engine on the machine removes what no
living process holds.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

PREFIX = "polyscribe-engine-"
STARTING = "polyscribe-starts-"
LOCK = "lock"
MEMORY = "memory"
SHARED = Path("/dev/shm")  # noqa: S108 - where Linux keeps what multiprocessing.shared_memory makes
VARIABLE = "VLLM_RPC_BASE_PATH"
# A unix socket's path has at most 107 bytes; the folder's name and a UUID take 64 of them.
LONGEST_BASE = 43
# as multiprocessing.shared_memory names what it makes
_NAME = re.compile(r"\bpsm_[0-9a-f]+")


class EngineFolder:
    """Held by a lock for as long as this process, or a child that it forked, lives."""

    def __init__(self) -> None:
        base = os.environ.get(VARIABLE) or tempfile.gettempdir()
        if len(os.fsencode(base)) > LONGEST_BASE:
            base = "/tmp"  # noqa: S108 - mkdtemp makes a folder that only this user enters
        _sweep(Path(base))
        # Under its final name only when it is held: another engine's sweep may come at any moment.
        made = Path(tempfile.mkdtemp(prefix=STARTING, dir=base))
        self._lock = os.open(made / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = made.rename(made.with_name(PREFIX + made.name.removeprefix(STARTING)))

    @contextmanager
    def used(self) -> Iterator[None]:
        """vLLM binds its sockets here, as long as it is started within."""
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = str(self.path)
        try:
            yield
        finally:
            del os.environ[VARIABLE]
            if before is not None:
                os.environ[VARIABLE] = before

    def note_memory(self) -> None:
        """Write down the shared memory that processes hold which this one has started, by now."""
        names: set[str] = set()
        for process in psutil.Process().children(recursive=True):
            with suppress(OSError):  # it has just ended
                names |= set(_NAME.findall(Path(f"/proc/{process.pid}/maps").read_text()))
        (self.path / MEMORY).write_text("\n".join(names))

    def remove(self) -> None:
        """The folder, and the shared memory noted in it. May be called twice."""
        if self._lock >= 0:
            _remove(self.path)
            os.close(self._lock)
            self._lock = -1


def _sweep(base: Path) -> None:
    for left in base.glob(f"{PREFIX}*/{LOCK}"):
        with suppress(OSError):  # held by its engine, or just removed by another one
            lock = os.open(left, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(left.parent)
            finally:
                os.close(lock)


def _remove(folder: Path) -> None:
    with suppress(OSError):
        for name in _NAME.findall((folder / MEMORY).read_text()):
            (SHARED / name).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
