"""Stores by URI: their options, and what of a URI is shown."""

from __future__ import annotations

import pytest

from operators.stores import StoreError, filesystem, redact, unsigned


def test_a_wrong_storage_option_is_named_but_not_its_value():
    with pytest.raises(StoreError, match="no option secrret") as caught:
        filesystem("s3://bucket/a", {"secrret": "hunter2"})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://me:hunter2@host:8080/a@b.jpg", "https://***@host:8080/a@b.jpg"),
        ("https://me:hunter@2@host/a.jpg", "https://***@host/a.jpg"),
        ("http://127.0.0.1:8080/a@b.jpg", "http://127.0.0.1:8080/a@b.jpg"),
        ("https://host/a.jpg?X-Amz-Signature=hunter2#x", "https://host/a.jpg?***"),
        ("s3://KEY:hun/ter2@bucket/a?.jpg", "s3://***@bucket/a?.jpg"),
        ("s3://bucket/a b/ü#1?.jpg", "s3://bucket/a b/ü#1?.jpg"),
        ("/data/a?b#c@d.jpg", "/data/a?b#c@d.jpg"),
        ("tar://m?.jpg::https://u:p@host/s.tar?sig=x", "tar://m?.jpg::https://***@host/s.tar?***"),
    ],
)
def test_messages_show_the_uri_without_credentials(uri, shown):
    assert redact(uri) == shown


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://u:p@host/a.jpg?id=1&key=b", "https://host/a.jpg?id=1&key=b"),
        ("https://u:p@ss@host/a.jpg", "https://host/a.jpg"),
        ("tar://m.jpg::https://u:p@host/s@1.tar", "tar://m.jpg::https://host/s@1.tar"),
        ("https://host/a?X-Amz-Date=1&w=2&X-Amz-Signature=3", "https://host/a?w=2"),
        ("https://host/a?sv=1&sig=2", "https://host/a"),
        ("s3://KEY:hun/ter2@bucket/a@2x.jpg", "s3://bucket/a@2x.jpg"),
        (
            "tar://m?.jpg::https://u:p@h/s.tar?X-Amz-Signature=x&w=1",
            "tar://m?.jpg::https://h/s.tar?w=1",
        ),
    ],
)
def test_results_show_the_uri_without_what_signs_it(uri, shown):
    assert unsigned(uri) == shown


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/a?sig=1.jpg",
        "s3://bucket/me@corp/a@2x.jpg",
        "s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/raw/a@2x.jpg",
        "abfs://raw@account.dfs.core.windows.net/a.jpg",
        "/home/me@corp/x://y@z.jpg",
        "tar://icon@2x.png::/s.tar",
        "tar://1.jpg::/home/me@corp/s.tar",
        "tar://1.jpg::s3://bucket/set@v2.tar",
    ],
)
def test_an_at_sign_in_a_name_is_no_users(uri):
    assert unsigned(uri) == uri
