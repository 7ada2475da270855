"""What a run leaves to read: run.json, report.json, report.html, latest.json."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import duckdb
from jinja2 import Environment

from pipeline import sample
from pipeline.assemble import Assembly
from pipeline.config import Job
from pipeline.ledger import TOKENS
from pipeline.progress import clock
from pipeline.store import Store

STAGES = ("fetch", "decode", "prepare", "generate")


def write_run(
    folder: Store,
    job: Job,
    run_id: str,
    state: str,
    versions: dict[str, str],
    accounts: dict[str, Any] | None,
) -> None:
    """run.json: the resolved job without its secrets, versions, time and counts."""
    content = {
        "run_id": run_id,
        "state": state,
        "fingerprint": job.fingerprint,
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "job": job.public(),
        "accounts": accounts,
    }
    folder.write("run.json", json.dumps(content, indent=1).encode())


def write_latest(output: Store, job: Job, run_id: str) -> None:
    """latest.json points at the newest finished fingerprint: this one, unless a later run wrote it."""
    try:
        latest = json.loads(output.read("latest.json"))
    except FileNotFoundError:
        latest = {"run_id": ""}
    if latest["run_id"] < run_id:  # they sort by time
        content = {"fingerprint": job.fingerprint, "run_id": run_id}
        output.write("latest.json", json.dumps(content, indent=1).encode())


def write_report(
    folder: Store,
    job: Job,
    db: duckdb.DuckDBPyConnection,
    run_id: str,
    assembly: Assembly,
    reading: dict[str, float],
    seconds: float,
) -> None:
    """report.json and report.html of one run, from the tally's last reading."""
    report = summary(job, run_id, assembly, reading, seconds)
    folder.write("report.json", json.dumps(report, indent=1).encode())
    page = Environment(autoescape=True).from_string(PAGE)
    html = page.render(
        report=report,
        clock=clock,
        answers=sample.answers(job, db, folder, assembly),
        failures=sample.failures(db, folder, assembly),
    )
    folder.write("report.html", html.encode())


