"""`wardround`: what a coordinator or researcher does offline, with the thin install. Also how all three command lines end."""

import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from wardround import accounting, audit
from wardround.canonical import digest_name
from wardround.compare import Side, as_text, compare
from wardround.errors import ConflictError, SettingsError, StorageError, UsageError, WardroundError
from wardround.keyfiles import ed25519_key, private_pem, read_secret, write_secret
from wardround.layout import layout_of
from wardround.messages import SILO_NAME
from wardround.plan import Plan, load_plan
from wardround.roster import changes, operator_words, parse_draft, read_public_key, sign_roster, write_public_key
from wardround.tracking import Tracking
from wardround.warm_start import check_bundle

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def command_line(about: str) -> typer.Typer:
    """A group of commands: help when called without one, examples printed as they are typed."""
    return typer.Typer(
        help=about, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
    )


def run(app: typer.Typer) -> None:
    """Run a command line. A WardroundError ends it with its exit code and one line on stderr, never with a traceback."""
    try:
        app()
    except WardroundError as error:
        print(f"error ({error.code}): {'; '.join(str(error).splitlines())}", file=sys.stderr)
        sys.exit(error.exit_code)


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """One JSON object, or a line per fact; lists take a line per item."""
    if as_json:
        print(json.dumps(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        for item in value if isinstance(value, list) else [value]:
            print(f"{name.replace('_', ' '):<{width}}  {in_words(item)}")


def or_stdin(what: str) -> Any:
    """The argument of a file to read; standard input where none is named."""
    return typer.Argument(help=f"{what}; - is standard input.", default_factory=lambda: "-", show_default=False)


def in_words(value: Any) -> str:
    """As people read it: yes and no, and nothing where there is none."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


app = command_line("Wardround, offline: check plans, sign rosters, verify audit chains. Nothing here needs a network.")
plan_app = command_line("Plans: what a federation trains.")
operator_app = command_line("The operator's key, which says who is in the federation.")
roster_app = command_line("Rosters: the signed list of silos.")
run_app = command_line("Runs, as MLflow shows them.")
audit_app = command_line("Audit chains: who decided what, and whether anyone touched it since.")
for name, group in (("plan", plan_app), ("operator", operator_app), ("roster", roster_app), ("run", run_app), ("audit", audit_app)):
    app.add_typer(group, name=name)


@plan_app.command()
def validate(
    file: Annotated[Path, typer.Argument(help="The plan, YAML.")],
    bundle: Annotated[Path | None, typer.Option(help="Of a warm start: the bundle's folder, to hold the plan against.")] = None,
    json_: Json = False,
) -> None:
    """Check a plan and say what it will cost.

    \b
    Example:
      wardround plan validate configs/plans/brain-tissue.yaml
      wardround plan validate next.yaml --bundle brain-tissue

    Exit code 2 when the plan does not hold, and what is wrong by its key; a section of an unknown kind (training.algorithm,
    say) hides what is wrong inside it. Whether a hospital takes part is its own decision: aggregator plan check.
    """
    plan = load_plan(file)
    facts = plan_facts(plan)
    if bundle is not None:
        check_bundle(plan, bundle)
        facts["start"] = "the bundle's arrays are those that the plan names, and fit its network"
    print_facts(facts, json_)


def plan_facts(plan: Plan) -> dict[str, Any]:
    """What `plan validate` prints. Bytes are exact; MB are 10^6 bytes."""
    layout = layout_of(plan)
    he, minimum = plan.aggregation.he, plan.aggregation.min_silos
    up, down = he.upload_bytes(layout), he.sum_bytes(layout)
    return {
        "name": plan.name,
        "digest": digest_name(plan.digest),
        "parameters": layout.num_parameters,
        "mb_up_per_round": round(up / 1e6, 2),
        "mb_down_per_round": round(down / 1e6, 2),
        "mb_up_per_run": round((plan.rounds * up + he.upload_bytes(None)) / 1e6, 2),
        "rounds": plan.rounds,
        "rounds_with_closing": plan.rounds + 1,
        "min_silos": minimum,
        "absent": f"every silo beyond {minimum} may be absent from a round; at most {he.max_silos} can be in one",
        **_cost_facts(plan),
        "notes": list(plan.caveats),
    }


def _cost_facts(plan: Plan) -> dict[str, Any]:
    """What the run costs every patient: epsilon in all, and the epsilon_cap from which a hospital's empty ledger takes it.

    Raises PlanError when the plan's numbers cannot fit together.
    """
    event = accounting.round_event(plan)
    if plan.privacy is None or event is None:
        return {}
    events, delta = Counter({event: plan.rounds}), plan.privacy.delta
    cap = accounting.cap_needed(events, delta)
    return {
        "noise_multiplier": event.noise_multiplier,
        "private_steps": plan.rounds * event.steps,
        "epsilon": round(accounting.pld_epsilon(events, delta), 4),
        "delta": delta,
        "epsilon_cap_needed": cap or "no ledger admits this run",
        "patients_needed": math.ceil(1 / event.sample_rate),
    }


@run_app.command("compare")
def run_compare(
    a: Annotated[str, typer.Argument(help="A run, e.g. brain-tissue-1.")],
    b: Annotated[str, typer.Argument(help="Another; differences are this one minus the first.")],
    mlflow: Annotated[str, typer.Option(help="MLflow's address.", envvar="MLFLOW_TRACKING_URI")],
    json_: Json = False,
) -> None:
    """Two runs side by side, out of MLflow: plans, measures, hospitals, cost, and what the comparison does not show.

    \b
    Example:
      wardround run compare brain-tissue-1 brain-tissue-2 --mlflow http://127.0.0.1:5000

    Prints Markdown. The coordinator's `aggregator run compare` prints the same out of the store.
    """
    tracking = Tracking(mlflow)
    print_comparison(tracking.side(a), tracking.side(b), json_)


def print_comparison(a: Side, b: Side, as_json: bool) -> None:
    """Raises UsageError for one run twice."""
    if a.run == b.run:
        raise UsageError(f"{a.run} was named twice: two runs are compared")
    found = compare(a, b)
    print(json.dumps(found) if as_json else as_text(found), end="\n" if as_json else "")


@operator_app.command("init")
def operator_init(
    federation: Annotated[str, typer.Option(help="The federation's name.")],
    out: Annotated[Path, typer.Option(help="Where the private key goes; the public key goes beside it as .pub.")],
    json_: Json = False,
) -> None:
    """Make the key that signs rosters. Keep it offline: whoever has it says who is in the federation.

    \b
    Example:
      wardround operator init --federation neuro --out operator.key

    Prints the public key, for the aggregator and every hospital, and eight words to compare by telephone.
    """
    if not SILO_NAME.fullmatch(federation):
        raise SettingsError("a federation's name has lower-case letters, digits and hyphens, at most 40")
    public_file = out.with_suffix(".pub")
    if out.exists() or public_file.exists():
        raise ConflictError("there is an operator key already: nothing was overwritten; choose another --out")
    key = Ed25519PrivateKey.generate()
    public_key = key.public_key().public_bytes_raw()
    try:
        write_secret(out, private_pem(key), replace=False)
        public_file.write_text(write_public_key(public_key) + "\n")
    except OSError as error:
        raise StorageError(f"the key cannot be written: {error.strerror}") from None
    print_facts({"federation": federation, "public_key": write_public_key(public_key), "words": operator_words(public_key)}, json_)


@roster_app.command("sign")
def roster_sign(
    key: Annotated[Path, typer.Option(help="The operator's private key.")],
    draft: Annotated[
        typer.FileBinaryRead,
        or_stdin("The draft"),
    ],
    json_: Json = False,
) -> None:
    """Sign a roster that the aggregator drafted. Read what changes before you publish it.

    \b
    Example:
      aggregator roster draft | wardround roster sign --key operator.key > roster.json
      aggregator roster publish roster.json

    The signed roster goes to standard output, what changes to standard error (as JSON with --json). Compare each added silo's
    eight words with its hospital by telephone: they say that the keys are the hospital's own.
    """
    operator = ed25519_key(read_secret(key), "the operator's key")
    proposed, current = parse_draft(draft.read(), operator.public_key().public_bytes_raw())
    changed = [{"change": kind, "silo": member.name, "words": member.words} for kind, member in changes(proposed, current)]
    if json_:
        print(json.dumps({"federation": proposed.federation, "version": proposed.version, "changes": changed}), file=sys.stderr)
    else:
        print(f"{proposed.federation}, roster version {proposed.version}, {digest_name(proposed.digest)}", file=sys.stderr)
        for change in changed or [{"change": "nothing changes", "silo": "", "words": ""}]:
            print(f"  {change['change']:<15} {change['silo']:<20} {change['words']}", file=sys.stderr)
    print(sign_roster(proposed, operator).decode())


@audit_app.command("verify")
def audit_verify(
    file: Annotated[Path, typer.Argument(help="The SQLite file of an aggregator or a silo; only read.")],
    key: Annotated[Path | None, typer.Option(help="The side's audit public key; without it the file's own is believed.")] = None,
    head_from: Annotated[Path | None, typer.Option(help="A silo's SQLite file: the heads it kept must be in this chain.")] = None,
    json_: Json = False,
) -> None:
    """Verify an audit chain: every record, in order, unchanged, and none cut off below a kept head.

    \b
    Example:
      wardround audit verify aggregator.sqlite --head-from st-marys.sqlite

    Names the first record that does not hold, with exit code 1. Edits, deletions and reorderings always show; a chain that
    was cut shows only against heads kept elsewhere, which every silo does.
    """
    public_key = None
    if key is not None:
        try:
            public_key = read_public_key(key.read_text())
        except (OSError, UnicodeDecodeError):
            raise SettingsError(f"cannot read the audit public key {key}: expected one line of text") from None
    head, compared = audit.verify_file(file, public_key, head_from)
    facts = {
        "verified": True,
        "records": head.seq if head else 0,
        "head": head.hash.hex() if head else None,
        "key": "given" if key else "the file's own: this proves that the chain is whole, not whose it is",
        "kept_heads_compared": compared,
    }
    print_facts(facts, json_)


def main() -> None:
    run(app)
