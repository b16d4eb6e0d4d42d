"""The objects of kubectl: a schema that a strict API server takes (`helm lint` looks at no CRD), with what the operator writes."""

from typing import Any

import pytest

from tests.charts.conftest import Render

KNOWN = {
    "type", "description", "properties", "items", "required", "enum", "default", "format", "x-kubernetes-validations",
    "x-kubernetes-preserve-unknown-fields",
}  # fmt: skip


def unknown(schema: dict[str, Any], path: str = "") -> list[str]:
    """Keys that no schema has, e.g. half of a description with a comma in it."""
    found = [f"{path}.{key}" for key in schema if key not in KNOWN]
    for name, below in schema.get("properties", {}).items():
        found += unknown(below, f"{path}.{name}")
    return found + (unknown(schema["items"], f"{path}[]") if "items" in schema else [])


@pytest.mark.parametrize("kind", ["FederationRun", "Silo"])
def test_the_schema_has_only_keys_of_a_schema(render: Render, kind: str) -> None:
    crd = next(item for item in render("crds", {}) if item["spec"]["names"]["kind"] == kind)
    assert unknown(crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]) == []


def test_what_the_operator_writes_is_declared(render: Render) -> None:
    """The API server drops what is not, without a word."""
    crd = next(item for item in render("crds", {}) if item["spec"]["names"]["kind"] == "FederationRun")
    declared = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]
    written = {
        "run", "rehearsal", "phase", "round", "rounds", "progress", "silos", "epsilon", "joined", "waitingFor", "refused",
        "message",        "planDigest", "mlflow", "conditions", "observedGeneration",
    }  # fmt: skip
    assert set(declared) == written
