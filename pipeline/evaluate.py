"""Word and character error rates of outputs. Beside the way; writes nothing.

    open_output   a finished output's rows and settings
    score         results and references (pipeline/references.py): edits of each asset and of all
    compare       two such scores over the same assets: difference and its interval

Rates are total edits / total reference words (or characters), never a mean of rates.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa

from operators.score import Edits, Measured, measure, normaliser_for
from operators.stores import reason
from pipeline.assemble import MARKER, RESULTS_FOLDER, open_finished, read_part
from pipeline.references import EvaluateError, Reference, References, Row, matched
from pipeline.source_rows import SourceError, listing_faults
from pipeline.store import Store

COLUMNS = ["asset_id", "uri", "source_id", "status", "modality", "text", "transcript", "language"]
COLUMNS += ["error_code", "prompt_name", "output_tokens", "media_tokens"]
FINISHED = ("ok", "empty")
RESAMPLES = 2000
MIN_ASSETS = 10  # an interval from fewer would promise what it cannot know


@dataclass(frozen=True)
class Output:
    """A finished fingerprint's folder."""

    folder: Store
    parts: tuple[str, ...]

    @property
    def label(self) -> str:
        return self.folder.url()

    def rows(self) -> Iterator[dict[str, Any]]:
        for name in self.parts:
            try:
                part = read_part(self.folder, name, COLUMNS)
            except (*listing_faults(self.label), pa.ArrowException) as error:
                raise EvaluateError(
                    f"{self.folder.url(name)}: cannot be read ({reason(error)}). A run that ends just now"
                    " may have replaced it: try again; polyscribe verify says whether the output is whole"
                ) from error
            for row in part.to_pylist():
                spoken = row.pop("transcript")
                yield row | {"text": spoken} if row["modality"] == "video" else row

    def settings(self) -> dict[str, str]:
        """run.json's resolved job and versions: section.field -> value as JSON."""
        run = json.loads(self.folder.read("run.json"))
        job = {name: value for name, value in run["job"].items() if name != "output"}
        return dict(_flat(job)) | dict(_flat(run["versions"], "versions."))


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value, ensure_ascii=False)


def open_output(uri: str, storage_options: Mapping[str, Any]) -> Output:
    """OUTPUT (its newest fingerprint) or OUTPUT/<fingerprint>. Raises EvaluateError."""
    try:
        folder, marker = open_finished(uri, storage_options)
    except SourceError as error:
        raise EvaluateError(str(error)) from error
    if marker is None:
        raise EvaluateError(f"{folder.url(MARKER)} is missing: no run has finished here")
    names = (item["name"] for item in marker["files"])
    return Output(folder, tuple(name for name in names if name.startswith(RESULTS_FOLDER)))


@dataclass(frozen=True, slots=True)
class Scored:
    """One asset: its result against its reference, both normalised."""

    key: str
    row: Row
    language: str | None
    normaliser: str
    unspaced: bool
    texts: Measured

    @property
    def words(self) -> Edits:
        return self.texts.words

    @property
    def characters(self) -> Edits:
        return self.texts.characters

    @property
    def headline(self) -> Edits:
        """Characters where the language has no spaces."""
        return self.characters if self.unspaced else self.words


@dataclass(frozen=True)
class Scores:
    """One output against references."""

    label: str
    references: References
    assets: tuple[Scored, ...]
    missing: tuple[str, ...] = ()  # keys of references without a result
    unreferenced: int = 0  # results without a reference
    by_name: int = 0  # matched by the end of the path only
    left_out: Mapping[str, int] | None = None  # by status

    @property
    def words(self) -> Edits:
        """Over the assets whose language has spaces."""
        return sum((one.words for one in self.assets if not one.unspaced), Edits())

    @property
    def characters(self) -> Edits:
        return sum((one.characters for one in self.assets), Edits())

    @property
    def unspaced(self) -> int:
        return sum(one.unspaced for one in self.assets)


TEXTS = (
    "output",
    "asset_id",
    "uri",
    "source_id",
    "status",
    "reference_key",
    "language",
    "normaliser",
)
SCORED = pa.schema(
    [
        *[(name, pa.string()) for name in TEXTS],
        *[(name, pa.float64()) for name in ("wer", "cer")],
        *[
            (f"{unit}_{f.name}", pa.int64())
            for unit in ("words", "characters")
            for f in fields(Edits)
        ],
        *[(name, pa.string()) for name in ("reference", "answer")],
    ]
)


