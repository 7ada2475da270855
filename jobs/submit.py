"""Commands for a cluster: `polyscribe submit | status | logs | stop`, through Ray's job server."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from jobs.arguments import add_job
from jobs.exits import (
    BROKEN,
    FINISHED,
    TERMINATED,
    UNFINISHED,
    Terminated,
    exit_code_of,
    say_last,
)
from pipeline.config import ConfigError, Job
from pipeline.job_file import load_job, read_job

if TYPE_CHECKING:
    from pipeline.submit import JobServer, State

LOCAL_DASHBOARD = "http://127.0.0.1:8265"
NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")

Command = Callable[["JobServer", argparse.Namespace, Console], int]


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Put the four commands into the parser of jobs/__main__.py."""
    text = "run a job on a Ray cluster; prints the id that status, logs and stop want"
    submit = commands.add_parser("submit", help=text, description=text)
    submit.set_defaults(command=_with_server(_submit))
    add_job(submit)
    _add_address(submit)
    submit.add_argument(
        "--image-code",
        action="store_true",
        help="run the code in the cluster's image instead of sending this one",
    )
    submit.add_argument(
        "--id",
        type=_name,
        metavar="NAME",
        help="a name for the run; where one of this name goes on with the same job, that is watched and"
        " no second one started",
    )
    _add_waiting(submit)
    for name, command, text in (
        ("status", _status, "say how a submitted job is"),
        ("logs", _logs, "print what a submitted job said"),
        ("stop", _stop, "stop a submitted job; what is finished stays"),
    ):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=_with_server(command))
        sub.add_argument("id", metavar="ID", help="as submit printed it")
        _add_address(sub)
        if name != "status":
            _add_waiting(sub)


def _add_address(parser: argparse.ArgumentParser) -> None:
    # RAY_ADDRESS may also be host:port or auto, which name no dashboard.
    said = (os.environ.get(name, "") for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"))
    parser.add_argument(
        "--address",
        type=_url,
        default=next((url for url in said if "://" in url), LOCAL_DASHBOARD),
        metavar="URL",
        help="the cluster's dashboard; default: RAY_API_SERVER_ADDRESS or RAY_ADDRESS where that is a"
        f" URL, else {LOCAL_DASHBOARD}",
    )


def _url(text: str) -> str:
    """Ray would take anything else for a cluster's control port, and wait for it in vain."""
    if "://" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no URL such as {LOCAL_DASHBOARD}")
    return text


def _name(text: str) -> str:
    """The job server makes a file of it, and a part of the URLs that ask for the run."""
    if not NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"{text!r}: a name has 1 to 100 letters, digits, dots, hyphens and underscores"
        )
    return text


def _add_waiting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--wait", action="store_true", help="until it ends, with its exit code")
    parser.add_argument("--follow", action="store_true", help="print its output; implies --wait")


def _with_server(command: Command) -> Callable[[argparse.Namespace, Console], int]:
    def run(options: argparse.Namespace, console: Console) -> int:
        from pipeline.submit import JobServer, SubmitError

        try:
            return command(JobServer(options.address), options, console)
        except SubmitError as error:
            print(error, file=sys.stderr)
            return BROKEN
        except (KeyboardInterrupt, Terminated) as error:
            say_last("stopped before the cluster answered; `ray job list` says what goes on there")
            return exit_code_of(error)

    return run


def _submit(server: JobServer, options: argparse.Namespace, console: Console) -> int:
    job = load_job(options.job, options.set)
    _refuse_relative_paths(job)
    if options.wait or options.follow:
        server.reach(lambda text: print(text, file=sys.stderr))
    metadata = {"fingerprint": job.fingerprint, "output": job.public()["output"]["uri"]}
    job_id, goes_on = server.named(options.id, metadata) if options.id else (None, False)
    if job_id is None or not goes_on:
        fields = read_job(options.job, options.set)
        job_id = server.submit(fields, metadata, code=not options.image_code, job_id=job_id)
    console.print(job_id)
    return _watch(server, job_id, options)


def _status(server: JobServer, options: argparse.Namespace, console: Console) -> int:
    state = server.state(options.id)
    console.print(f"{state.status}: {state.message}")
    return exit_code(state)


def _logs(server: JobServer, options: argparse.Namespace, console: Console) -> int:
    if not options.follow:
        _say(server.logs(options.id))
    return _watch(server, options.id, options)


def _stop(server: JobServer, options: argparse.Namespace, console: Console) -> int:
    server.stop(options.id)
    return _watch(server, options.id, options, then="it was told to stop, and ends by itself")


def _watch(
    server: JobServer, job_id: str, options: argparse.Namespace, then: str | None = None
) -> int:
    """As long as was asked for. `then`: what the job does when nobody watches any more."""
    try:
        if options.follow:
            return exit_code(server.follow(job_id, _say))
        return exit_code(server.wait(job_id)) if options.wait else FINISHED
    except (KeyboardInterrupt, Terminated) as error:
        stop = f"polyscribe stop {job_id} --address {options.address}"
        then = then or f"it goes on, and `{stop}` ends it"
        say_last(f"no longer watching {job_id}: {then}")
        return exit_code_of(error)


def _say(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        Console().on_broken_pipe()  # `| head` has what it wanted: ends as every other output does


def exit_code(state: State) -> int:
    """The job's own exit code; of one that has none, what its state means."""
    if not state.ended:
        return UNFINISHED
    if state.status == "STOPPED":
        return TERMINATED
    if state.exit_code is not None:
        return state.exit_code
    return FINISHED if state.status == "SUCCEEDED" else BROKEN


def _refuse_relative_paths(job: Job) -> None:
    """On the cluster they would mean another folder, and results would vanish with it.

    So it is with the image's code as well: a job works in a folder of its own that ends with it.
    """
    named = {"input.uri": job.input.uri, "output.uri": job.output.uri}
    for field, model in (("model.id", job.model.id), ("model.adapter", job.model.adapter)):
        if model is not None and Path(model).exists():
            named[field] = model  # otherwise it is a name on the hub
    for field, value in named.items():
        if "://" not in value and not Path(value).is_absolute():
            raise ConfigError(
                f"{field}: {value} is a path relative to this folder, which the cluster does not"
                " have; give a URI, or a full path that every node sees"
            )
