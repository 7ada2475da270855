"""A child process for decoders that may hang, crash or eat memory: one per worker process.

    worker    Contained: sends one call at a time, waits with a time limit, takes the answer
    nursery   a bare interpreter that has imported the decoders and forks; it never decodes
    child     a fork of the nursery that runs the calls; killed and replaced in some 10 ms

A process of our own and not Pebble or concurrent.futures, for what was measured:
- 0.5 MB in and 1.9 MB out cost the worker 2.4 ms of CPU with Pebble, 1.6 ms with a bare pipe, and
  0.15 ms with memory that both share.
- multiprocessing's forkserver and spawn run the parent's __main__ in every child. In a Ray worker
  that is Ray's own worker program, in a user's script it is the script.
- A death in the middle of an answer is an end of file here: nobody else holds the socket.
No process outlives the worker, even when that one is killed: the nursery reads an end of file from
its control socket, the child gets PR_SET_PDEATHSIG. (Not the nursery: its signal would come with
the end of the *thread* that started it, and Ray has threads that come and go.)
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import mmap
import os
import pickle
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, NoReturn, TypeVar

from operators.errors import MediaError

T = TypeVar("T")

# Holds the patches of the largest budget (1120 * 6912 = 7.7 MB) and all but the largest files.
# Sparse: it costs what was once used of it. What does not fit goes through the socket.
SLAB_BYTES = 32 << 20
# Smaller arguments are not worth a buffer of their own.
OUT_OF_BAND_BYTES = 1 << 14
# torch and Pillow take 2 s to import here, a cold network disk may take a minute.
START_TIMEOUT_S = 300.0
PR_SET_PDEATHSIG = 1
STATUS = struct.Struct("=i")
ENVIRONMENT = {
    # Ray gives a task one CPU, and a fork keeps only one thread
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # Keep freed memory (up to 128 MiB) instead of faulting it in anew for each picture: decode to
    # hash takes 61 instead of 82 ms at 12 MP, 3.2 instead of 3.4 at 0.3 MP.
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
}
OUT_OF_MEMORY = MediaError(
    "decode.out_of_memory", "decoding needs more than image.max_memory_bytes"
)
BOOT = (
    "import json, sys; asked = json.loads(sys.argv[1]); sys.path[:] = asked.pop('path');"
    " from operators.contain import nursery; nursery(**asked)"
)


class ContainError(RuntimeError):
    """The nursery cannot start, or a contained function raised what is no MediaError."""


class Contained:
    """Runs functions in the child, in the order of `submit`.

    max_memory_bytes is what a call may take beyond what the child has mapped before it; preload
    names the modules that the nursery imports. Starts on first use, so it can be pickled.
    """

    def __init__(self, max_memory_bytes: int, preload: Sequence[str] = ()) -> None:
        self._max_memory_bytes = max_memory_bytes
        self._preload = tuple(preload)
        self._lock = threading.Lock()
        self._queue: ThreadPoolExecutor | None = None
        self._nursery: _Nursery | None = None
        self._child: _Child | None = None
        self._closed = False

    def __reduce__(self) -> tuple[type[Contained], tuple[int, tuple[str, ...]]]:
        return Contained, (self._max_memory_bytes, self._preload)

    def submit(self, function: Callable[..., T], *args: object, timeout_s: float) -> Future[T]:
        """`function(*args)` in the child; function and arguments are pickled.

        The result raises the function's own MediaError, or MediaError decode.timeout,
        decode.crashed or decode.out_of_memory. After each of them the next call works. Any other
        exception of the function is a ContainError with its traceback. timeout_s counts from the
        moment the child gets the call.
        """
        with self._lock:
            if self._closed:
                raise ContainError("closed")
            if self._queue is None:
                self._queue = ThreadPoolExecutor(1, thread_name_prefix="contained")
            return self._queue.submit(self._call, function, args, timeout_s)

    def close(self) -> None:
        """Ends child and nursery: a running call with ContainError, waiting ones by cancelling."""
        with self._lock:
            self._closed = True
            queue, nursery = self._queue, self._nursery
        if nursery is not None:
            nursery.stop()
        if queue is not None:
            queue.shutdown(cancel_futures=True)
        if self._child is not None:
            self._child.connection.close()

    def _call(self, function: Callable[..., T], args: tuple[object, ...], timeout_s: float) -> T:
        try:
            return self._once(function, args, timeout_s)
        except _KilledError:
            # Nothing that a file does sends SIGKILL: it was the kernel, short of memory, which may
            # have been another process's doing. Once more; then it is this file.
            try:
                return self._once(function, args, timeout_s)
            except _KilledError as error:
                raise MediaError(
                    "decode.crashed", "the decoder process was killed twice, likely for memory"
                ) from error

    def _once(self, function: Callable[..., T], args: tuple[object, ...], timeout_s: float) -> T:
        if self._child is None:
            self._replace()
        assert self._child is not None  # noqa: S101
        connection, slab = self._child
        try:
            send(connection, slab, (function, tuple(map(_out_of_band, args))))
            if not connection.poll(timeout_s):
                self._replace()
                raise MediaError("decode.timeout", f"no answer in {timeout_s:g} s")
            kind, value = receive(connection, slab)
        except (EOFError, ConnectionError):
            raise _verdict(self._replace()) from None
        if kind == "bug":
            self._replace()
            raise ContainError(f"in the contained process:\n{value}")
        if kind == "failed":
            if value.code == "decode.out_of_memory":
                self._replace()  # its heap is in pieces
            raise value
        result: T = value
        return result

    def _replace(self) -> int | None:
        """A new child. Returns the wait status of the one before; None: its nursery died too."""
        if self._child is not None:
            self._child.connection.close()
            self._child = None
        with self._lock:
            if self._closed:
                raise ContainError("closed while a call was running")
            if self._nursery is not None:
                try:
                    self._child, status = self._nursery.birth()
                    return status
                except (EOFError, OSError):
                    self._nursery.stop()
            self._nursery = _Nursery(self._max_memory_bytes, self._preload)
        try:
            self._child, _ = self._nursery.birth()
        except (EOFError, OSError) as error:
            self._nursery.stop()
            raise ContainError("the nursery does not start; its reason is on stderr") from error
        return None


def _verdict(status: int | None) -> Exception:
    code = -signal.SIGKILL if status is None else os.waitstatus_to_exitcode(status)
    if code == -signal.SIGKILL:
        return _KilledError()
    how = f"was ended by {signal.strsignal(-code)}" if code < 0 else f"left with status {code}"
    return MediaError("decode.crashed", f"the decoder process {how}")


class _KilledError(Exception):
    """The child ended by a SIGKILL that was not ours."""


class _Child(NamedTuple):
    connection: Connection
    slab: mmap.mmap


class _Nursery:
    """The worker's handle of its nursery."""

    def __init__(self, max_memory_bytes: int, preload: Sequence[str]) -> None:
        asked = {"path": sys.path, "max_memory_bytes": max_memory_bytes, "preload": preload}
        ours, theirs = socket.socketpair()
        slab_fd = os.memfd_create("contained", os.MFD_CLOEXEC)
        try:
            os.ftruncate(slab_fd, SLAB_BYTES)
            self._slab = mmap.mmap(slab_fd, SLAB_BYTES)
            asked |= {"control_fd": theirs.fileno(), "slab_fd": slab_fd}
            process = subprocess.Popen(  # noqa: S603  (our own interpreter)
                [sys.executable, "-c", BOOT, json.dumps(asked)],
                pass_fds=[theirs.fileno(), slab_fd],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, **ENVIRONMENT},
                # Ctrl-C on the terminal is for the worker, which ends us
                process_group=0,
            )
        finally:
            theirs.close()
            os.close(slab_fd)
        ours.settimeout(START_TIMEOUT_S)
        self._control = ours
        # also at interpreter exit
        self.stop = weakref.finalize(self, _stop, process, ours)

    def birth(self) -> tuple[_Child, int]:
        """Ends the child there is. Returns a new one, and that one's wait status (0 without one).

        Raises EOFError, OSError where the nursery is no more.
        """
        self._control.sendall(b"n")
        message, fds, _, _ = socket.recv_fds(self._control, STATUS.size, 1, socket.MSG_CMSG_CLOEXEC)
        if len(message) < STATUS.size or not fds:
            raise EOFError("the nursery has ended")
        return _Child(Connection(fds[0]), self._slab), STATUS.unpack(message)[0]


