"""Token sequences for training: one medium, then one or more instructions with their answers.

The instructions of one picture or clip share its tokens: each is a branch that sees the medium
and itself, and its positions go on from the medium's end, as if it stood alone. Audio comes
after its instruction, so an audio sequence has one branch only.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from deploy.nano import tokenizer as nano_tokenizer
from deploy.nano.generate_videos import clock
from deploy.nano.tokenizer import ID

Ints = NDArray[np.int64]

_USER: Final = "<bos><|turn>user\n"
_MODEL: Final = "<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
PADDING: Final = -1
SHARED: Final = 0


@lru_cache(maxsize=1)
def _tokenizer() -> PreTrainedTokenizerFast:
    return nano_tokenizer.build()


@lru_cache(maxsize=65536)
def encode(text: str) -> tuple[int, ...]:
    """Return token ids of a text that may hold special tokens; nothing is added."""
    return tuple(_tokenizer().encode(text, add_special_tokens=False))


@dataclass(frozen=True)
class Sequence:
    """One training sequence; all arrays are int64 [t].

    `branch` is 0 for what all see, 1.. for an instruction; `block` numbers the picture a vision
    token belongs to, -1 elsewhere; `target` is the id to predict at a place, -1 for none.
    """

    ids: Ints
    branch: Ints
    position: Ints
    block: Ints
    target: Ints


def _assemble(shared: list[int], branches: list[tuple[list[int], list[int]]]) -> Sequence:
    ids = list(shared)
    branch = [SHARED] * len(shared)
    position = list(range(len(shared)))
    target = [-1] * len(shared)
    for number, (prompt, answer) in enumerate(branches, start=1):
        ids += prompt + answer[:-1]
        length = len(prompt) + len(answer) - 1
        branch += [number] * length
        position += range(len(shared), len(shared) + length)
        target += [-1] * (len(prompt) - 1) + answer
    array = np.array(ids, dtype=np.int64)
    vision = (array == ID["<|image|>"]) | (array == ID["<|video|>"])
    starts = vision & ~np.concatenate([[False], vision[:-1]])
    block = np.where(vision, np.cumsum(starts) - 1, -1)
    return Sequence(
        array,
        np.array(branch, dtype=np.int64),
        np.array(position, dtype=np.int64),
        block.astype(np.int64),
        np.array(target, dtype=np.int64),
    )


def _branch(instruction: str, answer: str) -> tuple[list[int], list[int]]:
    return list(encode(instruction + _MODEL)), list(encode(answer + "<turn|>"))


def of_image(tokens: int, asked: list[tuple[str, str]]) -> Sequence:
    """Return the sequence of a picture of `tokens` patches and (instruction, answer) pairs."""
    shared = list(encode(_USER + "<|image>")) + [ID["<|image|>"]] * tokens
    return _assemble([*shared, ID["<image|>"]], [_branch(*pair) for pair in asked])


def of_video(tokens: int, stamps_s: list[float], asked: list[tuple[str, str]]) -> Sequence:
    """Return the sequence of frames of `tokens` patches each, shown at `stamps_s`."""
    shared: list[int] = []
    for index, stamp_s in enumerate(stamps_s):
        before = _USER if index == 0 else " "
        shared += encode(f"{before}{clock(stamp_s)} <|image>")
        shared += [ID["<|video|>"]] * tokens + [ID["<image|>"]]
    return _assemble(shared, [_branch(*pair) for pair in asked])


def of_audio(frames: int, instruction: str, answer: str) -> Sequence:
    """Return the sequence of a clip of `frames` frames after its instruction."""
    prompt = list(encode(_USER + instruction + "<|audio>"))
    prompt += [ID["<|audio|>"]] * frames + list(encode("<audio|>" + _MODEL))
    return _assemble([], [(prompt, list(encode(answer + "<turn|>")))])


def stack(sequences: list[Sequence]) -> dict[str, Ints]:
    """Pad to one length: arrays [b, t] by field name; padding has branch -1."""
    longest = max(len(s.ids) for s in sequences)
    fill = {"ids": ID["<pad>"], "branch": PADDING, "position": 0, "block": -1, "target": -1}
    stacked = {k: np.full((len(sequences), longest), v, np.int64) for k, v in fill.items()}
    for row, sequence in enumerate(sequences):
        for key, array in stacked.items():
            values = getattr(sequence, key)
            array[row, : len(values)] = values
    return stacked
