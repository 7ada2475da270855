"""Container images and the clusters made of them: their steps agree with deploy/setup.

There is no container engine where this runs: the images are read here, not built.
"""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

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
    assert f"torch=={pinned}" in PROJECT["dependencies"]
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
