"""The command line as a shell and a scheduler see it: exit codes, and messages of one kind of fault."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import media
import pytest
import ray
import yaml
from conftest import S3Server
from PIL import Image

from jobs.__main__ import _parser, main
from jobs.exits import BROKEN, FINISHED, REFUSED, TERMINATED
from pipeline.job_file import load_job
from pipeline.preview import HEADER_BYTES


@pytest.fixture
def job(nano: Path, tmp_path: Path) -> Path:
    """A job with three pictures, one of them broken."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(2):
        picture = media.encode(Image.new("RGB", (96 * (number + 1), 96), "red"), "PNG")
        (folder / f"{number}.png").write_bytes(picture)
    (folder / "broken.png").write_bytes(b"no picture")
    file = tmp_path / "job.yaml"
    sections = {
        "task": "caption",
        "input": {"uri": str(folder)},
        "output": {"uri": str(tmp_path / "out")},
        "model": {"id": str(nano)},
        "image": {"max_soft_tokens": 70},
    }
    file.write_text(yaml.safe_dump(sections))
    return file


def test_every_command_and_option_says_what_it_is() -> None:
    (commands,) = (one for one in _parser()._actions if isinstance(one.choices, dict))
    assert commands.choices
    for name, command in commands.choices.items():
        assert command.description, name
        assert [one.dest for one in command._actions if not one.help] == [], name


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("image.max_soft_tokens=100", "image.max_soft_tokens: must be one of (70, 140"),
        ("image.max_soft=70", "image.max_soft: no such field; allowed here:"),
        ("engine.max_num_seqs=many", "engine.max_num_seqs: "),
        ("image", "--set image: must be section.field=value"),
        ("limits.max_assets=[1", "the value is not YAML"),
    ],
)
def test_a_wrong_job_is_refused_with_field_and_value(
    job: Path, command: str, override: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = ray.is_initialized()
    assert main([command, str(job), "--set", override]) == REFUSED
    assert said in capsys.readouterr().err
    assert ray.is_initialized() == before
    assert not (job.parent / "out").exists()


@pytest.mark.parametrize("command", ["run", "plan", "submit"])
def test_a_missing_job_file_is_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(tmp_path / "none.yaml")]) == REFUSED
    assert "none.yaml: cannot be read" in capsys.readouterr().err


def test_an_input_without_files_is_refused(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    void = tmp_path / "[old] :x: void"  # shown as it is
    void.mkdir()
    assert main(["run", str(job), "--set", f"input.uri='{void}'"]) == REFUSED
    said = capsys.readouterr()
    assert f"listing {void}" in said.out
    assert "no file matches" in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["run", "plan"])
