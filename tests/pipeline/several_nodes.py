"""A run on several raylets of this machine; a program, since a test's own Ray may be up already.

python several_nodes.py joins|leaves|engine_leaves|alone JOB.yaml (tests/ on PYTHONPATH) prints what
happened as JSON.

joins          the run starts on a head without workers; two nodes come, and a third one in mid-run
leaves         one of three nodes leaves in mid-run
engine_leaves  the engine's node leaves in mid-run, and another one comes
alone          nobody ever comes to `polyscribe run`
"""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
import time
from contextlib import redirect_stderr
from functools import partial
from typing import Any

import fakes
import ray
from ray._private.state import available_resources_per_node
from ray.cluster_utils import Cluster
from rich.console import Console

from jobs.__main__ import main as polyscribe
from operators.requests import Answer, Request
from pipeline.job_file import load_job
from pipeline.run import folder_store, run


class Located(fakes.EchoEngine):
    """Answers with the node that it runs on."""

    def submit(self, request: Request) -> Any:
        answer: Answer = super().submit(request).result()
        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        return fakes.done(Answer(node, "stop", answer.prompt_tokens, answer.media_tokens, 1))


def main(what: str, job_file: str) -> dict[str, Any]:
    job = load_job(job_file)
    folder = folder_store(job)
    store = 200_000_000
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": store}
    )
    add = partial(cluster.add_node, num_cpus=1, object_store_memory=store)
    outcome: dict[str, Any] = {"joined_was_used": False, "error": None}
    if what in ("leaves", "engine_leaves"):
        gpu, _, leaving = add(num_gpus=1), add(), add()
        outcome["gpu"] = gpu.node_id
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    ray.cloudpickle.register_pickle_by_value(fakes)

    said = io.StringIO()
    if what == "alone":
        with redirect_stderr(said):
            outcome["code"] = polyscribe(["run", job_file])
        ray.shutdown()
        cluster.shutdown()
        return outcome | {"said": said.getvalue()}

    def work() -> None:
        try:
            finished = run(job, Console(file=said, width=300), lambda job: partial(Located))
            outcome["accounts"] = finished.accounts
        except Exception as error:  # noqa: BLE001 - handed to the test
            outcome["error"] = repr(error)

    thread = threading.Thread(target=work)
    thread.start()
    # Nodes are added on the main thread: elsewhere a raylet does not come up.
    if what == "joins":
        while thread.is_alive() and "no node with a CPU yet" not in said.getvalue():
            time.sleep(0.1)
        outcome["gpu"] = add(num_gpus=1).node_id
        add()
    while thread.is_alive() and not folder.names("ledger"):
        time.sleep(0.2)
    outcome["committed_before"] = len(folder.names("ledger"))
    outcome["changed_in_mid_run"] = thread.is_alive()
    joined = None
    if thread.is_alive():
        if what == "joins":
            joined = add().node_id
        else:
            cluster.remove_node(gpu if what == "engine_leaves" else leaving, allow_graceful=False)
        if what == "engine_leaves":
            outcome["second_gpu"] = add(num_gpus=1).node_id
    while thread.is_alive():
        if joined is not None:
            free = available_resources_per_node().get(joined)
            outcome["joined_was_used"] |= free is not None and free.get("CPU", 0) < 1
        time.sleep(0.05)
    ray.shutdown()
    cluster.shutdown()
    return outcome | {"said": said.getvalue()}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
