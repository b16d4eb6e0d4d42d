"""`aggregator`: the coordinator's command line. It works on the data folder itself; a running server notices within a second."""

import base64
import getpass
import io
import secrets
import sqlite3
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from aggregator.compare import side_of
from aggregator.config import Settings, load_settings
from aggregator.control import check_fits, silo_rows, spent, standing
from aggregator.folder import Opened
from aggregator.privacy_report import as_html, as_markdown, report_of
from aggregator.records import RunState
from aggregator.store import ENDED, Store
from aggregator.telemetry import configure
from aggregator.views import run_view
from wardround.cli import Json, command_line, plan_facts, print_comparison, print_facts, run
from wardround.errors import ConflictError, SettingsError, StorageError
from wardround.keyfiles import write_secret
from wardround.kube import ClusterApi
from wardround.pb import federation_pb2 as pb
from wardround.plan import load_plan
from wardround.roster import draft

WATCH_S = 1.0
Run = Annotated[str, typer.Argument(help="The run's name, e.g. brain-tissue-1.")]

app = command_line("The aggregator of a federation: serve hospitals, submit plans, watch runs, let silos in.")
plan_app = command_line("Plans: check one, submit one.")
run_app = command_line("Runs: list, show, watch, pause, compare, report, abort.")
silo_app = command_line("Silos: tokens to enrol with, who is there, whom to stop.")
roster_app = command_line("The roster: draft what the operator signs, publish what was signed.")
audit_app = command_line("The audit chain: every decision, in order, signed.")
for name, group in (("plan", plan_app), ("run", run_app), ("silo", silo_app), ("roster", roster_app), ("audit", audit_app)):
    app.add_typer(group, name=name)


@app.callback()
def settings_file(
    context: typer.Context,
    config: Annotated[Path, typer.Option(help="The settings.", envvar="WARDROUND_AGGREGATOR_CONFIG")] = Path("aggregator.yaml"),
) -> None:
    context.obj = config


def _settings(context: typer.Context) -> Settings:
    return load_settings(context.obj)


@contextmanager
def _opened(context: typer.Context) -> Iterator[Opened]:
    opened = Opened.of(_settings(context))
    try:
        yield opened
    finally:
        opened.database.close()


@app.command("serve")
def serve_command(context: typer.Context) -> None:
    """Serve the federation until SIGTERM, which drains.

    \b
    Example:
      aggregator --config aggregator.yaml serve

    Makes the data folder, the database and the certificates where they are missing. Killed at any moment, it goes on where it was.
    """
    from aggregator.server import serve  # takes a second to import, which no other command needs

    settings = _settings(context)
    configure(settings.log)
    serve(settings)


@app.command("operator")
def operator_command(
    control: Annotated[Path, typer.Option(help="The server's control socket.")],
    namespace: Annotated[str, typer.Option(help="Where FederationRun and Silo objects lie.")],
    mlflow: Annotated[str, typer.Option(help="Where people look at runs, for the objects' status.")] = "",
) -> None:
    """Turn FederationRun objects of Kubernetes into runs, and mirror runs and silos. The chart's second container.

    \b
    Example:
      aggregator operator --control /run/wardround/control.sock --namespace wardround
    """
    from aggregator.operator import Operator, Server

    configure("json")
    Operator(ClusterApi.of_this_pod(), namespace, Server(control), mlflow).run()


@app.command("mlflow-secret")
def mlflow_secret(
    name: Annotated[str, typer.Argument(help="NAMESPACE/NAME of the Kubernetes Secret.")], json_: Json = False
) -> None:
    """Make the Secret with MLflow's admin account, unless it is there. The chart's first Job runs it.

    \b
    Example:
      aggregator mlflow-secret wardround/mlflow
    """
    namespace, _, secret = name.partition("/")
    password = secrets.token_urlsafe(24)
    ini = (
        "[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:////data/auth.db\nadmin_username = admin\n"
        f"admin_password = {password}\nauthorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    values = {"username": "admin", "password": password, "flask_key": secrets.token_urlsafe(24), "basic_auth.ini": ini}
    body = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": secret, "labels": {"app.kubernetes.io/part-of": "wardround"}},
        "data": {key: base64.b64encode(value.encode()).decode() for key, value in values.items()},
    }
    made = ClusterApi.of_this_pod().create(f"/api/v1/namespaces/{namespace}/secrets", body)
    print_facts({"secret": name, "made": made}, json_)


# --- plans -----------------------------------------------------------------------------------------------------------------------


