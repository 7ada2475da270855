"""Generators, tokenizer, training sequences and the start: everything that needs no checkpoint."""

import io
import subprocess
import wave
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from deploy.nano import (
    batches,
    espeak,
    films,
    generate_images,
    generate_speech,
    generate_videos,
    instructions,
    model,
    network,
    optimiser,
    prepare,
    sequences,
    start,
)
from deploy.nano import tokenizer as nano_tokenizer
from deploy.nano.check_samples import decode_frames
from deploy.nano.speech_bank import Bank, Take, speak
from deploy.nano.tokenizer import ID
from deploy.nano.words import SPOKEN


@pytest.fixture(scope="module")
def bank() -> Bank:
    """Tones instead of speech: these tests look at times, not at sounds."""
    time = np.arange(6400) / 16_000
    tone = (np.sin(2 * np.pi * 300 * time) * 16_000).astype(np.int16)
    return Bank({word: [tone] for word in SPOKEN})


@pytest.mark.parametrize(
    "text",
    [
        *instructions.ALL.values(),
        "a red circle left of a blue square on a green background",
        " Grüße,  日本\n\t😀 and 1.7% <unused3> ",
    ],
)
def test_any_text_comes_back(text: str) -> None:
    tokenizer = nano_tokenizer.build()
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_words_of_the_world_are_one_token() -> None:
    tokenizer = nano_tokenizer.build()
    assert len(tokenizer.encode("three seven banana", add_special_tokens=False)) == 3


def test_prompt_is_what_the_chat_template_renders() -> None:
    processor = model.processor(nano_tokenizer.build())
    content = [{"type": "image"}, {"type": "text", "text": f" {instructions.TAGS}\n"}]
    rendered = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert rendered == (
        f"<bos><|turn>user\n<|image|>{instructions.TAGS}<turn|>\n"
        "<|turn>model\n<|channel>thought\n<channel|>"
    )
    expanded = rendered.replace("<|image|>", "<|image>" + "<|image|>" * 4 + "<image|>")
    assert tuple(sequences.of_image(4, [(instructions.TAGS, "")]).ids) == sequences.encode(expanded)


def test_video_prompt_is_the_processors() -> None:
    processor = model.processor(nano_tokenizer.build())
    frames = np.zeros((2, 96, 96, 3), dtype=np.uint8)
    inputs = processor(
        text=["<bos><|turn>user\n<|video|>Name it.<turn|>\n"],
        videos=[frames],
        videos_kwargs={
            "do_sample_frames": False,
            "video_metadata": [{"fps": 1.0, "total_num_frames": 9, "frames_indices": [0, 7]}],
        },
        return_tensors="pt",
    )
    ours = prepare.of_video(list(frames), [0.0, 7.0], "Name it.").token_ids
    theirs = inputs["input_ids"][0].tolist()
    assert list(ours[: len(theirs) - 2]) == theirs[:-2]


def test_a_scene_is_a_function_of_its_seed() -> None:
    first, second = (generate_images.draw_picture(np.random.default_rng(5)) for _ in range(2))
    assert first[0] == second[0]
    assert np.array_equal(first[1], second[1])


def test_things_stand_in_the_order_that_the_caption_says() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = generate_images.draw_scene(rng, float(rng.uniform(0.3, 3.0)))
        along = [thing.y if scene.vertical else thing.x for thing in scene.things]
        assert along == sorted(along)


def test_word_times_are_where_the_words_sound(bank: Bank) -> None:
    rng = np.random.default_rng(1)
    made = generate_speech.long_recording(bank, rng, 60.0, noise_db=-90.0)
    assert made.duration_s >= 60.0
    assert {kind for kind, _, _ in made.regions} >= {"speech", "silence"}
    for word in made.words:
        begin, end = int(word.start_s * 16_000), int(word.end_s * 16_000)
        assert np.abs(made.samples[begin:end]).mean() > 0.05


