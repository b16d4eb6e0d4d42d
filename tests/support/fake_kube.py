"""A Kubernetes API that is a dictionary: what callers of wardround.kube see of one, and nothing more."""

import copy
from collections.abc import Iterator

from wardround.errors import Disconnected
from wardround.kube import Object


class FakeKube:
    """`objects`: path -> object. A list is every object one level below its path, filtered by label or involved object."""

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
        self.calls: list[tuple[str, str]] = []
        self.away = False

    def get(self, path: str, **query: str) -> Object | None:
        self._call("get", path)
        if path in self.objects:
            return copy.deepcopy(self.objects[path])
        items = [item for name, item in sorted(self.objects.items()) if name.rpartition("/")[0] == path]
        if path.rpartition("/")[2] not in ("jobs", "pods", "events", "federationruns", "silos"):
            return None
        label = query.get("labelSelector", "").partition("=")
        items = [item for item in items if not label[0] or item["metadata"].get("labels", {}).get(label[0]) == label[2]]
        return {"items": copy.deepcopy(items), "metadata": {"resourceVersion": "1"}}

    def create(self, path: str, body: Object) -> bool:
        self._call("create", path)
        name = body["metadata"].get("name") or f"{body['metadata']['generateName']}{len(self.objects)}"
        if f"{path}/{name}" in self.objects:
            return False
        self.objects[f"{path}/{name}"] = copy.deepcopy(body)
        return True

    def patch(self, path: str, body: Object) -> bool:
        self._call("patch", path)
        item = self.objects.get(path.removesuffix("/status"))
        if item is None:
            return False
        item["status"] = {**item.get("status", {}), **copy.deepcopy(body["status"])}
        return True

    def delete(self, path: str) -> None:
        self._call("delete", path)
        self.objects.pop(path, None)

    def watch(self, path: str, version: str) -> Iterator[Object]:
        self._call("watch", path)
        return iter(())

    def _call(self, verb: str, path: str) -> None:
        if self.away:
            raise Disconnected("the Kubernetes API cannot be reached")
        self.calls.append((verb, path))

    def made(self, kind: str) -> list[str]:
        return [path for verb, path in self.calls if verb == "create" and path.endswith(f"/{kind}")]
