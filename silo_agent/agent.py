"""The agent: performs what the table in round.py decides. State is written before anything is sent, so that any action may be
killed at any point and is then simply decided again."""

import json
import os
import sqlite3
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from silo_agent import scrutiny
from silo_agent.config import Settings
from silo_agent.custody.keys import SiloKeys
from silo_agent.custody.policy import Policy, judge
from silo_agent.custody.spool import Spool
from silo_agent.custody.state import State
from silo_agent.desk import Desk
from silo_agent.inbox import Inbox
from silo_agent.launch import Helper
from silo_agent.membership import Membership
from silo_agent.round import Action, Attempt, Offered, Row, Stance, next_row
from silo_agent.secure_sum.check import CLEAR_EPOCH_SECRET, checked_sum, control_chunk, upload_bytes
from silo_agent.secure_sum.global_model import GlobalModel, clear_digest_key, model_mac
from silo_agent.secure_sum.packing import Exponents, bounds_digest, derive, encode, next_bounds, start_bounds
from silo_agent.telemetry import log
from silo_agent.work import IngestResult, IngestWork, TrainerResult, TrainerWork
from wardround import PROTOCOL, PROTOCOL_OLDEST, VERSION
from wardround.canonical import canonical_json, frame, sha256
from wardround.chunks import ControlMap, clear_coefficients, metric_names, num_chunks
from wardround.errors import Disconnected, IntegrityError, MessageError, StorageError, WardroundError
from wardround.layout import Layout, layout_of
from wardround.messages import run_ctx, sign, statement_digest
from wardround.pb import federation_pb2 as pb
from wardround.plan import Plan, parse_plan

MIN_VALIDATION_PATIENTS = 10  # below it a silo adds nothing to the cohort's metrics: a mean over few patients says too much
HELPER_CHECK_S = 1.0
MAX_REASON_CHARS = 500  # of a Refusal; the aggregator takes one line of at most that
CLEAR_NOTE = "updates travelled in the clear: the aggregator could read each hospital's update"
SEEDED_NOTE = "randomness came from a seed: reproducible, not private"


class Superseded(Exception):
    """The offer moved on while a helper was working: look again."""


class Run:
    """One run as the silo's state and plan describe it."""

    def __init__(self, row: sqlite3.Row) -> None:
        self.id: str = row["run"]
        self.plan: Plan = parse_plan(row["plan"])
        self.layout: Layout = layout_of(self.plan)
        self.snapshot: str | None = row["snapshot"]
        self.model_round: int = row["model_round"]
        self.statement: bytes | None = row["statement"]
        self.digest_key = clear_digest_key(self.id)
        self.metrics = metric_names(self.plan.classes)

    def layout_in(self, round_: int) -> Layout | None:
        """None in the closing round, which sums metrics only."""
        return self.layout if round_ <= self.plan.rounds else None

    def control(self, round_: int) -> ControlMap:
        return ControlMap(len(self.layout.arrays) if round_ <= self.plan.rounds else 0, self.metrics)


