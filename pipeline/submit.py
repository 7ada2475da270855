"""Runs as Ray jobs: hand one to a cluster's job server, watch it, stop it.

The cluster gets the code of this checkout as working directory (three packages, some 100 KB), or runs
the code of its image; either way the job travels along as job.yaml. What an override says stands there
and not in the command, which Ray shows to whoever sees the dashboard.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import aiohttp
import yaml
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

Answer = TypeVar("Answer")

PACKAGES = ("operators", "pipeline", "jobs")
CODE = Path(__file__).resolve().parents[1]
JOB_FILE = "job.yaml"
# `python` is the one on the cluster's PATH. exec: the job server's signal must reach Python and not only
# a shell around it.
ENTRYPOINT = f"exec python -m jobs run {JOB_FILE}"
# The job server's own grace between SIGTERM and SIGKILL is 3 s: too short for a far-away store.
STOP_WAIT_S = 30
POLL_S = 1.0
# A dashboard that starts again, a proxy in between: the job goes on meanwhile. As long as KubeRay's
# operator takes to call a job lost.
PATIENCE_S = 300.0
PROXY_FAULT = re.compile(r"status code 50[234]")


class SubmitError(Exception):
    """No job server, or it knows no such job."""


class SilentError(SubmitError):
    """The job server does not answer now."""


@dataclass(frozen=True)
class State:
    """`status` as Ray names it: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""

    status: str
    message: str
    exit_code: int | None

    @property
    def ended(self) -> bool:
        return bool(JobStatus(self.status).is_terminal())


class JobServer:
    """The job API of one cluster, by the address of its dashboard. Raises SubmitError."""

    def __init__(self, address: str) -> None:
        self._address = address

    @cached_property
    def _client(self) -> JobSubmissionClient:
        with _only_the_given_address():
            return self._ask(lambda: JobSubmissionClient(self._address))

    def reach(self, say: Callable[[str], None]) -> None:
        """Block until the server answers, at most PATIENCE_S: a head may start again at the hour of a run."""
        self._patiently(lambda: self._client, say)

    def submit(
        self,
        job: Mapping[str, Any],
        metadata: dict[str, str],
        code: bool = True,
        job_id: str | None = None,
    ) -> str:
        """The id of a new job. `job`: its fields (job_file.read_job). `code`: send this checkout's code,
        else that of the image runs. `job_id`: one that `named` gave; default: Ray makes one.
        """
        with TemporaryDirectory(prefix="polyscribe-") as folder:
            for package in PACKAGES if code else ():
                shutil.copytree(
                    CODE / package,
                    Path(folder, package),
                    ignore=shutil.ignore_patterns("__pycache__"),
                )
            fields = yaml.safe_dump(dict(job), allow_unicode=True, sort_keys=False)
            Path(folder, JOB_FILE).write_text(fields, encoding="utf-8")
            given: str = self._ask(
                lambda: self._client.submit_job(
                    entrypoint=ENTRYPOINT,
                    submission_id=job_id,
                    runtime_env={
                        "working_dir": folder,
                        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},
                    },
                    metadata=metadata,
                )
            )
        return given

    def named(self, name: str, metadata: Mapping[str, str]) -> tuple[str, bool]:
        """(id, whether it goes on): the job of this name that has not ended, else a free id.

        Ray takes no id twice, so NAME is followed by NAME-2 and so on. Raises SubmitError where the one
        that goes on says that it does something else than `metadata`: nobody would do this.
        """
        jobs = {job.submission_id: job for job in self._ask(self._client.list_jobs)}
        job_id, number = name, 1
        while job_id in jobs and jobs[job_id].status.is_terminal():
            number += 1
            job_id = f"{name}-{number}"
        if job_id not in jobs:
            return job_id, False
        does = jobs[job_id].metadata or {}
        if any(does.get(field, value) != value for field, value in metadata.items()):
            raise SubmitError(
                f"{self._address}: {job_id} goes on with another job (output {does.get('output')},"
                f" fingerprint {does.get('fingerprint')}): give this one another --id, or submit it"
                " again when that has ended"
            )
        return job_id, True

    def state(self, job_id: str) -> State:
        info = self._ask(lambda: self._client.get_job_info(job_id))
        return State(info.status.value, info.message or "", info.driver_exit_code)

    def logs(self, job_id: str) -> str:
        text: str = self._ask(lambda: self._client.get_job_logs(job_id))
        return text

    def stop(self, job_id: str) -> None:
        """SIGTERM, and SIGKILL where that takes too long. Returns before the job has ended."""
        self._ask(lambda: self._client.stop_job(job_id))

    def wait(self, job_id: str) -> State:
        """Block until the job has ended. A silent server is waited for, PATIENCE_S."""
        while not (state := self._patiently(lambda: self.state(job_id))).ended:
            time.sleep(POLL_S)
        return state

    def follow(self, job_id: str, say: Callable[[str], None]) -> State:
        """Hand on what the job prints until it ends, each line once, whatever the connection does."""
        self.state(job_id)  # an unknown id is told apart from a connection that closed
        said = 0

        async def tail() -> bool:
            """Whether the stream came to its own end. A fault of `say` is none of the connection's."""
            nonlocal said
            place = 0  # the stream always starts with the first line
            stream = self._client.tail_job_logs(job_id)
            while True:
                try:
                    lines = await anext(stream)
                except StopAsyncIteration:
                    return True
                except (OSError, RuntimeError, aiohttp.ClientError):
                    return False
                place += len(lines)
                if place > said:
                    say(lines[said - place :])
                    said = place

        ended = False
        while True:
            whole = asyncio.run(tail())
            # The stream also ends when a proxy loses patience: what counts is the job's state.
            state = self._patiently(lambda: self.state(job_id))
            if state.ended and (whole or ended):
                return state
            ended = state.ended
            time.sleep(POLL_S)

    def _patiently(
        self, request: Callable[[], Answer], say: Callable[[str], None] = lambda text: None
    ) -> Answer:
        until, said = time.monotonic() + PATIENCE_S, False
        while True:
            try:
                return request()
            except SilentError as error:
                if time.monotonic() > until:
                    raise
                if not said:
                    say(f"{error}. Asking again, at most {PATIENCE_S:g} s")
                    said = True
            time.sleep(POLL_S)

    def _ask(self, request: Callable[[], Answer]) -> Answer:
        try:
            return request()
        except AuthenticationError as error:  # at any time: a token may change
            raise SubmitError(
                f"{self._address}: the cluster wants its token: set RAY_AUTH_MODE=token, and"
                " RAY_AUTH_TOKEN or ~/.ray/auth_token to the token of the cluster"
            ) from error
        except OSError as error:  # requests' own errors are such
            raise SilentError(f"{self._address}: no Ray job server: {error}") from error
        except RuntimeError as error:
            # Ray has no type of its own for an answer of a proxy whose server is away.
            kind = SilentError if PROXY_FAULT.search(str(error)) else SubmitError
            raise kind(f"{self._address}: {error}") from error


@contextmanager
def _only_the_given_address() -> Iterator[None]:
    """Ray's client lets these two win over the address that it is given, without a word."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    others = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(others)
