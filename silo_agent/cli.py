"""`silo-agent`: what hospital IT types. Every command works beside the running agent; none needs an inbound port."""

import base64
import signal
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from silo_agent.budget import would_fit
from silo_agent.client import Credentials
from silo_agent.config import Settings, load_settings
from silo_agent.custody.door import Door, new_secret
from silo_agent.custody.enrollment import enroll_request, read_enrollment
from silo_agent.custody.installation import only_agent
from silo_agent.custody.keys import SiloKeys
from silo_agent.custody.policy import judge, load_policy
from silo_agent.custody.state import State
from silo_agent.ledger_cli import ledger_app
from silo_agent.membership import connect
from silo_agent.model_cli import model_app
from silo_agent.plan_cli import plan_app
from silo_agent.preflight import Finding, look_home, look_out
from silo_agent.roster_cli import roster_app
from silo_agent.status_cli import status
from wardround.canonical import digest_name
from wardround.cli import Json, command_line, print_facts
from wardround.cli import run as run_command_line
from wardround.errors import PolicyRefusal, SettingsError, UsageError, WardroundError
from wardround.kube import ClusterApi
from wardround.plan import load_plan
from wardround.roster import Member

if TYPE_CHECKING:
    from silo_agent.desk import Desk
    from silo_agent.launch import Helper

app = command_line("One hospital's side of a federation: keeps the keys, guards the data, takes part in rounds.")
data_app = command_line("Data: what this hospital's studies look like to a plan.")
policy_app = command_line("Policy: what this hospital takes part in.")
for name, group in (
    ("data", data_app),
    ("policy", policy_app),
    ("roster", roster_app),
    ("ledger", ledger_app),
    ("model", model_app),
    ("plan", plan_app),
):
    app.add_typer(group, name=name)
app.command()(status)

MAX_REASON_CHARS = 200


@app.callback()
def settings_file(
    context: typer.Context,
    config: Annotated[Path, typer.Option(help="The settings.", envvar="WARDROUND_SILO_CONFIG")] = Path("silo-agent.yaml"),
) -> None:
    context.obj = config


def _settings(context: typer.Context) -> Settings:
    return load_settings(context.obj)


@app.command()
def enroll(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="The enrolment file from the coordinator.")],
    unless_enrolled: Annotated[bool, typer.Option("--unless-enrolled", help="Nothing to do where this silo is enrolled.")] = False,
    json_: Json = False,
) -> None:
    """Join the federation. Makes this hospital's keys, which never leave it.

    \b
    Example:
      silo-agent enroll wardround-st-marys.yaml

    Then read the eight words to the coordinator by telephone: they name the keys this hospital will sign with.
    """
    settings = _settings(context)
    if unless_enrolled and (silo := _enrolled(settings)) is not None:
        print_facts({"enrolled": silo, "next": "silo-agent run"}, json_)
        return
    enrollment = read_enrollment(file)
    folder = settings.data / "keys"
    keys = SiloKeys.open(folder) if folder.is_dir() else SiloKeys.create(folder)
    bootstrap = Credentials(enrollment.roots, enrollment.bootstrap_certificate, enrollment.bootstrap_key)
    answer = connect(enrollment.target, bootstrap, settings).enroll(enroll_request(enrollment, keys))
    keys.install_certificate(answer, enrollment.federation, enrollment.silo)
    facts = {
        "federation": enrollment.federation.encode(),
        "silo": enrollment.silo.encode(),
        "target": enrollment.target.encode(),
        "operator_key": enrollment.operator_key,
        "audit_key": keys.audit_public,
    }
    State(settings.data / "state.sqlite", keys.audit).enrolled(facts)
    own = Member(name=enrollment.silo, identity=keys.identity_public, sealing=keys.sealing_public)
    print_facts({"enrolled": own.name, "federation": enrollment.federation, "words": own.words, "next": "silo-agent run"}, json_)


def _enrolled(settings: Settings) -> str | None:
    """The silo's name; None before its enrolment came to an end."""
    database = settings.data / "state.sqlite"
    silo = State(database).meta("silo") if database.exists() else None
    return None if silo is None else silo.decode()


