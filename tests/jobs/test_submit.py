"""Runs as jobs of a real local cluster with its job server: submit, follow, stop, go on, two at once."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from tempfile import mkdtemp

import media
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from jobs.exits import BROKEN, FINISHED, HELD, REFUSED, TERMINATED, TOO_MANY_FAILED, UNFINISHED
from jobs.submit import exit_code
from pipeline.config import load_job
from pipeline.submit import State, entrypoint

PICTURES = 1200
ENVIRONMENT = {
    **os.environ,
    # What the job server calls python must be the one that runs the tests.
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray asks for a token by itself wherever one lies in the home folder; here it is always one.
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "f" * 64,
}


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def polyscribe(
    *words: str, timeout: float = 150, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs", *words],
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
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
    until = time.monotonic() + 120
    while not list(folder.glob(name)):
        running = polyscribe("status", job_id, *at).returncode == UNFINISHED
        assert running, polyscribe("logs", job_id, *at).stdout
        assert time.monotonic() < until, f"no {name} in {folder}"


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


def test_no_job_server_is_said_in_a_line() -> None:
    (port,) = free_ports(1)
    ended = polyscribe("stop", "any", "--address", f"http://127.0.0.1:{port}")
    assert ended.returncode == BROKEN
    assert ended.stderr.count("\n") == 1
    assert "no Ray job server" in ended.stderr


def test_overrides_survive_the_clusters_shell() -> None:
    override = 'prompt.text=It\'s a $HOME; `x` "y", {title}'
    script = entrypoint([override]).replace("exec python", 'printf "%s\\n"', 1)
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == ["-m", "jobs", "run", "job.yaml", "--set", override]


def test_each_state_of_a_job_has_its_exit_code() -> None:
    assert exit_code(State("PENDING", "", None)) == UNFINISHED
    assert exit_code(State("RUNNING", "", None)) == UNFINISHED
    assert exit_code(State("SUCCEEDED", "", 0)) == FINISHED
    assert exit_code(State("STOPPED", "", None)) == TERMINATED
    assert exit_code(State("FAILED", "", TOO_MANY_FAILED)) == TOO_MANY_FAILED
    assert exit_code(State("FAILED", "the node died", None)) == BROKEN
