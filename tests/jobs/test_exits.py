"""Exit codes are a contract with schedulers: the README has each of them, and no two are the same."""

from __future__ import annotations

import re
from pathlib import Path

from jobs import exits

CODES = {name: value for name, value in vars(exits).items() if name.isupper()}
README = (Path(__file__).parents[2] / "README.md").read_text()


def test_each_code_is_its_own() -> None:
    assert len(set(CODES.values())) == len(CODES)
    assert CODES["INTERRUPTED"] == 128 + 2
    assert CODES["TERMINATED"] == 128 + 15


def test_the_readme_names_each_code() -> None:
    (paragraph,) = re.findall(r"\*\*Exit codes\*\*:(.*?)\n\n", README, re.DOTALL)
    words = re.sub(r"`[^`]*`", "", paragraph)
    assert sorted(int(number) for number in re.findall(r"\b\d+\b", words)) == sorted(CODES.values())
