"""`silo-agent`: what hospital IT types. Every command works beside the running agent; none needs an inbound port."""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from silo_agent.client import Credentials
from silo_agent.config import Settings, load_settings
from silo_agent.custody.enrollment import enroll_request, read_enrollment
from silo_agent.custody.keys import SiloKeys
from silo_agent.custody.policy import judge, load_policy
from silo_agent.custody.roster import approve
from silo_agent.custody.state import State
from silo_agent.membership import connect, stand_by
from wardround import tls
from wardround.canonical import digest_name
from wardround.cli import run as run_app
from wardround.errors import PolicyRefusal, SettingsError
from wardround.plan import load_plan
from wardround.roster import Roster, changes, parse_roster

app = typer.Typer(
    help="One hospital's side of a Wardround federation: keeps the keys, guards the data, takes part in rounds.",
    no_args_is_help=True,
    add_completion=False,
)
roster_app = typer.Typer(help="Which hospitals this one deals with.", no_args_is_help=True)
data_app = typer.Typer(help="What this hospital's data looks like to Wardround.", no_args_is_help=True)
policy_app = typer.Typer(help="What this hospital takes part in.", no_args_is_help=True)
app.add_typer(roster_app, name="roster")
app.add_typer(data_app, name="data")
app.add_typer(policy_app, name="policy")

