"""A fetch as tests ask for it: with limits, its failure, and what a web server sends."""

from __future__ import annotations

import pytest

from operators.fetch import Fetch, FetchError
from operators.settings import FetchSettings


def fetch(options=None, **limits):
    return Fetch(FetchSettings(**limits), options or {})


def failure(ref, options=None, **limits):
    with pytest.raises(FetchError) as caught:
        fetch(options, **limits)(ref)
    return caught.value


def answer(*bodies, status=200, length=True):
    """A route that sends one body after the other, the last one for ever; an int is a status."""
    left = list(bodies)

    def route(handler):
        body = left.pop(0) if len(left) > 1 else left[0]
        code, data = (body, b"") if isinstance(body, int) else (status, body)
        handler.send_response(code)
        if length:
            handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return route
