"""Three hospitals on a real Kubernetes: installed, run, killed, upgraded and probed. One federation, in the order of the file."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from aggregator.pki import Pki
from tests.cluster.federation import IMAGE, JOBS, NAMES, NS, PROXIED, Federation, at, trainers_of
from tests.cluster.kube import CHARTS, RESTRICTED, Failed, Kube, stranger
from tests.support.plans import TINY, private

pytestmark = pytest.mark.timeout(1500)
PLAN: dict[str, Any] = yaml.safe_load(TINY) | {"rounds": 4}
LONG = PLAN | {"name": "long", "rounds": 10}


@pytest.fixture(scope="module")
def federation(kube: Kube, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    federation = Federation(kube, tmp_path_factory.mktemp("federation"))
    federation.prepare()
    yield federation


def test_nine_commands_from_nothing_to_a_roster(federation: Federation, kube: Kube) -> None:
    federation.install()
    kube.kubectl("get", "pods", "-A")
    federation.run("tiny", PLAN)
    assert federation.commands <= 9
    rows = kube.kubectl("get", "federationruns,silos", "-n", NS)
    assert all(name in rows for name in NAMES)


def test_key_files_stay_private_on_a_volume_with_a_group(federation: Federation, kube: Kube) -> None:
    """fsGroup would make them 0660 at a second mount, and both programs refuse such files."""
    find = "find /data -type f \\( -name '*.key' -o -name '*.pem' \\) -perm /077"
    for namespace, app in ((NS, "aggregator"), (at(NAMES[0]), "silo-agent")):
        assert kube.kubectl("exec", f"deploy/{app}", "-c", app, "-n", namespace, "--", "sh", "-c", find) == ""


def test_the_run_completes(federation: Federation, kube: Kube) -> None:
    federation.until_round("tiny", 1, 600)
    kube.kubectl("get", "federationruns,silos", "-n", NS, "-o", "wide")
    status = federation.until_completed("tiny", 600)
    assert (
        status["silos"] == 3
        and status["progress"] == "4/4"
        and status["epsilon"] == "unbounded"
        and status["conditions"][0]["status"] == "True"
    )
    kube.kubectl("get", "federationruns,silos", "-n", NS, "-o", "wide")
    kube.kubectl("describe", "federationrun", "tiny", "-n", NS)


def test_agents_made_one_job_each(federation: Federation, kube: Kube) -> None:
    """A trainer stays warm over the rounds, and is gone with the run."""
    for silo in JOBS:
        log = kube.kubectl("logs", "deploy/silo-agent", "-c", "silo-agent", "-n", at(silo), quiet=True)
        assert log.count('"helper started"') == 1, log


def test_mlflow_has_rounds_and_lineage(federation: Federation, kube: Kube) -> None:
    program = (
        "from mlflow import MlflowClient; c = MlflowClient(); e = c.get_experiment_by_name('neuro/tiny');"
        "r = c.search_runs([e.experiment_id], filter_string=\"tags.`wardround.run_id` = 'tiny-1'\")[0];"
        "print(r.info.status, len(c.get_metric_history(r.info.run_id, 'cohort/size')), len(r.inputs.dataset_inputs),"
        "r.data.tags['wardround.plan_digest'][:7])"
    )
    environment = ["env", "MLFLOW_TRACKING_URI=http://mlflow:5000", "python", "-W", "ignore", "-c", program]

    def ready() -> str:
        return kube.kubectl("exec", "deploy/aggregator", "-c", "aggregator", "-n", NS, "--", *environment)

    kube.until("the run in MLflow", lambda: ready().startswith("FINISHED"), 120)
    _, rounds, datasets, digest = ready().split()
    assert int(rounds) >= 4 and int(datasets) == 3 and digest == "sha256:"


def test_mlflow_wants_a_login(federation: Federation, kube: Kube) -> None:
    program = (
        "import urllib.request as u; u.urlopen('http://mlflow:5000/api/2.0/mlflow/experiments/search?max_results=1', timeout=10)"
    )
    with pytest.raises(Failed, match="401"):
        kube.kubectl("exec", "deploy/aggregator", "-c", "aggregator", "-n", NS, "--", "python", "-c", program)


def test_helm_tests_hold(federation: Federation, kube: Kube) -> None:
    kube.helm("test", "wardround", "-n", NS, "--logs")
    kube.helm("test", "silo", "-n", at(NAMES[2]), "--logs")


PROBE = """
import socket, sys
for target in sys.argv[1:]:
    host, _, port = target.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 3).close()
        print(target, "open")
    except OSError as error:
        print(target, "closed", type(error).__name__)
