"""The manifests of k8s/ as `kubectl kustomize` builds them, and what their tests ask of them."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import pytest
import yaml

from pipeline.config import Job
from pipeline.job_file import load_job

ROOT = Path(__file__).resolve().parents[1]
OVERLAYS = sorted(path.parent.name for path in ROOT.glob("k8s/overlays/*/kustomization.yaml"))
KUBERNETES = "1.34"
IMAGE_ROOT = "/opt/polyscribe"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RAY_VERSION = next(
    pin.partition("==")[2] for pin in PROJECT["dependencies"] if pin.startswith("ray[")
)

every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)
RAY_KINDS = ("RayCluster", "RayJob", "RayCronJob")
Manifest = dict[str, Any]


@functools.cache
def built(overlay: str) -> tuple[Manifest, ...]:
    if shutil.which("kubectl") is None:
        missing = "kubectl (1.27 or newer) is not installed: the manifests were NOT checked"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    made = subprocess.run(
        ["kubectl", "kustomize", str(ROOT / "k8s/overlays" / overlay)],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    return tuple(yaml.safe_load_all(made.stdout))


def of_kind(overlay: str, *kinds: str) -> list[Manifest]:
    return [manifest for manifest in built(overlay) if manifest["kind"] in kinds]


def ray_job_specs(overlay: str) -> list[Manifest]:
    return [manifest["spec"] for manifest in of_kind(overlay, "RayJob")] + [
        manifest["spec"]["jobTemplate"] for manifest in of_kind(overlay, "RayCronJob")
    ]


def ray_clusters(overlay: str) -> list[Manifest]:
    standing = [manifest["spec"] for manifest in of_kind(overlay, "RayCluster")]
    return standing + [spec["rayClusterSpec"] for spec in ray_job_specs(overlay)]


def groups(cluster: Manifest) -> list[Manifest]:
    return [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]


def pods(overlay: str) -> Iterator[Manifest]:
    """Every pod template: {metadata, spec}."""
    for cluster in ray_clusters(overlay):
        for group in groups(cluster):
            yield group["template"]
    for cron in of_kind(overlay, "CronJob"):
        yield cron["spec"]["jobTemplate"]["spec"]["template"]


def containers(pod: Manifest) -> list[Manifest]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def job_of(overlay: str) -> Job:
    (config,) = [one for one in of_kind(overlay, "ConfigMap") if "job.yaml" in one["data"]]
    text: str = config["data"]["job.yaml"]
    source = ROOT / "k8s/overlays" / overlay / "job.yaml"
    if source.exists():
        assert source.read_text() == text
    with NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        return load_job(file.name)


def environment(container: Manifest) -> dict[str, str | None]:
    return {one["name"]: one.get("value") for one in container.get("env", [])}
