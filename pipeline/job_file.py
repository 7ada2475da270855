"""One YAML a job: read, overridden and checked.

Every error names the field, the value and what is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config import ConfigError, Job

# Where a wrong field is named in an error, its value is not, if its name matches.
SECRET_NAME = re.compile(
    r"secret|token|password|passwd|credential|key|sas|connection|auth|sign|cookie", re.IGNORECASE
)
# Fields of ours whose names look like secrets but are none.
PUBLIC_NAMES = frozenset({"max_tokens", "max_soft_tokens"})


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read a job file and apply `section.field=value` overrides (values are YAML).

    Raises ConfigError, with one line for each field that is wrong.
    """
    try:
        return Job.model_validate(read_job(path, overrides))
    except ValidationError as error:
        raise ConfigError("\n".join([f"{path}:", *_explain(error)])) from error


def read_job(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The job file's fields as they stand there, overrides applied, secrets included. Not checked.

    Raises ConfigError where there is no such mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must hold fields such as task, input and output")
    for override in overrides:
        _override(data, override)
    return data


def _override(data: dict[str, Any], override: str) -> None:
    name, equals, value = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set {override}: must be section.field=value")
    *sections, field = name.split(".")
    for section in sections:
        inner = data.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: {section} is not a section")
        data = inner
    try:
        data[field] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {error}") from error


def _explain(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"]) or "job"
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            yield f"  {field}: missing"
        elif problem["type"] == "extra_forbidden":
            yield f"  {field}: no such field; allowed here: {', '.join(_fields(problem['loc']))}"
        elif isinstance(problem["input"], dict):
            yield f"  {field}: {message}"
        elif "storage_options" in problem["loc"] or _is_secret(field.rpartition(".")[2]):
            yield f"  {field}: {message}; got ***"
        else:
            yield f"  {field}: {message}; got {problem['input']!r}"


def _fields(loc: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Job
    for part in loc[:-1]:
        annotation = model.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    return sorted(model.model_fields)


def _is_secret(name: str) -> bool:
    return name not in PUBLIC_NAMES and SECRET_NAME.search(name) is not None