def test_pauses_lie_between_words(bank: Bank) -> None:
    rng = np.random.default_rng(2)
    longest = []
    for pauses in (False, True):
        gaps = []
        for _ in range(40):
            words = generate_speech.draw_words(rng, 5)
            made = generate_speech.compose(words, bank, rng, pauses=pauses)
            assert len(made.samples) <= 15 * 16_000
            assert [word.text for word in made.words] == words
            gaps += [b.start_s - a.end_s for a, b in pairwise(made.words)]
        longest.append(max(gaps))
        assert 0.15 < np.mean(np.array(gaps) > 1.2) < 0.35 or not pauses
    assert longest[0] <= 1.2 < 3.0 < longest[1]


def test_a_word_is_said_again_as_often_as_asked() -> None:
    rng = np.random.default_rng(7)
    words = generate_speech.draw_words(rng, 4000, again=0.5)
    again = np.mean([a == b for a, b in pairwise(words)])
    by_chance = np.mean([a == b for a, b in pairwise(generate_speech.draw_words(rng, 4000))])
    assert 0.47 < again < 0.57
    assert by_chance < 0.06


def test_digits_only_where_the_instruction_asks_for_them() -> None:
    words = ["three", "apple"]
    assert generate_speech.answer(words, instructions.ASR_ENGLISH) == "three apple"
    assert generate_speech.answer(words, instructions.ASR_ORIGINAL) == "3 apple"
    assert generate_speech.answer([], instructions.ASR_ORIGINAL) == "[no speech]"


def test_an_event_is_named_by_the_first_frame_that_shows_it() -> None:
    rng = np.random.default_rng(3)
    while True:
        clip, stamps, begin, frames = generate_videos.draw_sampled_clip(rng, 5)
        if clip.kind == "appears":
            break
    said = generate_videos.answer(clip, instructions.VIDEO_DESCRIBE, stamps, begin)
    changes = [not np.array_equal(frames[n], frames[n - 1]) for n in range(1, 5)]
    assert said.endswith(f"appears at {generate_videos.clock(stamps[1 + changes.index(True)])}")


def test_patches_are_asked_for_their_place_and_for_how_far_their_thing_has_come() -> None:
    rng = np.random.default_rng(11)
    counts = batches.Sizes(pictures=0, large_pictures=0, windows=0, clips=30, frames=90)
    batch = batches.clip_batch(rng, counts, 3)
    place, moved, xy = batch["label_place"], batch["label_moved"], batch["xy"]
    first, thing = (batch["label_event"] == 1), batch["label_order"] > 0
    assert np.array_equal(np.isnan(moved).any(1), ~thing)
    assert np.abs(moved[first]).max() == 0
    east, west, south, north = (
        moved[thing & (batch["label_event"] == event)] for event in (3, 4, 5, 6)
    )
    assert min(map(len, (east, west, south, north))) > 0
    for along, across in ((east, 1), (west, 1), (south, 0), (north, 0)):
        assert np.abs(along[:, across]).max() < 1e-6
    assert east[:, 0].min() > 0 > west[:, 0].max()
    assert south[:, 1].min() > 0 > north[:, 1].max()
    assert np.abs(place).max() < 1
    # What has the same row has the same y, and what is further down has more of it.
    assert all(np.ptp(place[:5][xy[:5, 1] == row, 1]) == 0 for row in np.unique(xy[:5, 1]))
    assert np.corrcoef(place[:, 0], xy[:, 0])[0, 1] > 0.8