@plan_app.command()
def check(context: typer.Context, file: Annotated[Path, typer.Argument(help="The plan, YAML.")], json_: Json = False) -> None:
    """Check a plan against the silos that are active now. Submits nothing.

    \b
    Example:
      aggregator plan check brain-tissue.yaml

    Whether a hospital's policy and data fit is its own decision: it answers when the plan is submitted, before anything trains.
    """
    plan = load_plan(file)
    with _opened(context) as opened:
        active = check_fits(plan, opened.store)
    unknown = "not asked: a hospital's policy and dataset are judged there, once the plan is submitted"
    print_facts(plan_facts(plan) | {"active_silos": active, "each_silo": unknown}, json_)


@plan_app.command()
def submit(context: typer.Context, file: Annotated[Path, typer.Argument(help="The plan, YAML.")], json_: Json = False) -> None:
    """Submit a plan: every active silo is asked, and the run starts when they have joined.

    \b
    Example:
      aggregator plan submit brain-tissue.yaml
      aggregator run watch brain-tissue-1

    One run moves at a time; a later one waits for it to end.
    """
    plan = load_plan(file)
    with _opened(context) as opened:
        active = check_fits(plan, opened.store)
        name = opened.store.submit(plan, _person())
    print_facts({"run": name, "asked": active}, json_)


def _person() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"  # a container whose user has no name


# --- runs ------------------------------------------------------------------------------------------------------------------------


@run_app.command("list")
def run_list(context: typer.Context, json_: Json = False) -> None:
    """Every run, oldest first.

    \b
    Example:
      aggregator run list
    """
    with _opened(context) as opened:
        rows = [_summary(state, opened.store) for state in opened.store.runs()]
    _print_rows("runs", rows, json_, ("run", "phase", "round", "rounds", "epsilon", "situation"))


@run_app.command("show")
def run_show(context: typer.Context, name: Run, json_: Json = False) -> None:
    """One run: where it stands, whom it waits for, who refused and why, which attempts failed and why.

    \b
    Example:
      aggregator run show brain-tissue-1
    """
    with _opened(context) as opened:
        print_facts(_details(opened.store, name), json_)


@run_app.command("watch")
def run_watch(context: typer.Context, name: Run, json_: Json = False) -> None:
    """Follow a run until it ends: a live table on a terminal, else a line per change (with --json a JSON object per line).

    \b
    Example:
      aggregator run watch brain-tissue-1

    Exit code 0 when it completed, 1 when it failed or was aborted.
    """
    with _opened(context) as opened:
        phase = _watch_live(opened.store, name) if sys.stdout.isatty() and not json_ else _watch_lines(opened.store, name, json_)
    raise typer.Exit(0 if phase == "completed" else 1)


@run_app.command("compare")
def run_compare(
    context: typer.Context, a: Run, b: Annotated[str, typer.Argument(help="Another run, e.g. brain-tissue-2.")], json_: Json = False
) -> None:
    """Two runs side by side: plans, measures, hospitals, cost, and what the comparison does not show. Differences are the second
    minus the first.

    \b
    Example:
      aggregator run compare brain-tissue-1 brain-tissue-2

    Prints Markdown. A researcher's `wardround run compare` prints the same out of MLflow.
    """
    with _opened(context) as opened:
        first, second = (side_of(run_view(opened.store, name)) for name in (a, b))
    print_comparison(first, second, json_)


@run_app.command("report")
def run_report(context: typer.Context, name: Run, html: Annotated[bool, typer.Option("--html", help="As HTML.")] = False) -> None:
    """The privacy report of a run: what left the hospitals, who could read it, what it cost, what is not covered.

    \b
    Example:
      aggregator run report brain-tissue-1 --html > report.html

    MLflow has the same as artifacts of the run.
    """
    with _opened(context) as opened:
        report = report_of(run_view(opened.store, name))
    print(as_html(report) if html else as_markdown(report), end="")


@run_app.command("abort")
def run_abort(context: typer.Context, name: Run, json_: Json = False) -> None:
    """Ask for a run to be ended now. Completed rounds stay; the round under way is given up.

    \b
    Example:
      aggregator run abort brain-tissue-1
    """
    with _opened(context) as opened:
        opened.store.request_abort(name, _person())
    print_facts({"run": name, "abort": "requested; the server ends it within seconds"}, json_)


@run_app.command("pause")
def run_pause(
    context: typer.Context,
    name: Run,
    reason: Annotated[str, typer.Argument(help="One sentence, for whoever looks at the run.")],
    json_: Json = False,
) -> None:
    """Open no new round. The one under way ends as usual.

    \b
    Example:
      aggregator run pause brain-tissue-1 "leuven moves its scanner until Monday"
    """
    if not (told := " ".join(reason.split())):
        raise SettingsError("the reason is empty: say in one sentence why, for whoever looks at the run")
    with _opened(context) as opened:
        opened.store.pause(name, told, _person())
    print_facts({"run": name, "paused": told, "next": f"aggregator run resume {name}"}, json_)


