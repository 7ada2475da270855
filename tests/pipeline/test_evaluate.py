"""Error rates: what is counted, how texts are normalised, and which reference means which file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from operators.score import Edits, normaliser_for
from pipeline.evaluate import Scores, asset_table, compare, references_of, score
from pipeline.references import (
    EvaluateError,
    Reference,
    References,
    matched,
    read_references,
)


def result(uri: str, text: str | None, **columns: Any) -> dict[str, Any]:
    return {
        "asset_id": f"id of {uri}",
        "uri": uri,
        "source_id": None,
        "status": "failed" if text is None else "ok" if text else "empty",
        "text": text,
        "language": None,
        "error_code": None,
        "prompt_name": "transcribe",
        "output_tokens": 7,
        "media_tokens": 50,
        **columns,
    }


def said(key: str = "uri", language: str | None = None, **texts: str) -> References:
    rows = (
        Reference(f"{name}.wav", text, language, f"/r/{name}.wav") for name, text in texts.items()
    )
    return References("refs.csv", key, tuple(rows))


def scored(references: References, answers: dict[str, str | None], **how: Any) -> Scores:
    rows = [result(f"s3://b/{name}.wav", text) for name, text in answers.items()]
    return score("out", rows, references, **how)


def test_the_whole_is_edits_over_words_and_not_a_mean_of_rates() -> None:
    scores = scored(
        said(short="no", long="one two three four five six seven eight nine"),
        {"short": "yes", "long": "one two three four five six seven eight nine"},
    )
    assert [one.row["uri"] for one in scores.assets] == ["s3://b/short.wav", "s3://b/long.wav"]
    assert scores.assets[0].words == Edits(1, 1, 1, 0, 0)
    assert scores.words.errors == 1
    # "one two three ..." is one number to the English normaliser, on both sides alike
    assert scores.words.reference == 1 + scores.assets[1].words.reference


def test_substitutions_insertions_and_deletions_are_told_apart() -> None:
    (one,) = scored(said(a="the cat sat on a mat"), {"a": "the hat sat on the a"}).assets
    assert one.words == Edits(6, 6, 1, 1, 1)
    assert one.words.rate == 0.5


def test_empty_references_and_empty_answers() -> None:
    scores = scored(
        said(silence="", words="", lost="hello big world", punctuation="?!"),
        {"silence": "", "words": "thank you", "lost": "", "punctuation": "..."},
    )
    by_key = {one.key: one for one in scores.assets}
    assert by_key["silence.wav"].words == Edits()
    assert by_key["punctuation.wav"].words == Edits()
    assert by_key["silence.wav"].words.rate is None
    assert by_key["words.wav"].words == Edits(0, 2, 0, 2, 0)
    assert by_key["lost.wav"].words == Edits(3, 0, 0, 0, 3)
    assert scores.words.rate == 5 / 3
    # words where nothing is said are worse than any rate
    assert [one.key for one in scores.assets][:2] == ["words.wav", "lost.wav"]


def test_failed_is_all_deletions_unless_left_out() -> None:
    rows = [
        result("/x/bad.wav", None),
        result("/x/good.wav", "hello"),
        result("/x/half.wav", "some", status="partial"),
    ]
    scores = score("out", rows, said(bad="big word", good="hello", half="some text"))
    assert scores.words == Edits(5, 2, 0, 0, 3)
    finished = score(
        "out", rows, said(bad="big word", good="hello", half="some text"), only_finished=True
    )
    assert finished.words == Edits(1, 1, 0, 0, 0)
    assert finished.left_out == {"failed": 1, "partial": 1}


@pytest.mark.parametrize(
    ("language", "reference", "answer", "rate"),
    [
        ("English", "Mr. Neill's colour isn't grey...", "mister neill's color is not gray", 0.0),
        ("English", "It cost $20 million", "it cost twenty million dollars", 0.0),
        ("en-GB", "Twenty three dogs", "23 dogs.", 0.0),
        (None, "Twenty three dogs", "23 dogs.", 0.0),
        # not English: numbers and accents stay as they are
        ("de", "Dreißig Straßen, schön!", "dreißig straßen schön", 0.0),
        ("de", "drei", "3", 1.0),
        ("French", "garçon", "garcon", 1.0),
        ("{lang}", "Colour", "color", 0.0),  # a job's variable is no language
        (None, "Привет, мир!", "привет мир", 0.0),
    ],
)
def test_normalised_by_language(
    language: str | None, reference: str, answer: str, rate: float
) -> None:
    (one,) = scored(said(language=language, a=reference), {"a": answer}).assets
    assert one.words.rate == rate


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("zh", "", ("basic", True)),
        ("Chinese (Mandarin)", "", ("basic", True)),
        ("th-TH", "", ("basic", True)),
        (None, "今天天气很好", ("basic", True)),
        ("unknown", "ภาษาไทย", ("basic", True)),
        (None, "한국어 문장", ("basic", False)),
        (None, "", ("english", False)),
        (None, "1234 ?!", ("english", False)),
    ],
)
def test_which_normaliser(language: str | None, text: str, expected: tuple[str, bool]) -> None:
    assert normaliser_for(language, text) == expected


def test_languages_without_spaces_count_in_characters() -> None:
    scores = scored(
        said(zh="今天天气很好。", en="hello world"), {"zh": "今天 天汽很好", "en": "hello"}
    )
    chinese = next(one for one in scores.assets if one.key == "zh.wav")
    assert chinese.headline == Edits(6, 6, 1, 0, 0)
    assert scores.unspaced == 1
    assert scores.words == Edits(2, 1, 0, 0, 1)
    assert scores.characters.reference == 6 + len("hello world")


def test_marks_of_thai_are_letters() -> None:
    (one,) = scored(said(language="th", a="ที่นี่"), {"a": "ทนี"}).assets
    assert one.characters.deletions > 0


@given(st.text(max_size=60), st.text(max_size=60), st.sampled_from([None, "en", "de", "ja"]))
def test_any_two_texts_have_counts_that_add_up(
    said_: str, heard: str, language: str | None
) -> None:
    (one,) = scored(said(language=language, a=said_), {"a": heard}).assets
    for edits, length in ((one.words, len(one.texts.answer.split())),):
        assert edits.answer == length
        hits = edits.reference - edits.substitutions - edits.deletions
        assert 0 <= hits == edits.answer - edits.substitutions - edits.insertions
    (same,) = scored(said(language=language, a=said_), {"a": said_}).assets
    assert same.words.errors == same.characters.errors == 0


def test_the_same_uri_wins_then_the_nearest_path() -> None:
    rows = [
        result("/data/x/a.wav", ""),
        result("/data/y/a.wav", ""),
        result("s3://b/raw/y/b.wav", ""),
        result("tar://z/c.wav::s3://b/0.tar", ""),
        result("https://h/d.wav?page=1", ""),
        result("/data/alone.wav", ""),
    ]
    keys = ["/data/x/a.wav", "y/a.wav", "gs://other/y/b.wav", "c.wav", "d.wav", "gone.wav"]
    references = References("r", "uri", tuple(Reference(key, "", None, key) for key in keys))
    matches = matched(references, rows)
    assert [row["uri"] for _, row in matches.pairs] == [row["uri"] for row in rows[:5]]
    assert matches.missing == ("gone.wav",)
    assert (matches.unreferenced, matches.by_name) == (1, 4)


def test_names_that_may_mean_two_files_are_refused_by_name() -> None:
    rows = [result("/data/x/a.wav", ""), result("/data/y/a.wav", "")]
    with pytest.raises(EvaluateError, match=r"uri: 1 values mean more.*a\.wav: /data/x/a\.wav, /d"):
        matched(said(a=""), rows)
    two = References(
        "r", "uri", tuple(Reference(key, "", None, key) for key in ("p/a.wav", "q/a.wav"))
    )
    with pytest.raises(EvaluateError, match=r"/data/x/a\.wav: the references p/a\.wav, q/a\.wav"):
        matched(two, rows[:1])
    # an id that two files have
    rows = [result("/1.wav", "", source_id="s"), result("/2.wav", "", source_id="s")]
    with pytest.raises(EvaluateError, match=r"source_id: 1 values mean more"):
        matched(References("r", "source_id", (Reference("s", ""),)), rows)


def test_a_name_that_is_taken_exactly_is_not_taken_again() -> None:
    """References of two splits with the same names, an output of one of them."""
    keys = ("/in/test/1.wav", "/in/train/1.wav")
    references = References("r", "uri", tuple(Reference(key, "", None, key) for key in keys))
    matches = matched(references, [result("/in/test/1.wav", "")])
    assert matches.missing == ("/in/train/1.wav",)


def test_no_match_at_all_says_what_was_looked_for() -> None:
    with pytest.raises(EvaluateError, match=r"refs.csv: column uri: none of 1 values.*a\.wav"):
        scored(said(a="x"), {"b": "x"})


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        names = list(rows[0])
        lines = [",".join(names), *(",".join(str(row[name]) for name in names) for row in rows)]
        path.write_text("\n".join(lines), encoding="utf-8-sig")
    return str(path)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_every_kind_of_file_gives_the_same_references(tmp_path: Path, kind: str) -> None:
    rows = [
        {"uri": "sub/a.wav", "text": "hello", "language": "en", "other": 1},
        {"uri": "sub/b.wav", "text": "", "language": "en", "other": 2},
        {"uri": "sub/a.wav", "text": "hello", "language": "en", "other": 3},  # twice the same
    ]
    references = read_references(write(tmp_path / f"refs.{kind}", rows), {})
    assert references.key == "uri"
    assert references.rows == (
        Reference("sub/a.wav", "hello", "en", f"{tmp_path}/sub/a.wav"),
        Reference("sub/b.wav", "", "en", f"{tmp_path}/sub/b.wav"),
    )


def test_the_most_exact_key_is_taken_unless_one_is_asked_for(tmp_path: Path) -> None:
    name = write(tmp_path / "r.csv", [{"uri": "a.wav", "source_id": "007", "text": "x"}])
    assert read_references(name, {}).rows[0].key == "007"
    assert read_references(name, {}, "uri").rows[0].key == "a.wav"
    with pytest.raises(
        EvaluateError, match=r"r\.csv: no column asset_id.*there are uri, source_id"
    ):
        read_references(name, {}, "asset_id")


def test_text_that_a_parquet_file_holds_as_bytes_is_text(tmp_path: Path) -> None:
    rows = [{"uri": b"a.wav", "text": "grün".encode()}]
    (reference,) = read_references(write(tmp_path / "r.parquet", rows), {}).rows
    assert reference == Reference("a.wav", "grün", None, f"{tmp_path}/a.wav")


def test_rows_without_text_are_counted_and_a_day_of_speech_fits_in_csv(tmp_path: Path) -> None:
    name = write(tmp_path / "r.jsonl", [{"uri": "a", "text": None}, {"uri": "b", "text": "x"}])
    assert read_references(name, {}).without_text == 1
    day = write(tmp_path / "r.csv", [{"uri": "a.wav", "text": "word " * 150_000}])
    assert len(read_references(day, {}).rows[0].text) == 750_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.txt", "x", r"r\.txt: must end in one of \.parquet"),
        ("r.csv", "file,text\na,b\n", r"r\.csv: no column that names the asset; needed: asset_id"),
        (
            "r.csv",
            "uri,words\na,b\n",
            r"r\.csv: no column text; needed: text; there are uri, words",
        ),
        ("r.csv", "uri,text\n,b\n", r"r\.csv: row 1: column uri is empty"),
        ("r.csv", "uri,text\na,b\na,c\n", r"r\.csv: row 2: uri a comes twice and differs"),
        ("r.csv", "uri,text\na,b\nc,well, yes\n", r"r\.csv: row 2: more cells than .* in quotes"),
        (
            "r.jsonl",
            '{"uri": "a", "text": ["b"]}',
            r"r\.jsonl: row 1: column text: must be one text",
        ),
        (
            "r.jsonl",
            '{"uri": "a", "text": "\\ud83d"}',
            r"r\.jsonl: row 1: column text: holds '.ud83d'",
        ),
        ("r.csv", "", r"r\.csv: no column .* there are none"),
        ("r.csv", "uri,text\n", r"r\.csv: column text: no row has one"),
        ("r.jsonl", "{", r"r\.jsonl: not a whole file of its kind"),
        ("r.jsonl", "[1]\n", r"r\.jsonl: every line must be an object"),
        ("r.parquet", "x", r"r\.parquet: not a whole file of its kind"),
        ("r.csv.gz", "x", r"r\.csv\.gz: cannot be read"),
    ],
)
def test_bad_references_are_refused_with_the_reason(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(EvaluateError, match=message):
        read_references(str(tmp_path / name), {})
    with pytest.raises(EvaluateError, match=r"none\.csv: cannot be read"):
        read_references(str(tmp_path / "none.csv"), {})


def pair_of(errors_a: list[int], errors_b: list[int], words: int) -> tuple[Scores, Scores]:
    """Two outputs with so many wrong words an asset, of `words`."""

    def answers(errors: list[int]) -> dict[str, str | None]:
        return {f"n{i}": "x " * count + "w " * (words - count) for i, count in enumerate(errors)}

    references = said(language="de", **{f"n{i}": "w " * words for i in range(len(errors_a))})
    a = scored(references, answers(errors_a))
    return a, scored(references, answers(errors_b), like=a)


def test_two_outputs_side_by_side() -> None:
    compared = compare(*pair_of([1, 5, 0, 2] + 8 * [1], [1, 0, 3, 2] + 8 * [1], 10))
    assert (compared.words.a.rate, compared.words.b.rate) == (16 / 120, 14 / 120)
    changes = [(b.key, b.words.errors - a.words.errors) for a, b in compared.pairs]
    assert changes[0] == ("n2.wav", 3)
    assert changes[-1] == ("n1.wav", -5)
    assert compared.words.interval is not None
    low, high = compared.words.interval
    assert low < 0 < high


def test_the_interval_is_that_of_the_difference_and_repeats() -> None:
    rng = np.random.default_rng(1)
    a = rng.integers(0, 10, 200)
    better = np.maximum(a - rng.integers(0, 2, 200), 0)
    compared = compare(*pair_of(a.tolist(), better.tolist(), 20))
    assert (
        compared.words.interval == compare(*pair_of(a.tolist(), better.tolist(), 20)).words.interval
    )
    low, high = compared.words.interval or (0, 0)
    change = (better.sum() - a.sum()) / 4000
    # paired: far narrower than the spread between assets, and close to the normal approximation
    half = 1.96 * float(np.std(better - a)) / 20 / np.sqrt(200)
    assert low == pytest.approx(change - half, abs=half / 5)
    assert high == pytest.approx(change + half, abs=half / 5)
    assert high < 0


def test_too_few_assets_have_no_interval_and_nothing_common_no_rate() -> None:
    assert compare(*pair_of([1] * 9, [0] * 9, 5)).words.interval is None
    a, b = scored(said(a="x"), {"a": "x"}), scored(said(b="x"), {"b": "x"})
    compared = compare(a, b)
    assert (compared.pairs, compared.only_a, compared.only_b) == ((), 1, 1)
    assert compared.words.a.rate is None
    silent = scored(said(**dict.fromkeys("abcdefghijkl", "")), dict.fromkeys("abcdefghijkl", "x"))
    assert compare(silent, silent).words.interval is None


def test_both_outputs_are_normalised_alike() -> None:
    references = said(a="three colours")
    rows = [result("/a.wav", "3 colors")]
    french = [result("/a.wav", "3 colors", language="French")]
    a = score("A", rows, references)
    assert score("B", french, references).words.errors == 2
    assert score("B", french, references, like=a).words.errors == 0


def test_one_output_as_the_reference_of_the_other() -> None:
    rows = [result("/a.wav", "hello world"), result("/b.wav", None), result("/c.wav", "")]
    references = references_of("A", "asset_id", rows)
    assert [one.text for one in references.rows] == ["hello world", ""]
    scores = score("B", [result("/a.wav", "hello"), result("/b.wav", "x")], references)
    assert scores.words == Edits(2, 1, 0, 0, 1)
    assert (scores.missing, scores.unreferenced) == (("id of /c.wav",), 1)
    with pytest.raises(EvaluateError, match=r"uri /a\.wav has more than one answer"):
        references_of("A", "uri", [*rows, result("/a.wav", "again")])


def test_the_table_has_a_row_an_asset() -> None:
    scores = scored(said(a="hello world", zh="你好", s=""), {"a": "hello", "zh": "你", "s": "x"})
    table = {row["reference_key"]: row for row in asset_table([scores]).to_pylist()}
    assert table["a.wav"]["wer"] == 0.5
    assert table["a.wav"]["words_deletions"] == 1
    assert (table["zh.wav"]["wer"], table["zh.wav"]["cer"]) == (None, 0.5)
    assert (table["s.wav"]["wer"], table["s.wav"]["words_insertions"]) == (None, 1)
    assert (table["a.wav"]["reference"], table["a.wav"]["answer"]) == ("hello world", "hello")