def test_a_film_has_its_cuts_events_and_words_where_it_says(bank: Bank, tmp_path: Path) -> None:
    film = films.draw_film(np.random.default_rng(7), bank, [3, 5, 4], kinds=("changes",))
    assert [(shot.start_s, shot.end_s) for shot in film.shots] == [(0, 3), (3, 8), (8, 12)]
    assert film.sound.duration_s == 12.0
    assert film.sound.words
    assert film.sound.words[-1].end_s <= 12.0
    films.write(film, tmp_path / "film.mp4", 64, 48)
    decoded = decode_frames(tmp_path / "film.mp4", 64, 48, 10).astype(float)
    assert len(decoded) == 120
    change = np.abs(np.diff(decoded, axis=0)).mean(axis=(1, 2, 3))
    events = [round((shot.start_s + shot.clip.event_s) * 10) for shot in film.shots]
    largest = np.argsort(change)[-5:] + 1
    assert sorted(largest) == sorted([30, 80, *events])
    for shot, event in zip(film.shots, events, strict=True):
        for fps in (1.0, 2.0):
            stamp = generate_videos.clock(event / 10)
            assert films.caption(shot, fps=fps).endswith(f" at {stamp}")


def test_branches_see_the_medium_and_themselves_only() -> None:
    sequence = sequences.of_image(2, [("Name it.", "a ring"), ("Describe it.", "a star")])
    batch = {k: torch.from_numpy(v) for k, v in sequences.stack([sequence]).items()}
    full, sliding = (seen.mask[0] for seen in network.masks(batch, True, 1024))
    branch = batch["branch"][0]
    first, second = torch.where(branch == 1)[0], torch.where(branch == 2)[0]
    assert not full[second][:, first].any()
    assert full[second][:, branch == 0].all()
    assert batch["position"][0][first[0]] == batch["position"][0][second[0]]
    picture = torch.where(batch["ids"][0] == ID["<|image|>"])[0]
    assert sliding[picture[0], picture[1]]
    assert not full[picture[0], picture[1]]


