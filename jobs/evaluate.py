"""`polyscribe evaluate`: error rates of an output, of two side by side, or of a setting's values.

Reads finished outputs and prints; only `--out` and `--sweep` write. The arithmetic is in
pipeline/evaluate.py and sweep.py, imported late: the other commands must not wait a second for it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from jobs.arguments import add_overrides, add_storage_options
from jobs.exits import BROKEN, FINISHED, HELD, REFUSED

if TYPE_CHECKING:
    from operators.score import Edits
    from pipeline.evaluate import Comparison, Difference, Output, Scored, Scores
    from pipeline.references import References
    from pipeline.run import EngineFactory
    from pipeline.sweep import Tried

UNFINISHED = ("failed", "partial")
EXAMPLES = 3


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Put `evaluate` into the parser of jobs/__main__.py."""
    text = "word and character error rates against references, or of two outputs"
    sub = commands.add_parser("evaluate", help=text, description=text)
    sub.set_defaults(command=command)
    sub.add_argument(
        "output",
        nargs="?",
        metavar="OUTPUT",
        help="its newest fingerprint, or OUTPUT/<fingerprint>",
    )
    sub.add_argument(
        "--references",
        metavar="FILE",
        help="Parquet, CSV or JSONL with asset_id, source_id or uri, with text, perhaps language",
    )
    sub.add_argument(
        "--key",
        choices=("asset_id", "source_id", "uri"),
        help="column to join by; default: the first of them that the references have",
    )
    sub.add_argument("--against", metavar="OUTPUT", help="compare with this output")
    sub.add_argument(
        "--only-finished",
        action="store_true",
        help="leave failed and partial assets out; otherwise a failed one is all deletions",
    )
    sub.add_argument("--out", metavar="FILE.parquet", help="write a row an asset")
    sub.add_argument("--show", type=int, default=20, metavar="N", help="assets to print (20)")
    add_storage_options(sub)
    sub.add_argument("--job", metavar="JOB.yaml", help="with --sweep: what to run")
    sub.add_argument(
        "--sweep", metavar="section.field=a,b,c", help="run the job for each value on a sample"
    )
    sub.add_argument("--sample", type=int, default=50, metavar="N", help="files of a sweep (50)")
    sub.add_argument("--seed", type=int, default=0, help="which files (0)")
    add_overrides(sub)


def command(
    options: argparse.Namespace, console: Console, engine: EngineFactory | None = None
) -> int:
    """Exit code of `polyscribe evaluate`. `engine` is for --sweep; default: vLLM."""
    from pipeline.references import EvaluateError

    try:
        _check(options)
        if options.sweep:
            return _sweep(options, console, engine)
        scores = _compare(options, console) if options.against else [_evaluate(options, console)]
        _write(options, scores)
    except EvaluateError as error:
        print(error, file=sys.stderr)
        return REFUSED
    return FINISHED


def _check(options: argparse.Namespace) -> None:
    from pipeline.references import EvaluateError

    swept = bool(options.sweep or options.job)
    if swept and not (options.sweep and options.job and options.references):
        raise EvaluateError("--sweep needs --job JOB.yaml and --references FILE")
    if swept and (options.output or options.against):
        raise EvaluateError(
            "--sweep takes its outputs from the job; leave OUTPUT and --against out"
        )
    if not swept and not options.output:
        raise EvaluateError("OUTPUT is missing: an output to evaluate, or --job with --sweep")
    if not swept and not (options.references or options.against):
        raise EvaluateError("--references FILE or --against OUTPUT: one of them is needed")
    if options.out and not options.out.endswith(".parquet"):
        raise EvaluateError(f"--out {options.out}: must end in .parquet")
    if options.sample < 1:
        raise EvaluateError(f"--sample {options.sample}: must be 1 or more")


def _evaluate(options: argparse.Namespace, console: Console) -> Scores:
    from pipeline.evaluate import open_output, score
    from pipeline.references import read_references

    output = open_output(options.output, options.storage_options)
    references = read_references(options.references, options.storage_options, options.key)
    scores = score(output.label, output.rows(), references, options.only_finished)
    _print_overall(console, scores)
    _print_worst(console, scores, options.show)
    return scores