"""


def probe(kube: Kube, namespace: str, pod: str, *targets: str) -> dict[str, str]:
    out = kube.kubectl("exec", pod, "-n", namespace, "--", "python3", "-c", PROBE, *targets)
    return {line.split()[0]: line.split()[1] for line in out.splitlines()}


def address(kube: Kube, namespace: str, service: str) -> str:
    found: str = kube.get("service", service, namespace)["spec"]["clusterIP"]
    return found


def test_policies_hold(federation: Federation, kube: Kube) -> None:
    """By address, so that a name that is not found proves nothing."""
    silo = NAMES[2]
    desk, aggregator = f"{address(kube, at(silo), 'silo-agent')}:8444", f"{address(kube, NS, 'aggregator')}:443"
    mlflow, api = f"{address(kube, NS, 'mlflow')}:5000", f"{address(kube, 'default', 'kubernetes')}:443"
    everything = (desk, aggregator, mlflow, api)
    for app in ("silo-ingest", "silo-trainer"):
        seen = probe(kube, at(silo), kube.pod(at(silo), app), *everything)
        assert seen == {desk: "open", aggregator: "closed", mlflow: "closed", api: "closed"}, app
    seen = probe(kube, at(silo), "deploy/silo-agent", *everything)
    assert seen[aggregator] == "open" and seen[mlflow] == "closed" and seen[api] == "closed"
    kube.apply(stranger(at(silo), "stranger"))
    kube.kubectl("wait", "-n", at(silo), "--for=condition=Ready", "pod/stranger", "--timeout=60s")
    assert set(probe(kube, at(silo), "stranger", *everything).values()) == {"closed"}
    kube.kubectl("delete", "pod", "stranger", "-n", at(silo), "--now")


def test_policies_hold_where_trainers_are_jobs_and_at_the_coordinator(federation: Federation, kube: Kube) -> None:
    """What calls itself a trainer reaches its own hospital's desk; whoever does not, nothing; and mlflow calls nobody."""
    silo = JOBS[0]
    desks = {name: f"{address(kube, at(name), 'silo-agent')}:8444" for name in NAMES}
    aggregator, mlflow = f"{address(kube, NS, 'aggregator')}:443", f"{address(kube, NS, 'mlflow')}:5000"
    api, metrics = f"{address(kube, 'default', 'kubernetes')}:443", f"{address(kube, NS, 'aggregator')}:9464"
    everything = (*desks.values(), aggregator, mlflow, api, metrics)
    trainer = stranger(trainers_of(silo), "trainer")
    trainer["metadata"]["labels"] = {"app.kubernetes.io/name": "silo-trainer"}
    places = ((trainers_of(silo), "trainer"), (trainers_of(silo), "stranger"), (NS, "stranger"))
    kube.apply(trainer, *(stranger(namespace, name) for namespace, name in places[1:]))
    for namespace, name in places:
        kube.kubectl("wait", "-n", namespace, "--for=condition=Ready", f"pod/{name}", "--timeout=60s")
        seen = probe(kube, namespace, name, *everything)
        assert {target for target, how in seen.items() if how == "open"} == ({desks[silo]} if name == "trainer" else set()), name
        kube.kubectl("delete", "pod", name, "-n", namespace, "--now")
    others = [target for target in everything if target != mlflow]  # a pod may always call itself
    assert set(probe(kube, NS, kube.pod(NS, "mlflow"), *others).values()) == {"closed"}


def test_restricted_is_enforced(kube: Kube, federation: Federation) -> None:
    pod = stranger(at(NAMES[0]), "root")
    pod["spec"]["securityContext"] = {}
    with pytest.raises(Failed, match="violates PodSecurity"):
        kube.apply(pod)
    assert kube.get("namespace", at(NAMES[0]))["metadata"]["labels"].items() >= RESTRICTED.items()


@pytest.mark.parametrize(
    ("verb", "what", "where", "allowed"),
    [
        ("create", "jobs", "train", "yes"),
        ("get", "secrets", "train", "no"),
        ("create", "jobs", "home", "no"),
        ("create", "pods", "home", "no"),
        ("get", "secrets", "home", "no"),
        ("list", "persistentvolumeclaims", "home", "no"),
    ],
)
def test_the_agents_token_cannot_reach_the_keys(
    federation: Federation, kube: Kube, verb: str, what: str, where: str, allowed: str
) -> None:
    silo = JOBS[0]
    account = f"--as=system:serviceaccount:{at(silo)}:silo-agent"
    try:
        told = kube.kubectl("auth", "can-i", verb, what, account, "-n", trainers_of(silo) if where == "train" else at(silo))
    except Failed as failed:
        told = str(failed)
    assert re.search(rf"\b{allowed}\b", told)


