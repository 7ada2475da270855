"""A table of file and answer, for a person at a terminal."""

from __future__ import annotations

from pathlib import PurePosixPath

from rich.console import Console
from rich.table import Table

from pipeline.assemble import RESULTS_FOLDER, read_marker, read_part
from pipeline.config import Job
from pipeline.run import folder_store
from pipeline.sample import LINES, TIMED, answer_lines
from pipeline.source_rows import path_in


def print_answers(job: Job, console: Console, rows: int) -> None:
    """The first `rows` results, failures with their code."""
    folder = folder_store(job)
    marker = read_marker(folder) or {"files": []}
    table = Table(show_lines=False, expand=True)
    table.add_column("file", ratio=1, overflow="fold")
    table.add_column("state", no_wrap=True)
    table.add_column("answer", ratio=3, overflow="fold")
    left = rows
    for item in marker["files"]:
        if not item["name"].startswith(RESULTS_FOLDER) or left <= 0:
            continue
        answers = read_part(folder, item["name"], ["uri", "status", "error_code", *TIMED])
        for answer in answers.slice(0, left).to_pylist():
            lines = answer_lines(answer, summary="text" in job.instructions)
            shown = [f"{time} {text}".strip() for time, text in lines[:LINES]]
            if len(lines) > LINES:
                shown.append(f"and {len(lines) - LINES} more")
            if answer["error_code"]:
                shown.append(answer["error_code"])
            name = PurePosixPath(path_in(answer["uri"])).name
            table.add_row(name, answer["status"], "\n".join(shown))
        left -= min(left, answers.num_rows)
    if table.row_count:
        console.print(table)
