"""The Kubernetes API in the few verbs that the two programs use, with the pod's own token. One namespace, plain JSON, no cache.

Five calls of the standard library instead of the `kubernetes` package, whose models alone cost a third of the agent's memory
(docs/adr/0040-plain-kubernetes-api.md). Paths are those of the API reference, e.g. /apis/batch/v1/namespaces/NS/jobs.
"""

import json
import os
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlencode

from wardround.errors import Disconnected, MessageError, SettingsError

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TIMEOUT_S = 20.0
MAX_ANSWER_BYTES = 16 << 20
WATCH_S = 30  # one watch; the caller lists again then, so that nothing missed stays missed for longer
Object = dict[str, Any]


class Api(Protocol):
    """What callers need; tests stand a dictionary behind it."""

    def get(self, path: str, **query: str) -> Object | None:
        """None when there is no such object."""

    def create(self, path: str, body: Object) -> bool:
        """False when one of that name is there already."""

    def patch(self, path: str, body: Object) -> bool:
        """A merge patch (RFC 7386). False when there is no such object."""

    def delete(self, path: str) -> None:
        """Its pods go too. Nothing when there is none."""

    def watch(self, path: str, version: str) -> Iterator[Object]:
        """Changes since a list's resourceVersion, for WATCH_S at most."""


@dataclass(frozen=True)
class ClusterApi:
    """The API server of the cluster this pod runs in. The token is read for each call: the kubelet renews it hourly."""

    host: str
    port: int
    account: Path = ACCOUNT

    @classmethod
    def of_this_pod(cls) -> "ClusterApi":
        """Raises SettingsError outside a pod, or where the pod has no token."""
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        if host is None or not (ACCOUNT / "token").exists():
            raise SettingsError("this pod has no Kubernetes token: its chart gives it one where trainers are Jobs")
        return cls(host, int(port))

    def get(self, path: str, **query: str) -> Object | None:
        status, answer = self._call("GET", f"{path}?{urlencode(query)}" if query else path)
        return None if status == 404 else answer

    def create(self, path: str, body: Object) -> bool:
        return self._call("POST", path, body)[0] != 409

    def patch(self, path: str, body: Object) -> bool:
        return self._call("PATCH", path, body, "application/merge-patch+json")[0] != 404

    def delete(self, path: str) -> None:
        self._call("DELETE", path, {"propagationPolicy": "Background"})

    def watch(self, path: str, version: str) -> Iterator[Object]:
        query = urlencode(
            {"watch": "1", "resourceVersion": version, "timeoutSeconds": str(WATCH_S), "allowWatchBookmarks": "false"}
        )
        connection, answer = self._send("GET", f"{path}?{query}", None, "", WATCH_S + TIMEOUT_S)
        try:
            if answer.status == 200:  # 410: the version is too old, and the caller lists again
                for line in answer:
                    yield json.loads(line)
        except (OSError, HTTPException, ValueError):
            return  # cut: the caller lists again
        finally:
            connection.close()

    def _call(self, method: str, path: str, body: Object | None = None, kind: str = "application/json") -> tuple[int, Object]:
        """Status (200 to 299, 404 or 409) and answer. Raises SettingsError, MessageError or Disconnected for the others."""
        connection, answer = self._send(method, path, body, kind, TIMEOUT_S)
        try:
            value = json.loads(answer.read(MAX_ANSWER_BYTES) or b"{}")
        except (OSError, HTTPException, ValueError):
            raise Disconnected("the Kubernetes API broke off its answer") from None
        finally:
            connection.close()
        if answer.status < 300 or answer.status in (404, 409):
            return answer.status, value
        told = str(value.get("message", answer.reason))
        if answer.status in (401, 403):
            raise SettingsError(f"Kubernetes does not allow it: {told}; the chart's Role does")
        if answer.status >= 500 or answer.status == 429:
            raise Disconnected(f"the Kubernetes API answers {answer.status}")
        raise MessageError(f"Kubernetes refuses the object: {told}")

    def _send(
        self, method: str, path: str, body: Object | None, kind: str, timeout_s: float
    ) -> tuple[HTTPSConnection, HTTPResponse]:
        try:
            token = (self.account / "token").read_text().strip()
            context = ssl.create_default_context(cafile=str(self.account / "ca.crt"))
        except OSError as error:
            raise SettingsError(f"the pod's Kubernetes token cannot be read: {error.strerror}") from None
        connection = HTTPSConnection(self.host, self.port, timeout=timeout_s, context=context)
        headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"} | ({"Content-Type": kind} if body else {})
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None, headers)
            return connection, connection.getresponse()
        except (OSError, HTTPException) as error:
            connection.close()
            raise Disconnected(f"the Kubernetes API cannot be reached ({type(error).__name__})") from None
