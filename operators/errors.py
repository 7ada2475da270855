"""The failures that a row can end with: one code each, and whether the next run tries again.

    MediaError        a row's failure: bad media, a bad answer, a store that refused
      code            one of FAILURES; the part before the dot is the stage
                      in TRANSIENT: not sealed in the ledger, the next run asks again

A broken machine (a dead engine, a full disk) is not one of these: it stays an ordinary exception.
"""

from __future__ import annotations

# What each code means, in a sentence a user can act on. After these the next run asks again.
TRANSIENT = {
    "fetch.not_found": "the store has no such object",
    "fetch.forbidden": "the store refused the credentials",
    "fetch.timeout": "the store did not answer within fetch.timeout_s",
    "fetch.unavailable": "the store kept failing after all attempts",
    "fetch.changed": "the object changed between listing and reading",
    "generate.interrupted": "the engine broke the request off",
}
# These are the last word on a row.
LASTING = {
    "fetch.too_large": "the object is larger than fetch.max_bytes or max_file_bytes",
    "decode.empty": "the file has no bytes",
    "decode.unsupported": "the bytes are no format that the decoder knows",
    "decode.no_audio": "the file has no sound track",
    "decode.no_video": "the file has no moving pictures",
    "decode.too_short": "there is less than 0.1 s of sound",
    "decode.corrupt": "the file is damaged or ends early",
    "decode.too_large": "the picture has more pixels than image.max_pixels or video.max_pixels",
    "decode.timeout": "decoding took longer than its section's timeout_s",
    "decode.crashed": "the decoder process died on this file",
    "decode.out_of_memory": "decoding needed more than its section's max_memory_bytes",
    "prepare.aspect_ratio": "the sides are so unequal that no patch grid fits the budget",
    "prepare.bad_variable": "a prompt variable is missing, too long or holds a control token",
    "prepare.too_long": "prompt and media exceed model.max_model_len",
    "generate.looped": "the answer repeated itself",
    "generate.truncated": (
        "the answer hit sampling.max_tokens, or what a video's sound or summary may have"
    ),
    "generate.refused": "the model says that it cannot transcribe, instead of doing so",
    "generate.rejected": "the engine refused the request",
    "generate.engine_killed": "the engine died twice while this row was in it",
}
FAILURES = TRANSIENT | LASTING


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
    def columns(self) -> dict[str, str]:
        """As a row's error columns."""
        return {
            "error_code": self.code,
            "error_stage": self.stage,
            "error_message": self.message,
        }

    def __reduce__(self) -> tuple[type[MediaError], tuple[str, str]]:
        return MediaError, (self.code, self.message)
