"""Several nodes: engines where the GPUs are, media work elsewhere, nodes that come and go mid-run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import media
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.verify import verify

PROGRAM = Path(__file__).with_name("several_nodes.py")
PATH = os.pathsep.join([str(PROGRAM.parents[2]), str(PROGRAM.parents[1])])
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


def several_nodes(what: str, job: Path) -> dict[str, Any]:
    ended = subprocess.run(
        [sys.executable, PROGRAM, what, str(job)],
        env={
            **os.environ,
            "PYTHONPATH": PATH,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",
        },
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    outcome: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    assert outcome["error"] is None, outcome["error"]
    return outcome


def results(job: Path) -> list[dict[str, Any]]:
    (folder,) = job.parent.glob("out/*/results")
    rows: list[dict[str, Any]] = pq.read_table(folder).to_pylist()
    return rows


def test_a_node_that_joins_is_used_and_engines_stay_with_the_gpus(job: Path) -> None:
    outcome = several_nodes("joins", job)
    assert outcome["accounts"]["assets"]["ok"] == PICTURES
    assert outcome["committed_before"] < PICTURES // 64
    assert outcome["joined_was_used"]
    assert {row["text"] for row in results(job)} == {outcome["gpu"]}
    assert "engines: 1 (one a GPU), 0.75 CPU each" in outcome["said"]


def test_a_node_that_leaves_costs_no_row_and_doubles_none(job: Path) -> None:
    outcome = several_nodes("leaves", job)
    assert outcome["left"]
    assert outcome["accounts"]["assets"]["ok"] == PICTURES
    assert len({row["asset_id"] for row in results(job)}) == len(results(job)) == PICTURES
    assert verify(str(job.parent / "out"), {})[0] == []


@pytest.mark.parametrize("cpus", [1])  # two: every other test with a Ray
def test_the_smallest_machines_finish(job: Path, cpus: int) -> None:
    program = (
        "import sys, io, fakes, ray; from rich.console import Console\n"
        "from pipeline.config import load_job; from pipeline.run import run\n"
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
        timeout=90,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