@run_app.command("resume")
def run_resume(context: typer.Context, name: Run, json_: Json = False) -> None:
    """Open rounds again after a pause.

    \b
    Example:
      aggregator run resume brain-tissue-1
    """
    with _opened(context) as opened:
        opened.store.pause(name, "", _person())
    print_facts({"run": name, "paused": "no"}, json_)


def _summary(state: RunState, store: Store) -> dict[str, Any]:
    return {
        "run": state.id,
        "phase": state.phase,
        "round": state.attempt.round if state.attempt else 0,
        "rounds": state.plan.rounds,
        "epsilon": spent(state),
        "situation": standing(state, store),
    }


def _details(store: Store, name: str) -> dict[str, Any]:
    state = store.run(name)
    refusals = {silo: pb.Refusal.FromString(signed.body) for silo, signed in state.refusals.items()}
    rounds = []
    for total in store.sums(name):
        means = dict(pb.ModelReport.FromString(next(iter(total.reports.values())).body).means) if total.reports else {}
        rounds.append(
            {"round": total.attempt.round, "in_sum": list(total.attempt.u3), "reported": sorted(total.reports), "means": means}
        )
    return _summary(state, store) | {
        "plan_digest": "sha256:" + state.plan.digest.hex(),
        "submitted_by": state.submitted_by,
        "submitted": _when(state.created_ms),
        "ended": _when(state.ended_ms),
        "joined": sorted(state.joins),
        "refused": [f"{silo}: {refusal.reason}" for silo, refusal in refusals.items()],
        "given_up": [f"round {one.round}, attempt {one.attempt}: {one.reason}" for one in store.abandoned(name)],
        "completed": rounds,
        "in_mlflow": name not in store.unprojected(),
        "key_epoch": state.epoch.number if state.epoch else 0,
        "keys_made_by": state.epoch.maker if state.epoch else "nobody yet",
        "keys_held_by": sorted(state.epoch.keyed) if state.epoch else [],
        "notes": _notes(state),
    }


def _notes(state: RunState) -> list[str]:
    said = [note for signed in state.joins.values() for note in pb.Join.FromString(signed.body).notes]
    return list(dict.fromkeys(said))


def _watch_lines(store: Store, name: str, as_json: bool) -> str:
    last = ""
    while True:
        state = store.run(name)
        summary = _summary(state, store)
        if summary["situation"] != last:
            last = summary["situation"]
            print_facts(summary, True) if as_json else print(last)
            sys.stdout.flush()
        if state.phase in ENDED:
            return state.phase
        time.sleep(WATCH_S)


def _watch_live(store: Store, name: str) -> str:
    with Live(console=Console(), refresh_per_second=4) as live:
        while True:
            state = store.run(name)
            live.update(_table(store, state))
            if state.phase in ENDED:
                return state.phase
            time.sleep(WATCH_S)


def _table(store: Store, state: RunState) -> Table:
    """A line per silo: what it says it does, and what it has delivered for the attempt under way."""
    table = Table(
        "silo",
        "stance",
        "does",
        "upload",
        "seal",
        "report",
        "seen",
        title=f"{standing(state, store)}; epsilon {spent(state)}",
    )
    known = {silo.name: silo for silo in store.silos()}
    for silo in sorted(state.active | state.joins.keys()):
        about = known.get(silo)
        stance = "joined" if silo in state.joins else "refused" if silo in state.refusals else "asked"
        upload = state.uploads.get(silo)
        seen = f"{max(0, store.now_ms() - about.last_seen_ms) // 1000} s ago" if about and about.last_seen_ms else "never"
        ticks = ("yes" if silo in state.seals else "", "yes" if silo in state.reports else "")
        done = "" if upload is None else "yes" if upload.finished_ms else upload.state
        table.add_row(silo, stance, about.activity if about else "", done, *ticks, seen)
    return table


# --- silos -----------------------------------------------------------------------------------------------------------------------


