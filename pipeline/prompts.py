"""The prompts of a job in its checkpoint's own form, or why it cannot have them."""

from __future__ import annotations

from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from operators.prompts import Prompts, load_prompts
from pipeline.cluster import BrokenRunError
from pipeline.config import ConfigError, Job


def job_prompts(job: Job) -> Prompts:
    """Reads the checkpoint's tokenizer.

    Raises ConfigError where there is no such checkpoint, where it has no form for what is asked, or
    where a picture of all its tokens, or a window of speech, does not fit beside the prompt;
    BrokenRunError where the hub does not answer.
    """
    try:
        prompts = load_prompts(job.model, job.prompt, job.video, job.instructions)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error
    except OSError as error:  # transformers' own, whatever it does not get; the cause is the hub's
        cause = error.__cause__
        silent = isinstance(cause, HfHubHTTPError | LocalEntryNotFoundError)
        if silent and not isinstance(cause, RepositoryNotFoundError | RevisionNotFoundError):
            raise BrokenRunError(f"model.id: {job.model.id}: {error}") from error
        raise ConfigError(
            f"model.id: {job.model.id}: no folder here, and at revision {job.model.revision} no checkpoint"
            f" of the hub that may be read: {error}"
        ) from error
    for medium, prompt, tokens in (
        ("a picture", prompts.get("image"), job.image.max_soft_tokens),
        ("a window of speech", prompts.get("audio"), job.speech_tokens),
    ):
        if prompt is None:
            continue
        if prompt.own_tokens + tokens > prompt.max_tokens:
            raise ConfigError(
                f"model.max_model_len: {job.model.max_model_len} has no room for"
                f" {prompt.own_tokens} tokens of the prompt and {tokens} of {medium} beside an answer of"
                f" {job.model.max_model_len - prompt.max_tokens}"
            )
    return prompts