def _stop(process: subprocess.Popen[bytes], control: socket.socket) -> None:
    # shutdown, not only close: another thread may be waiting in it
    with contextlib.suppress(OSError):  # the nursery may have been first
        control.shutdown(socket.SHUT_RDWR)
    control.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def nursery(control_fd: int, slab_fd: int, max_memory_bytes: int, preload: Sequence[str]) -> None:
    """The nursery's life: a birth for each byte that it reads, until the end of file."""
    for name in preload:
        importlib.import_module(name)
    # a crash is expected here: no core files
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    control = socket.socket(fileno=control_fd)
    slab = mmap.mmap(slab_fd, SLAB_BYTES)
    child = 0
    while control.recv(1):
        status = _bury(child)
        ours, theirs = socket.socketpair()
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            control.close()
            theirs.close()
            _serve(Connection(ours.detach()), slab, parent, max_memory_bytes)
        ours.close()
        socket.send_fds(control, [STATUS.pack(status)], [theirs.fileno()])
        theirs.close()
    _bury(child)


def _bury(child: int) -> int:
    """Wait status of the child, which is killed if it still lives. 0 where there is none."""
    if child == 0:
        return 0
    # A dead child keeps its id until it is waited for, so this can hit nobody else.
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def _serve(connection: Connection, slab: mmap.mmap, parent: int, max_memory_bytes: int) -> NoReturn:
    """The child's life: calls, until the end of file."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)  # it died before the line above
        _limit_memory(max_memory_bytes)
        # libtiff writes a line for each damaged strip
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        while True:
            try:
                function, args = receive(connection, slab)
            except EOFError:
                os._exit(0)
            try:
                answer = ("value", function(*args))
            except MediaError as error:
                answer = ("failed", error)
            except MemoryError:
                answer = ("failed", OUT_OF_MEMORY)
            send(connection, slab, answer)
    finally:
        # What comes here is a mistake of ours: the worker raises it. Never back into the nursery.
        try:
            send(connection, slab, ("bug", traceback.format_exc()))
        finally:
            os._exit(1)


def _limit_memory(max_memory_bytes: int) -> None:
    """torch maps far more than it uses, so the limit counts from what is mapped now."""
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = mapped + max_memory_bytes
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _out_of_band(value: object) -> object:
    if isinstance(value, bytes) and len(value) >= OUT_OF_BAND_BYTES:
        return pickle.PickleBuffer(value)
    return value


def send(connection: Connection, slab: mmap.mmap, value: object) -> None:
    """One message: a pickle whose large buffers lie in the slab, or follow where it is too small.

    The slab needs no lock: calls and answers alternate, and `receive` copies out of it.
    """
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    sizes = [view.nbytes for view in views]
    if sum(sizes) <= SLAB_BYTES:
        offset = 0
        for view in views:
            slab[offset : offset + view.nbytes] = view
            offset += view.nbytes
    connection.send((head, sizes))
    if sum(sizes) > SLAB_BYTES:
        for view in views:
            connection.send_bytes(view)


def receive(connection: Connection, slab: mmap.mmap) -> Any:  # noqa: ANN401
    """The value of one message. Its buffers are bytes: arrays over them are read-only."""
    head, sizes = connection.recv()
    if sum(sizes) > SLAB_BYTES:
        buffers = [connection.recv_bytes() for _ in sizes]
    else:
        ends = list(accumulate(sizes))
        buffers = [slab[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    return pickle.loads(head, buffers=buffers)  # noqa: S301  (from our own process)
