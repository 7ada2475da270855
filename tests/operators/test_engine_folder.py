"""An engine's sockets and shared memory are known by a folder that goes with it, or with the next one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from operators.engine_folder import LONGEST_BASE, EngineFolder

HOLD = """
import subprocess, sys, tempfile
from operators.engine_folder import EngineFolder
tempfile.tempdir = sys.argv[1]
folder = EngineFolder()
(folder.path / "socket").touch()
share = '''
import sys
from multiprocessing import resource_tracker, shared_memory
shared = shared_memory.SharedMemory(create=True, size=4096)
resource_tracker.unregister(shared._name, "shared_memory")
print(shared.name, flush=True)
sys.stdin.read()
'''
worker = subprocess.Popen([sys.executable, "-c", share], stdout=subprocess.PIPE)
name = worker.stdout.readline().decode()
folder.note_memory()
print(name, end="", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.delenv("VLLM_RPC_BASE_PATH", raising=False)
    # short enough for a socket below it, which pytest's own folders need not be
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def folders(base: Path) -> list[Path]:
    return list(base.glob("polyscribe-engine-*"))


def test_the_folder_is_the_engines_while_it_starts_and_then_goes(base: Path) -> None:
    folder = EngineFolder()
    assert folder.path.parent == base
    assert folder.path.stat().st_mode & 0o077 == 0
    with folder.used():
        assert os.environ["VLLM_RPC_BASE_PATH"] == str(folder.path)
    assert "VLLM_RPC_BASE_PATH" not in os.environ
    folder.remove()
    folder.remove()
    assert folders(base) == []


def test_a_base_of_the_users_own_is_used_and_restored(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = base / "own"
    own.mkdir()
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", str(own))
    folder = EngineFolder()
    with folder.used():
        assert folder.path.parent == own
    assert os.environ["VLLM_RPC_BASE_PATH"] == str(own)
    folder.remove()


def test_a_base_too_long_for_a_sockets_path_is_passed_over(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = base / ("x" * LONGEST_BASE)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    folder = EngineFolder()
    assert folder.path.parent == Path("/tmp")
    folder.remove()
    assert not folder.path.exists()


def test_what_a_killed_process_left_goes_with_the_next_engine(base: Path) -> None:
    held = EngineFolder()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(base)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    ) as other:
        assert other.stdout is not None
        shared = Path("/dev/shm", other.stdout.readline().decode().strip())
        assert len(folders(base)) == 2
        second = EngineFolder()
        assert len(folders(base)) == 3  # all three are alive
        assert shared.is_file()
        other.kill()
    third = EngineFolder()
    assert set(folders(base)) == {held.path, second.path, third.path}
    assert not shared.exists()
    for folder in (held, second, third):
        folder.remove()
