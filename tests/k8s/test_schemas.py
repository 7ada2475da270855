"""Every overlay builds, and fits the schemas of KubeRay's operator and of the API server, strictly."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from manifests import KUBERNETES, RAY_KINDS, ROOT, built, every_overlay, of_kind, pods


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


@every_overlay
def test_ray_kinds_fit_the_operators_schemas(overlay: str) -> None:
    found = of_kind(overlay, *RAY_KINDS)
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
