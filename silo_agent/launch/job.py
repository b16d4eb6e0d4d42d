"""How a trainer comes to be in a cluster: a Job that the agent creates when there is work, or a pod that someone else keeps.

The Job's name is wr-<silo>-<lease>. The lease is durable before the Job is created and names it, so an agent that is killed between
the two, or finds a Job of that name (409), adopts it: there is never a second one. What a pod waits for is no failure: it is said,
here, in `silo-agent status` and to the coordinator, and waited for.
"""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import yaml

from silo_agent.telemetry import log
from wardround.canonical import canonical_json, sha256
from wardround.errors import Disconnected, SettingsError
from wardround.kube import Api, Object

RESTART_WAIT_S = 10.0  # between two Jobs: one that fails at once must not fill the cluster; twice as long for each that follows
MAX_RESTART_WAIT_S = 300.0
STEADY_S = 300.0  # a trainer that ends after this has worked: the next one need not wait longer
LOOK_S = 5.0  # between two looks at a Job that is not running yet
MAX_MESSAGE_CHARS = 300  # of what Kubernetes says
SILENT_S = 60.0  # a resident helper asks at least every 20 s
MADE_FROM = "wardround.org/template"  # the annotation with the digest of the Job's template
CANNOT_PULL = frozenset({"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"})


class Leases(Protocol):
    """What job.py needs of the desk's door."""

    @property
    def lease(self) -> int: ...

    def next_lease(self) -> int: ...

    def lease_token(self, lease: int) -> str: ...


def load_template(path: Path) -> Object:
    """The Job as the chart rendered it; name, labels and token are added. Raises SettingsError."""
    try:
        template = yaml.safe_load(path.read_bytes())
        template["spec"]["template"]["spec"]["containers"][0]["env"]
        template["metadata"]["namespace"]
    except OSError as error:
        raise SettingsError(f"cannot read pods.job: {error.strerror}") from None
    except (yaml.YAMLError, KeyError, TypeError, IndexError):
        raise SettingsError("pods.job is not the trainer's Job as the chart renders it") from None
    return dict(template)


