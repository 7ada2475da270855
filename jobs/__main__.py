"""The command line: `polyscribe run | plan | verify | evaluate | submit | status | logs | stop`.

The same as `python -m jobs`.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from jobs.arguments import add_job, add_storage_options
from jobs.evaluate import add_command as add_evaluate
from jobs.exits import (
    BROKEN,
    FINISHED,
    HELD,
    REFUSED,
    TOO_MANY_FAILED,
    Terminated,
    exit_code_of,
    say_last,
)
from jobs.submit import add_commands
from pipeline.config import ConfigError
from pipeline.job_file import load_job

# A scheduler's, and that of a terminal which goes away.
TERMINATING = (signal.SIGTERM, signal.SIGHUP)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    # Nothing is marked up here, and names and answers may hold [brackets], :signs: and numbers.
    console = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in TERMINATING:
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                before[number] = signal.signal(number, _terminate)
    try:
        code: int = options.command(options, console)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return REFUSED
    except (KeyboardInterrupt, Terminated) as error:
        say_last("stopped: what is finished is committed; run again to do the rest")
        return exit_code_of(error)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code


def _terminate(number: int, frame: object) -> None:
    for each in TERMINATING:
        signal.signal(each, signal.SIG_IGN)  # a second one must not stop the first's work
    raise Terminated


def _run(options: argparse.Namespace, console: Console) -> int:
    from jobs.table import print_answers
    from pipeline.cluster import BrokenRunError
    from pipeline.lease import LeaseError
    from pipeline.run import run

    job = load_job(options.job, options.set)
    try:
        finished = run(job, console)
    except LeaseError as error:
        print(error, file=sys.stderr)
        return HELD
    except BrokenRunError as error:
        print(error, file=sys.stderr)
        return BROKEN
    if options.show:
        print_answers(job, console, options.show)
    assets = finished.accounts["assets"]
    console.print(
        f"{'finished' if finished.did_work else 'nothing new to do'}: {assets['found']:,} assets ="
        f" {assets['ok']:,} ok + {assets['empty']:,} empty + {assets['partial']:,} partial"
        f" + {assets['failed']:,} failed\nresults  {finished.folder.url('results')}\n"
        f"report   {finished.folder.url('report.html')}"
    )
    if finished.failed_fraction > job.limits.max_failed_fraction:
        print(
            f"{finished.failed_fraction:.1%} failed; limits.max_failed_fraction is"
            f" {job.limits.max_failed_fraction:.1%}. See {finished.folder.url('failures')}",
            file=sys.stderr,
        )
        return TOO_MANY_FAILED
    return FINISHED


def _plan(options: argparse.Namespace, console: Console) -> int:
    from pipeline.cluster import BrokenRunError
    from pipeline.preview import preview

    try:
        preview(load_job(options.job, options.set), console)
    except BrokenRunError as error:
        print(error, file=sys.stderr)
        return BROKEN
    return FINISHED


def _verify(options: argparse.Namespace, console: Console) -> int:
    from pipeline.verify import verify

    problems, accounts = verify(options.output, options.storage_options)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        return BROKEN
    assets: dict[str, Any] = accounts["assets"]
    console.print(
        f"whole: {accounts['result_rows']:,} results; last input {assets['found']:,} assets"
    )
    return FINISHED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="polyscribe",
        description="Captions and transcribes large corpora of images, recordings and videos.",
        epilog="Job files are in jobs/examples; README.md says what a run leaves, and its exit codes.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, text in (
        ("run", _run, "do what is left of a job"),
        ("plan", _plan, "count what a run would do, and what it would take; starts no engine"),
    ):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        add_job(sub)
        if name == "run":
            sub.add_argument(
                "--show", type=int, default=20, metavar="N", help="print the first N answers (20)"
            )
    text = "check that an output is whole; 1 and a line for each fault where it is not"
    sub = commands.add_parser("verify", help=text, description=text)
    sub.set_defaults(command=_verify)
    sub.add_argument(
        "output", metavar="OUTPUT", help="its newest fingerprint, or OUTPUT/<fingerprint>"
    )
    add_storage_options(sub)
    add_evaluate(commands)
    add_commands(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
