"""The server's back door for its own pod: the operator container asks here, and never opens the database.

One JSON object a line over a Unix socket in a folder that only this user enters. The process with the CA's key and the database has
no Kubernetes token, and the process with the token has neither; what passes between them is this and nothing else:

    {"do": "look"}                                     -> {"runs": [...], "silos": [...]}
    {"do": "submit", "plan": YAML, "by": who}          -> {"run": name}       the same `by` again: the same run; `rehearse: true`
                                                                              in the plan: a rehearsal of it
    {"do": "stop", "run": name, "by": who}             -> {}
    {"do": "pause", "run": name, "reason": why, "by": who}  -> {}    an empty reason resumes it
    any of them                                        -> {"error": code, "message": one sentence}
"""

import json
import socketserver
import threading
from pathlib import Path
from typing import Any

from aggregator.driver import facts_of, situation
from aggregator.records import RunState
from aggregator.runs import ENDED
from aggregator.store import Store
from wardround.accounting import epsilon_after, round_event
from wardround.canonical import canonical_json, digest_name
from wardround.errors import MessageError, PlanError, SettingsError, WardroundError
from wardround.pb import federation_pb2 as pb
from wardround.plan import Plan, parse_plan
from wardround.warm_start import check_parent

MAX_LINE_BYTES = 1 << 20
NOT_THEIR_WORK = ("queued", "paused", "approval", "hours", "troubled")  # first words of an activity that keeps others waiting


def check_fits(plan: Plan, store: Store) -> list[str]:
    """Names of the active silos. Raises PlanError when they are too few or too many for the plan, and as `parent_of` does."""
    roster = store.newest_roster()
    revoked = {silo.name for silo in store.silos() if silo.revoked_ms is not None}
    active = sorted(roster.active().keys() - revoked) if roster else []
    round_event(plan)  # a privacy section whose numbers cannot fit together is refused here
    parent_of(plan, store)
    if len(active) < plan.aggregation.min_silos:
        raise PlanError(
            f"aggregation.min_silos is {plan.aggregation.min_silos}, the published roster has {len(active)} active "
            "silos: enrol more, or ask fewer"
        )
    if len(active) > plan.aggregation.he.max_silos:
        raise PlanError(
            f"aggregation.max_silos is {plan.aggregation.he.max_silos}, the published roster has {len(active)} active silos: a sum "
            "must have headroom for all of them"
        )
    return active


def parent_of(plan: Plan, store: Store) -> RunState | None:
    """The run whose released model a plan starts from; None without one. Raises PlanError: none, or of another layout."""
    if plan.parent is None:
        return None
    parent = store.released(plan.parent)
    if parent is None:
        raise PlanError(
            f"initial.bundle: no run of this federation released {digest_name(plan.parent)}. `aggregator run show` names what a "
            "run released, MLflow in the tag wardround.parameters_digest"
        )
    check_parent(plan, parent.plan, parent.id)
    return parent


def continued(plan: Plan, run: str, store: Store) -> Plan:
    """`plan`, from the released model of `run` on. Raises SettingsError where that released none."""
    bundle = store.run(run).bundle
    if bundle is None:
        raise SettingsError(
            f"{run} released no model, so nothing can continue from it: only a run that completed under release: registry did"
        )
    digest = digest_name(pb.Bundle.FromString(bundle.body).parameters_digest)
    return parse_plan(canonical_json(plan.model_dump(mode="json") | {"initial": {"bundle": digest}}))


def silo_rows(store: Store) -> list[dict[str, Any]]:
    """Every silo known by enrolment, roster or unused token, in the order of names."""
    roster = store.newest_roster()
    known = {silo.name: silo for silo in store.silos()}
    members = {member.name: member.status for member in roster.silos} if roster else {}
    waiting = {one.silo for one in store.tokens() if one.state == "unused" and one.expires_ms > store.now_ms()}
    rows: list[dict[str, Any]] = []
    for silo in sorted(known.keys() | members.keys() | waiting):
        about = known.get(silo)
        standing = members.get(silo) or ("enrolled, not in the roster" if about else "token issued, not enrolled")
        rows.append(
            {
                "silo": silo,
                "standing": "revoked" if about and about.revoked_ms is not None else standing,
                "version": about.software_version if about else "",
                "activity": about.activity if about else "",
                "approved_roster": about.roster_version if about else 0,
                "last_seen_ms": about.last_seen_ms if about else None,
            }
        )
    return rows