@app.command()
def preflight(
    context: typer.Context,
    enrolment: Annotated[Path | None, typer.Option(help="The enrolment file, before this silo is enrolled.")] = None,
    json_: Json = False,
) -> None:
    """What stands between this hospital and its federation: one line a hop, ok or FAIL and what to do.

    \b
    Example:
      silo-agent preflight --enrolment wardround-st-marys.yaml

    Exit code 1 when something fails. A silo that is enrolled waits for its network: then only what is at home counts.
    """
    settings = _settings(context)
    found, must_hold = list(look_home(settings)), True
    if _enrolled(settings) is not None:
        must_hold = False
        material = SiloKeys.open(settings.data / "keys").tls_material()
        host, _, port = (State(settings.data / "state.sqlite").meta("target") or b"").decode().rpartition(":")
        out = look_out(host, int(port), material[0], settings.network.proxy)
    elif enrolment is None or not enrolment.exists():
        told = "NOT ENROLLED: name the file that the coordinator sent, wardround-NAME.yaml: with --enrolment, or to helm with -f"
        out = iter([Finding("enrolment", False, told)])
    else:
        try:
            file = read_enrollment(enrolment)
        except WardroundError as error:
            out = iter([Finding("enrolment", False, str(error))])
        else:
            found.append(Finding("enrolment", True, f"a token for {file.silo} in {file.federation}"))
            out = look_out(file.host, file.port, file.roots, settings.network.proxy)
    home_holds = all(finding.ok for finding in found)
    found += out
    if json_:
        print_facts({"findings": [vars(finding) for finding in found]}, True)
    else:
        print("\n".join(map(str, found)))
    if not home_holds or (must_hold and not all(finding.ok for finding in found)):
        raise typer.Exit(1)


@app.command("desk-secret")
def desk_secret(name: Annotated[str, typer.Argument(help="NAMESPACE/NAME of the Kubernetes Secret.")], json_: Json = False) -> None:
    """Make the Secret with which ingest and trainer find the agent, unless it is there. The chart's first Job runs it.

    \b
    Example:
      silo-agent desk-secret wardround-silo/silo-agent-desk

    What is made is never read back: the Job may create Secrets, and nothing here may read one.
    """
    namespace, _, secret = name.partition("/")
    body = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": secret, "labels": {"app.kubernetes.io/part-of": "wardround"}},
        "data": {key: base64.b64encode(value).decode() for key, value in new_secret().items()},
    }
    made = ClusterApi.of_this_pod().create(f"/api/v1/namespaces/{namespace}/secrets", body)
    print_facts({"secret": name, "made": made}, json_)


@app.command()
def run(
    context: typer.Context,
    seed: Annotated[int | None, typer.Option(help="Reproducible randomness: NOT PRIVATE, needs allow_seeded_noise.")] = None,
    log_json: Annotated[bool, typer.Option("--log-json", help="Log lines as JSON.")] = False,
) -> None:
    """Take part in rounds until stopped.

    \b
    Example:
      silo-agent --config silo-agent.yaml run

    SIGTERM ends after the step at hand; SIGKILL loses nothing either.
    """
    from silo_agent.agent import Agent
    from silo_agent.telemetry import configure, log

    configure(log_json)
    settings = _settings(context)
    policy = load_policy(settings.policy)
    if seed is not None and not policy.allow_seeded_noise:
        raise SettingsError("--seed makes randomness reproducible, not private: it needs allow_seeded_noise: true in the policy")
    keys = SiloKeys.open(settings.data / "keys")
    state = State(settings.data / "state.sqlite", keys.audit)
    # Under /tmp: a Unix socket's name has at most 107 bytes.
    with only_agent(settings.data), tempfile.TemporaryDirectory(prefix="wr-") as folder:
        desk, helpers = _staff(settings, Path(folder), (state.meta("silo") or b"").decode())
        agent = Agent(settings, policy, keys, state, desk, helpers, seed)
        for number in (signal.SIGTERM, signal.SIGINT):
            # In a thread: a handler that interrupts the loop at the wrong instruction would wait for a lock the loop holds.
            signal.signal(number, lambda *_: threading.Thread(target=agent.inbox.stop).start())
        log.info("silo agent", silo=agent.held.silo, federation=agent.held.federation, seeded=seed is not None)
        try:
            agent.run()
        finally:
            for helper in helpers.values():
                helper.leave()
            desk.close()
            state.close()


def _staff(settings: Settings, folder: Path, silo: str) -> "tuple[Desk, dict[str, Helper]]":
    """The desk and who works at it, by the settings."""
    from silo_agent.desk import Desk
    from silo_agent.launch.job import JobHelper, Resident, load_template
    from silo_agent.launch.process import MODULES, Process

    pods = settings.pods
    if pods is None:
        desk = Desk(f"unix:{folder / 'desk'}")
        return desk, {program: Process(program, desk.address) for program in MODULES}
    door = Door.open(pods.secret, settings.data / "desk")
    desk = Desk(pods.listen, door)
    trainer: Helper = Resident("trainer", desk.silent_s)
    if pods.job is not None:
        trainer = JobHelper(ClusterApi.of_this_pod(), load_template(pods.job), silo, door, door.certificate)
    return desk, {"ingest": Resident("ingest", desk.silent_s), "trainer": trainer}


