"""The agent: performs what the table in round.py decides. State is written before anything is sent, so that any action may be
killed at any point and is then simply decided again."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, overload

from silo_agent import alone, release, scrutiny, warm_start
from silo_agent.algorithms.at_home import Home
from silo_agent.algorithms.fedavg import Round
from silo_agent.budget import Budget
from silo_agent.config import Settings
from silo_agent.custody.hours import in_words
from silo_agent.custody.keys import SiloKeys
from silo_agent.custody.policy import Policy, judge
from silo_agent.custody.spool import Spool
from silo_agent.custody.state import State
from silo_agent.desk import Desk
from silo_agent.inbox import Inbox
from silo_agent.keyring import Keyring
from silo_agent.launch import Helper
from silo_agent.membership import Membership
from silo_agent.round import Action, Attempt, Facts, Offered, Row, Stance, next_row
from silo_agent.run import Run, exponents_of
from silo_agent.secure_sum.check import checked_sum, control_chunk, upload_coefficients
from silo_agent.secure_sum.checkpoint import Reported, read_checkpoint
from silo_agent.secure_sum.encryption import decrypt, encrypt
from silo_agent.secure_sum.global_model import GlobalModel, initial_digest_key, model_mac
from silo_agent.secure_sum.packing import Exponents, bounds_digest, derive, encode, next_bounds
from silo_agent.telemetry import log
from silo_agent.work import IngestResult, IngestWork, TrainerResult, TrainerWork, ingest_work
from wardround import PROTOCOL, PROTOCOL_OLDEST, VERSION, accounting
from wardround.canonical import canonical_json, frame, sha256
from wardround.chunks import num_chunks
from wardround.errors import Disconnected, IntegrityError, MessageError, PlanError, PolicyRefusal, StorageError, WardroundError
from wardround.layout import checkpoint_bytes
from wardround.messages import claimed, run_ctx, sign, statement_digest
from wardround.pb import federation_pb2 as pb
from wardround.plan import parse_plan
from wardround.stop import Progress, advanced

MIN_VALIDATION_PATIENTS = 10  # below it a silo adds nothing to the cohort's metrics: a mean over few patients says too much
HELPER_CHECK_S = 1.0
REPORTED = (Action.TRAIN, Action.ENCODE, Action.UPLOAD, Action.APPLY, Action.EVALUATE)  # how long they take leaves the hospital
MAX_REASON_CHARS = 500  # of a Refusal; the aggregator takes one line of at most that
SUM_REFUSED = "the published sum failed the check; the agent's log says how"
QUOTING = ("waiting", "paused", "disconnected", "refused")  # activities whose detail is somebody's sentence
SEEDED_NOTE = "randomness came from a seed: reproducible, not private"


def wall_clock() -> datetime:
    return datetime.now(UTC)


class Superseded(Exception):
    """The offer moved on while a helper was working: look again."""


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
        self.budget = Budget(state, policy, seed)
        self.keyring = Keyring(keys, state, self.spool, self.membership)
        self.inbox = Inbox(self._request, self.membership.dial, self.membership.attend)
        self._activity = ""
        self._doing = ("decide", "")
        self._seconds: dict[str, float] = {}  # phase -> since the last report

    # --- the loop --------------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until `inbox.stop`. Retryable trouble is retried for ever; anything else waits for another offer."""
        self.inbox.start()
        failures = 0
        while not self.inbox.stopping:
            self.inbox.changed.clear()
            offer, doing = self.inbox.offer, "decide"
            try:
                row = next_row(self._facts(offer.run), self._offered(offer))
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
        self._doing = (row.action.value, f"round {offer.facts.round}" if offer.facts.round else offer.run)
        self._be(*self._doing)
        started, before = time.monotonic(), sum(self._seconds.values())
        getattr(self, f"_{row.action.value}")(offer)
        seconds = time.monotonic() - started
        if row.action in REPORTED:  # without what was taken out of it meanwhile: phases add up
            self._took(row.action.value, max(0.0, seconds - (sum(self._seconds.values()) - before)))
        log.info("done", action=row.action.value, run=offer.run, round=offer.facts.round, seconds=round(seconds, 2))

    def _took(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._took(phase, time.monotonic() - started)

    def _wait(self, row: Row, offer: pb.Offer) -> None:
        """Until there is another offer or other trouble."""
        trouble, paused = self.inbox.trouble, self.state.paused()
        if trouble is None and paused:
            self._be("paused", paused)
        elif trouble is None and row.name == "approval":
            self._be("approval", f"waits for IT: silo-agent plan approve {offer.run}")
        elif trouble is None and row.name == "hours" and (opens := self.policy.opens(wall_clock())) is not None:
            self._be("hours", f"begin {in_words(opens)}: then the round trains here")
        elif trouble is None:
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
        told = f"{word}{': ' if word in QUOTING else ' '}{detail}".rstrip()
        if told != self._activity:
            self._activity = told
            with suppress(StorageError):
                self.state.set_activity(word, detail)

    def _facts(self, run: str) -> Facts:
        return replace(self.state.facts(run), off_hours=self.policy.opens(wall_clock()) is not None)

    def _offered(self, offer: pb.Offer) -> Offered:
        row = self.state.run(offer.run)
        run = None if row is None or row["code"] is not None else Run(row)  # a refused plan may not even parse
        ours = self._our_keys(offer)
        return Offered(
            phase=pb.Phase.Name(offer.phase),
            attempt=(offer.facts.round, offer.facts.attempt),
            rounds=run.last_round if run else 0,
            in_cohort=self.silo in offer.facts.cohort,
            in_u3=self.silo in (signed.silo for signed in offer.uploads),
            summed_rounds=frozenset(
                total.facts.round for total in offer.sums if self.keyring.holds(offer.run, total.facts.key_epoch)
            ),
            epoch=offer.facts.key_epoch if offer.phase == pb.KEYING else 0 if ours is None else claimed(ours, pb.KeyEpoch).number,
            checkpoint_round=offer.checkpoint.facts.round,
            validate_every=run.plan.validate_every if run else 1,
            rehearse=run.plan.rehearse if run else False,
        )

    def _our_keys(self, offer: pb.Offer) -> pb.Signed | None:
        """The relayed KeyEpoch, if it has a box for this silo."""
        for signed in offer.relayed:
            if signed.message == "key-epoch" and self.silo in (box.silo for box in claimed(signed, pb.KeyEpoch).boxes):
                return signed
        return None

    # --- the run's beginning ---------------------------------------------------------------------------------------------------

    def _judge(self, offer: pb.Offer) -> None:
        code, reason, plan_digest = None, "", offer.facts.plan_digest
        plan, rehearse = offer.plan, False
        try:
            parsed = parse_plan(offer.plan)
            plan, rehearse = parsed.canonical(), parsed.rehearse
            if parsed.digest != plan_digest:
                raise MessageError("the plan on offer is not the one its digest names")
            binding = self.settings.dataset(parsed.dataset)
            judge(self.policy, parsed)
            binding.check_labels(parsed)
            warm_start.check_offered(parsed, offer.parent)
            self.budget.reserve(offer.run, parsed, binding.declared_patients)
        except WardroundError as error:
            code, reason = error.code, _one_line(error)
        self.state.judged(offer.run, plan, plan_digest, code, reason, rehearse, self.policy.approval == "manual")
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
            work = ingest_work(binding, run.plan, self.keys.split_key, self.settings.snapshots)
            result = self._helped(offer, work)
        except WardroundError as error:
            if error.retryable or type(error) is WardroundError:
                raise
            self._decline(run, error)
            return
        self.state.snapshot_made(run.id, result.snapshot, result.patients)
        self.helpers["ingest"].stop()  # its libraries hold 0.7 GB; a run needs it once
        log.info("snapshot", patients=result.patients, quarantined=result.quarantined)

    def _initialize(self, offer: pb.Offer) -> None:
        run = self._run(offer.run)
        if run.plan.parent is None:
            values = self._helped(offer, TrainerWork("initialize", run.plan)).values
        else:
            _, identities = self._members(offer.facts.roster_version)
            try:
                values = warm_start.parameters(run.plan, offer.parent, self.federation, identities, self._fetch_bundle)
            except (PlanError, MessageError, IntegrityError) as error:
                self._decline(run, error)
                return
        model, exponents, home = run.learning.begin(values)
        self.state.keep_home(run.id, 0, self._put_home(home))
        if run.plan.local_gain:
            self.state.keep_alone(run.id, self.spool.put(alone.begun(values)))
        self._keep_model(run, 0, model, exponents, [], model_mac(initial_digest_key(run.id), run.layout, model.parameters))

    def _decline(self, run: Run, error: WardroundError) -> None:
        """A run that was accepted cannot be joined after all."""
        self.state.refuse(run.id, error.code, _one_line(error))
        log.warning("run declined", run=run.id, code=error.code, reason=_one_line(error))

    def _join(self, offer: pb.Offer) -> None:
        run = self._run(offer.run)
        if run.statement is None:
            binding = self.settings.dataset(run.plan.dataset)
            model = self.state.model(run.id, 0)
            notes = [
                *run.plan.caveats,
                *warm_start.notes(offer.parent),
                *([SEEDED_NOTE] if self.seed is not None else []),
                *([binding.note] if binding.note else []),
            ]
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
                bounds_digest=bounds_digest(exponents_of(model)),
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

    # --- key epochs ------------------------------------------------------------------------------------------------------------

    def _make_keys(self, offer: pb.Offer) -> None:
        self.keyring.make(self._run(offer.run), offer.facts)

    def _take_keys(self, offer: pb.Offer) -> None:
        signed = self._our_keys(offer)
        assert signed is not None  # noqa: S101 - the table: they are on offer
        self.keyring.take(self._run(offer.run), signed, acknowledge=offer.phase != pb.COMPLETED)

    def _restore(self, offer: pb.Offer) -> None:
        """Take the model of a round this silo missed from the newest key epoch's checkpoint."""
        run, total = self._run(offer.run), offer.checkpoint
        row = self.state.epoch(run.id)
        assert row is not None  # noqa: S101 - the table: its keys are held
        keys = self.keyring.keys(run, row["number"])
        report = scrutiny.check_restorable(self._known(run, row["number"]), total, self._members(total.facts.roster_version)[1])
        blob = self._fetch(total, checkpoint_bytes(run.layout))
        reported = Reported(total.facts.round, report.model_mac, report.bounds_digest)
        model, exponents = read_checkpoint(blob, reported, run.layout, keys)
        sources = {"ctx": total.facts.ctx, "sum_digest": report.sum_digest, "means": json.dumps(dict(report.means)), "reported": 1}
        told = report.progress
        progress = Progress(told.measured, told.best, told.waited, told.stopped_after) if run.plan.stop else None
        self._keep_model(run, total.facts.round, model, exponents, [], report.model_mac, progress, **sources)

    def _halt(self, offer: pb.Offer) -> None:
        row = self.state.run(offer.run)
        assert row is not None  # noqa: S101 - the table: its Halt is kept
        self.membership.dial().post(pb.Signed.FromString(row["halt"]))
        self._close(offer)  # whatever the aggregator offers of this run from now on

    # --- a round ---------------------------------------------------------------------------------------------------------------

    def _open_event(self, offer: pb.Offer) -> None:
        run = self._run(offer.run)
        _, identities = self._checked(run, offer.facts)
        # No patient is charged for a round whose cohort has not joined this very run.
        scrutiny.check_joins(self._known(run, offer.facts.key_epoch), offer.joins, offer.facts.cohort, identities)
        try:
            self._budgeted(run, offer.facts.round)
        except PolicyRefusal as refusal:
            self.keyring.halt(run, offer.facts, _one_line(refusal))
            log.error("no budget, keys destroyed", run=run.id, round=offer.facts.round, reason=str(refusal))
            return
        if self.seed is None:
            key = os.urandom(32)
        else:
            key = derive(
                frame(b"seed", str(self.seed).encode()), run.plan.digest, self.silo.encode(), offer.facts.round.to_bytes(8, "big")
            )
        self.state.open_event(run.id, offer.facts.round, key, seeded=self.seed is not None)

    def _train(self, offer: pb.Offer) -> None:
        run, round_ = self._run(offer.run), offer.facts.round
        model, home = self._model(run, run.model_round), self._home(run, round_)
        event, key = accounting.round_event(run.plan), self._budgeted(run, round_)
        work = TrainerWork(
            "train",
            run.plan,
            round_,
            run.learning.parameters(model, home),
            None if run.plan.rehearse else self._snapshot_folder(run),
            key or derive(self.state.event(run.id, round_)["random_key"], b"wardround/training/1"),
            event.noise_multiplier if event else 0.0,
            self.settings.dataset(run.plan.dataset).declared_patients,
            run.learning.correction(model, home),
        )
        result = self._helped(offer, work)
        if len(result.values) != len(work.parameters):
            raise MessageError(f"the trainer delivered {len(result.values)} bytes, the layout has {len(work.parameters)}")
        stays = self._put_home(run.learning.trained(result.values, model, home, run.rate(round_)))
        beside = self._trained_alone(offer, run, work) if run.plan.local_gain else None
        self.state.update_made(run.id, round_, self.spool.put(result.values), result.num_patients, stays, beside)
        self.budget.close_event(run, round_)

    def _trained_alone(self, offer: pb.Offer, run: Run, work: TrainerWork) -> str:
        """This round's steps of the model that meets no other: hex digest of its state."""
        own = self._alone(run)
        beside = alone.work_of(work, own, derive(work.random_key, b"wardround/alone/1"))
        return self.spool.put(alone.stepped(own, self._helped(offer, beside).values, run.plan))

    def _encode(self, offer: pb.Offer) -> None:
        run, facts = self._run(offer.run), offer.facts
        ctx, identities = self._checked(run, facts)
        declared = scrutiny.check_joins(self._known(run, facts.key_epoch), offer.joins, facts.cohort, identities)
        if facts.cap < max(declared.values()):
            raise IntegrityError(f"the aggregator's cap of {facts.cap} is below a silo's declared patients")
        model = self.state.model(run.id, run.model_round)
        encoded, scalars = None, []
        if (layout := run.layout_in(facts.round)) is not None:
            event = self.state.event(run.id, facts.round)
            trained = Round(run.rate(facts.round), event["num_patients"], facts.cap)
            share = run.learning.share(self.spool.get(event["update_digest"]), self._home(run, facts.round + 1), trained)
            rounding = derive(event["random_key"], b"wardround/rounding/1")
            weight = declared[self.silo] / facts.cap
            encoded = encode(share.values, layout, exponents_of(model), weight, rounding, run.he)
            scalars = [weight * scalar for scalar in share.scalars]
        metrics = json.loads(model["metrics"]) if (model["num_validation"] or 0) >= MIN_VALIDATION_PATIENTS else {}
        whole = metrics if metrics.keys() >= set(run.metrics) else None  # a class that no patient here has: no mean of it
        keys = self.keyring.keys(run, facts.key_epoch)
        control = control_chunk(
            run.control(facts.round), self.silo, declared[self.silo], encoded, whole, ctx, keys.secret, run.he, scalars
        )
        coefficients = upload_coefficients(control, encoded, run.he)
        with self._timed("encrypt"):
            content = encrypt(run.he, keys.he_secret_key, coefficients)
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
            ledger_head=self.budget.head(run.plan),
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
        known = self._known(run, facts.key_epoch)
        sealable = scrutiny.check_uploads(known, facts, ctx, offer.uploads, identities)
        self._saw_own_head(sealable)
        declared = scrutiny.check_joins(known, offer.joins, list(sealable.headers), identities)
        if sealable.declared != declared:
            raise IntegrityError("a silo's upload declares other patients than its Join")
        seal = scrutiny.make_seal(known, facts, ctx, sealable, self._own_header(offer)[1].content_digest)
        signed = sign("seal", ctx, seal, self.silo, self.keys.identity)
        kept = self.state.sealing(run.id, _attempt(offer), signed.SerializeToString(), list(seal.u3))
        self.membership.dial().post(pb.Signed.FromString(kept))
        self.state.sealed(run.id, _attempt(offer))

    def _apply(self, offer: pb.Offer) -> None:
        run = self._run(offer.run)
        total = next(total for total in offer.sums if total.facts.round == run.model_round + 1)
        facts, known = total.facts, self._known(run, total.facts.key_epoch)
        ctx, identities = self._checked(run, facts)
        sealable = scrutiny.check_uploads(known, facts, ctx, total.uploads, identities)
        self._saw_own_head(sealable)
        self._check_sealed(run, facts, list(sealable.headers))
        layout = run.layout_in(facts.round)
        blob = self._fetch(total, run.he.sum_bytes(layout))
        keys = self.keyring.keys(run, facts.key_epoch)
        try:
            with self._timed("decrypt"):
                coefficients = decrypt(run.he, keys.he_secret_key, blob)
            control = run.control(facts.round)
            checked = checked_sum(coefficients, layout, control, sealable.declared, ctx, keys.secret, run.he)
        except (IntegrityError, MessageError) as error:
            self.keyring.halt(run, facts, SUM_REFUSED)
            log.error("sum refused, keys destroyed", run=run.id, round=facts.round, reason=str(error))
            return
        exponents = exponents_of(self.state.model(run.id, run.model_round))
        model = self._model(run, run.model_round)
        if layout is not None:
            patients = list(sealable.declared.values())
            model = model.stepped(checked, run.layout, exponents, sealable.cap, patients, run.learning.algorithm)
            sizes = [array.size for array in layout.arrays]
            exponents = next_bounds(exponents, checked.saturations, checked.moments, sizes, len(sealable.headers))
        mac = model_mac(keys.digest_key, run.layout, model.parameters)
        try:
            scrutiny.check_reports(known, facts, ctx, total.reports, identities, mac)
        except IntegrityError as error:
            self.keyring.halt(run, facts, _one_line(error))
            log.error("reports differ, keys destroyed", run=run.id, round=facts.round, reason=str(error))
            return
        saturated = sum(checked.saturations) / (run.layout.summed.num_parameters * len(sealable.headers))
        self._keep_model(
            run,
            facts.round,
            model,
            exponents,
            list(sealable.headers),
            mac,
            self._advanced(run, facts.round, checked.means),
            ctx=ctx,
            sum_digest=total.digest,
            means=json.dumps(checked.means),
            declared=json.dumps(sealable.declared),
            saturated=saturated,
        )

    def _advanced(self, run: Run, round_: int, means: dict[str, float]) -> Progress | None:
        """Of the plan's stop rule, if it has one; the plan's last round ends the run by itself."""
        if run.plan.stop is None:
            return None
        before = self.state.progress(run.id)
        return advanced(run.plan.stop, before, round_, means) if round_ < run.plan.rounds else before

    def _evaluate(self, offer: pb.Offer) -> None:
        run = self._run(offer.run)
        model = self._model(run, run.model_round)
        parameters = run.learning.parameters(model, self._home(run, run.model_round + 1))
        work = TrainerWork("evaluate", run.plan, run.model_round, parameters, self._snapshot_folder(run))
        result, beside = self._helped(offer, work), None
        if run.model_round == run.last_round and self.state.num_trained(run.id) == run.last_round and run.plan.local_gain:
            own = self._helped(offer, replace(work, parameters=alone.parameters_of(self._alone(run))))
            beside = json.dumps(own.metrics)
        self.state.evaluated(run.id, run.model_round, json.dumps(result.metrics), result.num_patients, beside)

    def _report(self, offer: pb.Offer) -> None:
        run = self._run(offer.run)
        self.state.measured(run.id, run.model_round, json.dumps({name: round(value, 2) for name, value in self._seconds.items()}))
        self._seconds = {}
        model = self.state.model(run.id, run.model_round)
        measured = (model if run.plan.rounds else self.state.model(run.id, 0))["metrics"]  # without rounds the start is measured
        own = json.loads(measured) if measured and self.policy.metrics == "per_silo" else {}
        if own and run.model_round == run.last_round and (beside := self.state.alone(run.id)) is not None:
            own |= {f"alone/{name}": value for name, value in json.loads(beside["metrics"] or "{}").items()}

        def parameters() -> bytes:
            return self._model(run, run.model_round).parameters

        body = pb.ModelReport(
            round=run.model_round,
            model_mac=model["mac"],
            bounds_digest=bounds_digest(exponents_of(model)),
            sum_digest=model["sum_digest"],
            means=json.loads(model["means"]),
            means_of_round=run.model_round - 1,
            own={name: round(value, 3) for name, value in own.items()},
            seconds=json.loads(model["seconds"]),
            saturated_fraction=model["saturated"],
            parameters_digest=release.signed_digest(run, parameters, self.policy, self.state.seeded(run.id)),
            progress=pb.Progress(**asdict(self.state.progress(run.id))) if run.plan.stop else None,
        )
        signed = self._post("model-report", model["ctx"], body)
        self.state.reported(run.id, run.model_round, statement_digest(signed))

    def _release(self, offer: pb.Offer) -> None:
        """Make the bundle of the final model and send it, where plan and policy agree to that."""
        run = self._run(offer.run)
        if (why := release.withheld(run.plan, self.policy, self.state.seeded(run.id))) is not None:
            raise PolicyRefusal(f"the aggregator asks for the bundle of {run.id}: {why}; nothing is sent")
        if self.state.bundle(run.id) is None:
            ctx, parameters = run_ctx(self.federation, run.id, run.plan.digest), self._model(run, run.model_round).parameters
            release.make_bundle(
                run, parameters, self.state, self.spool, lambda work: self._helped(offer, work),
                lambda body: sign("bundle", ctx, body, self.silo, self.keys.identity),
            )  # fmt: skip
        row = self.state.bundle(run.id)
        assert row is not None  # noqa: S101 - it was there, or make_bundle has just written it
        self.membership.dial().upload(pb.Signed.FromString(row["statement"]), self.spool.get(row["content"]))
        self.state.bundle_sent(run.id)

    def _close(self, offer: pb.Offer) -> None:
        row = self.state.run(offer.run)
        self.budget.release(offer.run)
        self.state.set_stance(offer.run, Stance.CLOSED)
        self.spool.keep_only(self.state.needed(offer.run))
        self.helpers["trainer"].stop()  # frees the GPU for whoever is next
        log.info("run over", run=offer.run, how=pb.Phase.Name(offer.phase), model_round=None if row is None else row["model_round"])

    # --- what actions share ----------------------------------------------------------------------------------------------------

    def _run(self, run: str) -> Run:
        row = self.state.run(run)
        if row is None:
            raise MessageError("the aggregator speaks of a run this silo never judged")
        return Run(row)

    def _budgeted(self, run: Run, round_: int) -> bytes | None:
        """The noise key of a round that is charged. Raises PolicyRefusal when the ledger has not enough left."""
        home = (self.state.home(run.id, round_) or "").encode()  # another one is another input of the event
        mac = self.state.model(run.id, run.model_round)["mac"]
        return self.budget.open_event(run, round_, sha256(frame(mac, home)) if home else mac)

    def _saw_own_head(self, sealable: scrutiny.Sealable) -> None:
        own = sealable.headers.get(self.silo)
        self.budget.saw([own.ledger_head] if own is not None and own.ledger_head else [])

    def _known(self, run: Run, key_epoch: int) -> scrutiny.Known:
        model = self.state.model(run.id, run.model_round)
        return scrutiny.Known(
            self.silo, self.federation, run.id, run.plan, run.layout.digest, bounds_digest(exponents_of(model)), model["mac"],
            self.keyring.view(run, key_epoch),
        )  # fmt: skip

    def _members(self, roster_version: int) -> tuple[bytes, scrutiny.Identities]:
        digest, members = self.membership.roster(roster_version)
        return digest, {name: member.identity for name, member in members.items()}

    def _checked(self, run: Run, facts: pb.Round) -> tuple[bytes, scrutiny.Identities]:
        """ctx of the attempt, and who may sign in it."""
        digest, identities = self._members(facts.roster_version)
        return scrutiny.check_ctx(self._known(run, facts.key_epoch), facts, digest), identities

    def _check_sealed(self, run: Run, facts: pb.Round, u3: list[str]) -> None:
        """A sum must be of the set this silo sealed, where it sealed one."""
        row = self.state.attempt(run.id, (facts.round, facts.attempt))
        if row is not None and row["seal"] is not None:
            sealed = pb.Seal.FromString(pb.Signed.FromString(row["seal"]).body)
            if list(sealed.u3) != u3:
                raise IntegrityError("the published sum is of another set of silos than the one this silo sealed")

    def _fetch(self, total: pb.Sum, num_bytes: int) -> bytes:
        """The blob of a sum or checkpoint, which has exactly `num_bytes`. Raises IntegrityError before a byte is fetched."""
        if total.num_bytes != num_bytes:
            raise IntegrityError(
                f"the aggregator offers {total.num_bytes} bytes of round {total.facts.round}, not {num_bytes}: nothing is fetched"
            )
        return self.membership.dial().fetch(total.digest, num_bytes, self.spool)

    def _fetch_bundle(self, closing: pb.Sum) -> bytes:
        return self.membership.dial().fetch(closing.digest, closing.num_bytes, self.spool)

    def _model(self, run: Run, round_: int) -> GlobalModel:
        return GlobalModel.load(self.spool.get(self.state.model(run.id, round_)["state"]), run.layout)

    def _alone(self, run: Run) -> bytes:
        row = self.state.alone(run.id)
        if row is None:
            raise IntegrityError("the model that trains alone is missing: the run began with another version of this software")
        return self.spool.get(row["state"])

    def _home(self, run: Run, round_: int) -> Home:
        """What stays at home, as the newest training before `round_` left it."""
        digest = self.state.home(run.id, round_)
        return run.learning.home(b"" if digest is None else self.spool.get(digest))

    def _put_home(self, home: Home) -> str | None:
        """Hex digest of what stays at home, once it is on disk; None: this plan keeps nothing."""
        data = home.dump()
        return self.spool.put(data) if data else None

    def _keep_model(
        self,
        run: Run,
        round_: int,
        model: GlobalModel,
        exponents: Exponents,
        u3: list[str],
        mac: bytes,
        progress: Progress | None = None,
        **more: Any,
    ) -> None:
        row = {"mac": mac, "state": self.spool.put(model.dump()), "exponents": json.dumps(exponents), **more}
        self.state.model_made(run.id, round_, row, u3, progress)
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

    @overload
    def _helped(self, offer: pb.Offer, work: TrainerWork) -> TrainerResult: ...

    @overload
    def _helped(self, offer: pb.Offer, work: IngestWork) -> IngestResult: ...

    def _helped(self, offer: pb.Offer, work: TrainerWork | IngestWork) -> TrainerResult | IngestResult:
        """Have a helper do it. Raises Superseded when the offer moved past it, and what the helper failed with."""
        helper = self.helpers["trainer" if isinstance(work, TrainerWork) else "ingest"]
        work_id = self.desk.submit(work)
        while True:
            if helper.ensure():
                log.info("helper started", program=helper.program)
            self._be(*(("queued", helper.situation) if helper.situation else self._doing))
            result = self.desk.wait(work_id, HELPER_CHECK_S)
            if result is not None:
                if isinstance(work, TrainerWork):
                    self._took("wait_gpu", self.desk.waited_s(work_id))
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
