"""Exit codes: what a scheduler can tell apart."""

FINISHED = 0
BROKEN = 1  # a machine or our own code; run again to do the rest
REFUSED = 2  # the job or its input; nothing was started
TOO_MANY_FAILED = 3  # finished, with more failures than limits.max_failed_fraction
HELD = 4  # another run is at work on this output
UNFINISHED = 5  # `status` of a submitted job that waits or runs
INTERRUPTED = 130  # SIGINT; what is finished is committed
TERMINATED = 143  # SIGTERM; likewise
