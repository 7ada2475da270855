"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from typing import Any

import yaml


def add_job(parser: argparse.ArgumentParser) -> None:
    """`JOB.yaml`, and `--set section.field=value`, a list of strings."""
    parser.add_argument("job", metavar="JOB.yaml", help="job file, such as those in jobs/examples")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """`--set` alone."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="section.field=value",
        help="override one field of the job (may be repeated)",
    )


def add_storage_options(parser: argparse.ArgumentParser) -> None:
    """`--storage-options YAML`, an empty dict by default."""
    parser.add_argument(
        "--storage-options",
        type=_mapping,
        default={},
        metavar="YAML",
        help="for fsspec, for example '{endpoint_url: http://...}'",
    )


def _mapping(text: str) -> dict[str, Any]:
    try:
        options = yaml.safe_load(text)
    except yaml.YAMLError:
        options = None
    if not isinstance(options, dict):  # not shown: it may hold a secret
        raise argparse.ArgumentTypeError("must be a YAML mapping like '{key: value}'")
    return options
