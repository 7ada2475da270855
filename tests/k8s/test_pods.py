"""What pods may do, what they mount, whom they reach, and whether their memory adds up."""

from __future__ import annotations

import re
from ipaddress import ip_address, ip_network

from manifests import (
    Manifest,
    containers,
    every_overlay,
    groups,
    job_of,
    of_kind,
    pods,
    ray_clusters,
)

from pipeline.submit import STOP_WAIT_S


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


def gibibytes(quantity: str) -> float:
    match = re.fullmatch(r"(\d+)(Gi|Mi)", quantity)
    assert match, quantity
    return int(match[1]) / (1 if match[2] == "Gi" else 1024)


@every_overlay
def test_pods_reach_what_the_readme_says_and_not_the_nodes_rights(overlay: str) -> None:
    (policy,) = [
        one
        for one in of_kind(overlay, "NetworkPolicy")
        if one["metadata"]["name"] == "polyscribe-ray"
    ]

    def reached(address: str, port: int) -> bool:
        return any(
            port in {one["port"] for one in rule.get("ports", [])}
            and any(admits(peer["ipBlock"], address) for peer in rule.get("to", [ANYWHERE]))
            for rule in policy["spec"]["egress"]
            if "podSelector" not in rule.get("to", [ANYWHERE])[0]
        )

    assert reached("93.184.215.14", 443)
    assert reached("93.184.215.14", 80)
    assert reached("169.254.169.252", 988)  # GKE's metadata server
    assert reached("169.254.170.23", 80)  # EKS Pod Identity's agent
    assert not reached("169.254.169.254", 80)  # a node's
    (dashboard,) = [rule for rule in policy["spec"]["ingress"] if "ports" in rule]
    (operator,) = [peer for peer in dashboard["from"] if "namespaceSelector" in peer]
    (names,) = operator["namespaceSelector"]["matchExpressions"]
    assert {"ray-system", "default"} <= set(names["values"])
    assert operator["podSelector"]["matchLabels"]  # not whoever is in these namespaces


ANYWHERE = {"ipBlock": {"cidr": "0.0.0.0/0"}}


def admits(block: Manifest, address: str) -> bool:
    def within(cidr: str) -> bool:
        return ip_address(address) in ip_network(cidr)

    return within(block["cidr"]) and not any(within(one) for one in block.get("except", []))


# Ray's session with its logs, and blocks that it spills.
RAYS_TMP_GIB = 8


@every_overlay
def test_the_cache_of_files_fits_its_volume(overlay: str) -> None:
    """A pod whose volume outgrows its limit is evicted, and its successor likewise."""
    cache = job_of(overlay).fetch.max_cache_bytes / 2**30
    for cluster in ray_clusters(overlay):
        for group in cluster["workerGroupSpecs"]:
            spec = group["template"]["spec"]
            if group["rayStartParams"].get("num-cpus") == "0":
                continue  # no media tasks there
            (tmp,) = [volume for volume in spec["volumes"] if volume["name"] == "tmp"]
            assert cache + RAYS_TMP_GIB <= gibibytes(tmp["emptyDir"]["sizeLimit"])


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