class JobHelper:
    """The trainer as a Job. `situation` is one sentence while it is not at work yet, else empty."""

    program = "trainer"

    def __init__(self, api: Api, template: Object, silo: str, leases: Leases, certificate: bytes) -> None:
        self._api, self._template, self._silo, self._leases, self._certificate = api, template, silo, leases, certificate
        namespace = template["metadata"]["namespace"]
        self._jobs = f"/apis/batch/v1/namespaces/{namespace}/jobs"
        self._pods = f"/api/v1/namespaces/{namespace}/pods"
        self._events = f"/api/v1/namespaces/{namespace}/events"
        self._made_from = sha256(canonical_json(template)).hex()
        self._failures, self._failed_lease = 0, 0
        self._started = self._looked = -RESTART_WAIT_S
        self.situation = ""

    def ensure(self) -> bool:
        """One trainer is there or on its way. True when a Job was created now. Raises SettingsError, MessageError."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return False
        self._looked = now
        try:
            job = self._api.get(f"{self._jobs}/{self._name}") if self._leases.lease else None
            if job is not None and not _over(job):
                waits = _waiting_for(job, self._newest_pod(), self._warning)
                if waits and job["metadata"].get("annotations", {}).get(MADE_FROM, self._made_from) != self._made_from:
                    self._api.delete(f"{self._jobs}/{self._name}")  # it waits for what the hospital has changed since
                    waits = "its settings changed while it waited; starting another"
                    self._started = now
                self._say(waits)
                return False
            if job is not None and _over(job) == "Failed":
                self._count_failure(now)
                self._say(f"the last trainer ended: {_why_ended(self._newest_pod())}; starting another")
            if now - self._started < min(MAX_RESTART_WAIT_S, RESTART_WAIT_S * 2**self._failures):
                return False
            self._started = now
            self._leases.next_lease()
            return self._api.create(self._jobs, self._manifest())
        except Disconnected as error:
            self._say(f"whether the trainer runs is not known: {error}")
            return False

    def _count_failure(self, now: float) -> None:
        """Once a lease."""
        if self._failed_lease != self._leases.lease:
            self._failures = self._failures + 1 if self._failed_lease and now - self._started < STEADY_S else 0
            self._failed_lease = self._leases.lease

    def stop(self) -> None:
        """Frees the GPU: there is no work for a while."""
        if self._leases.lease:
            self._api.delete(f"{self._jobs}/{self._name}")
        self.situation = ""

    def leave(self) -> None:
        """The agent ends; its trainer stays for the next one."""

    @property
    def _name(self) -> str:
        return f"wr-{self._silo}-{self._leases.lease}"

    def _manifest(self) -> Object:
        job = copy.deepcopy(self._template)
        job["metadata"] |= {"name": self._name, "annotations": {MADE_FROM: self._made_from}}
        container = job["spec"]["template"]["spec"]["containers"][0]
        container["env"] = [
            *container["env"],
            {"name": "WARDROUND_DESK_TOKEN", "value": self._leases.lease_token(self._leases.lease)},
            {"name": "WARDROUND_DESK_CA", "value": self._certificate.decode()},
        ]
        return job

    def _newest_pod(self) -> Object | None:
        pods = (self._api.get(self._pods, labelSelector=f"job-name={self._name}") or {}).get("items", [])
        return max(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")), default=None)

    def _warning(self) -> str:
        """The newest thing that Kubernetes complains of about the Job itself."""
        found = self._api.get(self._events, fieldSelector=f"involvedObject.name={self._name},type=Warning") or {}
        items = sorted(found.get("items", []), key=lambda event: str(event.get("lastTimestamp") or event.get("eventTime") or ""))
        return _short(items[-1].get("message", "")) if items else ""

    def _say(self, situation: str) -> None:
        if situation != self.situation:
            self.situation = situation
            log.info("trainer", situation=situation or "running")


class Resident:
    """A helper that the chart, or Slurm, keeps running: all the agent can do is notice that it does not ask for work."""

    def __init__(self, program: str, silent_s: Callable[[str], float | None]) -> None:
        self.program, self._silent_s = program, silent_s

    def ensure(self) -> bool:
        return False

    @property
    def situation(self) -> str:
        silent = self._silent_s(self.program)
        if silent is None:
            return f"waiting for {self.program}: it has not dialled in yet, look at its pod"
        return f"waiting for {self.program}: silent for {silent:.0f} s, look at its pod" if silent > SILENT_S else ""

    def stop(self) -> None:
        """It goes on asking."""

    leave = stop


def _over(job: Object) -> str:
    """Complete or Failed, else empty."""
    conditions = job.get("status", {}).get("conditions", [])
    return next((str(c["type"]) for c in conditions if c["type"] in ("Complete", "Failed") and c["status"] == "True"), "")


def _waiting_for(job: Object, pod: Object | None, warning: Callable[[], str]) -> str:
    """Why a Job that is not over does not work yet; empty: it does."""
    if job["spec"].get("suspend"):
        return "queued: the Job is suspended, a queue holds it"
    if pod is None:
        told = warning()
        return f"no pod can be made: {told}" if told else "queued: its pod is not made yet"
    status = pod.get("status", {})
    if status.get("phase") == "Running":
        return ""
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"unschedulable: {_short(condition.get('message', ''))}"
    for state in _container_states(status):
        waiting = state.get("waiting", {})
        if waiting.get("reason") in CANNOT_PULL:
            return f"its image cannot be pulled ({waiting['reason']}): check image.registry, the digest and imagePullSecrets"
    return "starting: its node pulls the image or mounts the volumes"


def _why_ended(pod: Object | None) -> str:
    if pod is None:
        return "its pod is gone"
    status = pod.get("status", {})
    if status.get("reason") == "Evicted":
        return f"evicted: {_short(status.get('message', ''))}"
    for state in _container_states(status):
        ended = state.get("terminated", {})
        if ended.get("reason") == "OOMKilled":
            return "out of memory (OOMKilled): raise trainer.resources.limits.memory"
        if ended.get("exitCode"):
            return f"exit code {ended['exitCode']}: see its log"
    return "preempted or deleted"


def _container_states(status: dict[str, Any]) -> list[dict[str, Any]]:
    return [c.get("state", {}) for c in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]]


def _short(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= MAX_MESSAGE_CHARS else line[: MAX_MESSAGE_CHARS - 3] + "..."