def test_a_job_cannot_mount_the_keys(federation: Federation, kube: Kube) -> None:
    """A claim is of its namespace: the name of the key volume means nothing where trainers run."""
    silo = JOBS[0]
    volumes = {"volumes": [{"name": "keys", "persistentVolumeClaim": {"claimName": "silo-agent-data"}}]}
    kube.apply(stranger(trainers_of(silo), "thief", **volumes))
    pod = kube.until("a verdict", lambda: scheduled(kube, trainers_of(silo), "thief"), 60)
    assert 'persistentvolumeclaim "silo-agent-data" not found' in pod
    kube.kubectl("delete", "pod", "thief", "-n", trainers_of(silo), "--now")


def scheduled(kube: Kube, namespace: str, name: str) -> str:
    conditions = kube.get("pod", name, namespace).get("status", {}).get("conditions", [])
    return next((c.get("message", "") for c in conditions if c["type"] == "PodScheduled" and c["status"] == "False"), "")


def test_killed_aggregator_agent_and_trainer_mid_round(federation: Federation, kube: Kube) -> None:
    federation.run("long", LONG, state="Paused")
    kube.until("the pause", lambda: federation.status("long").get("phase") == "Paused", 120)
    assert federation.status("long")["round"] == 0
    state(kube, "long", "Running")
    federation.until_round("long", 2)
    kube.kubectl("delete", "pod", kube.pod(NS, "aggregator"), "-n", NS, "--grace-period=0", "--force")
    federation.until_round("long", 4)
    kube.kubectl("delete", "pod", kube.pod(at(PROXIED), "silo-agent"), "-n", at(PROXIED), "--grace-period=0", "--force")
    federation.until_round("long", 6)
    trainers = trainers_of(JOBS[1])
    kube.kubectl("delete", "pod", kube.pod(trainers, "silo-trainer"), "-n", trainers, "--grace-period=0", "--force")
    status = federation.until_completed("long", 600)
    assert status["silos"] == 3 and status["progress"] == "10/10"
    jobs = [job["metadata"]["name"] for job in kube.get("jobs", namespace=trainers_of(PROXIED))]
    assert len(jobs) <= 2, jobs  # that of the run before, and one of this: the restarted agent adopted it


def test_upgrade_and_rollback_mid_run_lose_nothing(federation: Federation, kube: Kube) -> None:
    federation.run("upgraded", LONG | {"name": "upgraded", "rounds": 40})
    federation.until_round("upgraded", 2)
    values = federation.aggregator_values() | {"podLabels": {"upgraded": "yes"}}
    kube.helm("upgrade", "wardround", str(CHARTS / "aggregator"), "-n", NS, "--wait", values=values)
    assert federation.status("upgraded")["phase"] == "Running", "the run was over before the rollback: nothing is shown"
    kube.helm("rollback", "wardround", "1", "-n", NS, "--wait")
    silo = federation.silo_values(NAMES[2]) | {"podLabels": {"upgraded": "yes"}}
    kube.helm("upgrade", "silo", str(CHARTS / "silo-agent"), "-n", at(NAMES[2]), "--wait", values=silo)
    assert federation.until_completed("upgraded", 600)["progress"] == "40/40"


