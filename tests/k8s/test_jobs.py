"""What the manifests run: images, commands, jobs and their fit to the cluster; the README's examples."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from manifests import (
    OVERLAYS,
    PROJECT,
    ROOT,
    containers,
    every_overlay,
    groups,
    job_of,
    of_kind,
    pods,
    ray_clusters,
    ray_job_specs,
)

from jobs.exits import HELD, REFUSED, TOO_MANY_FAILED
from jobs.submit import exit_code
from pipeline.compute import Node, compute
from pipeline.config import Job
from pipeline.lease import TTL_S
from pipeline.submit import State

STOPPED = exit_code(State("STOPPED", "", None))
IMAGE_ROOT = "/opt/polyscribe"


@every_overlay
def test_images_are_those_that_deploy_build_makes(overlay: str) -> None:
    for pod in pods(overlay):
        for container in containers(pod):
            name, _, tag = container["image"].rpartition(":")
            assert tag == PROJECT["version"]
            flavour = name.rpartition("/")[2].removeprefix("polyscribe-")
            assert (ROOT / f"deploy/{flavour}.Dockerfile").exists()
            if "nvidia.com/gpu" in container["resources"]["limits"]:
                assert flavour == "gpu"


def calls_in(overlay: str) -> Iterator[list[str]]:
    for spec in ray_job_specs(overlay):
        yield shlex.split(spec["entrypoint"])
    for pod in pods(overlay):
        for container in containers(pod):
            if "command" in container:
                yield [*container["command"], *container.get("args", [])]


@every_overlay
def test_commands_exist_and_know_their_options(overlay: str) -> None:
    calls = list(calls_in(overlay))
    assert calls
    for program, *words in calls:
        if program == "python":
            assert words[:2] == ["-m", "jobs"]
            words = words[2:]
        elif program == "hf":
            job = job_of(overlay)
            assert words == ["download", job.model.id, "--revision", job.model.revision]
            assert Path(sys.executable).with_name("hf").exists()
            continue
        else:
            assert program in PROJECT["scripts"]
        asked = subprocess.run(
            [sys.executable, "-m", "jobs", words[0], "--help"], capture_output=True, text=True
        )
        assert asked.returncode == 0, asked.stderr
        for word in words:
            assert not word.startswith("--") or word in asked.stdout
        assert words[1] == "/etc/polyscribe/job.yaml"


def test_the_nightly_job_knows_the_exit_codes() -> None:
    (cron,) = of_kind("prod", "CronJob")
    moved, ended = cron["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    # The first rule that fits counts: a pod that is moved ends with 143 as well, and its run goes on.
    assert moved["action"] == "Ignore"
    assert moved["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert ended["action"] == "FailJob"
    assert ended["onExitCodes"]["values"] == [REFUSED, TOO_MANY_FAILED, HELD, STOPPED]
    # What a killed run leaves must be over before the next try gives up.
    assert job_of("prod").limits.wait_for_lease_s > TTL_S


@every_overlay
def test_the_submitter_names_the_clusters_own_service(overlay: str) -> None:
    for cron in of_kind(overlay, "CronJob"):
        (container,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
        (cluster,) = of_kind(overlay, "RayCluster")
        address = container["args"][container["args"].index("--address") + 1]
        assert address == f"http://{cluster['metadata']['name']}-head-svc:8265"
        assert cron["metadata"]["namespace"] == cluster["metadata"]["namespace"]


def test_a_pod_that_is_tried_again_finds_the_run_of_its_night() -> None:
    """Every pod of a Job has the Job's name as a label, and a CronJob puts the scheduled time into it."""
    (cron,) = of_kind("prod", "CronJob")
    (container,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    name = container["args"][container["args"].index("--id") + 1]
    (night,) = [one for one in container["env"] if f"$({one['name']})" == name]
    field = night["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.labels['batch.kubernetes.io/job-name']"


@every_overlay
def test_the_job_fits_the_cluster_at_its_largest_and_starts_at_its_smallest(overlay: str) -> None:
    job = job_of(overlay)
    for cluster in ray_clusters(overlay):
        for replicas in ("minReplicas", "maxReplicas"):
            nodes = [Node(0, 0)]
            pools: list[Node] = []
            for group in cluster["workerGroupSpecs"]:
                limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
                cpus = float(group["rayStartParams"].get("num-cpus", limits["cpu"]))
                gpus = int(limits.get("nvidia.com/gpu", 0))
                pools.append(Node(cpus, gpus))
                # a run waits for the first node with a CPU; GPUs it only asks for
                nodes += [Node(cpus, gpus)] * max(group[replicas], 0 if gpus else 1)
            shares = compute(job, nodes, 1_000_000)
            assert shares.engines == (job.resources.engines or 1)
            # shares are set when a node of the pool is there, or again then
            shares = compute(job, [*nodes, *pools], 1_000_000)
            assert all(pool.gpus * shares.engine_cpus <= pool.cpus for pool in pools)
            # a pod with a GPU and a CPU to give is started for media work as well
            assert all(pool.cpus == 0 for pool in pools if pool.gpus)
        gpus_at_most = sum(node.gpus for node in nodes)
        assert job.resources.engines in (None, gpus_at_most)
        assert not shares.warnings


def test_the_dev_job_uses_what_the_image_holds() -> None:
    job = job_of("dev")
    dockerfile = (ROOT / "deploy/cpu.Dockerfile").read_text()
    for path in (job.input.uri, job.model.id):
        inside = Path(path).relative_to(IMAGE_ROOT)
        assert (ROOT / inside).is_dir()
        assert any(str(inside).startswith(line.split()[1]) for line in copies(dockerfile))
    (output,) = [
        mount["mountPath"]
        for mount in next(pods("dev"))["spec"]["containers"][0]["volumeMounts"]
        if mount["name"] == "output"
    ]
    assert job.output.uri.startswith(output)


def test_patches_reach_the_cluster_that_a_job_gets() -> None:
    """A patch whose target is gone by then is passed over without a word."""
    (dev,) = ray_clusters("dev")
    assert dev["enableInTreeAutoscaling"] is False
    assert [group.get("groupName") for group in groups(dev)] == [None, "cpu"]
    (once,) = ray_clusters("prod-once")
    assert [group.get("groupName") for group in groups(once)] == [None, "cpu", "gpu"]
    assert ray_clusters("raycron") == [once] == ray_clusters("prod")
    (queued,) = ray_clusters("kueue")
    assert [group["replicas"] for group in queued["workerGroupSpecs"]] == [2, 8]


def copies(dockerfile: str) -> list[str]:
    return [line for line in dockerfile.splitlines() if line.startswith("COPY ")]


def test_the_readme_names_what_exists() -> None:
    text = (ROOT / "k8s/README.md").read_text()
    for path in re.findall(r"\b(?:k8s|deploy|jobs)/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path
    for overlay in OVERLAYS:
        assert f"overlays/{overlay}" in text


def test_the_readme_reads_the_log_where_ray_writes_it() -> None:
    """A driver writes to a file of the job server's: `kubectl logs` of the head has nothing of a run."""
    text = (ROOT / "k8s/README.md").read_text()
    calls = re.findall(r"^kubectl -n polyscribe (logs|exec) (.*)$", text, re.MULTILINE)
    assert [verb for verb, _ in calls] == ["exec", "logs"]
    in_head, of_night = (words.partition("  #")[0] for _, words in calls)
    assert in_head.endswith("-c ray-head -- polyscribe logs $run --follow")
    (cron,) = of_kind("prod", "CronJob")
    labels = cron["spec"]["jobTemplate"]["spec"]["template"]["metadata"]["labels"]
    name, value = re.findall(r"-l (\S+)=(\S+)", of_night)[0]
    assert labels[name] == value


SIZED = (
    ("caption", 2.0),
    ("caption", 12.0),
    ("transcribe", None),
    ("describe-video", None),
)


def test_the_sized_examples_fit() -> None:
    """The table of k8s/README.md: GPUs, then CPU pods of 16 for each of SIZED; one less is warned of."""
    cells = r"^\| (\d+) " + r"\| (\d+) " * len(SIZED) + r"\|"
    rows = re.findall(cells, (ROOT / "k8s/README.md").read_text(), re.MULTILINE)
    assert [int(row[0]) for row in rows] == [1, 8, 64]
    for gpus, *pods_16 in ([int(cell) for cell in row] for row in rows):
        head_and_engines = [Node(0, 0), *[Node(0, 1)] * gpus]
        for (task, megapixels), count in zip(SIZED, pods_16, strict=True):
            job = Job.model_validate(
                {
                    "task": task,
                    "input": {"uri": "s3://b/i"},
                    "output": {"uri": "s3://b/o"},
                    "model": {"id": "google/gemma-4-12B-it"},
                }
            )
            for there, warned in ((count, False), (count - 1, True)):
                if there:
                    nodes = [*head_and_engines, *[Node(16, 0)] * there]
                    assert bool(compute(job, nodes, 10**6, megapixels).warnings) == warned
