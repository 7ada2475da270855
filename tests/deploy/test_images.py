"""Images, local cluster and schedules: their steps agree with deploy/setup and with the command line.

There is no container engine where this runs: the images are read here, not built.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import yaml
from conftest import WebServer
from ports import free_ports

from jobs.exits import HELD, REFUSED, TOO_MANY_FAILED
from jobs.submit import exit_code
from pipeline.lease import TTL_S
from pipeline.submit import State

ROOT = Path(__file__).resolve().parents[2]
SETUP = (ROOT / "deploy/setup").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
each_image = pytest.mark.parametrize("flavour", ["cpu", "gpu"])


def dockerfile(flavour: str) -> list[str]:
    """Instructions, one a line, without comments."""
    text = (ROOT / f"deploy/{flavour}.Dockerfile").read_text()
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", kept)
    return [line for line in joined.splitlines() if line.strip()]


def of(flavour: str, instruction: str) -> list[str]:
    return [
        line.removeprefix(f"{instruction} ")
        for line in dockerfile(flavour)
        if line.startswith(f"{instruction} ")
    ]


def apt_packages(flavour: str) -> set[str]:
    (apt,) = [run for run in of(flavour, "RUN") if "apt-get" in run]
    assert "rm -rf /var/lib/apt/lists/*" in apt
    return set(apt.split("--no-install-recommends ")[1].split("&&")[0].split())


@each_image
def test_packages_come_by_the_pins_alone(flavour: str) -> None:
    runs = " ".join(of(flavour, "RUN"))
    assert f"-c deploy/constraints.txt '.[{flavour}]'" in runs
    installs = re.findall(r"pip install ([^&]*)", runs)
    for install in installs:
        assert "-c deploy/constraints.txt" in install or "--no-deps" in install, install
    # No version of a package stands here: it would have to be changed in two places.
    assert re.findall(r"==v?\d", runs) == []
    assert "dev]" not in runs


@each_image
def test_the_base_has_a_python_that_the_project_admits(flavour: str) -> None:
    (base,) = of(flavour, "FROM")
    version = re.match(r"python:3\.(\d+)-slim-bookworm$", base)
    assert version
    low, high = re.findall(r"3\.(\d+)", PROJECT["requires-python"])
    assert int(low) <= int(version[1]) < int(high)


@each_image
def test_programs_are_those_of_the_set_up(flavour: str) -> None:
    needed = re.findall(r"^need_programs (.*)$", SETUP, re.MULTILINE)[0]
    packages = {pair.partition(":")[2] for pair in needed.split()}
    assert packages <= apt_packages(flavour)


def test_the_cpu_image_takes_torch_as_the_set_up_does() -> None:
    runs = " ".join(of("cpu", "RUN"))
    (index,) = of("cpu", "ARG")
    assert index.partition("=")[2] in SETUP
    command = re.search(r"torch=\$\((sed .*? pyproject\.toml)\)", runs)
    assert command
    pinned = subprocess.run(
        ["bash", "-c", command[1]], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert f"torch=={pinned}" in PROJECT["optional-dependencies"]["cpu"]
    assert '"torch==$torch+cpu"' in runs
    assert '"torch==$torch+cpu"' in SETUP
    loop = "for package in torchaudio torchcodec; do"
    assert loop in runs
    assert loop in SETUP
    shim = "polyscribe_torchvision_cpu.pth"
    assert shim in runs
    assert shim in SETUP


@each_image
def test_nobody_is_root_and_no_weights_are_inside(flavour: str) -> None:
    assert of(flavour, "USER") == ["1000:1000"]
    assert any("useradd --uid 1000" in run for run in of(flavour, "RUN"))
    assert "hf download" not in " ".join(dockerfile(flavour))
    ignored = (ROOT / f"deploy/{flavour}.Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    admitted = {line[1:] for line in ignored if line.startswith("!")}
    copied = [word for copy in of(flavour, "COPY") for word in copy.split()[:-1]]
    for path in copied:
        assert (ROOT / path).exists(), path
    assert set(copied) == admitted
    for path in map(Path, copied):
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) < 32 << 20


@each_image
def test_code_is_the_last_layer_to_change(flavour: str) -> None:
    lines = dockerfile(flavour)
    code = lines.index("COPY operators operators")
    heavy = [place for place, line in enumerate(lines) if f"'.[{flavour}]'" in line]
    assert max(heavy) < code
    assert "RUN pip install --no-deps ." in lines[code:]


def test_build_names_the_images_and_asks_the_builder(tmp_path: Path) -> None:
    docker = tmp_path / "docker"
    docker.write_text('#!/bin/bash\necho "$@"\n')
    docker.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "POLYSCRIBE_REGISTRY": "registry.example.com/",
        "POLYSCRIBE_TORCH_INDEX": "https://mirror",
    }
    ended = subprocess.run(
        [ROOT / "deploy/build", "--push"], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    names = [
        f"registry.example.com/polyscribe-{one}:{PROJECT['version']}" for one in ("cpu", "gpu")
    ]
    assert ended.stdout.splitlines() == [
        f"build --file deploy/cpu.Dockerfile --tag {names[0]}"
        " --build-arg TORCH_INDEX=https://mirror .",
        f"push {names[0]}",
        f"build --file deploy/gpu.Dockerfile --tag {names[1]} .",
        f"push {names[1]}",
    ]
    missing = subprocess.run(
        [ROOT / "deploy/build"],
        env=environment | {"POLYSCRIBE_BUILDER": "no-such-builder"},
        capture_output=True,
        text=True,
    )
    assert missing.returncode == 1
    assert "no-such-builder is not installed" in missing.stderr


def launcher() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "deploy/cluster.yaml").read_text())
    return loaded


def test_the_vm_cluster_fits_rays_own_schema() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = launcher()
    validate_config(prepare_config(config))
    assert f":{PROJECT['version']}" in str(config["docker"])


def test_the_images_hold_what_rays_launcher_calls_in_them() -> None:
    """It copies its files into every container with rsync, and the head's own reaches the workers by ssh
    and makes them with the cloud's client (ray/autoscaler/_private, command_runner.py and aws/config.py).
    """
    config = launcher()
    docker = [
        config["docker"],
        *(one.get("docker", {}) for one in config["available_node_types"].values()),
    ]
    images = {image for one in docker for name, image in one.items() if name.endswith("_image")}
    flavours = {image: re.findall(r"polyscribe-(\w+):", image)[0] for image in images}
    assert set(flavours.values()) == {"cpu", "gpu"}
    for flavour in flavours.values():
        assert "rsync" in apt_packages(flavour)
    assert "openssh-client" in apt_packages(flavours[config["docker"]["head_image"]])
    assert config["provider"]["type"] == "aws"
    assert any(pin.startswith("boto3==") for pin in PROJECT["dependencies"])


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


@pytest.mark.ray
def test_the_local_cluster_comes_up_and_goes_down(tmp_path: Path) -> None:
    """Head and two workers, in a copy whose virtual environment is the one of this test."""
    checkout = tmp_path / "checkout"
    (checkout / "deploy").mkdir(parents=True)
    shutil.copy(ROOT / "deploy/cluster", checkout / "deploy")
    (checkout / "deploy/setup").write_text("exit 0\n")
    (checkout / ".venv").symlink_to(sys.prefix)
    ports = [str(port) for port in free_ports(2)]
    place = mkdtemp(prefix="pc-", dir="/tmp")  # socket paths must be short
    environment = {
        **os.environ,
        "POLYSCRIBE_CLUSTER": f"{place}/c",
        "POLYSCRIBE_PORT": ports[0],
        "POLYSCRIBE_DASHBOARD_PORT": ports[1],
        "RAY_AUTH_MODE": "disabled",  # the token would be put into the home folder
    }

    def cluster(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", checkout / "deploy/cluster", *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    try:
        up = cluster("up", "2", "1")
        assert up.returncode == 0, up.stderr
        assert "up with 2 x 1 CPUs" in up.stdout
        lines = Path(place, "c/processes").read_text().splitlines()
        processes = [int(line.split()[0]) for line in lines]
        assert len(processes) == 3
        nodes = subprocess.run(
            [
                *(sys.executable, "-c"),
                "import ray, sys; ray.init(sys.argv[1], log_to_driver=False)\n"
                "import time; until = time.monotonic() + 30\n"
                "while len(ray.nodes()) < 3 and time.monotonic() < until: time.sleep(0.3)\n"
                "print(sorted(node['Resources'].get('CPU', 0) for node in ray.nodes()))",
                f"127.0.0.1:{ports[0]}",
            ],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert nodes.stdout == "[0, 1.0, 1.0]\n", nodes.stderr
        assert cluster("up").returncode == 1  # it is up
    finally:
        down = cluster("down")
    assert down.stdout == "cluster: down\n"
    assert not any(Path(f"/proc/{process}").exists() for process in processes)
    shutil.rmtree(place)


@pytest.fixture
def local_cluster(tmp_path: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """deploy/cluster in a copy whose `ray` starts a head, and one worker."""
    (tmp_path / "deploy").mkdir()
    shutil.copy(ROOT / "deploy/cluster", tmp_path / "deploy")
    (tmp_path / "deploy/setup").write_text("exit 0\n")
    ray = tmp_path / ".venv/bin/ray"
    ray.parent.mkdir(parents=True)
    ray.write_text(
        "#!/bin/bash\n"
        "[[ $1 == start ]] || exit 0\n"
        'if [[ $* != *--head* ]]; then mkdir one 2>/dev/null || { echo "no raylet"; exit 1; }; fi\n'
        'echo "Ray runtime started"; exec sleep 600\n'
    )
    ray.chmod(0o755)
    environment = {
        **os.environ,
        "POLYSCRIBE_CLUSTER": str(tmp_path / "cluster"),
        "RAY_AUTH_MODE": "disabled",
    }

    def cluster(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", tmp_path / "deploy/cluster", *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    yield cluster
    cluster("down")


def test_a_worker_that_does_not_start_is_said(
    local_cluster: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    assert local_cluster("up", "1", "1").returncode == 0
    assert local_cluster("down").returncode == 0
    up = local_cluster("up", "2", "1")  # by now even the first finds no place
    assert up.returncode == 1
    assert "worker 1 of 2 does not start; see" in up.stderr
    assert "up with" not in up.stdout
    assert "no raylet" in (tmp_path / "cluster/log").read_text()


def test_down_ends_what_up_started_and_nobody_elses(
    local_cluster: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    assert local_cluster("up", "1", "1").returncode == 0
    book = tmp_path / "cluster/processes"
    ours = [int(line.split()[0]) for line in book.read_text().splitlines()]
    # As after a restart of the machine: the number is another process's.
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as other:
        with book.open("a") as lines:
            lines.write(book.read_text().splitlines()[0].replace(str(ours[0]), f"{other.pid}", 1))
            lines.write("\n")
        assert local_cluster("down").returncode == 0
        assert other.poll() is None
        other.kill()
    assert not any(Path(f"/proc/{process}").exists() for process in ours)


def test_the_local_cluster_explains_itself_and_leaves_others_alone(tmp_path: Path) -> None:
    environment = {**os.environ, "POLYSCRIBE_CLUSTER": str(tmp_path / "none")}
    usage = subprocess.run(
        [ROOT / "deploy/cluster"], env=environment, capture_output=True, text=True
    )
    assert usage.returncode == 2
    assert "deploy/cluster up" in usage.stdout
    down = subprocess.run(
        [ROOT / "deploy/cluster", "down"], env=environment, capture_output=True, text=True
    )
    assert (down.returncode, down.stdout) == (0, "cluster: it is not up\n")