def test_what_keeps_a_trainer_from_its_work_is_told_apart_and_mended(federation: Federation, kube: Kube) -> None:
    """Image pull, out of memory, unschedulable, evicted: each at the hospital and at the coordinator, and none ends the run."""
    silo, trainers = JOBS[1], trainers_of(JOBS[1])
    good = federation.silo_values(silo)

    def changed(**values: Any) -> None:
        image = {"image": good["image"] | {"pullPolicy": "IfNotPresent"}}
        kube.helm("upgrade", "silo", str(CHARTS / "silo-agent"), "-n", at(silo), values=good | image | values)
        kube.kubectl("rollout", "status", "deploy/silo-agent", "-n", at(silo), "--timeout=120s", quiet=True)

    def told(word: str) -> None:
        def everywhere() -> bool:
            run, seen = federation.status("troubled"), kube.get("silos", silo, NS).get("status", {})
            return word in seen.get("activity", "") and f"{silo}: queued" in run["message"] and word in run["message"]

        kube.until(f"the coordinator to see {word!r}", everywhere, 180)
        assert word in federation.silo(silo, "status")
        kube.kubectl("get", "federationruns,silos", "-n", NS, "-o", "wide")

    federation.run("troubled", LONG | {"name": "troubled"})
    federation.until_round("troubled", 1)
    state(kube, "troubled", "Paused")  # or it is over before the hospital's chart has changed
    changed(trainerImage={"tag": "misspelt"})
    state(kube, "troubled", "Running")
    kube.kubectl("delete", "pod", kube.pod(trainers, "silo-trainer"), "-n", trainers, "--now")  # it is warm, and needs no image
    told("image cannot be pulled")
    changed(trainer=good["trainer"] | {"resources": {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "128Mi"}}})
    told("OOMKilled")
    changed(trainer=good["trainer"] | {"gpu": {"count": 1}})
    told("Insufficient nvidia.com/gpu")
    patch = '[{"op":"add","path":"/status/capacity/nvidia.com~1gpu","value":"1"}]'
    kube.kubectl("patch", "node", "node1", "--subresource=status", "--type=json", "-p", patch)
    pod = kube.until("a trainer at work", lambda: running(kube, trainers, "silo-trainer"), 180)
    state(kube, "troubled", "Paused")  # the kubelet needs a moment to see a full disk
    with suppress(Failed):  # the exec dies with its pod
        kube.kubectl("exec", pod, "-n", trainers, "--", "sh", "-c", "head -c 2300M /dev/zero >/tmp/full", timeout_s=120)
    kube.until("an eviction", lambda: evicted(kube, trainers, pod), 120)
    state(kube, "troubled", "Running")
    assert federation.until_completed("troubled", 600)["progress"] == "10/10"
    log = kube.kubectl("logs", "deploy/silo-agent", "-c", "silo-agent", "-n", at(silo), quiet=True)
    assert "the last trainer ended: evicted" in log, log


def state(kube: Kube, run: str, wanted: str) -> None:
    kube.kubectl("patch", "federationrun", run, "-n", NS, "--type=merge", "-p", f'{{"spec":{{"state":"{wanted}"}}}}')


def running(kube: Kube, namespace: str, app: str) -> str:
    pod = kube.pod(namespace, app)
    return pod if pod and kube.get("pod", pod, namespace)["status"].get("phase") == "Running" else ""


def evicted(kube: Kube, namespace: str, pod: str) -> bool:
    return bool(kube.get("pod", pod, namespace).get("status", {}).get("reason") == "Evicted")


def test_a_rehearsal_and_then_the_run_it_rehearsed_waits_for_it_and_spends(federation: Federation, kube: Kube) -> None:
    """Under privacy, and at a hospital whose IT reads every plan before it runs."""
    silo, name = JOBS[0], "guarded"
    plan = private(rounds=2, epsilon=2.0).model_dump(mode="json", exclude_none=True) | {"name": name}
    plan.pop("rehearse")  # not of a plan that is to become a run
    federation.run("practice", plan, rehearse=True)
    status = federation.until_completed("practice")
    assert (status["rehearsal"], status["progress"], status["epsilon"]) == (True, "1/1", "nothing"), status
    assert "deadline_s" in status["message"]
    with pytest.raises(Failed, match="a rehearsal does not become a run"):
        kube.kubectl("patch", "federationrun", "practice", "-n", NS, "--type=merge", "-p", '{"spec":{"rehearse":false}}')

    values = federation.silo_values(silo)
    values["policy"]["rules"] |= {"approval": "manual"}
    kube.helm("upgrade", "silo", str(CHARTS / "silo-agent"), "-n", at(silo), "--wait", values=values)

    federation.run(name, plan)
    kube.until("the wait for IT", lambda: f"{silo}: approval waits for IT" in federation.status(name).get("message", ""), 180)
    kube.kubectl("get", "federationruns,silos", "-n", NS)
    assert json.loads(federation.silo(silo, "ledger", "show", "--json"))["events"] == 0
    federation.silo(silo, "plan", "approve", federation.status(name)["run"])
    status = federation.until_completed(name)
    spent = json.loads(federation.silo(silo, "ledger", "show", "--json"))
    assert spent["events"] == 2 and 0 < spent["epsilon"] <= 2.0
    assert status["epsilon"] == f"{spent['epsilon']:.2f} of 2", status
    kube.kubectl("get", "federationruns,silos", "-n", NS)