class Agent:
    """One silo at work. `seed` makes its randomness reproducible (only where the policy allows it)."""

    def __init__(
        self,
        settings: Settings,
        policy: Policy,
        keys: SiloKeys,
        state: State,
        desk: Desk,
        helpers: dict[str, Helper],
        seed: int | None,
    ) -> None:
        self.settings, self.policy, self.keys, self.state, self.desk, self.helpers = settings, policy, keys, state, desk, helpers
        self.seed = seed
        self.spool = Spool(settings.data / "spool")
        self.membership = Membership(settings, keys, state)
        self.silo, self.federation = self.membership.silo, self.membership.federation
        self.inbox = Inbox(self._request, self.membership.dial, self.membership.attend)
        self._activity = ""

    # --- the loop --------------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until `inbox.stop`. Retryable trouble is retried for ever; anything else waits for another offer."""
        self.inbox.start()
        failures = 0
        while not self.inbox.stopping:
            self.inbox.changed.clear()
            offer, doing = self.inbox.offer, "decide"
            try:
                row = next_row(self.state.facts(offer.run), self._offered(offer))
                doing = row.action.value
                if isinstance(self.inbox.trouble, IntegrityError):
                    self._wait(row, offer)  # its chain was cut: not even the offer at hand is served
                else:
                    self.perform(row, offer)
                failures = 0
            except Superseded:
                log.info("offer moved on", action=doing)
            except WardroundError as error:
                failures += 1
                log.warning("action failed", action=doing, code=error.code, reason=str(error))
                self._be("troubled", f"{doing}: {error}")
                self.inbox.pause(failures if error.retryable else max(failures, 6))
        self._be("stopped", "")
        self.membership.hang_up()  # ends the long poll at hand
        self.inbox.join()

    def perform(self, row: Row, offer: pb.Offer) -> None:
        """One action. Kill tests wrap this method."""
        if row.action is Action.WAIT:
            self._wait(row, offer)
            return
        started = time.monotonic()
        self._be(row.action.value, f"round {offer.facts.round}" if offer.facts.round else offer.run)
        getattr(self, f"_{row.action.value}")(offer)
        log.info(
            "done", action=row.action.value, run=offer.run, round=offer.facts.round, seconds=round(time.monotonic() - started, 2)
        )

    def _wait(self, row: Row, offer: pb.Offer) -> None:
        """Until there is another offer or other trouble."""
        trouble = self.inbox.trouble
        if trouble is None:
            self._be("waiting", offer.message or row.name)
        else:
            self._be("disconnected" if isinstance(trouble, Disconnected) else "refused", str(trouble))
        self.inbox.changed.wait()

    def _request(self) -> pb.PollRequest:
        head = self.state.last_head()
        run = self.state.run(self.inbox.offer.run)
        return pb.PollRequest(
            activity=self._activity,
            roster_version=self.membership.approved_version(),
            head_seq=0 if head is None else head["seq"],
            head_hash=b"" if head is None else head["hash"],
            run="" if run is None else run["run"],
            model_round=0 if run is None else max(run["model_round"], 0),
        )

    def _be(self, word: str, detail: str) -> None:
        """For `silo-agent status`; a disk that cannot keep it stops nothing."""
        if f"{word} {detail}" != self._activity:
            self._activity = f"{word} {detail}"
            with suppress(StorageError):
                self.state.set_activity(word, detail)

    def _offered(self, offer: pb.Offer) -> Offered:
        row = self.state.run(offer.run)
        plan = None if row is None or row["code"] is not None else Run(row).plan  # a refused plan may not even parse
        return Offered(
            phase=pb.Phase.Name(offer.phase),
            attempt=(offer.facts.round, offer.facts.attempt),
            rounds=plan.rounds if plan else 0,
            in_cohort=self.silo in offer.facts.cohort,
            in_u3=self.silo in (signed.silo for signed in offer.uploads),
            summed_rounds=frozenset(total.facts.round for total in offer.sums),
            validate_every=plan.validate_every if plan else 1,
        )

    # --- the run's beginning ---------------------------------------------------------------------------------------------------

    def _judge(self, offer: pb.Offer) -> None:
        code, reason, plan_digest = None, "", offer.facts.plan_digest
        plan = offer.plan
        try:
            parsed = parse_plan(offer.plan)
            plan = parsed.canonical()
            if parsed.digest != plan_digest:
                raise MessageError("the plan on offer is not the one its digest names")
            binding = self.settings.dataset(parsed.dataset)
            judge(self.policy, parsed)
            binding.check_classes(parsed.dataset, parsed.classes)
        except WardroundError as error:
            code, reason = error.code, _one_line(error)
        self.state.judged(offer.run, plan, plan_digest, code, reason)
        log.info("plan judged", run=offer.run, accepted=code is None, reason=reason)

    def _refuse(self, offer: pb.Offer) -> None:
        row = self.state.run(offer.run)
        assert row is not None  # noqa: S101 - the table: a stance is known
        body = pb.Refusal(run=offer.run, plan_digest=offer.facts.plan_digest, code=row["code"], reason=row["reason"])
        self._post("refusal", run_ctx(self.federation, offer.run, offer.facts.plan_digest), body)
        self.state.set_stance(offer.run, Stance.REFUSED)

    def _snapshot(self, offer: pb.Offer) -> None:
        run = self._run(offer.run)
        try:
            binding = self.settings.dataset(run.plan.dataset)
            segments = {name: binding.labels.segments[name] for name in run.plan.classes[1:]}
            work = IngestWork(run.plan, binding.source, segments, self.keys.split_key, self.settings.snapshots)
            result = self._helped(offer, work)
            assert isinstance(result, IngestResult)  # noqa: S101 - the desk pairs work and result
        except WardroundError as error:
            if error.retryable or type(error) is WardroundError:
                raise
            self.state.refuse(run.id, error.code, _one_line(error))
            return
        self.state.snapshot_made(run.id, result.snapshot, result.patients)
        self.helpers["ingest"].stop()  # its libraries hold 0.7 GB; a run needs it once
        log.info("snapshot", patients=result.patients, quarantined=result.quarantined)

    def _initialize(self, offer: pb.Offer) -> None:
        run = self._run(offer.run)
        result = self._helped(offer, TrainerWork("initialize", run.plan))
        assert isinstance(result, TrainerResult)  # noqa: S101 - the desk pairs work and result
        model = GlobalModel.initial(result.values, run.layout)
        exponents = start_bounds(np.frombuffer(result.values, dtype="<f4"), run.layout)
        self._keep_model(run, 0, model, exponents, [])

    def _join(self, offer: pb.Offer) -> None:
        run = self._run(offer.run)
        if run.statement is None:
            binding = self.settings.dataset(run.plan.dataset)
            model = self.state.model(run.id, 0)
            notes = [CLEAR_NOTE, *([SEEDED_NOTE] if self.seed is not None else []), *([binding.note] if binding.note else [])]
            declared_facts = {"dataset": run.plan.dataset, "silo": self.silo, "declared_patients": binding.declared_patients}
            body = pb.Join(
                run=run.id,
                plan_digest=run.plan.digest,
                protocol_min=PROTOCOL_OLDEST,
                protocol_max=PROTOCOL,
                software_version=VERSION,
                declared_patients=binding.declared_patients,
                layout_digest=run.layout.digest,
                initial_model_mac=model["mac"],
                bounds_digest=bounds_digest(_exponents(model)),
                roster_version=self.membership.approved_version(),
                dataset_digest=sha256(canonical_json(declared_facts)),
                per_silo_metrics=self.policy.metrics == "per_silo",
                notes=notes,
            )
            signed = sign("join", run_ctx(self.federation, run.id, run.plan.digest), body, self.silo, self.keys.identity)
            self.state.keep_statement(run.id, signed.SerializeToString())
        statement = self._run(offer.run).statement
        assert statement is not None  # noqa: S101 - kept above
        self.membership.dial().post(pb.Signed.FromString(statement))
        self.state.set_stance(run.id, Stance.JOINED)

    # --- a round ---------------------------------------------------------------------------------------------------------------

    def _open_event(self, offer: pb.Offer) -> None:
        run = self._run(offer.run)
        self._checked(run, offer.facts)
        if self.seed is None:
            key = os.urandom(32)
        else:
            key = derive(
                frame(b"seed", str(self.seed).encode()), run.plan.digest, self.silo.encode(), offer.facts.round.to_bytes(8, "big")
            )
        self.state.open_event(run.id, offer.facts.round, key, seeded=self.seed is not None)

    def _train(self, offer: pb.Offer) -> None:
        run, round_ = self._run(offer.run), offer.facts.round
        key = derive(self.state.event(run.id, round_)["random_key"], b"wardround/training/1")
        parameters = self._model(run, run.model_round).parameters
        result = self._helped(offer, TrainerWork("train", run.plan, round_, parameters, self._snapshot_folder(run), key))
        assert isinstance(result, TrainerResult)  # noqa: S101 - the desk pairs work and result
        if len(result.values) != run.layout.num_bytes:
            raise MessageError(f"the trainer delivered {len(result.values)} bytes, the layout has {run.layout.num_bytes}")
        self.state.update_made(run.id, round_, self.spool.put(result.values), result.num_patients)

    def _encode(self, offer: pb.Offer) -> None:
        run, facts = self._run(offer.run), offer.facts
        ctx, identities = self._checked(run, facts)
        declared = scrutiny.check_joins(self._known(run), offer.joins, facts.cohort, identities)
        if facts.cap < max(declared.values()):
            raise IntegrityError(f"the aggregator's cap of {facts.cap} is below a silo's declared patients")
        model = self.state.model(run.id, run.model_round)
        encoded = None
        if run.layout_in(facts.round) is not None:
            event = self.state.event(run.id, facts.round)
            update = np.frombuffer(self.spool.get(event["update_digest"]), dtype="<f4")
            rounding = derive(event["random_key"], b"wardround/rounding/1")
            encoded = encode(update, run.layout, _exponents(model), declared[self.silo] / facts.cap, rounding)
        metrics = json.loads(model["metrics"]) if (model["num_validation"] or 0) >= MIN_VALIDATION_PATIENTS else None
        control = control_chunk(run.control(facts.round), declared[self.silo], encoded, metrics, ctx, CLEAR_EPOCH_SECRET)
        content = upload_bytes(control, encoded)
        header = pb.UploadHeader(
            run=run.id,
            round=facts.round,
            attempt=facts.attempt,
            silo=self.silo,
            content_digest=bytes.fromhex(self.spool.put(content)),
            num_chunks=num_chunks(run.layout_in(facts.round)),
            content_bytes=len(content),
            declared_patients=declared[self.silo],
            cap=facts.cap,
        )
        signed = sign("upload", ctx, header, self.silo, self.keys.identity)
        self.state.encoded(run.id, _attempt(offer), ctx, signed.SerializeToString(), header.content_digest)

    def _upload(self, offer: pb.Offer) -> None:
        signed, header = self._own_header(offer)
        self.membership.dial().upload(signed, self.spool.get(header.content_digest.hex()))
        self.state.uploaded(offer.run, _attempt(offer))

    def _seal(self, offer: pb.Offer) -> None:
        run, facts = self._run(offer.run), offer.facts
        ctx, identities = self._checked(run, facts)
        known = self._known(run)
        sealable = scrutiny.check_uploads(known, facts, ctx, offer.uploads, identities)
        declared = scrutiny.check_joins(known, offer.joins, list(sealable.headers), identities)
        if sealable.declared != list(declared.values()):
            raise IntegrityError("a silo's upload declares other patients than its Join")
        seal = scrutiny.make_seal(known, facts, ctx, sealable, self._own_header(offer)[1].content_digest)
        signed = sign("seal", ctx, seal, self.silo, self.keys.identity)
        kept = self.state.sealing(run.id, _attempt(offer), signed.SerializeToString(), list(seal.u3))
        self.membership.dial().post(pb.Signed.FromString(kept))
        self.state.sealed(run.id, _attempt(offer))

    def _apply(self, offer: pb.Offer) -> None:
        run = self._run(offer.run)
        total = next(total for total in offer.sums if total.facts.round == run.model_round + 1)
        facts, known = total.facts, self._known(run)
        ctx, identities = self._checked(run, facts)
        sealable = scrutiny.check_uploads(known, facts, ctx, total.uploads, identities)
        self._check_sealed(run, facts, list(sealable.headers))
        layout = run.layout_in(facts.round)
        blob = self.membership.dial().fetch(total.digest, total.num_bytes, self.spool)
        coefficients = clear_coefficients(blob, layout)
        checked = checked_sum(coefficients, layout, run.control(facts.round), sealable.declared, ctx, CLEAR_EPOCH_SECRET)
        exponents = _exponents(self.state.model(run.id, run.model_round))
        model = self._model(run, run.model_round)
        if layout is not None:
            model = model.stepped(checked, layout, exponents, sealable.cap, sealable.declared, run.plan.aggregation.server)
            sizes = [array.size for array in layout.arrays]
            exponents = next_bounds(exponents, checked.saturations, checked.moments, sizes, len(sealable.headers))
        mac = model_mac(run.digest_key, run.layout, model.parameters)
        scrutiny.check_reports(known, facts, ctx, total.reports, identities, mac)
        saturated = sum(checked.saturations) / (run.layout.num_parameters * len(sealable.headers))
        self._keep_model(
            run,
            facts.round,
            model,
            exponents,
            list(sealable.headers),
            ctx=ctx,
            sum_digest=total.digest,
            means=json.dumps(checked.means),
            saturated=saturated,
        )

    def _evaluate(self, offer: pb.Offer) -> None:
        run = self._run(offer.run)
        parameters = self._model(run, run.model_round).parameters
        work = TrainerWork("evaluate", run.plan, run.model_round, parameters, self._snapshot_folder(run))
        result = self._helped(offer, work)
        assert isinstance(result, TrainerResult)  # noqa: S101 - the desk pairs work and result
        self.state.evaluated(run.id, run.model_round, json.dumps(result.metrics), result.num_patients)

    def _report(self, offer: pb.Offer) -> None:
        run = self._run(offer.run)
        model = self.state.model(run.id, run.model_round)
        own = json.loads(model["metrics"]) if model["metrics"] and self.policy.metrics == "per_silo" else {}
        body = pb.ModelReport(
            round=run.model_round,
            model_mac=model["mac"],
            bounds_digest=bounds_digest(_exponents(model)),
            sum_digest=model["sum_digest"],
            means=json.loads(model["means"]),
            means_of_round=run.model_round - 1,
            own={name: round(value, 3) for name, value in own.items()},
            saturated_fraction=model["saturated"],
        )
        signed = self._post("model-report", model["ctx"], body)
        self.state.reported(run.id, run.model_round, statement_digest(signed))

    def _close(self, offer: pb.Offer) -> None:
        row = self.state.run(offer.run)
        self.state.set_stance(offer.run, Stance.CLOSED)
        self.helpers["trainer"].stop()  # frees the GPU for whoever is next
        log.info("run over", run=offer.run, how=pb.Phase.Name(offer.phase), model_round=None if row is None else row["model_round"])

    # --- what actions share ----------------------------------------------------------------------------------------------------

    def _run(self, run: str) -> Run:
        row = self.state.run(run)
        if row is None:
            raise MessageError("the aggregator speaks of a run this silo never judged")
        return Run(row)

    def _known(self, run: Run) -> scrutiny.Known:
        model = self.state.model(run.id, run.model_round)
        return scrutiny.Known(
            self.silo, self.federation, run.id, run.plan, run.layout.digest, bounds_digest(_exponents(model)), model["mac"]
        )

    def _checked(self, run: Run, facts: pb.Round) -> tuple[bytes, scrutiny.Identities]:
        """ctx of the attempt, and who may sign in it."""
        digest, identities = self.membership.roster(facts.roster_version)
        return scrutiny.check_ctx(self._known(run), facts, digest), identities

    def _check_sealed(self, run: Run, facts: pb.Round, u3: list[str]) -> None:
        """A sum must be of the set this silo sealed, where it sealed one."""
        row = self.state.attempt(run.id, (facts.round, facts.attempt))
        if row is not None and row["seal"] is not None:
            sealed = pb.Seal.FromString(pb.Signed.FromString(row["seal"]).body)
            if list(sealed.u3) != u3:
                raise IntegrityError("the published sum is of another set of silos than the one this silo sealed")

    def _model(self, run: Run, round_: int) -> GlobalModel:
        return GlobalModel.load(self.spool.get(self.state.model(run.id, round_)["state"]), run.layout)

    def _keep_model(self, run: Run, round_: int, model: GlobalModel, exponents: Exponents, u3: list[str], **more: Any) -> None:
        mac = model_mac(run.digest_key, run.layout, model.parameters)
        row = {"mac": mac, "state": self.spool.put(model.dump()), "exponents": json.dumps(exponents), **more}
        self.state.model_made(run.id, round_, row, u3)
        self._tidy(run)

    def _tidy(self, run: Run) -> None:
        """Drop what no later step can ask for: older models, updates and uploads, sums already applied."""
        self.spool.keep_only(self.state.needed(run.id))

    def _own_header(self, offer: pb.Offer) -> tuple[pb.Signed, pb.UploadHeader]:
        row = self.state.attempt(offer.run, _attempt(offer))
        if row is None:
            raise MessageError("the aggregator asks for an attempt this silo uploaded nothing for")
        signed = pb.Signed.FromString(row["header"])
        return signed, pb.UploadHeader.FromString(signed.body)

    def _snapshot_folder(self, run: Run) -> Path:
        return self.settings.snapshots / str(run.snapshot)

    def _post(self, message: str, ctx: bytes, body: Any) -> pb.Signed:
        signed = sign(message, ctx, body, self.silo, self.keys.identity)
        self.membership.dial().post(signed)
        return signed

    def _helped(self, offer: pb.Offer, work: TrainerWork | IngestWork) -> TrainerResult | IngestResult:
        """Have a helper do it. Raises Superseded when the offer moved past it, and what the helper failed with."""
        helper = self.helpers["trainer" if isinstance(work, TrainerWork) else "ingest"]
        work_id = self.desk.submit(work)
        while True:
            if helper.ensure():
                log.info("helper started", program=helper.program)
            if helper.situation:
                self._be("queued", helper.situation)
            result = self.desk.wait(work_id, HELPER_CHECK_S)
            if result is not None:
                return result
            now = self.inbox.offer
            over = now.run != offer.run or now.phase in (pb.FAILED, pb.ABORTED)
            late = isinstance(work, TrainerWork) and work.kind == "train" and now.facts.round > work.round
            if self.inbox.stopping or over or late:
                raise Superseded


def _one_line(error: WardroundError) -> str:
    """A reason as a Refusal carries it."""
    text = "; ".join(str(error).splitlines())
    return text if len(text) <= MAX_REASON_CHARS else text[: MAX_REASON_CHARS - 3] + "..."


def _attempt(offer: pb.Offer) -> Attempt:
    return (offer.facts.round, offer.facts.attempt)


def _exponents(model: sqlite3.Row) -> Exponents:
    return tuple(json.loads(model["exponents"]))
