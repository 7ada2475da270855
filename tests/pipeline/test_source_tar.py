"""Tar shards: members by their headers, and damage that neither stops the run nor vanishes."""

from __future__ import annotations

import io
import tarfile

import pytest
from listing import listed, source

from operators.fetch import Fetch, Ref
from operators.settings import FetchSettings
from pipeline.source_rows import SourceError


def tar(*files, end=True, form=tarfile.PAX_FORMAT):
    """Bytes of a shard of (name, data)."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w", format=form) as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        size = archive.offset
    return whole.getvalue() if end else whole.getvalue()[:size]


def fetched(row, options=None):
    ref = Ref(row["fetch_uri"], row["fetch_offset"], row["fetch_length"], row["size_bytes"])
    return Fetch(FetchSettings(), options or {})(ref).data


FILES = [
    ("a/1.jpg", b"one"),
    ("a/1.json", b"{}"),
    ("ü" * 120 + " #?.jpg", b"two" * 1000),
    ("3.jpg", b""),
]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_found_and_fetched_by_offset(tmp_path, s3, form):
    shard = tar(*FILES, form=form)
    (tmp_path / "s.tar").write_bytes(shard)
    remote = f"{s3.bucket()}/s 1#.tar"
    s3.put(remote, shard)
    wanted = [(name, data) for name, data in FILES if name.endswith(".jpg")]
    for uri, options in ((str(tmp_path / "s.tar"), {}), (remote, s3.options)):
        rows, skipped = listed(uri, storage_options=options)
        assert [row["uri"] for row in rows] == [f"tar://{name}::{uri}" for name, _ in wanted]
        assert [fetched(row, options) for row in rows] == [data for _, data in wanted]
        assert len({row["version"] for row in rows}) == len(rows)
        assert skipped == {"unknown type .json": 1}


def test_every_member_has_a_uri_of_its_own_whatever_the_names_hold(tmp_path):
    folder = tmp_path / "me@corp"
    folder.mkdir()
    names = ["1.jpg", "icon@2x.jpg", "a://b@c.jpg"]
    (folder / "set@v2.tar").write_bytes(tar(*[(name, b"1") for name in names]))
    rows, _ = listed(folder / "set@v2.tar")
    assert [row["uri"] for row in rows] == [f"tar://{name}::{folder}/set@v2.tar" for name in names]


def test_only_headers_are_read_of_large_members(s3):
    uri = f"{s3.bucket()}/big.tar"
    s3.put(uri, tar(*[(f"{number}.jpg", bytes(8 << 20)) for number in range(3)]))
    s3.requests.clear()
    rows, _ = listed(uri, storage_options=s3.options)
    assert len(rows) == 3
    # two HEADs, then one window of 1 MiB for each header and one for the end
    assert len(s3.requests) <= 8


def test_links_folders_and_excluded_members(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name, kind in (("d", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type = kind
            archive.addfile(member)
        for name in ("x/a.jpg", "y/b.jpg", "y/c.bin"):
            archive.addfile(tarfile.TarInfo(name))
    rows, skipped = listed(tmp_path / "s.tar", include=("y/*",), exclude=("**/*.bin",))
    assert [row["uri"].partition("::")[0] for row in rows] == ["tar://y/b.jpg"]
    assert skipped == {
        "tar member is a link, a device or sparse": 1,
        "not in include": 1,
        "excluded": 1,
    }


def test_what_is_no_shard_in_a_folder_of_them_is_counted(tmp_path):
    for name in ("1.tar", "2.TAR", "3.tar.gz", "list.txt", "val/4.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(tar(("a.jpg", b"1")))
    rows, skipped = listed(tmp_path, kind="tar", exclude=("val/*",))
    assert [row["fetch_uri"] for row in rows] == [
        f"{tmp_path}/{name}" for name in ("1.tar", "2.TAR")
    ]
    assert skipped == {"unknown type .gz": 1, "unknown type .txt": 1, "excluded": 1}
    rows, skipped = listed(f"{tmp_path}/*.tar")
    assert [row["fetch_uri"] for row in rows] == [f"{tmp_path}/1.tar"]
    assert skipped == {"not in include": 4}


@pytest.mark.parametrize("uri", ["{}/shards", "{}/shards/*.tar", "{}/shards/s-{{00..11}}.tar"])
def test_many_shards_come_in_order(tmp_path, uri):
    (tmp_path / "shards").mkdir()
    for shard in range(12):
        files = [(f"{shard}-{number}.jpg", b"x") for number in range(300)]
        (tmp_path / "shards" / f"s-{shard:02d}.tar").write_bytes(tar(*files))
    rows, _ = listed(uri.format(tmp_path), kind="auto" if "*" in uri else "tar")
    expected = [f"{shard}-{number}.jpg" for shard in range(12) for number in range(300)]
    assert [row["uri"].removeprefix("tar://").partition("::")[0] for row in rows] == expected


def test_a_reader_that_stops_early_leaves_no_thread_behind(tmp_path):
    for shard in range(10):
        files = [(f"{number}.jpg", b"") for number in range(2000)]
        (tmp_path / f"{shard}.tar").write_bytes(tar(*files))
    batches = source(f"{tmp_path}/*.tar").batches()
    assert next(batches).num_rows == 256
    batches.close()  # would wait for ever for a thread that waits to be read


def test_a_shard_cut_inside_a_member_keeps_the_bytes_that_are_there(tmp_path):
    shard = tar(("1.jpg", b"one"), ("2.jpg", b"x" * 2000), ("3.jpg", b"three"))
    (tmp_path / "s.tar").write_bytes(shard[: 512 * 3 + 700])
    (tmp_path / "t.tar").write_bytes(tar(("4.jpg", b"four")))
    rows, _ = listed(f"{tmp_path}/*.tar")
    assert [fetched(row) for row in rows] == [b"one", b"x" * 700, b"four"]
    assert rows[1]["uri"] == f"tar://2.jpg::{tmp_path}/s.tar"


def test_a_damaged_header_becomes_a_row_for_the_rest(tmp_path):
    shard = bytearray(tar(("1.jpg", b"one"), ("2.jpg", b"two"), ("3.jpg", b"three")))
    shard[1024:1100] = b"\xff" * 76
    path = tmp_path / "s.tar"
    path.write_bytes(shard)
    rows, _ = listed(path)
    assert [row["uri"] for row in rows] == [f"tar://1.jpg::{path}", str(path)]
    assert fetched(rows[1]) == bytes(shard[1024:1536])
    assert rows[1]["version"]


def header(name, size, kind=tarfile.REGTYPE):
    """The block of a header that says what it likes about its size."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    block[156:157] = kind
    block[148:156] = (
        b"%06o\0 " % tarfile.calc_chksums(bytes(block[:148] + b" " * 8 + block[156:]))[0]
    )
    return bytes(block)


