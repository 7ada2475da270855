"""A place for files, on local disk and on S3."""

from __future__ import annotations

import pytest
from listing import touch


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path, s3):
    """Put files somewhere: `put(names)` gives the prefix and its storage options."""

    def put(*names):
        if request.param == "local":
            touch(tmp_path, *names)
            return str(tmp_path), {}
        prefix = f"{s3.bucket()}/raw"
        for name in names:
            s3.put(f"{prefix}/{name}", name.encode())
        return prefix, s3.options

    return put
