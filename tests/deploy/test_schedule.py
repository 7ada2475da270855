"""deploy/schedule: what cron and systemd are told agrees with the command line."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from conftest import WebServer

from jobs.exits import HELD, REFUSED, TOO_MANY_FAILED
from jobs.submit import exit_code
from pipeline.lease import TTL_S
from pipeline.submit import State

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_schedules_call_what_exists() -> None:
    (service,) = re.findall(
        r"^ExecStart=(.*)$",
        (ROOT / "deploy/schedule/polyscribe.service").read_text(),
        re.MULTILINE,
    )
    cron = (ROOT / "deploy/schedule/crontab").read_text().splitlines()[-1]
    assert re.match(r"(\S+ ){5}cd ", cron)
    for line in (service, cron.partition("&& ")[2].partition(" >>")[0]):
        program, command, job, *options = shlex.split(line)
        assert Path(program).name in PROJECT["scripts"]
        assert job == "/etc/polyscribe/job.yaml"
        helped = subprocess.run(
            [sys.executable, "-m", "jobs", command, "--help"], capture_output=True, text=True
        )
        assert helped.returncode == 0
        for word in options:
            assert not word.startswith("--") or word in helped.stdout


def test_cron_may_write_its_log_whoever_it_runs_as(tmp_path: Path) -> None:
    """A log that cannot be opened is a command that is not run, every night."""
    line = (ROOT / "deploy/schedule/crontab").read_text().splitlines()[-1]
    command = line.split(maxsplit=5)[5].partition("&& ")[2]
    ended = subprocess.run(
        ["sh", "-c", "ls / " + command[command.index(" >>") :]], env={"HOME": str(tmp_path)}
    )
    assert ended.returncode == 0
    assert "etc" in (tmp_path / "polyscribe.log").read_text()


def test_a_follower_that_was_killed_finds_its_run() -> None:
    service = (ROOT / "deploy/schedule/polyscribe.service").read_text()
    assert re.search(r"^ExecStart=.* --id [\w-]+$", service, re.MULTILINE)


@pytest.mark.parametrize("schedule", ["crontab", "polyscribe.service"])
def test_the_schedules_give_the_local_clusters_token(
    schedule: str, web: WebServer, tmp_path: Path
) -> None:
    """With what cron and systemd give, and a token where `deploy/cluster up` leaves it."""
    text = (ROOT / "deploy/schedule" / schedule).read_text()
    said = re.findall(r"(?m)^(?:Environment=)?([A-Z][A-Z_]+)=(\S+)$", text)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("f" * 64)
    tokens = []

    def version(handler: BaseHTTPRequestHandler) -> None:
        tokens.append(handler.headers.get("Authorization"))
        handler.send_error(401)

    web.routes["/api/version"] = version
    subprocess.run(
        [sys.executable, "-m", "jobs", "status", "one", "--address", web.url],
        cwd=ROOT,
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", **dict(said)},
        capture_output=True,
        timeout=60,
    )
    assert tokens[0] == f"Bearer {'f' * 64}"


def test_the_service_knows_the_exit_codes() -> None:
    service = (ROOT / "deploy/schedule/polyscribe.service").read_text()
    assert re.findall(r"^SuccessExitStatus=(.*)$", service, re.MULTILINE) == [str(HELD)]
    prevented = re.findall(r"^RestartPreventExitStatus=(.*)$", service, re.MULTILINE)
    stopped = exit_code(State("STOPPED", "", None))
    assert prevented == [f"{REFUSED} {TOO_MANY_FAILED} {stopped}"]
    (minutes,) = re.findall(r"^RestartSec=(\d+)min$", service, re.MULTILINE)
    assert int(minutes) * 60 > TTL_S


def test_systemd_takes_the_service_and_the_timer(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed: the units were NOT checked with it")
    for name in ("polyscribe.service", "polyscribe.timer"):
        unit = (ROOT / "deploy/schedule" / name).read_text()
        # its program is not installed here
        (tmp_path / name).write_text(re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", unit))
    ended = subprocess.run(
        ["systemd-analyze", "verify", *sorted(tmp_path.iterdir())], capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    (calendar,) = re.findall(
        r"^OnCalendar=(.*)$", (tmp_path / "polyscribe.timer").read_text(), re.MULTILINE
    )
    subprocess.run(["systemd-analyze", "calendar", calendar], check=True, capture_output=True)
