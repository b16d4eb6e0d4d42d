"""`aggregator`: the coordinator's command line. It works on the data folder itself; a running server notices within a second."""

import base64
import io
import secrets
import sqlite3
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from aggregator.control import check_fits, continued, parent_of, silo_rows
from aggregator.run_cli import run_app
from aggregator.telemetry import configure
from aggregator.terminal import opened, person, print_rows, settings_of, tell_unserved, when
from wardround.cli import Json, command_line, or_stdin, plan_facts, print_facts, run
from wardround.errors import ConflictError, SettingsError, StorageError
from wardround.keyfiles import write_secret
from wardround.kube import ClusterApi
from wardround.plan import load_plan
from wardround.roster import draft
from wardround.warm_start import cost_of

SILENT_MS = 60_000  # since a silo was last seen: a poll lasts 25 s, so what it said then may no longer hold

app = command_line("The aggregator of a federation: serve hospitals, submit plans, watch runs, let silos in.")
plan_app = command_line("Plans: check one, submit one.")
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


@app.command("serve")
def serve_command(context: typer.Context) -> None:
    """Serve the federation until SIGTERM, which drains.

    \b
    Example:
      aggregator --config aggregator.yaml serve

    Makes the data folder, the database and the certificates where they are missing. Killed at any moment, it goes on where it was.
    """
    from aggregator.server import serve  # takes a second to import, which no other command needs

    settings = settings_of(context)
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
    with opened(context) as found:
        active = check_fits(plan, found.store)
        parent = parent_of(plan, found.store)
    unknown = (
        "not asked: a hospital's policy, its approval and hours too, its ledger and its dataset's name are judged there; "
        "`aggregator run rehearse` asks them all, and charges nobody"
    )
    facts = plan_facts(plan) | {"active_silos": active, "each_silo": unknown}
    print_facts(facts | ({"start": cost_of(parent.plan, parent.id)} if parent else {}), json_)


@plan_app.command()
def submit(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="The plan, YAML.")],
    continue_: Annotated[str, typer.Option("--continue", help="Start from this run's released model, not plan.initial.")] = "",
    json_: Json = False,
) -> None:
    """Submit a plan: every active silo is asked, and the run starts when they have joined.

    \b
    Example:
      aggregator plan submit brain-tissue.yaml
      aggregator run watch brain-tissue-1
      aggregator plan submit brain-tissue.yaml --continue brain-tissue-1

    One run moves at a time; a later one waits for it to end.
    """
    plan = load_plan(file)
    with opened(context) as found:
        plan = continued(plan, continue_, found.store) if continue_ else plan
        active = check_fits(plan, found.store)
        name = found.store.submit(plan, person())
        tell_unserved(found.store)
    print_facts({"run": name, "asked": active, "next": f"aggregator run watch {name}"}, json_)


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
    made = []
    with opened(context) as found, _archive(out) as archive:
        settings = found.settings
        for silo in names:
            data, serial, expires = found.pki.make_enrollment(silo, settings.host, settings.port, settings.operator_public_key())
            path = out / f"wardround-{silo}.yaml"
            if path.exists():
                raise ConflictError(f"there is a file {path.name} already: move it away, or choose another --out")
            found.store.token_issued(
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
    if archive is None:
        print_rows("tokens", made, json_, ("silo", "file", "expires"))


@contextmanager
def _archive(out: Path) -> Iterator[tarfile.TarFile | None]:
    """A tar archive on standard output, where `out` is a dash."""
    if str(out) != "-":
        yield None
        return
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as archive:
        yield archive


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
    with opened(context) as found:
        rows, now_ms = silo_rows(found.store), found.store.now_ms()
    for row in rows:
        seen_ms = row.pop("last_seen_ms")
        row["last_seen"] = when(seen_ms)
        if not json_ and seen_ms is not None and now_ms > seen_ms + SILENT_MS and row["activity"]:
            row["activity"] = f"silent; said last: {row['activity']}"
    print_rows("silos", rows, json_, ("silo", "standing", "version", "activity", "approved_roster", "last_seen"))


@silo_app.command()
def revoke(context: typer.Context, name: Annotated[str, typer.Argument(help="The silo.")], json_: Json = False) -> None:
    """Refuse every call of a silo from now on, also on open connections, and void its unused tokens.

    \b
    Example:
      aggregator silo revoke leuven
      aggregator roster draft | wardround roster sign --key operator.key | aggregator roster publish

    The other hospitals drop it once a roster without it is signed and published: the second line.
    """
    with opened(context) as found:
        found.store.revoke(name)
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
    with opened(context) as found:
        proposed, current = found.store.proposed_roster()
    if not proposed.silos:
        raise SettingsError("no silo has enrolled yet: send each its file (aggregator silo token NAME) and wait for it")
    print(draft(proposed, current).decode())


@roster_app.command("publish")
def roster_publish(
    context: typer.Context,
    file: Annotated[
        typer.FileBinaryRead,
        or_stdin("roster.json as signed"),
    ],
    json_: Json = False,
) -> None:
    """Accept a roster that the operator signed: silos get it with their next poll.

    \b
    Example:
      aggregator roster publish roster.json
    """
    with opened(context) as found:
        roster = found.store.publish_roster(file.read().strip())
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
    with opened(context) as found:
        try:
            records = found.store.export_audit(file)
        except FileExistsError:
            raise ConflictError(f"there is a file {file.name} already: move it away, or name another") from None
        except (OSError, sqlite3.Error):
            raise StorageError(f"{file.name} cannot be written: check its folder, and the space on its disk") from None
    print_facts({"file": file.name, "records": records}, json_)


def main() -> None:
    run(app)
