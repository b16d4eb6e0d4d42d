"""A cluster for tests: kubectl and helm on the node of scripts/cluster, or on any other by WARDROUND_KUBECONFIG."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHARTS = ROOT / "charts"
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
Object = dict[str, Any]


class Failed(Exception):
    """A command that ended badly: what it was, and all it said."""


class Kube:
    """`log` keeps every command as typed, with its output: the closing note of an issue is cut from it."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._other = os.environ.get("WARDROUND_KUBECONFIG")

    def run(self, program: str, *arguments: str, stdin: str | bytes = b"", timeout_s: float = 180, quiet: bool = False) -> str:
        """Standard output. Raises Failed."""
        command = [program, "--kubeconfig", self._other] if self._other else [str(ROOT / "scripts" / "cluster"), program]
        data = stdin.encode() if isinstance(stdin, str) else stdin
        done = subprocess.run([*command, *arguments], input=data, capture_output=True, timeout=timeout_s, check=False)
        out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        if not quiet:
            with self.log.open("a") as file:
                file.write(f"$ {program} {' '.join(arguments)}\n{out}{err}\n")
        if done.returncode:
            raise Failed(f"{program} {' '.join(arguments)}: {out}{err}")
        return out

    def kubectl(self, *arguments: str, stdin: str | bytes = b"", timeout_s: float = 180, quiet: bool = False) -> str:
        return self.run("kubectl", *arguments, stdin=stdin, timeout_s=timeout_s, quiet=quiet)

    def binary(self, *arguments: str) -> bytes:
        """kubectl's standard output as it is."""
        command = [str(ROOT / "scripts" / "cluster"), "kubectl"] if not self._other else ["kubectl", "--kubeconfig", self._other]
        return subprocess.run([*command, *arguments], capture_output=True, timeout=180, check=True).stdout

    def helm(self, *arguments: str, values: Object | None = None, timeout_s: float = 400) -> str:
        given = [] if values is None else ["--values", "-"]
        return self.run("helm", *arguments, *given, stdin=yaml.safe_dump(values or {}), timeout_s=timeout_s)

    def apply(self, *objects: Object) -> None:
        self.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(objects), quiet=True)

    def get(self, kind: str, name: str = "", namespace: str = "default", selector: str = "") -> Any:
        """An object, or the items of a list; an empty dictionary where there is none."""
        arguments = ["get", kind, *([name] if name else []), "-n", namespace, "-o", "json", "--ignore-not-found"]
        text = self.kubectl(*arguments, *(["-l", selector] if selector else []), quiet=True)
        value = json.loads(text or "{}")
        return value if name else value.get("items", [])

    def storage_class(self) -> None:
        self.apply(
            {"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": "wr"},
             "provisioner": "kubernetes.io/no-provisioner", "volumeBindingMode": "Immediate"}
        )  # fmt: skip

    def namespace(self, name: str) -> None:
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": RESTRICTED}})

    def volume(self, name: str, namespace: str, claim: str, path: Path, mode: str = "ReadWriteOnce", make: bool = False) -> None:
        """A local PersistentVolume of this node for one claim; with `make` the claim too. Local volumes know fsGroup, as
        block volumes of a real cluster do."""
        reference = {"namespace": namespace, "name": claim}
        term = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": ["node1"]}]}
        spec = {
            "capacity": {"storage": "50Gi"}, "accessModes": [mode], "storageClassName": "wr", "claimRef": reference,
            "persistentVolumeReclaimPolicy": "Retain", "local": {"path": str(path)},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [term]}},
        }  # fmt: skip
        self.apply({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": spec})
        if make:
            wanted = {"accessModes": [mode], "storageClassName": "wr", "volumeName": name}
            self.apply(
                {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": claim, "namespace": namespace},
                 "spec": wanted | {"resources": {"requests": {"storage": "1Gi"}}}}
            )  # fmt: skip

    def until(self, what: str, ready: Callable[[], Any], timeout_s: float = 240) -> Any:
        """What `ready` returns, once it is true. Raises Failed with the state of every pod."""
        deadline = time.monotonic() + timeout_s
        while not (value := ready()):
            if time.monotonic() > deadline:
                pods = self.kubectl("get", "pods", "-A", "-o", "wide")
                raise Failed(f"{what} did not come about in {timeout_s:.0f} s\n{pods}")
            time.sleep(1.0)
        return value

    def pod(self, namespace: str, app: str) -> str:
        """The name of the newest pod of an app that is not on its way out; empty where there is none."""
        pods = [p for p in self.get("pods", namespace=namespace, selector=f"app.kubernetes.io/name={app}")]
        live = [p for p in pods if "deletionTimestamp" not in p["metadata"] and p["status"].get("phase") in ("Pending", "Running")]
        return max(live, key=lambda p: p["metadata"]["creationTimestamp"])["metadata"]["name"] if live else ""


def stranger(namespace: str, name: str, **volumes: Any) -> Object:
    """A pod that nobody invited, as `restricted` lets it in."""
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    container = {
        "name": "c", "image": "ghcr.io/wardround/aggregator:0.1.0", "imagePullPolicy": "Never", "command": ["sleep", "600"],
        "securityContext": security,
    }  # fmt: skip
    spec = {
        "securityContext": {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container], "terminationGracePeriodSeconds": 1,
    }  # fmt: skip
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace}, "spec": spec | volumes}
