"""Runs as jobs of a real local cluster with its job server: submit, follow, stop, go on, two at once."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from tempfile import mkdtemp

import media
import pyarrow.parquet as pq
import pytest
import yaml
from job_server import ENVIRONMENT, polyscribe
from PIL import Image
from ports import free_ports

from jobs.exits import BROKEN, FINISHED, HELD, REFUSED, TERMINATED, TOO_MANY_FAILED, UNFINISHED
from pipeline.job_file import load_job

PICTURES = 1200


def ray_job(*words: str) -> subprocess.CompletedProcess[str]:
    """Ray's own command."""
    return subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "job", *words],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """`ray start --head`, in a place of its own so that no other Ray of this machine finds it."""
    place = mkdtemp(prefix="ps-", dir="/tmp")  # socket paths must be short
    dashboard, agent, client = free_ports(3)
    ray = subprocess.Popen(
        [
            *(shutil.which("ray", path=ENVIRONMENT["PATH"]) or "ray", "start", "--head", "--block"),
            *("--port=0", f"--dashboard-port={dashboard}", f"--temp-dir={place}"),
            *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"),
            *("--num-cpus=2", "--object-store-memory=500000000"),
        ],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        until = time.monotonic() + 60
        while "Job unborn does" not in polyscribe("logs", "unborn", "--address", address).stderr:
            assert ray.poll() is None
            assert time.monotonic() < until
        yield address
    finally:
        ray.terminate()  # it stops what it started, in order
        ray.wait(timeout=60)
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def job(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "in").mkdir()
    for number in range(PICTURES):
        color = (number % 256, number // 256 * 40, 90)
        picture = media.encode(Image.new("RGB", (96, 48), color), "PNG")
        (folder / "in" / f"{number:05d}.png").write_bytes(picture)
    (folder / "in" / "00000.png").write_bytes(b"no picture")
    file = folder / "captions of today.yaml"
    sections = {
        "task": "caption",
        "input": {"uri": str(folder / "in")},
        "output": {"uri": str(folder / "out")},
        "model": {"id": str(nano)},
        "image": {"max_soft_tokens": 70},
        "sampling": {"max_tokens": 8},
        "engine": {
            "max_num_seqs": 8,
            "kv_cache_memory_bytes": 64 << 20,
            "enforce_eager": True,
        },
        "resources": {"rows_per_block": 16},
        "limits": {"max_failed_fraction": 1.0},
    }
    file.write_text(yaml.safe_dump(sections))
    return file


def folder_of(job: Path, *overrides: str) -> Path:
    loaded = load_job(job, overrides)
    return Path(loaded.output.uri) / loaded.fingerprint


def committed(folder: Path) -> int:
    return sum(pq.read_metadata(part).num_rows for part in (folder / "ledger").glob("*.parquet"))


def wait_for(folder: Path, name: str, job_id: str, *at: str) -> None:
    asked = time.monotonic()
    until = asked + 900
    while not list(folder.glob(name)):
        time.sleep(0.2)
        if time.monotonic() - asked > 10:  # each call starts a Python, which costs the job its CPU
            running = polyscribe("status", job_id, *at).returncode == UNFINISHED
            assert running, polyscribe("logs", job_id, *at).stdout
            asked = time.monotonic()
        assert asked < until, f"no {name} in {folder}"


@pytest.mark.ray
@pytest.mark.engine
def test_submit_stop_and_go_on(head: str, job: Path) -> None:
    folder, at = folder_of(job), ("--address", head)
    first = polyscribe("submit", str(job), *at)
    assert first.returncode == FINISHED, first.stderr
    job_id = first.stdout.strip()
    assert polyscribe("status", job_id, *at).returncode == UNFINISHED

    # The same output while the first is at it, by the code of the "image".
    wait_for(folder, "lease.json", job_id, *at)
    second = polyscribe("submit", str(job), "--image-code", "--follow", *at)
    assert second.returncode == HELD, second.stdout
    assert "is at work on this output since" in second.stdout

    wait_for(folder, "ledger/*.parquet", job_id, *at)
    began = time.monotonic()
    stopped = polyscribe("stop", job_id, "--wait", *at)
    assert stopped.returncode == TERMINATED, stopped.stdout
    assert time.monotonic() - began < 25
    said = polyscribe("logs", job_id, *at).stdout
    assert "stopped: what is finished is committed" in said
    done = committed(folder)
    assert 0 < done < PICTURES
    assert not (folder / "_SUCCESS").exists()
    lease = json.loads((folder / "lease.json").read_text())
    assert datetime.fromisoformat(lease["expires"]) < datetime.now(UTC)  # given back

    # Two at once: the rest of a part of it, and another question with a failure too many.
    some = ("--set", f"limits.max_assets={done + 40}")
    other = ("--set", "prompt.text=What is 'this', then?", "--set", "limits.max_assets=20")
    none = ("--set", "limits.max_failed_fraction=0")
    resumed = polyscribe("submit", str(job), *some, *at)
    tags = polyscribe("submit", str(job), *other, *none, "--wait", *at)
    assert tags.returncode == TOO_MANY_FAILED, polyscribe("logs", tags.stdout.strip(), *at).stdout
    followed = polyscribe("logs", resumed.stdout.strip(), "--follow", *at)
    assert followed.returncode == FINISHED, followed.stdout
    assert "finished:" in followed.stdout
    accounts = json.loads((folder / "_SUCCESS").read_text())["accounts"]
    assert accounts["assets"]["found"] == done + 40
    assert accounts["done_now"] == committed(folder) - done < done + 40
    whole = polyscribe("verify", str(folder.parent))
    assert whole.returncode == FINISHED, whole.stderr

    # The same again by Ray's own command and the installed code: nothing is asked, nothing written.
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}
    again = ray_job("submit", *at, "--", "python", "-m", "jobs", "run", str(job), *some)
    assert again.returncode == 0, again.stdout
    assert f"nothing new to do: {done + 40:,} assets" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")} == before


@pytest.mark.ray
def test_what_is_refused_here_never_reaches_the_cluster(head: str, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("{task: caption, input: {uri: in}, output: {uri: s3://b/o}, model: {id: a/b}}")
    at = ("--address", head)
    relative = polyscribe("submit", str(file), *at)
    assert relative.returncode == REFUSED
    assert "input.uri: in is a path relative to this folder" in relative.stderr
    wrong = polyscribe("submit", str(file), "--set", "image.max_soft_tokens=7", *at)
    assert wrong.returncode == REFUSED
    assert "image.max_soft_tokens" in wrong.stderr
    unknown = polyscribe("logs", "raysubmit_none", *at)
    assert unknown.returncode == BROKEN
    assert "raysubmit_none" in unknown.stderr
    stranger = polyscribe("logs", "raysubmit_none", *at, RAY_AUTH_TOKEN="e" * 64)
    assert stranger.returncode == BROKEN
    assert "the cluster wants its token" in stranger.stderr


class Proxy:
    """Between a follower and the job server; `cut` closes every connection that is open."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._open: list[socket.socket] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # wakes `accept`, which `close` would not
        self._server.close()
        self.cut()
        for one in self._open:
            one.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.create_connection(self._target)
                self._open += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@pytest.mark.ray
def test_a_connection_that_is_cut_loses_no_line_and_doubles_none(head: str) -> None:
    """A night's run outlives the patience of proxies; its exit code must not be theirs."""
    host, _, port = head.removeprefix("http://").partition(":")
    proxy = Proxy((host, int(port)))
    counts = "for i in $(seq 1 40); do echo line $i; sleep 0.25; done; exit 3"
    submitted = ray_job(
        *("submit", "--address", head, "--no-wait", "--submission-id", "counts"),
        *("--", "bash", "-c", counts),
    )
    assert submitted.returncode == 0, submitted.stderr
    follower = subprocess.Popen(
        [
            *(sys.executable, "-m", "jobs", "logs", "counts", "--follow"),
            *("--address", f"http://127.0.0.1:{proxy.port}"),
        ],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert follower.stdout is not None
        said = [follower.stdout.readline() for _ in range(5)]
        proxy.cut()
        said += follower.stdout.readlines()
        assert follower.wait(timeout=300) == TOO_MANY_FAILED  # the job's own
    finally:
        follower.kill()
        follower.communicate()
        proxy.close()
    printed = [line for line in said if line.startswith("line ")]  # Ray says something first
    assert printed == [f"line {number}\n" for number in range(1, 41)]


@pytest.mark.ray
def test_a_name_is_one_run_at_a_time(head: str, tmp_path: Path) -> None:
    """A scheduler that tries again must find the run that goes on, and not start a second one."""
    at = ("--address", head)
    naps = ray_job("submit", *at, "--no-wait", "--submission-id", "night", "--", "sleep", "600")
    assert naps.returncode == 0, naps.stderr
    file = tmp_path / "job.yaml"
    file.write_text(
        f"{{task: caption, input: {{uri: {tmp_path}}}, output: {{uri: {tmp_path}/out}}}}"
    )
    submit = ("submit", str(file), "--set", "model.id=a/b", "--id", "night", *at)
    watched = polyscribe(*submit)
    assert watched.stdout == "night\n", watched.stderr
    assert polyscribe("stop", "night", "--wait", *at).returncode == TERMINATED
    second = polyscribe(*submit, "--wait")
    assert second.stdout == "night-2\n", second.stderr
    assert second.returncode == REFUSED  # no file matches