def test_an_output_that_cannot_be_used_is_refused_before_the_input_is_listed(
    job: Path, command: str, s3: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(uri: str, code: int = REFUSED, **options: object) -> str:
        given = {"uri": uri, "storage_options": options}
        assert main([command, str(job), "--set", f"output={yaml.safe_dump(given)}"]) == code
        said = capsys.readouterr()
        assert not said.out
        return said.err

    bucket = s3.bucket()
    missing = refused("s3://no-such-bucket/out", **s3.options)
    assert "output.uri: s3://no-such-bucket/out: does not exist; check the spelling" in missing
    assert "output: s4://b/out/" in refused("s4://b/out")
    assert "no option bogus" in refused(bucket, **s3.options, bogus=1)
    assert "output.uri: " in refused(f"{job}/out")  # below a file
    s3.fault = lambda *asked: (403, "AccessDenied")
    assert "may not be used; check the credentials" in refused(bucket, **s3.options)
    s3.fault = lambda *asked: (400, "ExpiredToken")
    assert "(HTTP 400 ExpiredToken)" in refused(bucket, **s3.options)


@pytest.mark.parametrize("denied", ["PUT", "POST"])  # to write, to delete
def test_an_output_with_too_few_rights_is_refused_at_the_first_write(
    job: Path, s3: S3Server, capsys: pytest.CaptureFixture[str], denied: str
) -> None:
    given = {"uri": s3.bucket(), "storage_options": s3.options}
    s3.fault = lambda method, *asked: (403, "AccessDenied") if method == denied else None
    assert main(["run", str(job), "--set", f"output={yaml.safe_dump(given)}"]) == REFUSED
    said = capsys.readouterr().err
    assert "may not be used; check the credentials and their rights to list, read, write" in said


def test_a_store_that_refuses_is_no_output_that_is_not_whole(
    s3: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket, options = s3.bucket(), yaml.safe_dump(s3.options, default_flow_style=True)
    s3.fault = lambda *asked: (403, "AccessDenied")
    assert main(["verify", bucket, "--storage-options", options]) == REFUSED
    assert f"{bucket}: may not be read; check the credentials" in capsys.readouterr().err
    assert main(["verify", "s4://b/out"]) == REFUSED
    assert "unknown scheme s4://" in capsys.readouterr().err
    with pytest.raises(SystemExit) as refused:
        main(["verify", bucket, "--storage-options", "key=value"])
    assert refused.value.code == REFUSED
    assert "--storage-options: must be a YAML mapping" in capsys.readouterr().err


def test_an_output_that_no_run_finished_is_not_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tmp_path)]) == BROKEN
    assert "is missing: no run has finished here" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_plan_shows_counts_tokens_and_reasons_without_an_engine(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(job), "--set", "limits.max_assets=3"]) == FINISHED
    said = capsys.readouterr().out
    assert "3 assets" in said
    assert "3 spans, 3 to do" in said
    assert "from 2 files looked at" in said  # the broken one thins the sample
    for reason in ("tokens in: about", "tokens out: at most", "engines: 1", "media workers:"):
        assert reason in said
    assert "engine hours" not in said
    assert not list((job.parent).glob("out/*/plan/*"))
    folder = job.parent / "out" / load_job(str(job)).fingerprint
    folder.mkdir(parents=True)
    engine = {"seconds": 7200.0, "waiting_share": 0.25}
    report = {"run_id": "first", "accounts": {"done_now": 100}, "engine": engine}
    (folder / "report.json").write_text(json.dumps(report))
    assert main(["plan", str(job)]) == FINISHED
    assert (
        "run first took 2.00 engine hours for 100 spans, models' loading apart (engines waited 25% of"
        " it): at its pace 0.1 engine hours, 3:36 with 1\n"
    ) in capsys.readouterr().out
    for format in ("webp", "avif", "heif"):  # whose headers alone are refused
        large = media.encode(media.photo(1600, 1200), format.upper())
        assert len(large) > HEADER_BYTES
        (job.parent / "in" / f"large.{format}").write_bytes(large)
    assert main(["plan", str(job)]) == FINISHED
    assert "from 5 files looked at" in capsys.readouterr().out


def test_help_names_every_command() -> None:
    helped = subprocess.run(
        [sys.executable, "-m", "jobs", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("run", "plan", "verify", "submit", "status", "logs", "stop"):
        assert f"\n    {command} " in helped.stdout
    assert subprocess.run([sys.executable, "-m", "jobs"], capture_output=True).returncode == REFUSED


@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_in_order_with_its_own_code(number: str) -> None:
    """Any command: here one that waits for a store that does not answer."""
    program = (
        "import os, signal, threading, time\n"
        "import jobs.__main__ as command_line\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # as without nohup
        "def waits(options, console):\n"
        "    threading.Timer(0.2, os.kill, (os.getpid(), signal.%s)).start()\n"
        "    try:\n"
        "        time.sleep(30)\n"
        "    finally:\n"
        "        print('put in order', flush=True)\n"
        "command_line._verify = waits\n"
        "raise SystemExit(command_line.main(['verify', 'anything']))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program % number],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert ended.returncode == TERMINATED
    assert ended.stdout == "put in order\n"
    assert "stopped: what is finished is committed" in ended.stderr
