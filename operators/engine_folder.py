"""A folder of an engine's own for its sockets, gone when the engine is.

vLLM binds unix sockets with random names in the temporary directory and leaves them there: seven an
engine. A process that is killed cannot clean up, so the next engine on the machine removes what no
living process holds.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "polyscribe-engine-"
LOCK = "lock"
VARIABLE = "VLLM_RPC_BASE_PATH"
# A unix socket's path has at most 107 bytes; the folder's name and a UUID take 64 of them.
LONGEST_BASE = 43


class EngineFolder:
    """Held by a lock for as long as this process, or a child that it forked, lives."""

    def __init__(self) -> None:
        base = os.environ.get(VARIABLE) or tempfile.gettempdir()
        if len(os.fsencode(base)) > LONGEST_BASE:
            base = "/tmp"  # noqa: S108 - mkdtemp makes a folder that only this user enters
        _sweep(Path(base))
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

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

    def remove(self) -> None:
        """May be called twice."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def _sweep(base: Path) -> None:
    for left in base.glob(f"{PREFIX}*/{LOCK}"):
        with suppress(OSError):  # held by its engine, or just removed by another one
            lock = os.open(left, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left.parent, ignore_errors=True)
            finally:
                os.close(lock)