@silo_app.command()
def token(
    context: typer.Context,
    names: Annotated[list[str], typer.Argument(help="One or more silo names.")],
    out: Annotated[Path, typer.Option(help="The folder for the files; -: a tar archive on standard output.")] = Path(),
    json_: Json = False,
) -> None:
    """Write one enrolment file per silo, to be sent to that hospital: it works once, for that name, for a week.

    \b
    Example:
      aggregator silo token st-marys charite leuven --out letters
      kubectl -n wardround exec deploy/aggregator -- aggregator silo token st-marys charite leuven --out - | tar x
    """
    made, archive = [], tarfile.open(fileobj=sys.stdout.buffer, mode="w|") if str(out) == "-" else None  # noqa: SIM115
    with _opened(context) as opened:
        settings = opened.settings
        for silo in names:
            data, serial, expires = opened.pki.make_enrollment(silo, settings.host, settings.port, settings.operator_public_key())
            path = out / f"wardround-{silo}.yaml"
            if path.exists():
                raise ConflictError(f"there is a file {path.name} already: move it away, or choose another --out")
            opened.store.token_issued(
                serial, silo, int(expires.timestamp() * 1000)
            )  # before the file: a token nobody has is no risk
            try:
                if archive is not None:
                    _add(archive, path.name, data)
                    continue
                out.mkdir(parents=True, exist_ok=True)
                write_secret(path, data, replace=False)
            except OSError as error:
                raise StorageError(f"the enrolment file cannot be written: {error.strerror}") from None
            made.append({"silo": silo, "file": path.name, "expires": expires.isoformat(timespec="minutes")})
    if archive is not None:
        archive.close()
        return
    _print_rows("tokens", made, json_, ("silo", "file", "expires"))


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = len(data), 0o600, int(time.time())
    archive.addfile(member, io.BytesIO(data))


@silo_app.command("list")
def silo_list(context: typer.Context, json_: Json = False) -> None:
    """Every silo: its standing, its version, what it does and when it was last seen; and tokens not used yet.

    \b
    Example:
      aggregator silo list
    """
    with _opened(context) as opened:
        rows = silo_rows(opened.store)
    for row in rows:
        row["last_seen"] = _when(row.pop("last_seen_ms"))
    _print_rows("silos", rows, json_, ("silo", "standing", "version", "activity", "approved_roster", "last_seen"))


@silo_app.command()
def revoke(context: typer.Context, name: Annotated[str, typer.Argument(help="The silo.")], json_: Json = False) -> None:
    """Refuse every call of a silo from now on, also on open connections, and void its unused tokens.

    \b
    Example:
      aggregator silo revoke leuven
      aggregator roster draft | wardround roster sign --key operator.key | aggregator roster publish

    The other hospitals drop it once a roster without it is signed and published: the second line.
    """
    with _opened(context) as opened:
        opened.store.revoke(name)
    print_facts({"revoked": name, "next": "draft, sign and publish a roster without it"}, json_)


# --- the roster ------------------------------------------------------------------------------------------------------------------


@roster_app.command("draft")
def roster_draft(context: typer.Context, json_: Json = False) -> None:
    """Print the next roster for the operator to sign: the current members, who has enrolled since, and without who was revoked.

    \b
    Example:
      aggregator roster draft | wardround roster sign --key operator.key | aggregator roster publish

    Always JSON: --json changes nothing.
    """
    with _opened(context) as opened:
        proposed, current = opened.store.proposed_roster()
    if not proposed.silos:
        raise SettingsError("no silo has enrolled yet: send each its file (aggregator silo token NAME) and wait for it")
    print(draft(proposed, current).decode())


@roster_app.command("publish")
def roster_publish(
    context: typer.Context,
    file: Annotated[typer.FileBinaryRead, typer.Argument(help="roster.json as signed; - is standard input.")] = "-",  # type: ignore[assignment]
    json_: Json = False,
) -> None:
    """Accept a roster that the operator signed: silos get it with their next poll.

    \b
    Example:
      aggregator roster publish roster.json
    """
    with _opened(context) as opened:
        roster = opened.store.publish_roster(file.read().strip())
    print_facts({"version": roster.version, "digest": "sha256:" + roster.digest.hex(), "active": sorted(roster.active())}, json_)


# --- the audit chain -------------------------------------------------------------------------------------------------------------


@audit_app.command("export")
def audit_export(
    context: typer.Context, file: Annotated[Path, typer.Argument(help="A new SQLite file.")], json_: Json = False
) -> None:
    """Write the audit chain to a file of its own, for whoever is to verify it elsewhere; also where the store is PostgreSQL.

    \b
    Example:
      aggregator audit export audit.sqlite
      wardround audit verify audit.sqlite --head-from st-marys.sqlite
    """
    with _opened(context) as opened:
        try:
            records = opened.store.export_audit(file)
        except FileExistsError:
            raise ConflictError(f"there is a file {file.name} already: move it away, or name another") from None
        except (OSError, sqlite3.Error):
            raise StorageError(f"{file.name} cannot be written: check its folder, and the space on its disk") from None
    print_facts({"file": file.name, "records": records}, json_)


def _print_rows(title: str, rows: list[dict[str, Any]], as_json: bool, columns: tuple[str, ...]) -> None:
    if as_json:
        print_facts({title: rows}, True)
        return
    table = Table(*(column.replace("_", " ") for column in columns))
    for row in rows:
        table.add_row(*("" if row[column] is None else str(row[column]) for column in columns))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _when(time_ms: int | None) -> str | None:
    return None if time_ms is None else datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="seconds")


def main() -> None:
    run(app)
