"""A run on a cluster whose pools start at zero, with Ray's own autoscaler (v2, as KubeRay's) and its
provider of nodes on one machine. A program of its own, as several_nodes.py.

python autoscaled.py run|plan JOB.yaml (tests/ on PYTHONPATH) prints what happened as JSON.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import fakes
import ray
from ports import free_ports
from rich.console import Console
from several_nodes import Located

from pipeline.job_file import load_job
from pipeline.preview import preview
from pipeline.run import run

HEAD = "f" * 51 + "00000"  # the provider's own name for it
STORE = 200_000_000
COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "rsync_exclude",
)
POOLS = {
    "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
    "cpu": {
        "resources": {"CPU": 1, "object_store_memory": STORE},
        "node_config": {},
        "min_workers": 0,
        "max_workers": 1,
    },
    "gpu": {
        "resources": {"CPU": 0, "GPU": 1, "object_store_memory": STORE},
        "node_config": {},
        "min_workers": 0,
        "max_workers": 2,
    },
}


@contextmanager
def autoscaled() -> Iterator[str]:
    """The address of a head without CPUs, whose autoscaler may start what POOLS has."""
    place = mkdtemp(prefix="pa-", dir="/tmp")  # socket paths must be short
    port, client = free_ports(2)
    address = f"{ray.util.get_node_ip_address()}:{port}"
    config = {
        "cluster_name": "polyscribe",
        "max_workers": 3,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        "provider": {
            "type": "external",  # its own name wants a file that the wheel does not have
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": HEAD,
            "gcs_address": address,
        },
        "auth": {},
        "available_node_types": POOLS,
        "head_node_type": "ray.head.default",
        "file_mounts": {},
        "cluster_synced_files": [],
        **{key: [] for key in COMMANDS},  # none, but the monitor ends without them
    }
    file = Path(place, "pools.json")
    file.write_text(json.dumps(config))
    head = subprocess.Popen(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
            *(f"--port={port}", "--num-cpus=0", f"--object-store-memory={STORE}"),
            *("--include-dashboard=false", f"--temp-dir={place}/ray"),
            *(f"--ray-client-server-port={client}", "--dashboard-agent-listen-port=0"),
            f"--autoscaling-config={file}",
        ],
        env={
            **os.environ,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield address
    finally:
        head.terminate()  # ends what it started itself; the nodes that came later are below
        head.wait(timeout=60)
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and place in _command(process):
                os.kill(int(process.name), 9)
        shutil.rmtree(place, ignore_errors=True)


def _command(process: Path) -> str:
    try:
        return process.joinpath("cmdline").read_text(errors="replace")
    except OSError:
        return ""  # it has ended


def main(what: str, job_file: str) -> dict[str, Any]:
    job = load_job(job_file)
    said = io.StringIO()
    console = Console(file=said, width=300)
    outcome: dict[str, Any] = {}
    with autoscaled() as address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        ray.cloudpickle.register_pickle_by_value(fakes)
        ray.cloudpickle.register_pickle_by_value(sys.modules["several_nodes"])
        assert [node["Resources"].get("CPU", 0) for node in ray.nodes()] == [0]
        if what == "plan":
            preview(job, console)
        else:
            finished = run(job, console, engine=lambda job: partial(Located))
            outcome["accounts"] = finished.accounts
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        outcome["nodes"] = sorted([node.get("CPU", 0), node.get("GPU", 0)] for node in nodes)
        ray.shutdown()
    return outcome | {"said": said.getvalue()}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