ConfigOption = Annotated[Path, typer.Option("--config", "-c", envvar="WARDROUND_SILO_CONFIG", help="The settings file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
CHECK_WAIT_S = 1.0


@app.command()
def enroll(file: Path, config: ConfigOption = Path("silo-agent.yaml"), as_json: JsonOption = False) -> None:
    """Join the federation with the file the coordinator sent. Makes this hospital's keys; they never leave.

    Example: silo-agent enroll wardround-st-marys.yaml

    Afterwards read the eight words to the coordinator by telephone: they name the keys that this hospital will sign with.
    """
    settings, enrollment = load_settings(config), read_enrollment(file)
    folder = settings.data / "keys"
    keys = SiloKeys.open(folder) if folder.is_dir() else SiloKeys.create(folder)
    client = connect(
        enrollment.target, Credentials(enrollment.roots, enrollment.bootstrap_certificate, enrollment.bootstrap_key), settings
    )
    answer = client.enroll(enroll_request(enrollment, keys))
    keys.install_certificate(answer, enrollment.federation, enrollment.silo)
    facts = {
        "federation": enrollment.federation.encode(),
        "silo": enrollment.silo.encode(),
        "target": enrollment.target.encode(),
        "operator_key": enrollment.operator_key,
        "audit_key": keys.audit_public,
    }
    State(settings.data / "state.sqlite", keys.audit).enrolled(facts)
    words = own_words(enrollment.silo, keys)
    if as_json:
        _print({"silo": enrollment.silo, "federation": enrollment.federation, "words": words})
    else:
        typer.echo(
            f"enrolled as {enrollment.silo} in {enrollment.federation}\nthis hospital's words: {words}\nnext: silo-agent run"
        )


@app.command("run")
def run_agent(
    config: ConfigOption = Path("silo-agent.yaml"),
    seed: Annotated[int | None, typer.Option(help="Reproducible randomness: NOT PRIVATE, needs allow_seeded_noise.")] = None,
    log_json: Annotated[bool, typer.Option("--log-json", help="Log lines as JSON.")] = False,
) -> None:
    """Take part in rounds until stopped. SIGTERM ends after the step at hand; SIGKILL loses nothing either."""
    from silo_agent.agent import Agent
    from silo_agent.desk import Desk
    from silo_agent.launch.process import MODULES, Helper
    from silo_agent.telemetry import configure, log

    configure(log_json)
    settings = load_settings(config)
    policy = load_policy(settings.policy)
    if seed is not None and not policy.allow_seeded_noise:
        raise SettingsError("--seed makes randomness reproducible, not private: it needs allow_seeded_noise: true in the policy")
    keys = SiloKeys.open(settings.data / "keys")
    state = State(settings.data / "state.sqlite", keys.audit)
    with tempfile.TemporaryDirectory(prefix="wr-") as folder:  # a Unix socket's name has at most 107 bytes
        desk = Desk(Path(folder) / "desk")
        helpers = {program: Helper(program, desk.address) for program in MODULES}
        agent = Agent(settings, policy, keys, state, desk, helpers, seed)
        for sign in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sign, lambda *_: agent.inbox.stop())
        log.info("silo agent", silo=agent.silo, federation=agent.federation, seeded=seed is not None)
        try:
            agent.run()
        finally:
            for helper in helpers.values():
                helper.stop()
            desk.close()
            state.close()


@app.command()
def status(config: ConfigOption = Path("silo-agent.yaml"), as_json: JsonOption = False) -> None:
    """What the agent is doing, which runs it knows, which roster it approved, when its certificate ends."""
    settings = load_settings(config)
    keys, state = SiloKeys.open(settings.data / "keys"), State(settings.data / "state.sqlite")
    activity = state.activity()
    head = state.last_head()
    runs = [{key: row[key] for key in ("run", "stance", "code", "reason", "model_round")} for row in state.runs()]
    certificate = tls.load_certificate(keys.tls_material()[1])
    approved = _standing(settings, state).approved
    value = {
        "silo": (state.meta("silo") or b"").decode(),
        "federation": (state.meta("federation") or b"").decode(),
        "activity": None if activity is None else dict(activity),
        "runs": runs,
        "roster_version": approved.version if approved else 0,
        "aggregator_head": 0 if head is None else head["seq"],
        "certificate_ends": certificate.not_valid_after_utc.isoformat(),
    }
    if as_json:
        _print(value)
        return
    doing = "never started" if activity is None else f"{activity['word']} ({activity['detail']}) for {_age(activity['since_ms'])}"
    typer.echo(f"{value['silo']} in {value['federation']}: {doing}")
    typer.echo(f"roster version {value['roster_version']} approved; certificate until {certificate.not_valid_after_utc:%Y-%m-%d}")
    for row in runs:
        refusal = f": {row['reason']}" if row["reason"] else ""
        typer.echo(f"run {row['run']}: {row['stance']}, model of round {row['model_round']}{refusal}")


@data_app.command("check")
def data_check(
    name: str,
    config: ConfigOption = Path("silo-agent.yaml"),
    plan: Annotated[Path | None, typer.Option(help="Also make the snapshot this plan would train on.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Index and validate a dataset binding as a run would: counts, splits, and why studies were set aside.

    Example: silo-agent data check brain-t1
    """
    from silo_agent.desk import Desk
    from silo_agent.launch.process import Helper
    from silo_agent.work import IngestWork

    settings = load_settings(config)
    binding = settings.dataset(name)
    keys = SiloKeys.open(settings.data / "keys")
    parsed = load_plan(plan) if plan else None
    work = IngestWork(parsed, binding.source, binding.labels.segments, keys.split_key, settings.data / "snapshots")
    with tempfile.TemporaryDirectory(prefix="wr-") as folder, Path(os.devnull).open("w") as nowhere:
        desk = Desk(Path(folder) / "desk")
        helper = Helper("ingest", desk.address, nowhere)
        started = time.monotonic()
        try:
            work_id = desk.submit(work)
            result = None
            while result is None:
                helper.ensure()
                result = desk.wait(work_id, CHECK_WAIT_S)
                if result is None and time.monotonic() - started > 2 and sys.stderr.isatty():
                    typer.echo(f"\rreading DICOM, {time.monotonic() - started:.0f} s", nl=False, err=True)
        finally:
            helper.stop()
            desk.close()
    value = {key: item for key, item in vars(result).items() if key != "seconds"}
    if as_json:
        _print(value)
        return
    table = Table("", name, title=f"dataset {name}")
    for key, item in value.items():
        shown = ", ".join(f"{k} {v}" for k, v in sorted(item.items())) or "none" if isinstance(item, dict) else str(item)
        table.add_row(key, shown)
    Console().print(table)


@policy_app.command("check")
def policy_check(plan: Path, config: ConfigOption = Path("silo-agent.yaml"), as_json: JsonOption = False) -> None:
    """Whether this hospital's policy and dataset bindings accept a plan, in words.

    Example: silo-agent policy check brain-tissue.yaml
    """
    settings, parsed = load_settings(config), load_plan(plan)
    settings.dataset(parsed.dataset).check_classes(parsed.dataset, parsed.classes)
    try:
        judge(load_policy(settings.policy), parsed)
    except PolicyRefusal as refusal:
        if as_json:
            _print({"accepted": False, "reason": str(refusal)})
            raise typer.Exit(PolicyRefusal.exit_code) from None
        raise
    if as_json:
        _print({"accepted": True, "reason": ""})
    else:
        typer.echo(f"accepted: this hospital would join {parsed.name} ({digest_name(parsed.digest)})")


@roster_app.command("show")
def roster_show(config: ConfigOption = Path("silo-agent.yaml"), as_json: JsonOption = False) -> None:
    """Who is in the federation, as the operator signed it, and who waits for this hospital's approval."""
    settings = load_settings(config)
    state = State(settings.data / "state.sqlite")
    received, standing = _received(state), _standing(settings, state)
    newest = received[-1] if received else None
    waiting = {member.name for member in standing.waiting}
    rows = [
        {"silo": m.name, "status": "waiting" if m.name in waiting else m.status, "words": m.words}
        for m in (newest.silos if newest else ())
    ]
    value = {
        "approved_version": standing.approved.version if standing.approved else 0,
        "newest_version": newest.version if newest else 0,
        "newest_digest": digest_name(newest.digest) if newest else "",
        "silos": rows,
    }
    if as_json:
        _print(value)
        return
    table = Table("silo", "status", "words to compare by telephone", title=f"roster version {value['newest_version']}")
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)
    if waiting:
        typer.echo(f"next: telephone the new hospitals, then: silo-agent roster approve {value['newest_digest']}")


@roster_app.command("approve")
def roster_approve(digest: str, config: ConfigOption = Path("silo-agent.yaml"), as_json: JsonOption = False) -> None:
    """Approve the newest roster, named by the digest that `roster show` prints, after comparing the words by telephone.

    Example: silo-agent roster approve sha256:3f...
    """
    settings = load_settings(config)
    keys = SiloKeys.open(settings.data / "keys")
    state = State(settings.data / "state.sqlite", keys.audit)
    received, standing = _received(state), _standing(settings, state)
    newer = [roster for roster in received if standing.approved is None or roster.version > standing.approved.version]
    try:
        wanted = bytes.fromhex(digest.removeprefix("sha256:"))
    except ValueError:
        raise SettingsError(
            "a roster is named by its digest, sha256: and 64 hexadecimal digits: see `silo-agent roster show`"
        ) from None
    chosen = approve(standing.approved, newer, wanted)
    state.approve_roster(chosen.version, digest_name(chosen.digest))
    if as_json:
        _print({"approved_version": chosen.version})
    else:
        names = ", ".join(f"{member.name} {what}" for what, member in changes(chosen, standing.approved)) or "nothing changed"
        typer.echo(f"approved roster version {chosen.version}: {names}")


def own_words(silo: str, keys: SiloKeys) -> str:
    """The eight words of this silo's keys, as rosters show them elsewhere."""
    from wardround.roster import Member

    return Member(name=silo, identity=keys.identity_public, sealing=keys.sealing_public).words


def _received(state: State) -> list[Roster]:
    operator = state.meta("operator_key")
    if operator is None:
        raise SettingsError("NOT ENROLLED: run `silo-agent enroll` with the file the coordinator sent")
    return [parse_roster(row["data"], operator) for row in state.rosters()]


def _standing(settings: Settings, state: State) -> Any:
    return stand_by(state, _received(state), settings.roster_approval)


def _age(since_ms: int) -> str:
    seconds = time.time() - since_ms / 1000
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _print(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def main() -> None:
    run_app(app)


if __name__ == "__main__":
    main()