def summary(
    job: Job, run_id: str, assembly: Assembly, reading: dict[str, float], seconds: float
) -> dict[str, Any]:
    """Counts, tokens, rates by stage, and how much of their time the engines waited."""
    spans = sum(reading.get(state, 0.0) for state in ("ok", "empty", "failed"))
    engine_s = reading.get("engine_s", 0.0)
    return {
        "run_id": run_id,
        "fingerprint": job.fingerprint,
        "task": job.task,
        "model": job.model.id,
        "seconds": round(seconds, 1),
        "accounts": assembly.accounts,
        "tokens": {name: int(reading.get(name, 0)) for name in TOKENS},
        "spans_per_s": round(spans / seconds, 3) if seconds else 0.0,
        # worker seconds in a stage: fetch and generate wait, decode and prepare compute
        "stages": {
            stage: {
                "seconds": round(reading.get(f"{stage}_s", 0.0), 3),
                "ms_per_span": round(1000 * reading.get(f"{stage}_s", 0.0) / spans, 2)
                if spans
                else 0.0,
            }
            for stage in STAGES
        },
        "engine": {
            "engines": int(reading.get("engines", 0)),
            "restarts": int(reading.get("engine_restarts", 0)),
            "seconds": round(engine_s, 1),
            "waiting_share": round(reading.get("idle_s", 0.0) / engine_s, 3) if engine_s else 0.0,
            "mean_open_requests": round(reading.get("open_s", 0.0) / engine_s, 1)
            if engine_s
            else 0.0,
        },
        "failures_by_code": assembly.accounts["failures_by_code"],
    }


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ report.task }} {{ report.run_id }}</title>
<style>
 body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; color: #1c2330;
        padding: 0 1rem }
 h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
 .sub { color: #5b6472 } .cards { display: flex; gap: .8rem; flex-wrap: wrap; margin: 1.2rem 0 }
 .card { border: 1px solid #dbe0e8; border-radius: .5rem; padding: .6rem 1rem; min-width: 6rem }
 .card b { display: block; font-size: 1.4rem } .card.bad b { color: #b3261e }
 table { border-collapse: collapse; width: 100% }
 th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #e6e9ef;
          vertical-align: top; overflow-wrap: anywhere }
 td.c { white-space: nowrap } img { display: block; max-width: 10rem }
 th { color: #5b6472; font-weight: 600; white-space: nowrap }
 td.n, th.n { text-align: right; white-space: nowrap }
 .bar { display: flex; height: .8rem; border-radius: .4rem; overflow: hidden; background: #e6e9ef }
 .ok { background: #2e7d4f } .empty { background: #9aa4b2 } .partial { background: #d08700 }
 .failed { background: #b3261e } .t { color: #5b6472; font-variant-numeric: tabular-nums }
</style></head><body>
<h1>{{ report.task }}: {{ report.model }}</h1>
<p class="sub">run {{ report.run_id }}, fingerprint {{ report.fingerprint }},
 {{ clock(report.seconds) }} in all, {{ report.spans_per_s }} spans a second</p>
{% set a = report.accounts.assets %}
<div class="cards">
 <div class="card"><b>{{ "{:,}".format(a.found) }}</b>found</div>
 <div class="card"><b>{{ "{:,}".format(a.ok) }}</b>ok</div>
 <div class="card"><b>{{ "{:,}".format(a.empty) }}</b>empty</div>
 <div class="card"><b>{{ "{:,}".format(a.partial) }}</b>partial</div>
 <div class="card {{ 'bad' if a.failed }}"><b>{{ "{:,}".format(a.failed) }}</b>failed</div>
 <div class="card"><b>{{ "{:,}".format(report.accounts.done_now) }}</b>spans done now</div>
</div>
<div class="bar">{% for state in ("ok", "empty", "partial", "failed") %}{% if a[state] %}
 <div class="{{ state }}" style="flex: {{ a[state] }}" title="{{ state }}: {{ a[state] }}"></div>
{% endif %}{% endfor %}</div>
<h2>Stages</h2>
<table><tr><th>stage</th><th class="n">worker seconds</th><th class="n">ms a span</th></tr>
{% for name, stage in report.stages.items() %}<tr><td>{{ name }}</td>
 <td class="n">{{ stage.seconds }}</td><td class="n">{{ stage.ms_per_span }}</td></tr>{% endfor %}
</table>
<p>{{ report.engine.engines }} engine{{ "s" if report.engine.engines != 1 }}, up for
 {{ "{:,.2f}".format(report.engine.seconds / 3600) }} hours together, waiting
 {{ "{:.0%}".format(report.engine.waiting_share) }} of the time,
 {{ report.engine.mean_open_requests }} requests open on average,
 {{ report.engine.restarts }} restarts. Tokens: {{ "{:,}".format(report.tokens.prompt_tokens) }} in
 (of which media {{ "{:,}".format(report.tokens.media_tokens) }}),
 {{ "{:,}".format(report.tokens.output_tokens) }} out.</p>
{% if failures %}<h2>Failures</h2>
<table><tr><th>code</th><th class="n">spans</th></tr>
{% for code, count in report.failures_by_code.items() %}<tr><td>{{ code }}</td>
 <td class="n">{{ "{:,}".format(count) }}</td></tr>{% endfor %}</table>
<table><tr><th>file</th><th>code</th><th>what happened</th><th class="n">attempts</th></tr>
{% for row in failures %}<tr><td>{{ row.uri }}</td><td class="c">{{ row.error_code }}</td>
 <td>{{ row.error_message }}</td><td class="n">{{ row.attempts or "" }}</td></tr>{% endfor %}</table>
{% endif %}
<h2>Answers ({{ answers | length }} of {{ "{:,}".format(a.found) }})</h2>
<table><tr><th></th><th>file</th><th>state</th><th>answer</th></tr>
{% for row in answers %}<tr><td>{% if row.picture %}<img src="{{ row.picture }}" alt="">{% endif %}</td>
 <td>{{ row.uri }}</td><td>{{ row.status }}</td>
 <td>{% for time, text in row.lines %}<div>{% if time %}<span class="t">{{ time }}</span> {% endif
 %}{{ text }}</div>{% endfor %}{% if row.more %}<div class="sub">and {{ row.more }} more</div>{% endif %}
 {{ row.error_code or "" }}</td></tr>{% endfor %}</table>
</body></html>
"""