def pax(**records):
    """An extended header for the member that follows."""
    return tarfile.TarInfo._create_pax_generic_header(
        {name.replace("_", "."): value for name, value in records.items()}, tarfile.XHDTYPE, "utf-8"
    )


NAMED_AGAIN = header("x", 2, tarfile.GNUTYPE_LONGNAME) + b"a".ljust(512, b"\0")


@pytest.mark.parametrize(
    "lie",
    [
        header("2.jpg", -512),
        header("2.jpg", -511),
        header("2.jpg", -1024),
        header("2.bin", 1 << 62),
        header("2.bin", 1 << 80),
        pax(size="-512") + header("2.jpg", 0),
        header("x", 1 << 62, tarfile.GNUTYPE_LONGNAME),
        header("x", 1 << 80, tarfile.GNUTYPE_LONGNAME),
        header("x", 1 << 62, tarfile.XHDTYPE),
        pax(GNU_sparse_map="x,y", GNU_sparse_size="3") + header("2.jpg", 0),
        pax(GNU_sparse_major="1", GNU_sparse_minor="0") + header("2.jpg", 0),
        NAMED_AGAIN * 1200 + header("2.jpg", 0),
    ],
    ids=range(12),
)
def test_a_header_that_lies_becomes_a_row_for_the_rest(tmp_path, lie):
    path = tmp_path / "s.tar"
    path.write_bytes(tar(("1.jpg", b"one"), end=False) + lie + tar(("3.jpg", b"three")))
    batches = source(path).batches()
    first = next(batches).to_pylist()  # of a listing without end it is 256 rows
    assert [row["uri"] for row in first] == [f"tar://1.jpg::{path}", str(path)]
    assert list(batches) == []
    assert fetched(first[1]) == lie[:512] or first[1]["size_bytes"] == 0


@pytest.mark.parametrize("data", [b"", b"no tar", b"\xff" * 5000])
def test_what_is_no_tar_at_all_is_one_row(tmp_path, data):
    (tmp_path / "s.tar").write_bytes(data)
    (tmp_path / "t.tar").write_bytes(tar(("4.jpg", b"four")))
    rows, _ = listed(f"{tmp_path}/*.tar")
    assert [row["uri"] for row in rows] == [f"{tmp_path}/s.tar", f"tar://4.jpg::{tmp_path}/t.tar"]
    assert fetched(rows[0]) == data[:512]


def test_shards_put_together_with_cat_do_not_lose_the_second_in_silence(tmp_path):
    (tmp_path / "s.tar").write_bytes(tar(("1.jpg", b"1")) + tar(("2.jpg", b"2")))
    rows, _ = listed(tmp_path / "s.tar")
    assert [row["uri"] for row in rows] == [f"tar://1.jpg::{tmp_path}/s.tar", f"{tmp_path}/s.tar"]
    assert fetched(rows[1]).startswith(b"2.jpg")


def test_a_shard_without_an_end_mark_is_counted(tmp_path):
    (tmp_path / "s.tar").write_bytes(tar(("1.jpg", b"1"), end=False))
    rows, skipped = listed(tmp_path / "s.tar")
    assert len(rows) == 1
    assert skipped == {"tar shard has no end mark (its members were taken)": 1}


def test_a_shard_that_may_not_be_read_is_a_row_and_one_that_cannot_be_reached_stops(s3):
    bucket = s3.bucket()
    for name in ("a", "b"):
        s3.put(f"{bucket}/{name}.tar", tar((f"{name}.jpg", b"1")))
    s3.fault = lambda _, path, query: (403, "AccessDenied") if path.endswith("a.tar") else None
    rows, _ = listed(f"{bucket}/*.tar", storage_options=s3.options)
    assert [row["uri"] for row in rows] == [f"{bucket}/a.tar", f"tar://b.jpg::{bucket}/b.tar"]
    options = {**s3.options, "config_kwargs": {"retries": {"total_max_attempts": 1}}}
    s3.fault = lambda _, path, query: (500, "InternalError") if path.endswith("a.tar") else None
    with pytest.raises(SourceError, match=r"a\.tar"):
        listed(f"{bucket}/*.tar", storage_options=options)


def test_an_http_server_without_ranges_is_named(web):
    def route(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(tar(("1.jpg", b"1")))

    def sized(handler):
        data = tar(("1.bin", bytes(2 << 20)), ("2.jpg", b"2"))
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    web.routes |= {"/s.tar": route, "/t.tar": sized}
    for name in ("s.tar", "t.tar"):
        with pytest.raises(SourceError, match=f"{name}: the server knows no ranges"):
            listed(f"{web.url}/{name}")
