"""Several nodes: engines where the GPUs are, media work elsewhere, nodes that come and go mid-run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import media
import pyarrow.parquet as pq
import pytest
import yaml
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayError

from jobs.exits import BROKEN
from pipeline.cluster import LAST_BYTES, BrokenRunError, broken_run, last_words
from pipeline.verify import verify

PROGRAMS = Path(__file__).parent
PATH = os.pathsep.join(str(folder) for folder in (PROGRAMS.parents[1], PROGRAMS.parent, PROGRAMS))
PICTURES = 192

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that take a core 60 ms each, so that media work is what a run waits for."""
    folder = tmp_path_factory.mktemp("corpus")
    picture = media.encode(media.photo(4000, 3000), "JPEG", quality=60)
    for number in range(PICTURES):
        (folder / f"{number:04d}.jpg").write_bytes(picture)
    return folder


@pytest.fixture
def job(nano: Path, corpus: Path, tmp_path: Path) -> Path:
    sections = {
        "task": "caption",
        "input": {"uri": str(corpus)},
        "output": {"uri": str(tmp_path / "out")},
        "model": {"id": str(nano)},
        "image": {"max_soft_tokens": 70},
        "engine": {"max_num_seqs": 8},
        "resources": {"rows_per_block": 8},
    }
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(sections))
    return file


def program(name: str, what: str, job: Path) -> dict[str, Any]:
    ended = subprocess.run(
        [sys.executable, PROGRAMS / name, what, str(job)],
        env={
            **os.environ,
            "PYTHONPATH": PATH,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",
            "RAY_worker_niceness": "0",  # 15 is Ray's own: slow where other work is going on
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    outcome: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return outcome


def several_nodes(what: str, job: Path) -> dict[str, Any]:
    outcome = program("several_nodes.py", what, job)
    assert outcome["error"] is None, outcome["error"]
    assert outcome["changed_in_mid_run"]
    assert outcome["accounts"]["assets"]["ok"] == PICTURES
    assert len({row["asset_id"] for row in results(job)}) == len(results(job)) == PICTURES
    assert verify(str(job.parent / "out"), {})[0] == []
    return outcome


def results(job: Path) -> list[dict[str, Any]]:
    (folder,) = job.parent.glob("out/*/results")
    rows: list[dict[str, Any]] = pq.read_table(folder).to_pylist()
    return rows


def test_workers_may_come_late_and_one_that_joins_is_used(job: Path) -> None:
    """The engine stays with the GPU, media work goes wherever there are CPUs."""
    outcome = several_nodes("joins", job)
    assert "no node with a CPU yet: asking for 1, waiting at most 1800 s" in outcome["said"]
    assert "engines: 1 (one a GPU), 0.75 CPU each" in outcome["said"]
    assert outcome["committed_before"] < PICTURES // 64
    assert outcome["joined_was_used"]
    assert {row["text"] for row in results(job)} == {outcome["gpu"]}


def test_a_node_that_leaves_costs_no_row_and_doubles_none(job: Path) -> None:
    several_nodes("leaves", job)


def test_an_engine_whose_node_leaves_goes_on_where_a_gpu_comes(job: Path) -> None:
    outcome = several_nodes("engine_leaves", job)
    assert {row["text"] for row in results(job)} == {outcome["gpu"], outcome["second_gpu"]}


def test_nobody_comes_and_the_run_says_so_in_time(job: Path) -> None:
    sections = yaml.safe_load(job.read_text()) | {"limits": {"wait_for_workers_s": 2}}
    job.write_text(yaml.safe_dump(sections))
    outcome = program("several_nodes.py", "alone", job)
    assert outcome["code"] == BROKEN  # a cluster to mend, not a job to change
    assert "no node with a CPU to give joined the cluster within 2 s" in outcome["said"]
    assert not list(job.parent.glob("out/*/ledger"))
    (lease,) = job.parent.glob("out/*/lease.json")
    ends = json.loads(lease.read_text())["expires"]
    assert datetime.fromisoformat(ends) < datetime.now(UTC)  # given back


@pytest.mark.parametrize("what", ["run", "plan"])
def test_pools_from_zero_are_asked_for_what_is_needed_and_no_more(job: Path, what: str) -> None:
    """Ray's own autoscaler, a head without CPUs, and two pools that are empty when the job starts."""
    sections = yaml.safe_load(job.read_text()) | {
        "resources": {"rows_per_block": 8, "accelerator": "gpu", "engines": 2},
        "limits": {"max_assets": 32},
    }
    job.write_text(yaml.safe_dump(sections))
    outcome = program("autoscaled.py", what, job)
    assert "no node with a CPU yet: asking for 1" in outcome["said"]
    if what == "plan":
        assert "0 GPUs are there now" in outcome["said"]
        assert outcome["nodes"] == [[0, 0], [1, 0]]  # looking costs no GPU
    else:
        assert "no node with a GPU yet: asking for 1" in outcome["said"]
        assert outcome["accounts"]["assets"]["ok"] == 32
        # Work of a second is not worth a second GPU, and CPUs are never asked of GPU nodes.
        assert outcome["nodes"] == [[0, 0], [0, 1], [1, 0]]


@pytest.mark.parametrize("cpus", [1])  # two: every other test with a Ray
def test_the_smallest_machines_finish(job: Path, cpus: int) -> None:
    program = (
        "import sys, io, fakes, ray; from rich.console import Console\n"
        "from pipeline.job_file import load_job; from pipeline.run import run\n"
        f"ray.init(num_cpus={cpus}, include_dashboard=False, log_to_driver=False,"
        " object_store_memory=200_000_000)\n"
        "ray.cloudpickle.register_pickle_by_value(fakes)\n"
        "job = load_job(sys.argv[1], ['limits.max_assets=40'])\n"
        "done = run(job, Console(file=io.StringIO()), engine=lambda job: fakes.EchoEngine)\n"
        "assert done.accounts['assets']['ok'] == 40, done.accounts\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(job)],
        env={**os.environ, "PYTHONPATH": PATH, "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]


@pytest.mark.parametrize("error", [RayError("no GPU"), ExecutionTimeoutError("no GPU")])
def test_what_ray_gives_up_says_what_to_do(error: Exception) -> None:
    with pytest.raises(BrokenRunError, match=r"(?s)no GPU.*run the job again"), broken_run():
        raise error


def test_what_an_engine_printed_last_is_shown_with_its_file(tmp_path: Path) -> None:
    for name, text in {
        "worker-a-01-7.out": "x" * LAST_BYTES + "\nout of memory\n",
        "worker-a-01-7.err": "Traceback: caf\xe9\n",
        "worker-b-01-8.err": "another worker\n",
    }.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    said = last_words(f"{tmp_path}/worker-a-*")
    assert f"{tmp_path}/worker-a-01-7.out:\nx" in said
    assert said.endswith("out of memory")
    assert f"{tmp_path}/worker-a-01-7.err:\nTraceback: caf" in said
    assert "another worker" not in said
    assert len(said) < LAST_BYTES + 200 + 2 * len(str(tmp_path))
    assert last_words(f"{tmp_path}/none-*") == ""
