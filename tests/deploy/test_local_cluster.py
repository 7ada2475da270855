"""deploy/cluster: a Ray cluster on this machine comes up, goes down, and leaves others alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

import pytest
from ports import free_ports

SCRIPT = Path(__file__).resolve().parents[2] / "deploy/cluster"


def checkout(place: Path) -> Path:
    """A folder whose deploy/cluster finds everything set up; returns its own .venv, to be filled."""
    (place / "deploy").mkdir(parents=True)
    shutil.copy(SCRIPT, place / "deploy")
    (place / "deploy/setup").write_text("exit 0\n")
    return place / ".venv"


def call(place: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """deploy/cluster of `place`. No token: Ray would put it into the home folder."""
    return subprocess.run(
        ["bash", place / "deploy/cluster", *words],
        env={**os.environ, "RAY_AUTH_MODE": "disabled", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.ray
def test_the_local_cluster_comes_up_and_goes_down(tmp_path: Path) -> None:
    """Head and two workers, in a copy whose virtual environment is the one of this test."""
    checkout(tmp_path).symlink_to(sys.prefix)
    ports = [str(port) for port in free_ports(2)]
    place = mkdtemp(prefix="pc-", dir="/tmp")  # socket paths must be short
    cluster = partial(
        call,
        tmp_path,
        POLYSCRIBE_CLUSTER=f"{place}/c",
        POLYSCRIBE_PORT=ports[0],
        POLYSCRIBE_DASHBOARD_PORT=ports[1],
    )
    try:
        up = cluster("up", "2", "1")
        assert up.returncode == 0, up.stderr
        assert "up with 2 x 1 CPUs" in up.stdout
        lines = Path(place, "c/processes").read_text().splitlines()
        processes = [int(line.split()[0]) for line in lines]
        assert len(processes) == 3
        nodes = subprocess.run(
            [
                *(sys.executable, "-c"),
                "import ray, sys; ray.init(sys.argv[1], log_to_driver=False)\n"
                "import time; until = time.monotonic() + 30\n"
                "while len(ray.nodes()) < 3 and time.monotonic() < until: time.sleep(0.3)\n"
                "print(sorted(node['Resources'].get('CPU', 0) for node in ray.nodes()))",
                f"127.0.0.1:{ports[0]}",
            ],
            env={**os.environ, "RAY_AUTH_MODE": "disabled"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert nodes.stdout == "[0, 1.0, 1.0]\n", nodes.stderr
        assert cluster("up").returncode == 1  # it is up
    finally:
        down = cluster("down")
    assert down.stdout == "cluster: down\n"
    assert not any(Path(f"/proc/{process}").exists() for process in processes)
    shutil.rmtree(place)


@pytest.fixture
def local_cluster(tmp_path: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """deploy/cluster in a copy whose `ray` starts a head, and one worker."""
    ray = checkout(tmp_path) / "bin/ray"
    ray.parent.mkdir(parents=True)
    ray.write_text(
        "#!/bin/bash\n"
        "[[ $1 == start ]] || exit 0\n"
        'if [[ $* != *--head* ]]; then mkdir one 2>/dev/null || { echo "no raylet"; exit 1; }; fi\n'
        'echo "Ray runtime started"; exec sleep 600\n'
    )
    ray.chmod(0o755)
    cluster = partial(call, tmp_path, POLYSCRIBE_CLUSTER=str(tmp_path / "cluster"))
    yield cluster
    cluster("down")


def test_a_worker_that_does_not_start_is_said(
    local_cluster: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    assert local_cluster("up", "1", "1").returncode == 0
    assert local_cluster("down").returncode == 0
    up = local_cluster("up", "2", "1")  # by now even the first finds no place
    assert up.returncode == 1
    assert "worker 1 of 2 does not start; see" in up.stderr
    assert "up with" not in up.stdout
    assert "no raylet" in (tmp_path / "cluster/log").read_text()


def test_down_ends_what_up_started_and_nobody_elses(
    local_cluster: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    assert local_cluster("up", "1", "1").returncode == 0
    book = tmp_path / "cluster/processes"
    ours = [int(line.split()[0]) for line in book.read_text().splitlines()]
    # As after a restart of the machine: the number is another process's.
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as other:
        with book.open("a") as lines:
            lines.write(book.read_text().splitlines()[0].replace(str(ours[0]), f"{other.pid}", 1))
            lines.write("\n")
        assert local_cluster("down").returncode == 0
        assert other.poll() is None
        other.kill()
    assert not any(Path(f"/proc/{process}").exists() for process in ours)


def test_the_local_cluster_explains_itself_and_leaves_others_alone(tmp_path: Path) -> None:
    checkout(tmp_path)
    cluster = partial(call, tmp_path, POLYSCRIBE_CLUSTER=str(tmp_path / "none"))
    usage = cluster()
    assert usage.returncode == 2
    assert "deploy/cluster up" in usage.stdout
    down = cluster("down")
    assert (down.returncode, down.stdout) == (0, "cluster: it is not up\n")
