"""Which store a URI means, and what its faults mean. Everything that opens a URI starts here.

filesystem(uri, options)   the fsspec store and the path in it
redact(uri), unsigned(uri) a URI without credentials: for messages, for results
classify(error)            the fetch.* code of a store's fault, and whether to try again
"""

from __future__ import annotations

import errno
import importlib
import os
import re
from collections.abc import Mapping
from typing import Any

import aiohttp
import botocore.exceptions
import botocore.parsers
import fsspec
from fsspec.registry import known_implementations

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
# s3://key:secret@bucket, https://user:pass@word@host: up to the last @ of the host's part. A secret
# may hold slashes; a port is none.
USERINFO = re.compile(r"(?<=://)(?:[^/]*@|[^/@:]*:(?!\d+(?:/|$))[^@]*@)")
LOCAL = frozenset({"file", "local"})
HTTP = frozenset({"http", "https"})
S3 = frozenset({"s3", "s3a"})
# fsspec has them, but they are no stores: what they would read stands in their options.
WRAPPERS = frozenset({"data", "dir", "tar", "zip"})
# Stores whose keys may hold ? and #: there it is a name, elsewhere a query with a signature in it.
NAMED = LOCAL | S3 | {"gs", "gcs", "memory"}
# Stores where an @ ends no user's name: in a path it is a letter, at Azure the container precedes it.
USERLESS = LOCAL | {"memory", "az", "abfs", "abfss"}
SYNONYMS = (LOCAL, HTTP, S3, frozenset({"gs", "gcs"}), frozenset({"az", "abfs", "abfss"}))
# What of flat storage options an HTTP request knows; the rest belongs to an object store.
HTTP_OPTIONS = frozenset({"headers", "cookies", "proxy", "ssl", "encoded"})
# Signed URLs of AWS, Google, CloudFront and Azure: with a signature, these parameters are its own.
SIGNED = re.compile(r"[?&](?:X-Amz-Signature|X-Goog-Signature|Signature|sig)=", re.IGNORECASE)
SIGNING = re.compile(
    r"(?:X-Amz-[\w-]+|X-Goog-[\w-]+|AWSAccessKeyId|GoogleAccessId|Signature|Expires|Policy"
    r"|Key-Pair-Id|response-content-[\w-]+|sig|sv|ss|srt|sp|st|se|spr|sr|sip|sk\w+)=",
    re.IGNORECASE,
)
# s3fs tries 5 times around botocore's attempts. With botocore's own default of 5 a wrong endpoint
# is 40 s of silence, with 4 half of that; 5xx answers are tried again by botocore only.
RETRIES = {"mode": "standard", "total_max_attempts": 4}
# S3's codes of what may pass, where no HTTP status says so
PASSING = re.compile(
    r"SlowDown|Throttl|TooManyRequests|RequestLimitExceeded|RequestTimeout|InternalError|ServiceUnavailable"
)
TIMEOUTS = (
    TimeoutError,
    botocore.exceptions.ConnectTimeoutError,
    botocore.exceptions.ReadTimeoutError,
)
CREDENTIALS = (
    PermissionError,
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
)
CONNECTIONS = (
    ConnectionError,
    aiohttp.ClientConnectionError,
    aiohttp.ClientPayloadError,
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.IncompleteReadError,
    botocore.parsers.ResponseParserError,
)
NO_SUCH = (
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    aiohttp.InvalidURL,
    botocore.exceptions.ParamValidationError,
    # a host name that cannot be one, in a URL or where a server sends us on to
    UnicodeError,
)
STORE_FAULTS: tuple[type[Exception], ...] = (
    OSError,
    aiohttp.ClientError,
    botocore.exceptions.BotoCoreError,
    UnicodeError,
)


class StoreError(Exception):
    """No store for this URI: an unknown scheme, a missing package, options nobody understands."""


def protocol(uri: str) -> str:
    """The scheme in lower case; a plain path is a file."""
    match = SCHEME.match(uri)
    return match[1].lower() if match else "file"


def split_member(uri: str) -> tuple[str, str]:
    """("tar://member", the shard's URI) of a member of a tar shard, ("", uri) of any other file."""
    member, mark, shard = uri.rpartition("::")
    return (member, shard) if mark and protocol(uri) == "tar" else ("", uri)


def redact(uri: str) -> str:
    """`uri` for messages: without user and password, and without a query that may be signed."""
    scheme = protocol(uri)
    member, shard = split_member(uri)
    if member:
        return f"{member}::{redact(shard)}"
    shown = USERINFO.sub("***@", uri)
    return shown if scheme in NAMED else re.sub(r"(?s)[?#].*", "?***", shown)


def unsigned(uri: str) -> str:
    """`uri` as results show it: user, password and the parameters of a signed URL taken out.

    What is left stays the same when a URL is signed anew. A member's name stays as it is.
    """
    scheme = protocol(uri)
    member, shard = split_member(uri)
    if member:
        return f"{member}::{unsigned(shard)}"
    plain = scheme in USERLESS or uri.startswith(f"{scheme}://arn:")
    shown = uri if plain else USERINFO.sub("", uri)
    head, question, query = shown.partition("?")
    if scheme in NAMED or not SIGNED.search(question + query):
        return shown
    query, hash_sign, fragment = query.partition("#")
    kept = "&".join(part for part in query.split("&") if not SIGNING.match(part))
    return head + (question + kept if kept else "") + hash_sign + fragment