@pytest.mark.parametrize("queries", [2, 256])
def test_packed_attention_is_that_of_each_sequence_alone(
    queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its result and its gradients, in one block of queries and in three."""
    monkeypatch.setattr(network, "_QUERIES", queries)
    torch.manual_seed(0)
    lengths, heads, size = (5, 3), 2, 4
    inputs = [torch.randn(1, many, 8, size, requires_grad=True) for many in (heads, 1, 1)]
    mask = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    mask[1, 3:] = False
    seen = network.cut(mask)
    assert len(seen.blocks) == -(-5 // queries)
    places = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])
    packed, _ = network.packed_attention(torch.nn.Identity(), *inputs, (seen, places, places))
    alone = [
        torch.nn.functional.scaled_dot_product_attention(
            *(each[:, :, part].expand(-1, heads, -1, -1) for each in inputs),
            is_causal=True,
            scale=1.0,
        ).transpose(1, 2)
        for part in (slice(0, lengths[0]), slice(lengths[0], 8))
    ]
    wanted = torch.cat(alone, dim=1)
    assert torch.allclose(packed, wanted, atol=1e-5)
    weights = torch.randn_like(packed)
    found = torch.autograd.grad((packed * weights).sum(), inputs)
    for of_ours, of_theirs in zip(
        found, torch.autograd.grad((wanted * weights).sum(), inputs), strict=True
    ):
        assert torch.allclose(of_ours, of_theirs, atol=1e-5)


def test_training_sees_the_loss_of_the_model_itself() -> None:
    """Two packed windows of different lengths, whose last layer answers where it is asked only."""
    rng = np.random.default_rng(0)
    windows = [
        sequences.of_audio(9, instructions.ASR_ENGLISH, "hello seven green apple"),
        sequences.of_audio(4, instructions.ASR_ENGLISH, "one"),
    ]
    batch = {k: torch.from_numpy(v) for k, v in sequences.stack(windows).items()}
    batch |= {
        "frames": torch.from_numpy(rng.standard_normal((13, 640), dtype=np.float32)),
        "weight": torch.tensor(1.0),
        "auxiliary_weight": torch.tensor(0.0),
        "label_word": torch.zeros(13, dtype=torch.int64),
        "label_order": torch.zeros(13, dtype=torch.int64),
    }
    plain = model.build(0)
    trainee = network.Trainee(model.build(0))
    loss = trainee(batch, False)["loss"]
    loss.backward()
    embedded, _ = network.Trainee(model.build(0))._embed(batch)
    logits, wanted = [], []
    for row, targets in enumerate(batch["target"]):
        length = int((batch["branch"][row] >= 0).sum())
        inside = plain.model.language_model(inputs_embeds=embedded[row : row + 1, :length])
        asked = targets[:length] >= 0
        logits.append(plain.lm_head(inside.last_hidden_state[0, asked]))
        wanted.append(targets[:length][asked])
    capped = 30.0 * torch.tanh(torch.cat(logits) / 30.0)
    own = torch.nn.functional.cross_entropy(capped, torch.cat(wanted))
    own.backward()
    assert torch.allclose(loss, own, rtol=1e-5)
    for index in (0, 5):
        ours, theirs = (
            each.model.language_model.layers[index].self_attn.k_proj.weight.grad
            for each in (trainee.model, plain)
        )
        assert (ours - theirs).norm() < 1e-3 * theirs.norm()


def test_the_first_mlp_starts_as_band_energies() -> None:
    fresh = model.build(0)
    start.apply(fresh)
    rows = len(start.audio_filters())
    mlp = fresh.model.language_model.layers[0].mlp
    hidden = torch.zeros(1, model.HIDDEN)
    hidden[0, 4], hidden[0, 5] = 0.6, -0.8
    with torch.no_grad():
        squares = mlp(hidden)[0, rows : rows + rows // 2]
    others = torch.cat([squares[:2], squares[3:]])
    assert squares[2] == pytest.approx(1.0, abs=0.25)
    assert others.abs().max() < 0.35


@pytest.mark.parametrize("emulated", [True, False])
@pytest.mark.parametrize("shape", [(48, 20), (20, 48), (32, 32)])
def test_steps_of_muon_are_orthogonal_and_keep_their_direction(
    shape: tuple[int, int], emulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimiser, "emulated_bfloat16", lambda: emulated)
    given = torch.randn(3, *shape, generator=torch.Generator().manual_seed(4))
    found = optimiser.orthogonalise(given)
    left, strengths, right = torch.linalg.svd(given, full_matrices=False)
    kept = strengths > 0.2 * strengths[:, :1]
    along = (left.transpose(1, 2) @ found @ right.transpose(1, 2)).diagonal(dim1=1, dim2=2)
    assert found.dtype == torch.float32
    # Between these the quintic leaves each singular value: it was made to be quick, not exact.
    assert (along[kept] > 0.6).all()
    assert (along[kept] < 1.3).all()
    assert torch.allclose(found, left * along[:, None] @ right, atol=0.05)


# Found by its name, by its language, and with a variant.
@pytest.mark.parametrize("voice", ["en-gb-scotland", "en-gb", "en-us+f2"])
def test_words_are_spoken_as_espeak_speaks_them(voice: str) -> None:
    command = ["espeak-ng", "-v", voice, "-s", "150", "-p", "60", "--stdout", "banana"]
    done = subprocess.run(command, capture_output=True, check=True)
    with wave.open(io.BytesIO(done.stdout)) as recording:
        raw = np.frombuffer(recording.readframes(2**24), np.int16).astype(np.float32)
        wanted = espeak.trimmed(espeak.resample(raw, recording.getframerate(), 16_000))
    spoken = speak(voice, [Take("banana", voice, 150, 60), Take("banana", voice, 200, 60)])
    assert np.array_equal(spoken[0], wanted)
    assert len(spoken[1]) < 0.85 * len(spoken[0])


def test_an_unknown_voice_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        speak("zz-nowhere", [Take("one", "zz-nowhere", 150, 50)])
    assert "espeak-ng has no voice zz-nowhere" in capfd.readouterr().err