def test_a_bad_plan_makes_nothing(federation: Federation, kube: Kube) -> None:
    federation.run("bad", PLAN | {"name": "bad", "rounds": 0})
    kube.until("its verdict", lambda: federation.status("bad").get("phase") == "Invalid", 60)
    assert "rounds" in federation.status("bad")["message"]
    with pytest.raises(Failed, match="a plan does not change once it is submitted"):
        federation.run("bad", PLAN | {"name": "bad", "rounds": 1})


def test_a_site_policy_that_refuses_and_a_pause_are_told_to_the_coordinator(federation: Federation, kube: Kube) -> None:
    silo = NAMES[2]
    values = federation.silo_values(silo)
    strict = values | {"policy": {"rules": values["policy"]["rules"] | {"allow_without_privacy": False}}}
    kube.helm("upgrade", "silo", str(CHARTS / "silo-agent"), "-n", at(silo), "--wait", values=strict)
    federation.run("unwanted", PLAN | {"name": "unwanted"})
    kube.until("its end", lambda: federation.status("unwanted").get("phase") == "Failed", 240)
    told = federation.status("unwanted")["message"]
    assert f"{silo} refused: policy allow_without_privacy is false" in told, told
    kube.helm("upgrade", "silo", str(CHARTS / "silo-agent"), "-n", at(silo), "--wait", values=values)

    federation.silo(silo, "pause", "the scanner moves until Monday")
    kube.until("the pause", lambda: "the scanner moves" in kube.get("silos", silo, NS).get("status", {}).get("activity", ""), 120)
    kube.kubectl("get", "federationruns,silos", "-n", NS)
    federation.silo(silo, "resume")


def test_a_hospital_without_a_volume_a_token_or_the_right_ca_is_told_so(federation: Federation, kube: Kube, tmp_path: Path) -> None:
    """Each where `kubectl describe pod` shows it."""
    kube.namespace("silo-new")
    chart = str(CHARTS / "silo-agent")
    values = {"image": IMAGE, "storage": {"storageClassName": "wr"}, "snapshots": {"storageClassName": "wr"}}
    kube.helm("install", "silo", chart, "-n", "silo-new", values=values)

    def told(words: str) -> None:
        def shown() -> bool:
            pods = kube.get("pods", namespace="silo-new", selector="app.kubernetes.io/name=silo-agent")
            return words in yaml.safe_dump([pod["status"] for pod in pods], width=10_000)

        kube.until(f"the pod to say {words!r}", shown, 180)

    told("unbound immediate PersistentVolumeClaims")
    kube.volume("new-data", "silo-new", "silo-agent-data", federation._folder("new-data"))
    told("NOT ENROLLED")
    another = Pki.open(tmp_path / "pki", "neuro", ["elsewhere.example.org"]).roots_pem.decode()
    kube.helm("upgrade", "silo", chart, "-n", "silo-new", values=federation.silo_values(NAMES[2]) | values | {"ca": another})
    told("not by this federation")


def test_two_releases_in_one_namespace_are_refused(federation: Federation, kube: Kube) -> None:
    with pytest.raises(Failed, match="invalid ownership metadata"):
        kube.helm("install", "another", str(CHARTS / "aggregator"), "-n", NS, values=federation.aggregator_values())


def test_uninstall_keeps_the_claims(federation: Federation, kube: Kube) -> None:
    kube.helm("uninstall", "silo", "-n", "silo-new", "--wait")
    assert {c["metadata"]["name"] for c in kube.get("persistentvolumeclaims", namespace="silo-new")} == {
        "silo-agent-data",
        "silo-snapshots",
    }


RESIDENT = """
import glob
lines = [line for name in glob.glob("/proc/[0-9]*/status") for line in open(name) if line.startswith("VmRSS")]
print(sum(int(line.split()[1]) for line in lines))
"""


def test_an_idle_agent_is_small(federation: Federation, kube: Kube) -> None:
    """What every container holds is in the log: docs/sizing.md is written from it."""
    for namespace, app, containers in ((NS, "aggregator", ("aggregator", "operator")), (NS, "mlflow", ("mlflow",))):
        for container in containers:
            kube.kubectl("exec", f"deploy/{app}", "-c", container, "-n", namespace, "--", "python", "-c", RESIDENT)
    for app in ("silo-ingest", "silo-trainer"):
        kube.kubectl("exec", f"deploy/{app}", "-n", at(NAMES[2]), "--", "python", "-c", RESIDENT)
    for silo in NAMES:
        out = kube.kubectl("exec", "deploy/silo-agent", "-c", "silo-agent", "-n", at(silo), "--", "python", "-c", RESIDENT)
        assert int(out) < 300_000, f"{silo}: {out} kB"
