"""Rules of KubeRay's operator that its schemas do not hold; it would refuse the object, or drop a field.

From ray-operator/controllers/ray/utils/validation.go of KubeRay 1.7.0, for the fields that are used here.
"""

from __future__ import annotations

import re
import zoneinfo

from manifests import (
    RAY_KINDS,
    RAY_VERSION,
    Manifest,
    environment,
    every_overlay,
    groups,
    of_kind,
    ray_clusters,
    ray_job_specs,
)

# What the operator puts into the names of what it makes.
LONGEST_NAME = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36}


@every_overlay
def test_names_leave_room_for_what_the_operator_adds(overlay: str) -> None:
    for manifest in of_kind(overlay, *RAY_KINDS):
        name = manifest["metadata"]["name"]
        assert len(name) <= LONGEST_NAME[manifest["kind"]]
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)


@every_overlay
def test_jobs(overlay: str) -> None:
    for spec in ray_job_specs(overlay):
        assert spec["submissionMode"] == "HTTPMode"  # not an enum in the schema
        assert spec["activeDeadlineSeconds"] > 0
        assert spec.get("preRunningDeadlineSeconds", 1) > 0
        assert spec["backoffLimit"] >= 1
        assert "rayClusterSpec" in spec
        assert "clusterSelector" not in spec
        if spec.get("suspend"):
            assert spec["shutdownAfterJobFinishes"]
        if "ttlSecondsAfterFinished" in spec:
            assert spec["shutdownAfterJobFinishes"]


@every_overlay
def test_deletion(overlay: str) -> None:
    """Either by rules or by shutdown; the cluster no later than the job; and failures of every kind."""
    for spec in ray_job_specs(overlay):
        if spec.get("shutdownAfterJobFinishes"):
            assert "deletionStrategy" not in spec
            continue
        (key,) = spec["deletionStrategy"]
        assert key == "deletionRules"
        after: dict[str, dict[str, int]] = {}
        for rule in spec["deletionStrategy"]["deletionRules"]:
            (status,) = {"jobStatus", "jobDeploymentStatus"} & set(rule["condition"])
            policies = after.setdefault(rule["condition"][status], {})
            assert rule["policy"] not in policies
            policies[rule["policy"]] = rule["condition"]["ttlSeconds"]
        # Past a deadline the job's own status stays RUNNING: only the deployment's says Failed.
        assert set(after) == {"SUCCEEDED", "Failed"}
        for policies in after.values():
            assert set(policies) == {"DeleteCluster", "DeleteSelf"}
            assert policies["DeleteCluster"] <= policies["DeleteSelf"]


@every_overlay
def test_clusters(overlay: str) -> None:
    for cluster in ray_clusters(overlay):
        assert cluster["rayVersion"] == RAY_VERSION
        scales = cluster["enableInTreeAutoscaling"]
        version = cluster.get("autoscalerOptions", {}).get("version")
        assert version == ("v2" if scales else None)
        names = [group["groupName"] for group in cluster["workerGroupSpecs"]]
        assert len(set(names)) == len(names)
        for group in cluster["workerGroupSpecs"]:
            assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
            assert scales or group["minReplicas"] == group["replicas"]
            # The operator refuses it where autoscaler v2 is not asked for.
            assert ("idleTimeoutSeconds" in group) == (version == "v2")
            assert group.get("idleTimeoutSeconds", 0) >= 0
        for group in groups(cluster):
            check_group(group, scales)


def check_group(group: Manifest, scales: bool) -> None:
    # rayStartParams are strings, or the operator drops them
    assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    assert "labels" not in group["rayStartParams"]
    assert "resources" not in group
    spec = group["template"]["spec"]
    if scales:
        assert spec["restartPolicy"] == "Never"
    names = set(environment(spec["containers"][0]))
    assert not names & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "RAY_enable_autoscaler_v2"}


@every_overlay
def test_schedules(overlay: str) -> None:
    for cron in of_kind(overlay, "RayCronJob", "CronJob"):
        spec = cron["spec"]
        assert re.fullmatch(r"([\d*/,-]+ ){4}[\d*/,-]+", spec["schedule"])
        assert spec["timeZone"] in zoneinfo.available_timezones()


def test_what_kueue_asks_for() -> None:
    (run,) = of_kind("kueue", "RayJob")
    assert run["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert run["spec"]["suspend"] is True
    assert run["spec"]["shutdownAfterJobFinishes"] is True
    assert run["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is False
    assert len(run["spec"]["rayClusterSpec"]["workerGroupSpecs"]) <= 7