def _compare(options: argparse.Namespace, console: Console) -> list[Scores]:
    from pipeline.evaluate import compare, open_output, score
    from pipeline.references import read_references

    a, b = (open_output(uri, options.storage_options) for uri in (options.output, options.against))
    console.print(f"A {a.label}\nB {b.label}")
    _print_settings(console, a.settings(), b.settings())
    if not options.references:
        scores = _disagreement(a, b, options.only_finished)
        console.print("No references: B is scored as if the finished answers of A were right")
        _print_overall(console, scores)
        _print_worst(console, scores, options.show)
        return [scores]
    references = read_references(options.references, options.storage_options, options.key)
    of_a = score(a.label, a.rows(), references, options.only_finished)
    of_b = score(b.label, b.rows(), references, options.only_finished, like=of_a)
    for name, scores in (("A", of_a), ("B", of_b)):
        _say(console, scores, name)
    _print_comparison(console, compare(of_a, of_b), options.show)
    return [of_a, of_b]


def _disagreement(a: Output, b: Output, only_finished: bool) -> Scores:
    from pipeline.evaluate import references_of, score

    ids = {row["asset_id"] for row in a.rows()}
    key = "asset_id" if any(row["asset_id"] in ids for row in b.rows()) else "uri"
    return score(b.label, b.rows(), references_of(a.label, key, a.rows()), only_finished)


def _sweep(options: argparse.Namespace, console: Console, engine: EngineFactory | None) -> int:
    from pipeline.cluster import BrokenRunError
    from pipeline.graph import vllm_engine
    from pipeline.lease import LeaseError
    from pipeline.references import read_references
    from pipeline.run import run
    from pipeline.sweep import sweep, swept_jobs

    jobs = swept_jobs(options.job, options.set, options.sweep)
    references = read_references(options.references, options.storage_options, options.key)
    work = partial(run, console=console, engine=engine or vllm_engine)
    try:
        tried = sweep(jobs, references, options.sample, options.seed, work, options.only_finished)
    except (LeaseError, BrokenRunError) as error:
        print(error, file=sys.stderr)
        return HELD if isinstance(error, LeaseError) else BROKEN
    print_sweep(console, options.sweep.partition("=")[0], references, tried)
    _write(options, [replace(one.scores, label=one.value) for one in tried])
    return FINISHED


def _write(options: argparse.Namespace, scores: Iterable[Scores]) -> None:
    if not options.out:
        return
    from operators.stores import StoreError, reason, redact
    from pipeline.evaluate import asset_table
    from pipeline.parts import parquet_bytes
    from pipeline.references import EvaluateError
    from pipeline.source_rows import listing_faults
    from pipeline.store import Store

    folder, _, name = options.out.rpartition("/")
    place = Store(folder or ("/" if options.out.startswith("/") else "."), options.storage_options)
    try:
        place.write(name, parquet_bytes(asset_table(scores)))
    except listing_faults(options.out) as error:
        why = str(error) if isinstance(error, StoreError) else reason(error)
        raise EvaluateError(f"--out {redact(options.out)}: cannot be written ({why})") from error


def _percent(rate: float | None, sign: str = "") -> str:
    return "-" if rate is None else f"{rate:{sign}.2%}"


def _table(*columns: str) -> Table:
    """The first column is text, the others are figures."""
    table = Table()
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left", overflow="fold")
    return table


def _examples(keys: Sequence[str]) -> str:
    return f" (for example {', '.join(keys[:EXAMPLES])})" if keys else ""


def _say(console: Console, scores: Scores, name: str = "") -> None:
    """What was joined by what, then how it counts."""
    asked = scores.references
    lines = [
        f"{len(asked.rows):,} references of {asked.name} by column {asked.key}"
        + (f" ({scores.by_name:,} by file name, not by the whole uri)" if scores.by_name else ""),
        f"{len(scores.missing):,} references without result{_examples(scores.missing)},"
        f" {scores.unreferenced:,} results without reference: not counted",
    ]
    if asked.without_text:
        lines.append(f"{asked.without_text:,} rows of the references without text: not counted")
    for line in (*lines, *_counted(scores)):
        console.print(f"{name} {line}".strip())


def _counted(scores: Scores) -> Iterator[str]:
    """How assets that did not finish count, and how texts are made alike."""
    assets = scores.assets
    states = {state: sum(one.row["status"] == state for one in assets) for state in UNFINISHED}
    if scores.left_out is not None:
        told = ", ".join(f"{count:,} {state}" for state, count in scores.left_out.items())
        yield f"--only-finished: {told or 'no'} assets left out"
    elif any(states.values()):
        yield (
            f"{states['failed']:,} failed assets count as all deletions, {states['partial']:,}"
            " partial ones as far as they go"
        )
    english = sum(one.normaliser == "english" for one in assets)
    basic = len(assets) - english
    yield f"normalised: {english:,} assets as English, {basic:,} in case, punctuation and spaces only"