def score(
    label: str,
    rows: Iterable[Row],
    references: References,
    only_finished: bool = False,
    like: Scores | None = None,
) -> Scores:
    """A failed asset says nothing: all deletions; a partial one is scored as it is. With
    `only_finished` both are left out. `like`: normalise each asset as it was there."""
    matches = matched(references, rows)
    before = {one.key: one for one in like.assets} if like else {}
    assets: list[Scored] = []
    left_out: Counter[str] = Counter()
    for reference, row in matches.pairs:
        if only_finished and row["status"] not in FINISHED:
            left_out[row["status"]] += 1
            continue
        language = reference.language or row["language"]
        if former := before.get(reference.key):
            how = former.normaliser, former.unspaced
        else:
            how = normaliser_for(language, reference.text or row["text"] or "")
        one = measure(reference.text, row["text"] or "", *how)
        assets.append(Scored(reference.key, row, language, *how, one))
    if not matches.pairs:
        raise EvaluateError(
            f"{references.name}: column {references.key}: none of {len(references.rows)} values, for"
            f" example {references.rows[0].key}, has a result in {label}"
        )
    return Scores(
        label,
        references,
        tuple(sorted(assets, key=_badness)),
        matches.missing,
        matches.unreferenced,
        matches.by_name,
        left_out if only_finished else None,
    )


def _badness(one: Scored) -> tuple[float, int, str]:
    """Worst first; words where nothing is said are worse than any rate."""
    edits = one.headline
    rate = edits.rate if edits.rate is not None else float("inf") if edits.errors else 0.0
    return -rate, -edits.errors, one.key


@dataclass(frozen=True)
class Difference:
    """Rates over the same references, and the 95 % interval of rate b - rate a (None: too few)."""

    a: Edits
    b: Edits
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Comparison:
    """B against A over the assets that both have; positive differences mean that B is worse."""

    pairs: tuple[tuple[Scored, Scored], ...]  # what got worse most first, by edits
    words: Difference
    characters: Difference
    only_a: int
    only_b: int


def compare(a: Scores, b: Scores) -> Comparison:
    """Pair by reference; score b with `like=a`, so that both are normalised alike."""
    of_a, of_b = ({one.key: one for one in scores.assets} for scores in (a, b))
    pairs = [(one, of_b[key]) for key, one in of_a.items() if key in of_b]
    pairs.sort(key=lambda pair: (pair[0].headline.errors - pair[1].headline.errors, pair[0].key))
    spaced = [(one.words, other.words) for one, other in pairs if not one.unspaced]
    return Comparison(
        tuple(pairs),
        _difference(spaced),
        _difference([(one.characters, other.characters) for one, other in pairs]),
        len(of_a) - len(pairs),
        len(of_b) - len(pairs),
    )


def _difference(pairs: Sequence[tuple[Edits, Edits]]) -> Difference:
    """Paired percentile bootstrap over assets, seeded (Bisani and Ney, ICASSP 2004)."""
    a, b = (
        (sum(side, Edits()) for side in zip(*pairs, strict=True)) if pairs else (Edits(), Edits())
    )
    if len(pairs) < MIN_ASSETS or not a.reference:
        return Difference(a, b, None)
    more = np.array([other.errors - one.errors for one, other in pairs])
    length = np.array([one.reference for one, _ in pairs])
    rng = np.random.default_rng(0)
    # one resample at a time: for 10^6 assets a table of them would take 16 GB
    drawn = (rng.integers(0, len(pairs), len(pairs)) for _ in range(RESAMPLES))
    totals = ((more[places].sum(), length[places].sum()) for places in drawn)
    deltas = [edits / words for edits, words in totals if words]
    low, high = np.percentile(deltas, [2.5, 97.5])
    return Difference(a, b, (float(low), float(high)))


def references_of(label: str, key: str, rows: Iterable[Row]) -> References:
    """An output's own finished answers as references; the others are not held against anybody."""
    found: dict[str, Reference] = {}
    for row in rows:
        if row["status"] in FINISHED:
            one = Reference(row[key], row["text"] or "", row["language"], row["uri"])
            if found.setdefault(one.key, one) is not one:
                raise EvaluateError(f"{label}: {key} {one.key} has more than one answer")
    return References(label, key, tuple(found.values()))


def asset_table(scores: Iterable[Scores]) -> pa.Table:
    """One row an asset and output: edits, rates (null where nothing is said) and both texts."""
    rows = [
        {
            "output": many.label,
            **{name: one.row[name] for name in ("asset_id", "uri", "source_id", "status")},
            "reference_key": one.key,
            "language": one.language,
            "normaliser": one.normaliser,
            "wer": None if one.unspaced else one.words.rate,
            "cer": one.characters.rate,
            **{f"words_{name}": value for name, value in asdict(one.words).items()},
            **{f"characters_{name}": value for name, value in asdict(one.characters).items()},
            "reference": one.texts.reference,
            "answer": one.texts.answer,
        }
        for many in scores
        for one in many.assets
    ]
    return pa.Table.from_pylist(rows, schema=SCORED)
