"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from typing import Any

import yaml


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