def _units(scores: Scores) -> Iterator[tuple[str, int, Edits]]:
    """(name, assets, edits), the headline first."""
    spaced = len(scores.assets) - scores.unspaced
    if spaced:
        yield "WER", spaced, scores.words
    yield "CER", len(scores.assets), scores.characters


def _kinds(edits: Edits) -> tuple[int, int, int, int]:
    return edits.substitutions, edits.insertions, edits.deletions, edits.reference


def _print_overall(console: Console, scores: Scores) -> None:
    _say(console, scores)
    kinds = ("substituted", "inserted", "deleted", "of reference")
    table = _table("", "rate", "assets", "errors", *kinds)
    for unit, assets, edits in _units(scores):
        counts = (assets, edits.errors, *_kinds(edits))
        table.add_row(unit, _percent(edits.rate), *(f"{number:,}" for number in counts))
    console.print(table)
    if scores.unspaced:
        console.print(f"{scores.unspaced:,} assets in languages without spaces count in CER only")


def _print_worst(console: Console, scores: Scores, rows: int) -> None:
    table = _table("worst first", "state", "WER", "CER", "sub", "ins", "del", "of")
    for one in scores.assets[: max(0, rows)]:
        table.add_row(
            one.row["source_id"] or one.row["uri"],
            one.row["error_code"] or one.row["status"],
            "-" if one.unspaced else _percent(one.words.rate),
            _percent(one.characters.rate),
            *(f"{number:,}" for number in _kinds(one.headline)),
        )
    if table.row_count:
        console.print(table)


def _print_settings(console: Console, a: Mapping[str, str], b: Mapping[str, str]) -> None:
    differing = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    table = _table("setting that differs", "A", "B")
    for name in differing:
        table.add_row(name, a.get(name, "-"), b.get(name, "-"))
    console.print(table if differing else "no setting differs")


def _print_comparison(console: Console, compared: Comparison, rows: int) -> None:
    console.print(
        f"{len(compared.pairs):,} assets that both have ({compared.only_a:,} only in A,"
        f" {compared.only_b:,} only in B: not compared)"
    )
    table = _table("", "A", "B", "B - A", "95 % interval")
    for unit, difference in (("WER", compared.words), ("CER", compared.characters)):
        if difference.a.rate is not None:
            table.add_row(unit, *_difference(difference))
    console.print(table)
    changed = [pair for pair in compared.pairs if _more(pair)]
    worse = [pair for pair in changed if _more(pair) > 0]
    better = [pair for pair in reversed(changed) if _more(pair) < 0]
    for title, pairs in (("worse in B", worse), ("better in B", better)):
        listed = _table(f"{len(pairs):,} {title}", "A", "B", "errors")
        for one, other in pairs[: max(0, rows)]:
            rates = (_percent(side.headline.rate) for side in (one, other))
            name = one.row["source_id"] or one.row["uri"]
            listed.add_row(name, *rates, f"{_more((one, other)):+,}")
        console.print(listed if listed.row_count else f"0 {title}")


def _more(pair: tuple[Scored, Scored]) -> int:
    return pair[1].headline.errors - pair[0].headline.errors


def _difference(one: Difference) -> tuple[str, str, str, str]:
    change = (one.b.rate or 0.0) - (one.a.rate or 0.0)
    interval = "too few assets"
    if one.interval:
        low, high = one.interval
        sure = "" if low <= 0 <= high else ", beyond chance"
        interval = f"{low:+.2%} to {high:+.2%}{sure}"
    return _percent(one.a.rate), _percent(one.b.rate), _percent(change, "+"), interval


def print_sweep(
    console: Console, field: str, references: References, tried: Sequence[Tried]
) -> None:
    """One line a value."""
    console.print(
        f"a sample of {len(tried[0].scores.references.rows):,} of {len(references.rows):,}"
        f" references of {references.name} by column {references.key}",
        *_counted(tried[0].scores),
        sep="\n",
    )
    columns = ("WER", "CER", "words", "failed", "output tokens", "media tokens", "seconds")
    table = _table(field, *columns)
    for one in tried:
        words = sum(asset.words.answer for asset in one.scores.assets)
        failed = sum(asset.row["status"] in UNFINISHED for asset in one.scores.assets)
        figures = (words, failed, one.total("output_tokens"), one.total("media_tokens"))
        table.add_row(
            one.value,
            _percent(one.scores.words.rate),
            _percent(one.scores.characters.rate),
            *(f"{number:,}" for number in figures),
            f"{one.seconds:.1f}",
        )
    console.print(table)
    console.print("seconds hold the engine's start; words are those of the answers")
