"""How a command ends: exit codes that a scheduler can tell apart, and signals."""

import sys
from contextlib import suppress

FINISHED = 0
BROKEN = 1  # a machine or our own code; run again to do the rest
REFUSED = 2  # the job, its model, input or output; no engine was started
TOO_MANY_FAILED = 3  # finished, with more failures than limits.max_failed_fraction
HELD = 4  # another run is at work on this output
UNFINISHED = 5  # `status` of a submitted job that waits or runs
INTERRUPTED = 130  # SIGINT; what is finished is committed
TERMINATED = 143  # SIGTERM or SIGHUP; likewise


class Terminated(BaseException):
    """SIGTERM or SIGHUP, as KeyboardInterrupt is SIGINT: everything on the way out is put in order."""


def exit_code_of(error: KeyboardInterrupt | Terminated) -> int:
    """The exit code of a command that a signal ended."""
    return TERMINATED if isinstance(error, Terminated) else INTERRUPTED


def say_last(text: str) -> None:
    """What a command that a signal ended says, on stderr: the terminal may be gone, its code stays."""
    with suppress(OSError):
        print(text, file=sys.stderr)
