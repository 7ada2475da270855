"""Identity: the same file is the same asset, anything else is another one."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.source_rows import asset_id, normalise, path_in, version_of

PARTS = st.tuples(
    st.text(), st.text(), st.none() | st.text(min_size=1), st.none() | st.text(min_size=1)
)


@given(PARTS, PARTS)
def test_ids_are_equal_only_where_all_four_parts_are(left, right):
    assert (asset_id(*left) == asset_id(*right)) == (left == right)


def test_an_id_never_changes_between_releases():
    assert asset_id("s3://b/a.jpg", "etag") == "5b9b41b1bf3ce001858273779f74c982"
    assert len(asset_id("", "")) == 32


@pytest.mark.parametrize(
    ("uri", "normal"),
    [
        ("S3://Bucket/x//y?.jpg#1", "s3://Bucket/x//y?.jpg#1"),
        ("s3://b/a%20b/../[c].jpg", "s3://b/a%20b/../[c].jpg"),
        ("https://H/a?b=//c", "https://H/a?b=//c"),
        ("/x//y/../a b#?.jpg", "/x/a b#?.jpg"),
        ("file:///x/a%20b.jpg", "/x/a%20b.jpg"),
        ("a.jpg", f"{os.getcwd()}/a.jpg"),
    ],
)
def test_local_paths_become_absolute_and_keys_stay_as_they_are(uri, normal):
    assert normalise(uri) == normal
    assert normalise(normal) == normal


@pytest.mark.parametrize(
    ("info", "version"),
    [
        ({"ETag": '"abc-2"', "size": 1}, "abc-2"),
        ({"etag": 'W/"abc"'}, "abc"),
        ({"size": 5, "mtime": 1.5}, "5-1.5"),
        ({"size": None}, ""),
        ({"size": 5}, ""),
    ],
)
def test_a_version_is_the_etag_or_size_and_time(info, version):
    assert version_of(info) == version


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("tar://x/a::b.wav::s3://b/0.tar", "x/a::b.wav"),
        ("s3://b/a::b.wav", "s3://b/a::b.wav"),
        ("/x/tar/0.tar", "/x/tar/0.tar"),
    ],
)
def test_a_member_is_named_by_its_path_in_the_shard(uri, path):
    assert path_in(uri) == path
