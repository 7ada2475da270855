"""The manifests: every overlay builds, fits the operator's own schemas, and names only what exists."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from pipeline.compute import Node, compute
from pipeline.config import Job, load_job
from pipeline.submit import STOP_WAIT_S

ROOT = Path(__file__).resolve().parents[1]
OVERLAYS = sorted(path.parent.name for path in ROOT.glob("k8s/overlays/*/kustomization.yaml"))
KUBERNETES = "1.34"
IMAGE_ROOT = "/opt/polyscribe"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RAY_VERSION = next(
    pin.partition("==")[2] for pin in PROJECT["dependencies"] if pin.startswith("ray[")
)

every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)
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


@functools.cache
def crd(kind: str) -> Any:
    """The validator of spec for a ray.io/v1 kind, strict about unknown fields."""
    folder = Path(os.environ.get("POLYSCRIBE_KUBERAY_CRDS", ROOT.parent / "shared/kuberay-crds"))
    if not folder.is_dir():
        pytest.skip(
            f"no KubeRay schemas: {folder} is missing and POLYSCRIBE_KUBERAY_CRDS names no other"
            " folder; ray.io manifests were NOT checked against them"
        )
    (whole,) = yaml.safe_load_all((folder / f"ray.io_{kind.lower()}s.yaml").read_text())
    (version,) = [version for version in whole["spec"]["versions"] if version["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


def strict(schema: Any) -> Any:
    """An OpenAPI schema of a CRD as JSON Schema: no unknown fields, int-or-string, nullable."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items() if not key.startswith("x-")}
    if isinstance(schema.get("properties"), dict):
        # `properties` may itself hold a field that is called type or format
        made["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get(
            "x-kubernetes-preserve-unknown-fields"
        ):
            made["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("anyOf", None)
        made["type"] = ["integer", "string"]
    if schema.get("nullable") is True and isinstance(made.get("type"), str):
        made["type"] = [made["type"], "null"]
    if made.get("format") in ("int32", "int64"):
        made.pop("format")
    return made


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
    source = ROOT / "k8s/overlays" / overlay / "job.yaml"
    if source.exists():
        assert source.read_text() == config["data"]["job.yaml"]
    path = Path(os.environ.get("PYTEST_TMP", "/tmp")) / f"polyscribe-{os.getpid()}.yaml"
    path.write_text(config["data"]["job.yaml"])
    try:
        return load_job(path)
    finally:
        path.unlink()


@every_overlay
def test_ray_kinds_fit_the_operators_schemas(overlay: str) -> None:
    found = of_kind(overlay, "RayCluster", "RayJob", "RayCronJob")
    assert found
    for manifest in found:
        errors = [
            f"{error.json_path}: {error.message[:300]}"
            for error in crd(manifest["kind"]).iter_errors(manifest)
        ]
        assert not errors, errors


def test_the_schema_check_is_strict() -> None:
    manifest = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {},
        "spec": {"entrypoint": "x", "backofLimit": 1},
    }
    (error,) = crd("RayJob").iter_errors(manifest)
    assert "backofLimit" in error.message
    manifest["spec"] = {"entrypoint": "x", "backoffLimit": "two"}
    assert len(list(crd("RayJob").iter_errors(manifest))) == 1


@every_overlay
def test_built_in_kinds_fit_their_schemas(overlay: str) -> None:
    found = [one for one in built(overlay) if not one["apiVersion"].startswith("ray.io/")]
    assert len(found) > 5
    for manifest in found:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@every_overlay
def test_pods_of_ray_kinds_are_pods(overlay: str) -> None:
    """CRDs repeat the pod's schema of their own time; the API server has the last word."""
    for pod in pods(overlay):
        whole = {"apiVersion": "v1", "kind": "Pod", **pod, "metadata": {"name": "x"}}
        kubernetes_validate.validate(whole, KUBERNETES, strict=True)


