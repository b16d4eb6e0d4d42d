"""Three hospitals and an aggregator on a cluster, by the commands of the journey. Trainers are Jobs at two and resident at one; one
hospital's way out is a CONNECT proxy with a login."""

import io
import os
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

import yaml

from sandbox.dicom import write_hospitals
from sandbox.processes import tool
from sandbox.scanner import HOSPITALS
from tests.cluster.kube import CHARTS, ROOT, Kube, Object

NAMES = tuple(hospital.name for hospital in HOSPITALS)
JOBS, PROXIED = NAMES[:2], NAMES[0]
NUM_PATIENTS = 16
SEED = 7
IMAGE = {"pullPolicy": "Never"}
SMALL = {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "3Gi"}}
NS = "wardround"
SITE = ROOT / ".venv" / "lib" / "python3.11" / "site-packages"
CACHE = Path(os.environ.get("WARDROUND_CACHE", Path.home() / ".cache" / "wardround"))
TORCH = "/usr/local/lib/python3.11/dist-packages"  # where the base image of a trainer would have it


def at(silo: str) -> str:
    return f"silo-{silo}"


def trainers_of(silo: str) -> str:
    return f"train-{silo}" if silo in JOBS else at(silo)


class Federation:
    """`folder` holds the volumes and the coordinator's files."""

    def __init__(self, kube: Kube, folder: Path) -> None:
        self.kube, self.folder = kube, folder
        self.commands = 0

    # --- what a cluster has before anybody installs anything --------------------------------------------------------------------

    def prepare(self) -> None:
        self.kube.storage_class()
        self.kube.namespace(NS)
        for claim in ("aggregator-data", "mlflow-data"):
            self.kube.volume(claim, NS, claim, self._folder(claim))
        images = write_hospitals(CACHE / "dicom", HOSPITALS, NUM_PATIENTS, SEED)
        for silo in NAMES:
            home, train = at(silo), trainers_of(silo)
            self.kube.namespace(home)
            self.kube.volume(f"{home}-data", home, "silo-agent-data", self._folder(f"{home}-data"))
            snapshots = self._folder(f"{home}-snapshots")
            self.kube.volume(f"{home}-snapshots", home, "silo-snapshots", snapshots)
            self.kube.volume(f"{home}-dicom", home, "dicom-research", images[silo], "ReadOnlyMany", make=True)
            self.kube.volume(f"{home}-site", home, "site", SITE, "ReadOnlyMany", make=True)
            if silo in JOBS:
                self.kube.namespace(train)
                self.kube.volume(f"{train}-snapshots", train, "silo-snapshots", snapshots, "ReadOnlyMany", make=True)
                self.kube.volume(f"{train}-site", train, "site", SITE, "ReadOnlyMany", make=True)
        self._proxy()

    def _folder(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir(parents=True)
        return path

    def _proxy(self) -> None:
        """Between PROXIED and the aggregator: allows one target, wants a login."""
        self.kube.namespace("dmz")
        program = (
            "import threading; from connect_proxy import ConnectProxy; "
            f"ConnectProxy('aggregator.{NS}.svc:443', 'hospital:secret', ('0.0.0.0', 3128)); threading.Event().wait()"
        )
        source = (ROOT / "tests" / "support" / "connect_proxy.py").read_text()
        security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        container = {
            "name": "proxy", "image": "ghcr.io/wardround/aggregator:0.1.0", "imagePullPolicy": "Never", "workingDir": "/proxy",
            "command": ["python", "-c", program], "securityContext": security,
            "ports": [{"containerPort": 3128, "protocol": "TCP"}], "volumeMounts": [{"name": "proxy", "mountPath": "/proxy"}],
        }  # fmt: skip
        spec = {
            "securityContext": {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [container], "volumes": [{"name": "proxy", "configMap": {"name": "proxy"}}],
            "terminationGracePeriodSeconds": 1,
        }  # fmt: skip
        labels = {"app": "proxy"}
        meta = {"namespace": "dmz", "name": "proxy"}
        self.kube.apply(
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"connect_proxy.py": source}},
            {"apiVersion": "v1", "kind": "Pod", "metadata": meta | {"labels": labels}, "spec": spec},
            {"apiVersion": "v1", "kind": "Service", "metadata": meta,
             "spec": {"selector": labels, "ports": [{"port": 3128, "protocol": "TCP"}]}},
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"namespace": at(PROXIED), "name": "proxy-login"},
             "stringData": {"login": "hospital:secret"}},
        )  # fmt: skip

    # --- the journey ------------------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """From nothing to three hospitals in a signed roster: the commands of docs/install.md, counted."""
        self.found()
        self._helm("install", "crds", str(CHARTS / "crds"), "-n", NS)
        self._helm("install", "wardround", str(CHARTS / "aggregator"), "-n", NS, "--wait", values=self.aggregator_values())
        letters = self._aggregator_bytes("silo", "token", *NAMES, "--out", "-")
        with tarfile.open(fileobj=io.BytesIO(letters)) as archive:
            archive.extractall(self.folder, filter="data")
        for silo in NAMES:
            self._helm("install", "silo", str(CHARTS / "silo-agent"), "-n", at(silo), "--wait", "--timeout", "6m",
                       values=self.silo_values(silo))  # fmt: skip
        self.publish()

    def found(self) -> None:
        self._typed("wardround", "operator", "init", "--federation", "neuro", "--out", "operator.key")

    def publish(self) -> None:
        """One pipeline of three."""
        draft = self.aggregator("roster", "draft")
        signed = self._typed("wardround", "roster", "sign", "--key", "operator.key", "-", stdin=draft)
        self.aggregator("roster", "publish", stdin=signed)
        self.commands -= 2  # one line

    def aggregator_values(self) -> Object:
        key = (self.folder / "operator.pub").read_text()
        return {
            "host": f"aggregator.{NS}.svc", "operator": {"publicKey": key}, "image": IMAGE, "service": {"type": "ClusterIP"},
            "storage": {"storageClassName": "wr", "size": "1Gi"}, "resources": SMALL,
            "mlflow": {"storage": {"storageClassName": "wr", "size": "1Gi"}, "resources": SMALL},
        }  # fmt: skip

    def silo_values(self, silo: str) -> Object:
        """The coordinator's file, and the hospital's own."""
        letter = yaml.safe_load((self.folder / f"wardround-{silo}.yaml").read_text())
        hospital = next(h for h in HOSPITALS if h.name == silo)
        torch: Object = {
            "extraVolumes": [{"name": "site", "persistentVolumeClaim": {"claimName": "site", "readOnly": True}}],
            "extraVolumeMounts": [{"name": "site", "mountPath": TORCH, "readOnly": True}],
            "resources": SMALL,
        }
        trainer = torch | ({"mode": "job", "namespace": trainers_of(silo), "createNamespace": False} if silo in JOBS else {})
        out = [{"to": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": NS}}}],
                "ports": [{"port": 8443, "protocol": "TCP"}]}]  # fmt: skip
        proxy = {"proxy": {"url": "http://proxy.dmz.svc:3128", "existingSecret": "proxy-login"}}
        return letter | {
            "image": IMAGE, "agent": {"resources": SMALL}, "rosterApproval": "signed",
            "policy": {"rules": {"allow_without_privacy": True, "release": ["registry", "silos-only"], "metrics": "per_silo"}},
            "storage": {"storageClassName": "wr", "size": "1Gi"},
            "snapshots": {"storageClassName": "wr", "size": "1Gi"} | ({"trainerClaim": "silo-snapshots"} if silo in JOBS else {}),
            "datasets": {"brain-t1": {"source": {"existingClaim": "dicom-research"}, "labels": {"segments": dict(hospital.binding)},
                                      "declaredPatients": NUM_PATIENTS}},
            "ingest": torch, "trainer": trainer, "network": proxy if silo == PROXIED else {"egress": out},
        }  # fmt: skip

    def run(self, name: str, plan: Object, **spec: Any) -> None:
        body = {
            "apiVersion": "federation.wardround.org/v1alpha1", "kind": "FederationRun",
            "metadata": {"name": name, "namespace": NS}, "spec": {"plan": plan} | spec,
        }  # fmt: skip
        self.kube.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(body))
        self.commands += 1

    def status(self, name: str) -> Object:
        found = self.kube.get("federationruns", name, NS)
        status: Object = found.get("status", {}) if found else {}
        return status

    def until_round(self, name: str, number: int, timeout_s: float = 400) -> None:
        def ready() -> bool:
            status = self.status(name)
            assert status.get("phase") not in ("Failed", "Invalid", "Stopped"), status
            return bool(status.get("round", 0) >= number or status.get("phase") == "Completed")

        self.kube.until(f"round {number} of {name}", ready, timeout_s)

    def until_completed(self, name: str, timeout_s: float = 400) -> Object:
        began = time.monotonic()

        def ready() -> bool:
            status = self.status(name)
            assert status.get("phase") not in ("Failed", "Invalid", "Stopped"), status
            return status.get("phase") == "Completed"

        self.kube.until(f"the end of {name}", ready, timeout_s)
        with self.kube.log.open("a") as file:
            file.write(f"# {name} completed after {time.monotonic() - began:.0f} s of waiting\n")
        return self.status(name)

    # --- commands ---------------------------------------------------------------------------------------------------------------

    def aggregator(self, *arguments: str, stdin: str = "") -> str:
        self.commands += 1
        container = ["exec", "-i", "deploy/aggregator", "-c", "aggregator", "-n", NS, "--", "aggregator"]
        return self.kube.kubectl(*container, *arguments, stdin=stdin)

    def _aggregator_bytes(self, *arguments: str) -> bytes:
        self.commands += 1
        return self.kube.binary("exec", "deploy/aggregator", "-c", "aggregator", "-n", NS, "--", "aggregator", *arguments)

    def silo(self, silo: str, *arguments: str) -> str:
        return self.kube.kubectl("exec", "deploy/silo-agent", "-c", "silo-agent", "-n", at(silo), "--", "silo-agent", *arguments)

    def _helm(self, *arguments: str, values: Object | None = None) -> None:
        self.commands += 1
        self.kube.helm(*arguments, values=values)

    def _typed(self, program: str, *arguments: str, stdin: str = "") -> str:
        self.commands += 1
        done = subprocess.run(
            tool(program, *arguments), cwd=self.folder, input=stdin, capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout
