"""MLflow as a projection of the store: the store is the truth, MLflow a view of it that may be down, late or rebuilt at any time.

`project` writes one run. Killed anywhere and repeated, it writes nothing twice and misses nothing, for MLflow's own keys make its
writes idempotent: a metric is (run, key, step, timestamp, value) with step = round and timestamp = the round's commit time in the
store, a param or tag is (run, key), an input is (run, dataset name, digest). Only making a run is not: its tag names it, and is
searched first. `follow` is the loop around it: a thread of its own that no round ever waits for.

Once a run has ended come its final model (registry.py), and the reports that people read beside it. This module reads no table:
whoever holds the store fills the views (run_view.py) and answers `Source`.
"""

import json
import math
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol
from urllib.parse import urlsplit

import structlog

from aggregator import registry
from aggregator.compare import side_of
from aggregator.privacy_report import as_html, as_markdown, report_of
from aggregator.round import RunPhase
from aggregator.run_view import MEASURES, DatasetView, RoundView, RunView, own_measures, released_of
from wardround.accounting import epsilon_after
from wardround.bundle import model_card
from wardround.canonical import digest_name
from wardround.compare import as_text, compare
from wardround.errors import Disconnected, IntegrityError, StorageError, WardroundError
from wardround.plan import Plan, flattened

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput
    from mlflow.exceptions import MlflowException

log = structlog.get_logger()

POLL_S = 2.0  # how often the store is asked for changes
MAX_PAUSE_S = 30.0  # between two tries while MLflow is down
REQUEST_TIMEOUT_S = 10
METRICS_PER_CALL = 1000  # MLflow's limits of one log-batch request
PARAMS_PER_CALL = 100
MAX_NOTE_CHARS = 200
MAX_TAG_CHARS = 1000
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # else MLflow's page opens with traces of language models
DIGEST_CHARS = 32  # of a dataset digest: MLflow's column holds 36

PHASES = frozenset({"wait_gpu", "ingest", "train", "encode", "encrypt", "upload", "fold", "decrypt", "apply", "evaluate", "round"})
STATUS = {RunPhase.COMPLETED: "FINISHED", RunPhase.FAILED: "FAILED", RunPhase.ABORTED: "KILLED"}


class Point(NamedTuple):
    """One value of one metric of one MLflow run."""

    key: str
    value: float
    step: int
    timestamp_ms: int


class Source(Protocol):
    """What `follow` needs of the store."""

    def unprojected(self) -> Sequence[RunView]:
        """Every run that is under way, or has ended since it was last reported as projected; oldest first."""

    def projected(self, run_id: str) -> None:
        """An ended run is in MLflow as a whole: never ask for it again."""

    def bundle(self, view: RunView) -> Mapping[str, bytes]:
        """Path -> content of the files of a released model's bundle."""

    def previous(self, run_id: str) -> RunView | None:
        """The newest run of the same plan name that completed before this one was submitted."""


def connect(tracking_uri: str) -> "MlflowClient":
    """A client that says nothing to anyone else, never goes through a proxy and does not retry by itself: `follow` does.

    MLflow is imported here because that takes seconds, which `aggregator --help` should not, and reads its switches.
    """
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = os.environ["DO_NOT_TRACK"] = "true"
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(REQUEST_TIMEOUT_S)
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    if host := urlsplit(tracking_uri).hostname:
        exempt = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
        if host not in exempt.split(","):
            os.environ["no_proxy"] = f"{exempt},{host}".lstrip(",")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri)


def project(view: RunView, client: "MlflowClient", source: Source, known: RunView | None = None) -> None:
    """Write `view` to MLflow; rounds that equal those of `known`, which this process has projected already, are left out.

    Raises Disconnected when MLflow cannot be reached and StorageError when it answers with an error: both mean "again, later".
    A run that somebody deleted in MLflow is written anew. Non-finite values are not written: a gap in the curve is what they are.
    """
    from mlflow.exceptions import MlflowException

    try:
        _project(view, client, source, known)
    except MlflowException as e:
        raise explained(e, view.run_id) from e
    except OSError as e:  # an artifact: requests' own errors are OSErrors, and so is a full disk here
        raise StorageError(
            f"an artifact of run {view.run_id} cannot be kept: MLflow's disk, or this machine's for temporary files, is "
            "full or cannot be written; it is tried again"
        ) from e


def explained(error: "MlflowException", run: str) -> WardroundError:
    """Whose fault it is and what to do; never MLflow's own text, which quotes addresses and paths."""
    from mlflow.exceptions import RestException

    code, text = str(error.error_code), str(error)
    later = "Runs go on, and it catches up later"
    if code in ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"):
        if "Host" in text:
            return Disconnected(f"MLflow cannot be reached: does the server's --allowed-hosts list this host? {later}")
        return StorageError(
            f"MLflow does not let this account write run {run}: it may create experiments and registered models, or was "
            "given EDIT on "
            f"them, by an admin; look at MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD. {later}"
        )
    if code in ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED") or "error code 404" in text:
        return StorageError(f"this MLflow server is too old for run {run}: logged models need MLflow 3; upgrade it. {later}")
    if re.search(r"(error code|too many) 5\d\d", text) or (code == "INTERNAL_ERROR" and isinstance(error, RestException)):
        return StorageError(
            f"MLflow fails to keep run {run}; its own log says why: a full disk, a folder of artifacts that cannot be "
            f"written, or a database of another version, for which `mlflow db upgrade` is meant. {later}"
        )
    if isinstance(error, RestException):
        return StorageError(f"MLflow refuses run {run} ({code}); its own log says why; this is tried again")
    return Disconnected(
        f"MLflow cannot be reached: is the server up, and is the address right? After an upgrade it may refuse to start before "
        f"`mlflow db upgrade`; its own log says so. {later}"
    )


def _project(view: RunView, client: "MlflowClient", source: Source, known: RunView | None) -> None:
    from mlflow.entities import Param

    before = {r.round: r for r in known.rounds} if known else {}
    rounds = [r for r in view.rounds if before.get(r.round) != r]
    name = f"{view.federation}/{view.plan.name}"
    found = client.get_experiment_by_name(name)
    experiment = found.experiment_id if found else client.create_experiment(name, tags=EXPERIMENT_TAGS)

    parent = _find_or_create(client, experiment, {"wardround.run_id": view.run_id}, view, view.run_id)
    params = [Param(key, value) for key, value in flattened(view.plan).items()]
    for start in range(0, len(params), PARAMS_PER_CALL):
        client.log_batch(parent, params=params[start : start + PARAMS_PER_CALL])
    if view.datasets:
        client.log_inputs(parent, datasets=_datasets(view))
    _log_points(client, parent, [point for r in rounds for point in points_of(view.plan, r, view.last_round)])

    children = []
    for silo in sorted({silo for r in (view.rounds if view.ended_ms else rounds) for silo in r.own}):
        tags = {"mlflow.parentRunId": parent, "wardround.silo": silo}
        children.append(_find_or_create(client, experiment, tags, view, f"{view.run_id}@{silo}"))
        _log_points(client, children[-1], [point for r in rounds for point in own_points_of(view.plan, r, silo)])
    _log_tags(client, parent, tags_of(view))
    if view.ended_ms is not None:
        _log_end(client, experiment, parent, view, source)
        for run in (*children, parent):
            client.set_terminated(run, STATUS[view.phase], view.ended_ms)


def _log_end(client: "MlflowClient", experiment: str, run: str, view: RunView, source: Source) -> None:
    """The final model, its measures under its name, and what people read: the privacy report, the card, a comparison."""
    for name, text in texts_of(view, source.previous(view.run_id)).items():
        client.log_text(run, text, name)
    model = registry.log_model(client, experiment, run, view, lambda: source.bundle(view))
    if model is None:
        return
    last = view.rounds[-1]
    measured = _measured("validation", view.plan, last.means, last.model_round_measured, last.committed_ms)
    _log_points(client, run, list(measured), model)
    if told := registry.register(client, run, model, view):
        _log_tags(client, run, {"wardround.model": told})


def texts_of(view: RunView, previous: RunView | None) -> dict[str, str]:
    """Artifact -> text."""
    report = report_of(view)
    texts = {"privacy_report.md": as_markdown(report), "privacy_report.html": as_html(report)}
    if view.model is not None:
        texts["model_card.md"] = model_card(released_of(view))
    if previous is not None:
        texts["comparison.md"] = as_text(compare(side_of(previous), side_of(view)))
    return texts


def tags_of(view: RunView) -> dict[str, str]:
    tags = {
        "mlflow.user": view.submitted_by,
        "mlflow.note.content": note_of(view),
        "wardround.phase": view.phase.value,
        "wardround.plan_digest": digest_name(view.plan.digest),
        "wardround.roster_digest": digest_name(view.roster_digest),
        "wardround.key_epoch": str(view.key_epoch),
        "wardround.protocol": str(view.protocol),
        "wardround.version": view.version,
        "wardround.audit_head": digest_name(view.audit_head),
        "wardround.parent_model": view.parent_model,
    }
    if view.ancestors:
        tags["wardround.parent_run"] = view.ancestors[0][0]
    if view.degraded:
        tags["wardround.degraded"] = view.degraded[:MAX_TAG_CHARS]
    return tags


def note_of(view: RunView) -> str:
    """What a reader sees first: what ran, on whom, and every caveat. A silo's note is one line of at most MAX_NOTE_CHARS."""
    plan = view.plan
    trained = sum(r.round <= view.last_round for r in view.rounds)
    what = f"{trained} of {plan.rounds} rounds" if plan.rounds else "a given model measured"
    lines = [
        f"{plan.task} of {', '.join(plan.bound_classes)} on {plan.dataset}: {plan.model.network}, {plan.training.algorithm}",
        f"{view.phase.value}, {what}" + (f": {view.reason}" if view.reason else ""),
    ]
    if view.rounds:
        lines.append(
            f"{view.rounds[-1].cohort_size} hospitals in the newest round; at least {plan.aggregation.min_silos} in every round"
        )
    if (privacy := plan.privacy) is not None and plan.rounds:
        lines.append(f"epsilon {privacy.epsilon:g} at delta {privacy.delta:g} for each patient and this whole run, by DP-SGD")
    if view.degraded:
        lines.append(f"hospitals were lost: {view.degraded}")
    lines += plan.caveats
    lines += [" ".join(note.split())[:MAX_NOTE_CHARS] for note in view.notes]
    return "\n".join(f"- {line}" for line in dict.fromkeys(lines))


def points_of(plan: Plan, view: RoundView, last_round: int | None = None) -> Iterator[Point]:
    """A round's metrics. Means stand at the step of the model they measure, everything else at the round's."""
    yield from _measured("validation", plan, view.means, view.model_round_measured, view.committed_ms)
    values = {
        "cohort/size": view.cohort_size,
        "cohort/late": view.late,
        "cohort/dropped": view.dropped,
        "bytes/upload": view.upload_bytes,
        "bytes/download": view.download_bytes,
        "update/saturated_fraction": view.saturated_fraction,
    } | {f"seconds/{phase}": value for phase, value in view.seconds.items() if phase in PHASES}
    if (epsilon := epsilon_after(plan, view.round, last_round)) is not None:
        values["privacy/epsilon"] = epsilon
    for key, value in values.items():
        yield Point(key, float(value), view.round, view.committed_ms)


def own_points_of(plan: Plan, view: RoundView, silo: str) -> Iterator[Point]:
    """One silo's metrics of this round's model, for its child run; none when its policy keeps them."""
    step = view.round if plan.rounds else 0
    for name, value in sorted(own_measures(plan, view.own.get(silo, {})).items()):
        key = name if name.startswith(("alone/", "gain/")) else f"validation/{name}"
        yield Point(key, value, step, view.committed_ms)


def _measured(prefix: str, plan: Plan, values: Mapping[str, float], step: int, committed_ms: int) -> Iterator[Point]:
    allowed = MEASURES | {f"dice/{name}" for name in plan.classes}
    for key in sorted(allowed & values.keys()):
        yield Point(f"{prefix}/{key}", values[key], step, committed_ms)


def _find_or_create(client: "MlflowClient", experiment: str, identity: dict[str, str], view: RunView, name: str) -> str:
    """The id of the MLflow run that carries the tags `identity`; they are set in the same transaction that makes it.

    The time of submission belongs to the identity: a new store counts its runs from 1 again, and MLflow may outlive the old one.
    """
    named = [f"tags.`{key}` = '{value}'" for key, value in identity.items()]
    condition = " and ".join([*named, f"attributes.start_time = {view.created_ms}"])
    if found := client.search_runs([experiment], condition, max_results=1):
        return str(found[0].info.run_id)
    tags = identity | {"mlflow.user": view.submitted_by}
    return str(client.create_run(experiment, start_time=view.created_ms, tags=tags, run_name=name).info.run_id)


def _log_points(client: "MlflowClient", run: str, points: Sequence[Point], model: str | None = None) -> None:
    """With `model` the same points also stand under that logged model."""
    from mlflow.entities import Metric

    metrics = [Metric(p.key, p.value, p.timestamp_ms, p.step, model) for p in points if math.isfinite(p.value)]
    for start in range(0, len(metrics), METRICS_PER_CALL):
        client.log_batch(run, metrics=metrics[start : start + METRICS_PER_CALL])


def _log_tags(client: "MlflowClient", run: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run, tags=[RunTag(key, value) for key, value in tags.items()])


def _datasets(view: RunView) -> list["DatasetInput"]:
    from mlflow.entities import Dataset, DatasetInput

    def dataset(silo: DatasetView) -> Dataset:
        facts = json.dumps({"silo": silo.silo, "declared_patients": silo.declared_patients, "digest": digest_name(silo.digest)})
        return Dataset(f"{view.plan.dataset}@{silo.silo}", silo.digest.hex()[:DIGEST_CHARS], source_type="silo", source=facts)

    return [DatasetInput(dataset(silo), tags=[]) for silo in view.datasets]


def follow(source: Source, tracking_uri: str, stop: threading.Event) -> None:
    """Keep MLflow up with the store until `stop`, in a thread of its own; one log line when MLflow goes down, one when it is up."""
    client = connect(tracking_uri)
    known: dict[str, RunView] = {}
    down, pause = "", 0.0
    while not stop.wait(pause):
        trouble = catch_up(source, client, known)
        if trouble is None:
            if down:
                log.info("lineage.up")
            down, pause = "", POLL_S
        else:
            if trouble.code != down:
                log.warning("lineage.down", code=trouble.code, reason=str(trouble))
            down, pause = trouble.code, min(MAX_PAUSE_S, 2 * pause or POLL_S)


def catch_up(source: Source, client: "MlflowClient", known: dict[str, RunView]) -> WardroundError | None:
    """Project every run that differs from `known`, which is kept up to date. What stands in the way is returned, for later.

    A run that MLflow refuses does not hold up the runs after it.
    """
    refused = None
    try:
        for view in source.unprojected():
            try:
                if known.get(view.run_id) != view:
                    project(view, client, source, known.get(view.run_id))
            except (StorageError, IntegrityError) as e:
                refused = e
                continue
            known[view.run_id] = view
            if view.ended_ms is not None:
                source.projected(view.run_id)
                del known[view.run_id]
    except (Disconnected, StorageError) as e:
        return e
    return refused
