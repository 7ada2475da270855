"""The failures that a row can end with: one code each, and whether the next run tries again.

    MediaError        a row's failure: bad media, a bad answer, a store that refused
      code            one of FAILURES; the part before the dot is the stage
      transient       True: not sealed in the ledger, the next run asks again

A broken machine (a dead engine, a full disk) is not one of these: it stays an ordinary exception.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Failure:
    """What a code means, in a sentence a user can act on."""

    meaning: str
    transient: bool = False


FAILURES: dict[str, Failure] = {
    "fetch.not_found": Failure("the store has no such object", transient=True),
    "fetch.forbidden": Failure("the store refused the credentials", transient=True),
    "fetch.too_large": Failure("the object is larger than fetch.max_bytes or max_file_bytes"),
    "fetch.timeout": Failure("the store did not answer within fetch.timeout_s", transient=True),
    "fetch.unavailable": Failure("the store kept failing after all attempts", transient=True),
    "fetch.changed": Failure("the object changed between listing and reading", transient=True),
    "decode.empty": Failure("the file has no bytes"),
    "decode.unsupported": Failure("the bytes are no format that the decoder knows"),
    "decode.no_audio": Failure("the file has no sound track"),
    "decode.no_video": Failure("the file has no moving pictures"),
    "decode.too_short": Failure("there is less than 0.1 s of sound"),
    "decode.corrupt": Failure("the file is damaged or ends early"),
    "decode.too_large": Failure(
        "the picture has more pixels than image.max_pixels or video.max_pixels"
    ),
    "decode.timeout": Failure("decoding took longer than its section's timeout_s"),
    "decode.crashed": Failure("the decoder process died on this file"),
    "decode.out_of_memory": Failure("decoding needed more than its section's max_memory_bytes"),
    "prepare.aspect_ratio": Failure("the sides are so unequal that no patch grid fits the budget"),
    "prepare.bad_variable": Failure(
        "a prompt variable is missing, too long or holds a control token"
    ),
    "prepare.too_long": Failure("prompt and media exceed model.max_model_len"),
    "generate.looped": Failure("the answer repeated itself"),
    "generate.truncated": Failure(
        "the answer hit sampling.max_tokens, or what a video's sound or summary may have"
    ),
    "generate.refused": Failure("the model says that it cannot transcribe, instead of doing so"),
    "generate.rejected": Failure("the engine refused the request"),
    "generate.interrupted": Failure("the engine broke the request off", transient=True),
    "generate.engine_killed": Failure("the engine died twice while this row was in it"),
}


class MediaError(Exception):
    """A row's failure. `code` must be a key of FAILURES (checked)."""

    def __init__(self, code: str, message: str) -> None:
        if code not in FAILURES:
            raise ValueError(f"unknown failure code {code!r}")
        super().__init__(message)
        self.code = code
        self.message = message

    @property
    def stage(self) -> str:
        return self.code.partition(".")[0]

    @property
    def transient(self) -> bool:
        return FAILURES[self.code].transient

    @property
    def columns(self) -> dict[str, str]:
        """As a row's error columns."""
        return {
            "error_code": self.code,
            "error_stage": self.stage,
            "error_message": self.message,
        }

    def __reduce__(self) -> tuple[type[MediaError], tuple[str, str]]:
        return MediaError, (self.code, self.message)
