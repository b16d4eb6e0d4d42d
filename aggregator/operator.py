"""The operator: FederationRun objects become runs, and objects mirror what the server's store says. The store is the truth.

A program of its own beside the server: it holds the Kubernetes token of one namespace, and neither database nor key. It lists,
reconciles every object to where it stands, watches for a change, and lists again after 30 s at most: level-triggered, so that
nothing it missed, and no death of it, leaves an object wrong for longer. Deleting an object stops its run; no finalizer holds
anything back.
"""

import json
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from aggregator.telemetry import log
from wardround.errors import BY_CODE, Disconnected, WardroundError
from wardround.kube import Api, Object

GROUP = "federation.wardround.org"
VERSION = "v1alpha1"
LOOK_S = 2.0  # between two looks at the server while something moves
CONTROL_TIMEOUT_S = 30.0
MAX_ANSWER_BYTES = 16 << 20
PHASES = {"pending": "Pending", "running": "Running", "completed": "Completed", "failed": "Failed", "aborted": "Stopped"}
PAUSED = "spec.state of its FederationRun is Paused"  # as the store has it: only such a pause is the object's to end
OVER = ("Completed", "Failed", "Stopped", "Invalid")


class Server:
    """The server's control socket (control.py)."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def ask(self, **asked: str) -> dict[str, Any]:
        """Raises what the server said no with, or Disconnected."""
        try:
            with socket.socket(socket.AF_UNIX) as line:
                line.settimeout(CONTROL_TIMEOUT_S)
                line.connect(str(self._path))
                with line.makefile("rwb") as file:
                    file.write(json.dumps(asked).encode() + b"\n")
                    file.flush()
                    answer: dict[str, Any] = json.loads(file.readline(MAX_ANSWER_BYTES))
        except (OSError, ValueError):
            raise Disconnected("the server of this pod does not answer yet") from None
        if "error" in answer:
            raise BY_CODE.get(answer["error"], WardroundError)(answer["message"])
        return answer


@dataclass
class Operator:
    """`reconcile` is one pass over everything; `run` repeats it."""

    api: Api
    namespace: str
    server: Server
    mlflow: str = ""  # where people look at runs; in each object's status

    def __post_init__(self) -> None:
        base = f"/apis/{GROUP}/{VERSION}/namespaces/{self.namespace}"
        self._runs, self._silos = f"{base}/federationruns", f"{base}/silos"
        self._events = f"/api/v1/namespaces/{self.namespace}/events"

    def run(self) -> None:
        """Until SIGTERM, at any point: nothing is kept here. Trouble is logged once and tried again."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: sys.exit(0))
        last: str | None = None
        while True:
            said, moving = "", True
            try:
                moving = self.reconcile()
                if not moving:
                    self._watch()
            except WardroundError as error:
                said = f"{error.code}: {error}"
            if said != last:
                last = said
                log.info("operator works") if not said else log.warning("operator waits", reason=said)
            if said or moving:
                time.sleep(LOOK_S)

    def _watch(self) -> None:
        """Returns at the first change, or after the watch's own end."""
        listed = self.api.get(self._runs, limit="1") or {}
        for _ in self.api.watch(self._runs, str(listed.get("metadata", {}).get("resourceVersion", ""))):
            return

    def reconcile(self) -> bool:
        """One pass: every FederationRun to where its run stands, every silo to its mirror. True while a run moves."""
        objects = (self.api.get(self._runs) or {}).get("items", [])
        for item in objects:
            if not item.get("status", {}).get("run") and item.get("status", {}).get("phase") not in OVER:
                self._submit(item)
        seen = self.server.ask(do="look")
        by = {_who(item): item for item in objects}
        runs = {row["by"]: row for row in seen["runs"]}
        for who, row in runs.items():
            if who in by:
                self._follow(by[who], row)
            elif who.startswith("FederationRun ") and row["phase"] in ("pending", "running"):
                self.server.ask(do="stop", run=row["run"], by="the deletion of its FederationRun")
        self._mirror(seen["silos"])
        return any(row["phase"] in ("pending", "running") for row in seen["runs"])

    # --- runs ------------------------------------------------------------------------------------------------------------------

    def _submit(self, item: Object) -> None:
        """A plan that does not hold is said in the object's status and event; nothing is made."""
        if item["spec"].get("state") == "Stopped":
            return
        try:
            plan = item["spec"]["plan"] | ({"rehearse": True} if item["spec"].get("rehearse") else {})
            self.server.ask(do="submit", plan=yaml.safe_dump(plan, sort_keys=False), by=_who(item))
        except Disconnected:
            raise
        except WardroundError as error:
            told = "; ".join(str(error).splitlines())
            waits = "published roster has" in told or error.code == "settings"  # too few silos yet, or no roster
            self._status(item, {"phase": "Waiting" if waits else "Invalid", "message": told}, "False", "NotAccepted", told)

    def _follow(self, item: Object, row: Mapping[str, Any]) -> None:
        wanted, moving = item["spec"].get("state", "Running"), row["phase"] in ("pending", "running")
        if moving and wanted == "Stopped":
            self.server.ask(do="stop", run=row["run"], by=_who(item))
        elif moving and wanted == "Paused" and not row["paused"]:
            self.server.ask(do="pause", run=row["run"], reason=PAUSED, by=_who(item))
        elif moving and wanted == "Running" and row["paused"] == PAUSED:
            self.server.ask(do="pause", run=row["run"], reason="", by=_who(item))
        status = {
            "run": row["run"],
            "rehearsal": row["rehearsal"],
            "phase": "Paused" if moving and row["paused"] else PHASES[row["phase"]],
            "round": row["round"],
            "rounds": row["rounds"],
            "progress": f"{min(row['round'], row['rounds'])}/{row['rounds']}",
            "silos": len(row["joined"]),
            "epsilon": row["epsilon"],
            "joined": row["joined"],
            "waitingFor": ", ".join(row["waiting_for"]),
            "refused": row["refused"],
            "message": row["situation"],
            "planDigest": row["plan_digest"],
            "mlflow": self.mlflow,
        }
        done = {"completed": "True", "failed": "False", "aborted": "False"}.get(row["phase"], "Unknown")
        self._status(item, status, done, status["phase"], row["situation"])

    def _status(self, item: Object, status: dict[str, Any], done: str, reason: str, told: str) -> None:
        """Written when it differs; an event when the phase does."""
        old = item.get("status", {})
        before: dict[str, Any] = next((c for c in old.get("conditions", []) if c["type"] == "Completed"), {})
        changed = before.get("lastTransitionTime") if before.get("status") == done else None
        condition = {
            "type": "Completed", "status": done, "reason": reason, "message": told, "lastTransitionTime": changed or _now(),
            "observedGeneration": item["metadata"].get("generation", 0),
        }  # fmt: skip
        status = status | {"conditions": [condition], "observedGeneration": item["metadata"].get("generation", 0)}
        if {k: old.get(k) for k in status} == status:
            return
        self.api.patch(f"{self._runs}/{item['metadata']['name']}/status", {"status": status})
        if old.get("phase") != status["phase"]:
            self._event(item, status["phase"], told)
            log.info("federationrun", name=item["metadata"]["name"], phase=status["phase"], reason=told)

    def _event(self, item: Object, reason: str, told: str) -> None:
        meta = item["metadata"]
        body = {
            "apiVersion": "v1", "kind": "Event",
            "metadata": {"generateName": f"{meta['name']}.", "namespace": self.namespace},
            "involvedObject": {
                "apiVersion": f"{GROUP}/{VERSION}", "kind": "FederationRun", "name": meta["name"], "namespace": self.namespace,
                "uid": meta["uid"],
            },
            "type": "Warning" if reason in ("Failed", "Invalid") else "Normal", "reason": reason, "message": told[:1000],
            "source": {"component": "wardround-operator"}, "firstTimestamp": _now(), "lastTimestamp": _now(), "count": 1,
        }  # fmt: skip
        with suppress(WardroundError):  # an event is a courtesy
            self.api.create(self._events, body)

    # --- silos -----------------------------------------------------------------------------------------------------------------

    def _mirror(self, rows: list[dict[str, Any]]) -> None:
        there = {item["metadata"]["name"]: item for item in (self.api.get(self._silos) or {}).get("items", [])}
        for row in rows:
            name, seen = row["silo"], row["last_seen_ms"]
            if name not in there:
                self.api.create(self._silos, {"apiVersion": f"{GROUP}/{VERSION}", "kind": "Silo", "metadata": {"name": name}})
            status = {
                "standing": row["standing"], "version": row["version"], "activity": row["activity"],
                "approvedRoster": row["approved_roster"],
            }  # fmt: skip
            if seen:
                # By the minute: a poll every 20 s is no news.
                status["lastSeen"] = _time(seen // 60_000 * 60_000)
            old = there.get(name, {}).get("status", {})
            if {k: old.get(k) for k in status} != status:
                self.api.patch(f"{self._silos}/{name}/status", {"status": status})
        for name in there.keys() - {row["silo"] for row in rows}:
            self.api.delete(f"{self._silos}/{name}")  # a mirror of nothing


def _who(item: Object) -> str:
    """Names this very object: one that is deleted and made again is another."""
    return f"FederationRun {item['metadata']['name']} {item['metadata']['uid']}"


def _now() -> str:
    return _time(int(time.time() * 1000))


def _time(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