@every_overlay
def test_the_operators_rules(overlay: str) -> None:
    for spec in ray_job_specs(overlay):
        assert spec["submissionMode"] == "HTTPMode"  # not an enum in the schema
        assert ("deletionStrategy" in spec) != spec.get("shutdownAfterJobFinishes", False)
        if "ttlSecondsAfterFinished" in spec:
            assert spec["shutdownAfterJobFinishes"]
        for rule in spec.get("deletionStrategy", {}).get("deletionRules", []):
            assert len({"jobStatus", "jobDeploymentStatus"} & set(rule["condition"])) == 1
        assert spec["activeDeadlineSeconds"] > 0
        assert spec["backoffLimit"] >= 1
        assert not {"clusterSelector", "rayClusterSpec"} <= set(spec)
    for cluster in ray_clusters(overlay):
        assert cluster["rayVersion"] == RAY_VERSION
        scales = cluster["enableInTreeAutoscaling"]
        assert ("autoscalerOptions" in cluster) or not scales
        names = [group["groupName"] for group in cluster["workerGroupSpecs"]]
        assert len(set(names)) == len(names)
        for group in cluster["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
            assert scales or group["minReplicas"] == group["replicas"]
        for group in groups(cluster):
            # rayStartParams are strings, or the operator drops them
            assert all(isinstance(value, str) for value in group["rayStartParams"].values())
            if scales:
                assert group["template"]["spec"]["restartPolicy"] == "Never"


@every_overlay
def test_the_head_does_no_work_and_stays(overlay: str) -> None:
    (budget,) = of_kind(overlay, "PodDisruptionBudget")
    for cluster in ray_clusters(overlay):
        head = cluster["headGroupSpec"]
        assert head["rayStartParams"]["num-cpus"] == "0"
        labels = head["template"]["metadata"]["labels"]
        assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()
        environment = {
            one["name"]: one.get("value") for one in containers(head["template"])[0]["env"]
        }
        assert environment["RAY_JOB_STOP_WAIT_TIME_S"] == str(STOP_WAIT_S)


@every_overlay
def test_workers_drain_before_they_are_killed(overlay: str) -> None:
    for cluster in ray_clusters(overlay):
        for group in cluster["workerGroupSpecs"]:
            spec = group["template"]["spec"]
            (main,) = spec["containers"]
            environment = {one["name"]: one.get("value") for one in main["env"]}
            assert int(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) == (
                spec["terminationGracePeriodSeconds"] - 10
            )


def test_what_kueue_asks_for() -> None:
    (run,) = of_kind("kueue", "RayJob")
    assert run["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert run["spec"]["suspend"] is True
    assert run["spec"]["shutdownAfterJobFinishes"] is True
    assert run["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is False
    assert len(run["spec"]["rayClusterSpec"]["workerGroupSpecs"]) <= 7


@every_overlay
def test_pods_are_confined(overlay: str) -> None:
    (namespace,) = of_kind(overlay, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for cluster in ray_clusters(overlay):
        if "autoscalerOptions" in cluster:
            assert cluster["autoscalerOptions"]["securityContext"]["readOnlyRootFilesystem"]
    for pod in pods(overlay):
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == 1000
        assert security["seccompProfile"]["type"] == "RuntimeDefault"
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            paths = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert "/tmp" in paths
            assert container["resources"]["requests"] == container["resources"]["limits"] or (
                container["name"] == "submit"
            )


@every_overlay
def test_rights_are_the_least(overlay: str) -> None:
    accounts = {one["metadata"]["name"] for one in of_kind(overlay, "ServiceAccount")}
    assert not of_kind(overlay, "Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding")
    for pod in pods(overlay):
        assert pod["spec"]["serviceAccountName"] in accounts
    for cluster in ray_clusters(overlay):
        scales = cluster["enableInTreeAutoscaling"]
        head, *workers = groups(cluster)
        assert head["template"]["spec"]["automountServiceAccountToken"] is scales
        for group in workers:
            assert group["template"]["spec"]["automountServiceAccountToken"] is False


@every_overlay
def test_every_pod_is_under_a_network_policy_and_ports_meet(overlay: str) -> None:
    policies = of_kind(overlay, "NetworkPolicy")
    for pod in pods(overlay):
        labels = pod["metadata"]["labels"]
        assert [
            policy
            for policy in policies
            if policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
        ]
    for cluster in ray_clusters(overlay):
        (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in head["ports"]}
        assert ports == {"gcs": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}
    (ray,) = [one for one in policies if one["metadata"]["name"] == "polyscribe-ray"]
    (dashboard,) = [rule for rule in ray["spec"]["ingress"] if "ports" in rule]
    assert [port["port"] for port in dashboard["ports"]] == [8265]


@every_overlay
def test_everything_that_is_mounted_exists(overlay: str) -> None:
    claims = {one["metadata"]["name"] for one in of_kind(overlay, "PersistentVolumeClaim")}
    maps = {one["metadata"]["name"] for one in of_kind(overlay, "ConfigMap")}
    for pod in pods(overlay):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        assert len(volumes) == len(pod["spec"]["volumes"])
        for container in containers(pod):
            assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
        for volume in volumes.values():
            assert volume.get("persistentVolumeClaim", {}).get("claimName") in {None, *claims}
            assert volume.get("configMap", {}).get("name") in {None, *maps}


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


@every_overlay
def test_the_submitter_names_the_clusters_own_service(overlay: str) -> None:
    for cron in of_kind(overlay, "CronJob"):
        (container,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
        (cluster,) = of_kind(overlay, "RayCluster")
        address = container["args"][container["args"].index("--address") + 1]
        assert address == f"http://{cluster['metadata']['name']}-head-svc:8265"
        assert cron["metadata"]["namespace"] == cluster["metadata"]["namespace"]


def gibibytes(quantity: str) -> float:
    match = re.fullmatch(r"(\d+)(Gi|Mi)", quantity)
    assert match, quantity
    return int(match[1]) / (1 if match[2] == "Gi" else 1024)


@every_overlay
def test_the_object_store_fits_its_memory(overlay: str) -> None:
    for cluster in ray_clusters(overlay):
        for group in groups(cluster):
            spec = group["template"]["spec"]
            (main,) = spec["containers"]
            memory = gibibytes(main["resources"]["limits"]["memory"])
            given = group["rayStartParams"].get("object-store-memory")
            store = int(given) / 2**30 if given else 0.3 * memory
            (shm,) = [volume for volume in spec["volumes"] if volume["name"] == "shm"]
            assert store <= gibibytes(shm["emptyDir"]["sizeLimit"]) + 0.5
            assert gibibytes(shm["emptyDir"]["sizeLimit"]) < memory


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
                nodes += [Node(cpus, gpus)] * group[replicas]
            shares = compute(job, nodes, 1_000_000)
            assert shares.engines == (job.resources.engines or 1)
            # also of a pool that was empty when the share was set
            assert all(pool.gpus * shares.engine_cpus <= pool.cpus for pool in pools)
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


def test_the_sized_examples_fit() -> None:
    """The table of k8s/README.md: GPUs, CPU pods of 16, at 2 MP and at 12 MP."""
    rows = re.findall(
        r"^\| (\d+) \| (\d+) \| (\d+) \|", (ROOT / "k8s/README.md").read_text(), re.MULTILINE
    )
    assert [int(row[0]) for row in rows] == [1, 8, 64]
    for gpus, small, large in ((int(a), int(b), int(c)) for a, b, c in rows):
        job = Job.model_validate(
            {
                "task": "caption",
                "input": {"uri": "s3://b/i"},
                "output": {"uri": "s3://b/o"},
                "model": {"id": "google/gemma-4-12B-it"},
            }
        )
        engines = [Node(0, 0), *[Node(1, 1)] * gpus]
        for pods_16, megapixels in ((small, 2.0), (large, 12.0)):
            enough = [*engines, *[Node(16, 0)] * pods_16]
            assert not compute(job, enough, 10**6, megapixels).warnings
            fewer = [*engines, *[Node(16, 0)] * (pods_16 - 1)]
            if pods_16 > 1:
                assert compute(job, fewer, 10**6, megapixels).warnings