def spent(state: RunState) -> str:
    """What the run has cost a patient so far, the round under way included, for people who look."""
    if state.plan.rehearse:
        return "nothing"
    epsilon = epsilon_after(state.plan, state.attempt.round if state.attempt else 0, state.last_round)
    if epsilon is None or state.plan.privacy is None:
        return "unbounded"
    return f"{epsilon:.2f} of {state.plan.privacy.epsilon:g}"


def standing(state: RunState, store: Store) -> str:
    """Where a run stands, and what those it waits for say of themselves when it is not their work."""
    now_ms = store.now_ms()
    told = situation(state, now_ms)
    awaited = frozenset() if state.phase in ENDED else facts_of(state, now_ms).waiting_for
    said = {silo.name: silo.activity for silo in store.silos() if silo.name in awaited}
    return "; ".join([told, *(f"{name}: {word}" for name, word in said.items() if word.startswith(NOT_THEIR_WORK))])


def run_row(state: RunState, store: Store) -> dict[str, Any]:
    """What the operator mirrors of a run."""
    now_ms = store.now_ms()
    facts = facts_of(state, now_ms)
    refusals = {silo: pb.Refusal.FromString(signed.body).reason for silo, signed in state.refusals.items()}
    return {
        "run": state.id,
        "by": state.submitted_by,
        "phase": state.phase,
        "rehearsal": state.plan.rehearse,
        "paused": state.paused,
        "epsilon": spent(state),
        "round": state.attempt.round if state.attempt else 0,
        "rounds": 1 if state.plan.rehearse else state.plan.rounds,
        "joined": sorted(state.joins),
        "waiting_for": [] if state.phase in ENDED else sorted(facts.waiting_for),
        "refused": [f"{silo}: {reason}" for silo, reason in sorted(refusals.items())],
        "situation": standing(state, store),
        "plan_digest": "sha256:" + state.plan.digest.hex(),
    }


class _Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        line = self.rfile.readline(MAX_LINE_BYTES)
        try:
            answer = _answer(self.server.store, json.loads(line))  # type: ignore[attr-defined]  # Control's
        except WardroundError as error:
            answer = {"error": error.code, "message": str(error)}
        except (ValueError, KeyError, TypeError):
            answer = {"error": MessageError.code, "message": "expected one JSON object on one line, as aggregator/control.py says"}
        self.wfile.write(json.dumps(answer).encode() + b"\n")


def _answer(store: Store, asked: dict[str, Any]) -> dict[str, Any]:
    if asked["do"] == "look":
        return {"runs": [run_row(state, store) for state in store.runs()], "silos": silo_rows(store)}
    if asked["do"] == "submit":
        by = str(asked["by"])
        if done := [state.id for state in store.runs() if state.submitted_by == by]:
            return {"run": done[-1]}  # an operator that was killed before it wrote down the answer
        plan = parse_plan(str(asked["plan"]).encode())
        check_fits(plan, store)
        return {"run": store.submit(plan, by)}
    if asked["do"] == "stop":
        store.request_abort(str(asked["run"]), str(asked["by"]))
        return {}
    if asked["do"] == "pause":
        store.pause(str(asked["run"]), str(asked["reason"]), str(asked["by"]))
        return {}
    raise MessageError(f"the control socket knows look, submit, pause and stop, not {asked['do']!r}")


class Control(socketserver.ThreadingUnixStreamServer):
    """Serves until `shutdown`."""

    daemon_threads = True

    def __init__(self, path: Path, store: Store) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self.store = store
        super().__init__(str(path), _Handler)
        path.chmod(0o600)
        self._path = path

    def start(self) -> threading.Thread:
        thread = threading.Thread(target=self.serve_forever, name="control", daemon=True)
        thread.start()
        return thread
