"""A run on several raylets of this machine; a program, since a test's own Ray may be up already.

python several_nodes.py joins|leaves JOB.yaml (tests/ on PYTHONPATH) prints what happened as JSON.
"""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
import time
from functools import partial
from typing import Any

import fakes
import ray
from ray._private.state import available_resources_per_node
from ray.cluster_utils import Cluster
from rich.console import Console

from operators.requests import Answer, Request
from pipeline.config import load_job
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
    gpu = cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=store)
    cluster.add_node(num_cpus=1, object_store_memory=store)
    leaving = cluster.add_node(num_cpus=1, object_store_memory=store) if what == "leaves" else None
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    ray.cloudpickle.register_pickle_by_value(fakes)
    outcome: dict[str, Any] = {"gpu": gpu.node_id, "joined_was_used": False, "error": None}

    def work() -> None:
        try:
            finished = run(job, Console(file=said), engine=lambda job: partial(Located))
            outcome["accounts"] = finished.accounts
        except Exception as error:  # noqa: BLE001 - handed to the test
            outcome["error"] = repr(error)

    said = io.StringIO()
    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive() and not folder.names("ledger"):
        time.sleep(0.2)
    outcome["committed_before"] = len(folder.names("ledger"))
    joined = None
    # On the main thread: elsewhere a raylet does not come up.
    if leaving is not None and thread.is_alive():
        cluster.remove_node(leaving, allow_graceful=False)
        outcome["left"] = True
    if what == "joins" and thread.is_alive():
        joined = cluster.add_node(num_cpus=1, object_store_memory=store).node_id
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