@app.command()
def pause(
    context: typer.Context,
    reason: Annotated[str, typer.Argument(help="One sentence; the coordinator reads it too.")],
    json_: Json = False,
) -> None:
    """Begin nothing new: no run is joined, no round trained. An update that was trained before still goes out.

    \b
    Example:
      silo-agent pause "the scanner moves until Monday"

    Holds from the agent's next look on, 25 s at most, and until `silo-agent resume`, also over restarts. Keys and budget stay as
    they are; rounds go on without this hospital once their deadline has passed.
    """
    if not (told := " ".join(reason.split())):
        raise UsageError("the reason is empty: say in one sentence why, for the coordinator who waits")
    _pause(context, told[:MAX_REASON_CHARS])
    print_facts({"paused": told[:MAX_REASON_CHARS], "next": "silo-agent resume"}, json_)


@app.command()
def resume(context: typer.Context, json_: Json = False) -> None:
    """Take part again after a pause.

    \b
    Example:
      silo-agent resume
    """
    _pause(context, "")
    print_facts({"paused": "no"}, json_)


def _pause(context: typer.Context, reason: str) -> None:
    settings = _settings(context)
    State(settings.data / "state.sqlite", SiloKeys.open(settings.data / "keys").audit).pause(reason)


@data_app.command("check")
def data_check(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A dataset of the settings.")],
    plan: Annotated[Path | None, typer.Option(help="Also make the snapshot that this plan would train on.")] = None,
    json_: Json = False,
) -> None:
    """Index and validate a dataset as a run would: counts, splits, and why studies were set aside.

    \b
    Example:
      silo-agent data check brain-t1

    `snapshot` names what was read, and stays in this hospital; the digest that MLflow shows of its dataset is of the declared
    facts alone, so the two differ.
    """
    from silo_agent.errand import run_errand
    from silo_agent.work import ingest_work

    settings = _settings(context)
    binding = settings.dataset(name)
    if settings.pods is not None:
        raise SettingsError(
            "in a cluster only ingest sees the images, and it looks at them when a run begins: see `silo-agent status`"
        )
    split_key = SiloKeys.open(settings.data / "keys").split_key
    parsed = load_plan(plan) if plan else None
    if parsed is not None:
        binding.check_labels(parsed)
    result = run_errand(ingest_work(binding, parsed, split_key, settings.snapshots), "reading DICOM")
    facts = vars(result)
    if not json_:
        facts = {k: [f"{n}: {m}" for n, m in v.items()] or ["none"] if isinstance(v, dict) else v for k, v in facts.items()}
    print_facts({"dataset": name} | facts, json_)


@policy_app.command("check")
def policy_check(
    context: typer.Context, plan: Annotated[Path, typer.Argument(help="The plan, YAML.")], json_: Json = False
) -> None:
    """Whether this hospital would join a plan: its policy, its dataset bindings and what its ledger has left, in words.

    \b
    Example:
      silo-agent policy check brain-tissue.yaml

    Exit code 0 when it would, 3 when the policy or the ledger refuses. Nothing is reserved.
    """
    settings, parsed = _settings(context), load_plan(plan)
    binding, database = settings.dataset(parsed.dataset), settings.data / "state.sqlite"
    binding.check_labels(parsed)
    policy = load_policy(settings.policy)
    try:
        judge(policy, parsed)
        if database.exists():
            would_fit(State(database), parsed, binding.declared_patients)
    except PolicyRefusal as refusal:
        if not json_:
            raise
        print_facts({"plan": parsed.name, "accepted": False, "reason": str(refusal)}, True)
        raise typer.Exit(refusal.exit_code) from None
    facts: dict[str, Any] = {
        "plan": parsed.name,
        "digest": digest_name(parsed.digest),
        "accepted": True,
        "approval": policy.approval,
    }
    if policy.approval == "manual":
        facts["approval"] = "manual: each run of it waits here until `silo-agent plan approve RUN`"
    if policy.hours:
        facts["hours"] = f"a round's training begins {policy.hours} ({policy.time_zone}) on {', '.join(policy.days)}"
    print_facts(facts, json_)


def main() -> None:
    run_command_line(app)