def filesystem(
    uri: str, storage_options: Mapping[str, Any]
) -> tuple[fsspec.AbstractFileSystem, str]:
    """The store of `uri` and the path in it.

    Storage options are flat, or keyed by scheme ({s3: {...}, https: {...}}) where a manifest names
    several stores. Flat ones go to object stores; files get none, HTTP only what it knows, so that
    an S3 secret never reaches another host. An S3 path is all after the scheme, unchanged.

    Raises StoreError.
    """
    scheme = protocol(uri)
    if scheme not in known_implementations or scheme in WRAPPERS:
        raise StoreError(
            f"{redact(uri)}: unknown scheme {scheme}:// (s3, gs, http, https, file, ...)"
        )
    options = options_for(scheme, storage_options)
    # Listings change while we run: a cached one would hide a part just written.
    merged = {} if scheme in LOCAL else {"use_listings_cache": False, **options}
    if scheme in S3:
        merged = {"config_kwargs": {"retries": RETRIES}, **merged}
    try:
        store = fsspec.filesystem(scheme, **merged)
        if scheme in S3:
            store.connect()
    except ImportError as error:
        package = {"gs": "gcsfs", "gcs": "gcsfs"}.get(scheme, "its fsspec package")
        raise StoreError(f"{redact(uri)}: {scheme}:// needs {package}, install it") from error
    except (TypeError, ValueError) as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        what = f"no option {unknown[1]}" if unknown else "an option has a wrong value"
        raise StoreError(f"{redact(uri)}: storage_options: {what} in {scheme}://") from error
    if scheme in LOCAL:
        return store, local_path(uri)
    if scheme in S3:
        return store, uri.partition("://")[2]
    return store, str(store._strip_protocol(uri))


def local_path(uri: str) -> str:
    """Absolute path of a plain path or file:// URI. Percent signs are names, not escapes."""
    path = uri.partition("://")[2] if SCHEME.match(uri) else os.path.expanduser(uri)
    return os.path.abspath(path)


def split_bucket(store: fsspec.AbstractFileSystem, path: str) -> tuple[str, str]:
    """Bucket and key of an S3 path. Not s3fs's own split: that cuts keys at `?versionId=`."""
    if path.startswith("arn:"):
        bucket, key, _ = store.split_path(path)
        return bucket, key
    bucket, _, key = path.partition("/")
    return bucket, key


def options_for(scheme: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the job's storage options that are for this scheme."""
    keyed = [
        name
        for name, value in options.items()
        if name in known_implementations and isinstance(value, Mapping)
    ]
    if keyed:
        same = next((names for names in SYNONYMS if scheme in names), frozenset({scheme}))
        return next((dict(options[name]) for name in keyed if name in same), {})
    if scheme in LOCAL:
        return {}
    if scheme in HTTP:
        return {name: value for name, value in options.items() if name in HTTP_OPTIONS}
    return dict(options)


def classify(error: BaseException) -> tuple[str, bool]:
    """The fetch.* code of a store's fault, and whether another attempt may help."""
    status = http_status(error)
    if isinstance(error, NO_SUCH) or status in (404, 410):
        return "fetch.not_found", False
    if isinstance(error, CREDENTIALS) or status in (401, 403, 407, 451):
        return "fetch.forbidden", False
    if status == 416:
        return "fetch.changed", False
    if isinstance(error, TIMEOUTS) or status in (408, 504):
        return "fetch.timeout", True
    again = (
        isinstance(error, CONNECTIONS)
        or (status is not None and (status == 429 or status >= 500))
        or PASSING.search(_store_code(error)) is not None
    )
    if status is None and isinstance(error, OSError) and not again:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL):
            return "fetch.not_found", False
        again = error.errno not in (None, errno.ENOTSUP)
    return "fetch.unavailable", again


def reason(error: BaseException) -> str:
    """A few words on a store's fault, none of them from the URI or the options."""
    status, code = http_status(error), _store_code(error)
    if status is not None:
        return f"HTTP {status}" + (f" {code}" if code and code != str(status) else "")
    if code:
        return code
    if isinstance(error, TIMEOUTS):
        return "timed out"
    if isinstance(error, UnicodeError):
        return "no valid host name"
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()


def _response(error: BaseException) -> dict[str, Any]:
    for link in (error, error.__cause__):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            return response
    return {}


def _store_code(error: BaseException) -> str:
    return str(_response(error).get("Error", {}).get("Code", ""))


def http_status(error: BaseException) -> int | None:
    """The HTTP status, as botocore, aiohttp and gcsfs each keep it."""
    status = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    if status is None:
        status = getattr(error, "status", None) or getattr(error, "code", None)
    return int(status) if str(status).isdigit() else None


def faults_of(uri: str) -> tuple[type[Exception], ...]:
    """What the store of `uri` raises when it fails. gcsfs's errors derive from Exception alone.

    So do those of ftp, sftp and Azure: from a store that we do not know, anything is its fault.
    """
    scheme = protocol(uri)
    if scheme in LOCAL | HTTP | S3 | {"memory"}:
        return STORE_FAULTS
    if scheme not in ("gs", "gcs"):
        return (Exception,)
    return (
        *STORE_FAULTS,
        importlib.import_module("gcsfs.retry").HttpError,
        importlib.import_module("google.auth.exceptions").GoogleAuthError,
    )
