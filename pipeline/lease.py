"""One writer at a time: `lease.json` in OUTPUT/<fingerprint> names the run that may write there.

    Lease         taken at the first write, renewed by a thread, ended when the run ends
    LeasedStore   the output folder as the driver of a run writes it: each write first asks the lease

Only what is there is ever replaced: on S3 by a conditional PUT (If-None-Match, If-Match), locally under
a file lock. A store without conditional writes gets write, wait, read back, and says so. A run that
died is taken over when its time is up; that compares two machines' clocks, so a skew shortens or
lengthens the ten minutes. Write tasks on workers go on under the driver's lease: a part's name holds
the run's id, so a late one never replaces another run's.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from fsspec.asyn import sync

from operators.stores import LOCAL, S3, faults_of, filesystem, local_path, protocol, split_bucket
from pipeline.store import Store

NAME = "lease.json"
# Three renewals fit in: two may fail before the lease is gone. Long against a store's hiccup, short
# against a night that waits for a run that died.
TTL_S = 600.0
# Where a store has no conditional write: long enough for another writer's PUT to arrive.
SETTLE_S = 2.0
REFUSED, UNSUPPORTED = (409, 412), (400, 405, 501)


class LeaseError(Exception):
    """Another run holds the output. The message says who, since when and until when."""


@dataclass(frozen=True)
class Claim:
    """What lease.json says. Times are ISO 8601, UTC; `expires` in the past: nobody holds it."""

    holder: str
    host: str
    since: str
    expires: str

    def json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    def over(self) -> bool:
        return datetime.fromisoformat(self.expires) <= datetime.now(UTC)


class Lease:
    """Context manager around a run. `on_lost` is called once, from a thread, when it is taken away."""

    def __init__(
        self,
        uri: str,
        storage_options: Mapping[str, Any],
        holder: str,
        say: Callable[[str], None],
        on_lost: Callable[[], None] = lambda: None,
        ttl_s: float = TTL_S,
    ) -> None:
        self._store = Store(uri, storage_options)
        self._slot = _slot(uri, storage_options)
        self._faults = faults_of(uri)
        self._holder = holder
        self._host = f"{platform.node()} (process {os.getpid()})"
        self._say = say
        self._on_lost = on_lost
        self._ttl_s = ttl_s
        self._since = ""
        self._lock = threading.Lock()
        self._mine: bytes | None = None  # what we wrote last; None: nothing held
        self._lost = ""
        self._ends = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._ends.set()
        if self._thread is not None:
            self._thread.join(timeout=self._ttl_s)
        if self._lost and not isinstance(error, LeaseError):
            # Whatever stopped the run, this is why.
            raise LeaseError(self._lost) from error
        self._release()

    def hold(self) -> None:
        """Take the lease, or look that it is still ours. Raises LeaseError."""
        with self._lock:
            if self._lost:
                raise LeaseError(self._lost)
            if self._mine is None:
                self._take()
            elif (found := self._slot.read()) is None or found[0] != self._mine:
                self._lose(found)
                raise LeaseError(self._lost)
        if self._thread is None:
            self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
            self._thread.start()

    def _take(self) -> None:
        self._since = _text(datetime.now(UTC))
        found = self._slot.read()
        if found is not None and not (claim := _claim(found[0])).over():
            raise LeaseError(self._held_by(claim))
        mine = self._claimed()
        if not self._swap(mine, found):
            found = self._slot.read()
            raise LeaseError(self._held_by(_claim(found[0]) if found else None))
        if not self._slot.conditional():
            self._say(
                "this store knows no conditional write: two runs that start within a"
                f" second or two may both go on; waiting {SETTLE_S:g} s to see one"
            )
            time.sleep(SETTLE_S)
            if (found := self._slot.read()) is None or found[0] != mine:
                raise LeaseError(self._held_by(_claim(found[0]) if found else None))
        self._mine = mine

    def _renew(self) -> None:
        until = time.monotonic() + self._ttl_s
        while not self._ends.wait(self._ttl_s / 3):
            with self._lock:
                if self._lost:
                    return
                try:
                    found = self._slot.read()
                    renewed = self._claimed()
                    if found is not None and found[0] == self._mine and self._swap(renewed, found):
                        self._mine = renewed
                        until = time.monotonic() + self._ttl_s
                    else:
                        self._lose(self._slot.read())
                except self._faults:
                    if time.monotonic() < until:
                        continue
                    self._lost = f"{self._store.url()}: the lease could not be renewed in time"
                if self._lost:
                    self._on_lost()
                    return

    def _release(self) -> None:
        """Leave the claim as the record of who wrote last, with its end set to now."""
        with self._lock:
            if self._mine is None or self._lost:
                return
            try:
                found = self._slot.read()
                if found is not None and found[0] == self._mine:
                    self._swap(self._claimed(ttl_s=0), found)
            except self._faults:
                self._say(
                    f"the lease of {self._store.url()} could not be given back; it ends by"
                    f" itself at {_claim(self._mine).expires}"
                )
            self._mine = None

    def _swap(self, data: bytes, found: tuple[bytes, str] | None) -> bool:
        self._slot.put(data, None if found is None else found[1])
        # A retried PUT is refused although its first try arrived: what counts is what is there.
        now = self._slot.read()
        return now is not None and now[0] == data

    def _claimed(self, ttl_s: float | None = None) -> bytes:
        ends = datetime.now(UTC) + timedelta(seconds=self._ttl_s if ttl_s is None else ttl_s)
        return Claim(self._holder, self._host, self._since, _text(ends)).json()

    def _lose(self, found: tuple[bytes, str] | None) -> None:
        claim = None
        if found is not None:
            with contextlib.suppress(LeaseError):
                claim = _claim(found[0])
        self._lost = self._held_by(claim, "has taken over")

    def _held_by(self, claim: Claim | None, does: str = "is at work on") -> str:
        if claim is None:
            return f"{self._store.url()}: another run {does} this output"
        return (
            f"{self._store.url()}: run {claim.holder} on {claim.host} {does} this output since"
            f" {claim.since}; its lease ends at {claim.expires} unless renewed. Wait for it or stop"
            " it; where it died, run the job again after that time"
        )


class LeasedStore(Store):
    """The output folder, written to only while the lease is ours. For the driver, never for workers."""

    def __init__(self, uri: str, storage_options: Mapping[str, Any], lease: Lease) -> None:
        super().__init__(uri, storage_options)
        self._lease = lease

    def write(self, name: str, data: bytes) -> None:
        self._lease.hold()
        super().write(name, data)

    def delete(self, names: Iterable[str]) -> None:
        self._lease.hold()
        super().delete(names)


class _Slot(Protocol):
    """lease.json in one kind of store."""

    def read(self) -> tuple[bytes, str] | None:
        """Content and tag; None where there is none."""

    def put(self, data: bytes, tag: str | None) -> None:
        """Write if the tag is still the one there (None: if nothing is); refused in silence."""

    def conditional(self) -> bool:
        """Whether `put` kept its condition. Asked by the holder, after a put."""


def _slot(uri: str, options: Mapping[str, Any]) -> _Slot:
    if protocol(uri) in LOCAL:
        return _LocalSlot(local_path(uri))
    return (_S3Slot if protocol(uri) in S3 else _PlainSlot)(f"{uri.rstrip('/')}/{NAME}", options)


class _LocalSlot:
    """A file, replaced under a lock that the kernel lets go of when its process ends."""

    def __init__(self, folder: str) -> None:
        self._store = Store(folder, {})
        self._folder = folder

    def read(self) -> tuple[bytes, str] | None:
        try:
            data = self._store.read(NAME)
        except FileNotFoundError:
            return None
        return data, data.decode()

    def put(self, data: bytes, tag: str | None) -> None:
        os.makedirs(self._folder, exist_ok=True)
        # Never removed: a lock on a file that has lost its name would lock nobody out.
        with open(os.path.join(self._folder, "lease.lock"), "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = self.read()
            if (None if found is None else found[1]) == tag:
                self._store.write(NAME, data)

    def conditional(self) -> bool:
        return True


class _S3Slot:
    """An object, by conditional PUT. A compatible store may ignore or refuse the condition."""

    def __init__(self, uri: str, options: Mapping[str, Any]) -> None:
        self._s3, path = filesystem(uri, options)
        self._bucket, self._key = split_bucket(self._s3, path)
        self._unsupported = False

    def read(self) -> tuple[bytes, str] | None:
        try:
            # The bytes and their tag in one request, or the tag might be of other bytes.
            answer = self._s3.call_s3("get_object", Bucket=self._bucket, Key=self._key)
        except FileNotFoundError:
            return None
        return _body(self._s3, answer), answer["ETag"]

    def put(self, data: bytes, tag: str | None) -> None:
        self._put(data, {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag})

    def conditional(self) -> bool:
        """Creates what is there already: a store that lets it pass does not look at conditions."""
        found = self.read()
        if not self._unsupported and found is not None:
            self._unsupported = self._put(found[0], {"IfNoneMatch": "*"})
        return not self._unsupported

    def _put(self, data: bytes, condition: dict[str, str]) -> bool:
        if self._unsupported:
            condition = {}
        try:
            self._s3.call_s3(
                "put_object", Bucket=self._bucket, Key=self._key, Body=data, **condition
            )
        except OSError as error:
            status = _status(error)
            if condition and status in UNSUPPORTED:
                self._unsupported = True
                return self._put(data, {})
            if status in REFUSED or isinstance(error, FileNotFoundError):
                return False
            raise
        return True


class _PlainSlot:
    """Any other store: looks, then writes."""

    def __init__(self, uri: str, options: Mapping[str, Any]) -> None:
        folder, _, _ = uri.rpartition("/")
        self._store = Store(folder, options)

    def read(self) -> tuple[bytes, str] | None:
        try:
            data = self._store.read(NAME)
        except FileNotFoundError:
            return None
        return data, data.decode()

    def put(self, data: bytes, tag: str | None) -> None:
        found = self.read()
        if (None if found is None else found[1]) == tag:
            self._store.write(NAME, data)

    def conditional(self) -> bool:
        return False


def _body(store: Any, answer: dict[str, Any]) -> bytes:  # noqa: ANN401
    data: bytes = sync(store.loop, answer["Body"].read)
    return data


def _status(error: OSError) -> int | None:
    response = getattr(error.__cause__, "response", None) or {}
    status: int | None = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status


def _claim(data: bytes) -> Claim:
    try:
        return Claim(**json.loads(data))
    except (ValueError, TypeError) as error:
        raise LeaseError(
            f"{NAME} cannot be read; remove it if no run is at work: {error}"
        ) from error


def _text(time: datetime) -> str:
    return time.isoformat(timespec="milliseconds")
