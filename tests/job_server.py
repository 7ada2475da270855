"""A job server for tests of what asks one: how the command line is called, what a scripted server says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path

ENVIRONMENT = {
    **os.environ,
    # What the job server calls python must be the one that runs the tests.
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's own is 15: on a machine with other work the engine would not start in minutes.
    "RAY_worker_niceness": "0",
    # Ray asks for a token by itself wherever one lies in the home folder; here it is always one.
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "f" * 64,
}
# What a server says of itself, and of a job but for its status.
VERSION = {"version": "4", "ray_version": "2.60.0", "ray_commit": ""}
JOB = {"type": "SUBMISSION", "entrypoint": "", "submission_id": "one"}


def polyscribe(
    *words: str, timeout: float = 900, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs", *words],
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def answer(handler: BaseHTTPRequestHandler, code: int, fields: object) -> None:
    data = json.dumps(fields).encode()
    handler.send_response(code)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)
