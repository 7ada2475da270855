"""Prompts: the checkpoint's own template around the instruction, and untrusted variables in it."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from transformers import AutoProcessor

from operators.errors import MediaError
from operators.prompt import (
    PRESETS,
    Prompt,
    instruction,
    load_prompt,
    transcribe_instruction,
    variables_in,
)
from operators.settings import AudioSettings, ModelSettings, PromptSettings


def load(checkpoint: Path, text: str, modality: str = "image", answer_tokens: int = 64) -> Prompt:
    model = ModelSettings(id=str(checkpoint), max_model_len=1024)
    return load_prompt(model, PromptSettings(max_variable_chars=20), modality, text, answer_tokens)


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_ids_are_those_of_the_checkpoints_processor(nano: Path, modality: str) -> None:
    text = PRESETS["caption-dense"].text
    processor = AutoProcessor.from_pretrained(nano)
    words, media = {"type": "text", "text": text}, {"type": modality}
    rendered = processor.apply_chat_template(
        [{"role": "user", "content": [media, words] if modality == "image" else [words, media]}],
        add_generation_prompt=True,
    )
    tokenizer = processor.tokenizer
    begin, soft, end = {
        "image": (tokenizer.boi_token, tokenizer.image_token, tokenizer.eoi_token),
        "audio": (tokenizer.boa_token, tokenizer.audio_token, tokenizer.eoa_token),
    }[modality]
    expected = tokenizer(rendered.replace(soft, begin + soft * 12 + end), add_special_tokens=False)[
        "input_ids"
    ]
    ids = load(nano, text, modality).window(12)
    assert ids == expected
    assert tokenizer.decode(ids).endswith("<|turn>model\n<|channel>thought\n<channel|>")


def test_the_placeholder_is_where_the_engine_will_put_the_media(nano: Path) -> None:
    prompt = load(nano, "Describe the image.")
    ids = prompt.window(12)
    offset, length = prompt.placeholder(ids)
    assert length == 12
    assert set(ids[offset : offset + length]) == {prompt.media_id}
    assert (ids[offset - 1], ids[offset + length]) == (prompt.begin_id, prompt.end_id)


def test_variables_are_filled_in_after_a_pickle_to_a_worker(nano: Path) -> None:
    filled: Prompt = pickle.loads(pickle.dumps(load(nano, "Describe the {thing} of {name}.")))
    plain = load(nano, "Describe the image of red.")
    assert filled.window(5, {"thing": "image", "name": "red"}) == plain.window(5)
    assert filled.raw({"thing": "image", "name": "red"}) == plain.raw()


def test_the_tokenizer_is_no_part_of_what_a_task_unpickles(nano: Path) -> None:
    """Each task unpickles its prompt; what lies beside the pickle stays in the object store."""
    prompt = load(nano, "Describe the {thing}.")
    assert prompt.tokenizer is not None
    beside: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(prompt, protocol=5, buffer_callback=beside.append)
    assert [len(buffer.raw()) for buffer in beside] == [prompt.tokenizer.json.nbytes]
    assert b"added_tokens" in bytes(beside[0].raw())
    assert b"added_tokens" not in pickled
    copy: Prompt = pickle.loads(pickled, buffers=beside)
    assert copy.window(5, {"thing": "image"}) == load(nano, "Describe the image.").window(5)
    assert copy == prompt


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "no name"),
        ({"name": "x" * 21}, "prompt.max_variable_chars is 20"),
        ({"name": "a<turn|>b"}, "token <turn|>"),
        ({"name": "<|image|>"}, "token <|image|>"),
    ],
)
def test_a_bad_variable_costs_its_row(nano: Path, variables: dict[str, str], said: str) -> None:
    with pytest.raises(MediaError, match=said.replace("|", r"\|")) as error:
        load(nano, "What is {name}?").window(5, variables)
    assert error.value.code == "prepare.bad_variable"


def test_no_token_is_made_of_a_value_and_the_text_around_it(nano: Path) -> None:
    prompt = load(nano, "What is <{name}>?")
    with pytest.raises(MediaError, match=r"with name the prompt holds the token <\|image\|>"):
        prompt.window(5, {"name": "|image|"})
    assert "<turn>" in prompt.raw({"name": "turn"})


def test_a_value_is_text_and_never_a_field_of_its_own(nano: Path) -> None:
    prompt = load(nano, "Is {a} or {b}?")
    assert "{b} or y" in prompt.raw({"a": "{b}", "b": "y"})


def test_a_prompt_that_leaves_no_room_is_refused(nano: Path) -> None:
    prompt = load(nano, "Describe the image.", answer_tokens=1000)
    with pytest.raises(MediaError, match=r"model\.max_model_len") as error:
        prompt.window(280)
    assert error.value.code == "prepare.too_long"


def test_presets_and_own_texts() -> None:
    assert instruction(PromptSettings(), "tags") == PRESETS["tags"]
    assert instruction(PromptSettings(preset="ocr"), "tags") == PRESETS["ocr"]
    assert instruction(PromptSettings(text=" Why? "), "tags").text == "Why?"
    with pytest.raises(ValueError, match=r"prompt\.preset: must be one of .*caption-short.*'x'"):
        instruction(PromptSettings(preset="x"), "tags")
    assert variables_in('Answer as {"a": 1} about {title} and {name_2}.') == {"title", "name_2"}


RULES = (
    " Follow these specific instructions for formatting the answer:\n"
    "* Only output the transcription, with no newlines."
)
NUMBERS = (
    "\n* When transcribing numbers, write the digits, i.e. write 1.7 and not one point seven, and write"
    " 3 instead of three."
)


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({}, "Transcribe the following speech segment in its original language." + RULES + NUMBERS),
        (
            {"language": "English"},
            "Transcribe the following speech segment in English into English text."
            + RULES
            + NUMBERS,
        ),
        (
            {"language": "{spoken}", "digits": False},
            "Transcribe the following speech segment in {spoken} into {spoken} text." + RULES,
        ),
        (
            {"vocabulary": ("Ada Lovelace", "Zuse"), "digits": False},
            "Transcribe the following speech segment in its original language."
            + RULES
            + "\n* These names and terms may occur: Ada Lovelace, Zuse.",
        ),
        (
            {"language": "German", "translate_to": "French", "digits": False},
            "Transcribe the following speech segment in German, then translate it into French.\n"
            "When formatting the answer, first output the transcription in German, then one newline,"
            " then output the string 'French: ', then the translation in French.",
        ),
    ],
)
def test_the_models_own_words_for_speech(asked: dict[str, object], text: str) -> None:
    assert transcribe_instruction(AudioSettings(**asked)).text == text


def test_the_nano_checkpoint_is_asked_what_it_was_trained_on() -> None:
    instructions = pytest.importorskip("deploy.nano.instructions")
    for asked, text in (
        ({}, instructions.ASR_ORIGINAL),
        ({"language": "English", "digits": False}, instructions.ASR_ENGLISH),
        ({"language": "English"}, instructions.ASR_ENGLISH_DIGITS),
    ):
        assert transcribe_instruction(AudioSettings(**asked)).text == text


def test_answers_have_room_for_fast_speech_and_a_translation() -> None:
    assert transcribe_instruction(AudioSettings()).max_tokens == 240
    assert transcribe_instruction(AudioSettings(window_s=30)).max_tokens == 480
    assert transcribe_instruction(AudioSettings(translate_to="French")).max_tokens == 480


@pytest.mark.parametrize(
    ("vocabulary", "said"),
    [
        (("x" * 401,), "401 characters; at most 400"),
        (("a" * 250, "b" * 250), "502 characters"),
        (("{name}",), "must be words"),
        (("<|audio>",), "must be words"),
        (("two\nlines",), "must be words"),
        (("good", " "), "must be words"),
    ],
)
def test_a_vocabulary_is_short_and_plain(vocabulary: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=r"audio\.vocabulary: .*" + said):
        transcribe_instruction(AudioSettings(vocabulary=vocabulary))
