"""The oracle has teeth: media prepared wrongly makes the nano checkpoint answer wrongly.

Each test breaks the inputs in one way a preparing step could, and asks for far fewer right answers
than the same requests get unbroken.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from conftest import CHECKPOINT

from deploy.nano import heldout, prepare
from deploy.nano.answers import Transformers
from deploy.nano.heldout import Example
from deploy.nano.prepare import Prepared
from deploy.nano.speech_bank import record

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

SEED = 3_000_017
CLEAR_DROP = 0.25
# A word has ten frames or more and survives the loss of one; of 8 to 12 words one often does not.
CLEAR_DROP_OF_SOUND = 0.1


@pytest.fixture(scope="module")
def model() -> Transformers:
    return Transformers(CHECKPOINT)


@pytest.fixture(scope="module")
def pictures() -> list[Example]:
    # The dense instruction names the relation, so every mistake shows.
    drawn = heldout.pictures(SEED, 90)
    return [e for e in drawn if "70 caption-dense" in e.group and " of " in e.expected][:20]


@pytest.fixture(scope="module")
def windows() -> list[Example]:
    drawn = heldout.windows(SEED, 120, record(heldout.BANK_SEED, per_voice=1))
    return [e for e in drawn if len(e.expected.split()) >= 8][:40]


@pytest.fixture(scope="module")
def clips() -> list[Example]:
    drawn = heldout.clips(SEED, 120)
    return [e for e in drawn if "2-6" in e.group and "moves" in e.expected][:20]


def accuracy(
    model: Transformers, examples: list[Example], spoil: Callable[[Prepared], Prepared]
) -> float:
    right = [model.answer(spoil(e.request)) == e.expected for e in examples]
    return sum(right) / len(right)


@pytest.fixture(scope="module")
def unspoilt(
    model: Transformers, pictures: list[Example], windows: list[Example], clips: list[Example]
) -> dict[str, float]:
    return {
        "clips": accuracy(model, clips, lambda request: request),
        "pictures": accuracy(model, pictures, lambda request: request),
        "windows": accuracy(model, windows, lambda request: request),
    }


def transposed(request: Prepared) -> Prepared:
    """Rows and columns of pixels change places inside each patch."""
    pixels = request.values.reshape(-1, 48, 48, 3).transpose(0, 2, 1, 3)
    return request.with_values(np.ascontiguousarray(pixels).reshape(request.values.shape))


def blue_first(request: Prepared) -> Prepared:
    """Channels in the order blue, green, red."""
    pixels = request.values.reshape(-1, 48 * 48, 3)[:, :, ::-1]
    return request.with_values(np.ascontiguousarray(pixels).reshape(request.values.shape))


def swapped_positions(request: Prepared) -> Prepared:
    """(y, x) where (x, y) belongs."""
    return replace(request, xy=np.ascontiguousarray(request.xy[:, ::-1]))


def column_major(request: Prepared) -> Prepared:
    """Patches go down the columns while positions go along the rows."""
    order = np.lexsort((request.xy[:, 1], request.xy[:, 0]))
    return request.with_values(request.values[order])


def one_frame_in_ten_lost(request: Prepared) -> Prepared:
    """Every tenth frame is left out, and its place with it."""
    keep = np.arange(len(request.values)) % 10 != 9
    soft = prepare.SOFT["audio"]
    places = np.flatnonzero(np.array(request.token_ids) == soft)
    gone = set(places[~keep].tolist())
    ids = tuple(t for n, t in enumerate(request.token_ids) if n not in gone)
    return replace(request, token_ids=ids, values=request.values[keep])


def halves_swapped(request: Prepared) -> Prepared:
    """Each frame shifted by half a frame within itself."""
    return request.with_values(np.roll(request.values, 320, axis=1))


def frames_reversed(request: Prepared) -> Prepared:
    """The last frame first, under the first one's time."""
    return request.with_values(request.values[::-1])


@pytest.mark.parametrize("spoil", [transposed, blue_first, swapped_positions, column_major])
def test_pictures_prepared_wrongly(
    spoil: Callable[[Prepared], Prepared],
    model: Transformers,
    pictures: list[Example],
    unspoilt: dict[str, float],
) -> None:
    assert accuracy(model, pictures, spoil) <= unspoilt["pictures"] - CLEAR_DROP


@pytest.mark.parametrize("spoil", [one_frame_in_ten_lost, halves_swapped])
def test_sound_prepared_wrongly(
    spoil: Callable[[Prepared], Prepared],
    model: Transformers,
    windows: list[Example],
    unspoilt: dict[str, float],
) -> None:
    assert accuracy(model, windows, spoil) <= unspoilt["windows"] - CLEAR_DROP_OF_SOUND


def test_frames_in_the_wrong_order(
    model: Transformers, clips: list[Example], unspoilt: dict[str, float]
) -> None:
    assert accuracy(model, clips, frames_reversed) <= unspoilt["clips"] - CLEAR_DROP
