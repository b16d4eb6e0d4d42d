"""What each action of the table in round.py does. State is written before anything is sent, so that any action may be killed at
any point and is then simply decided again."""

import json
import os
from dataclasses import replace
from typing import Protocol, overload

from silo_agent import alone, release, scrutiny, warm_start
from silo_agent.algorithms.fedavg import Round
from silo_agent.custody.policy import judge
from silo_agent.holdings import Holdings, attempt_of
from silo_agent.launch import Helper
from silo_agent.outgoing import ALONE, ASK_IT, UNUSABLE, one_line, shown
from silo_agent.round import Stance
from silo_agent.run import Run, exponents_of
from silo_agent.secure_sum.check import checked_sum, control_chunk, upload_coefficients
from silo_agent.secure_sum.checkpoint import Reported, read_checkpoint
from silo_agent.secure_sum.encryption import decrypt, encrypt
from silo_agent.secure_sum.global_model import initial_digest_key, model_mac
from silo_agent.secure_sum.packing import derive, encode, next_bounds
from silo_agent.statements import join, report
from silo_agent.stopwatch import Stopwatch
from silo_agent.telemetry import log
from silo_agent.work import IngestResult, IngestWork, TrainerResult, TrainerWork, ingest_work
from wardround import accounting
from wardround.canonical import frame
from wardround.chunks import num_chunks
from wardround.errors import IntegrityError, MessageError, PlanError, PolicyRefusal, WardroundError
from wardround.layout import checkpoint_bytes
from wardround.messages import run_ctx, sign, statement_digest
from wardround.pb import federation_pb2 as pb
from wardround.plan import parse_plan
from wardround.stop import Progress, advanced

MIN_VALIDATION_PATIENTS = 10  # below it a silo adds nothing to the cohort's metrics: a mean over few patients says too much
SUM_REFUSED = "the published sum failed the check; the agent's log says how"
SEEDED_NOTE = "randomness came from a seed: reproducible, not private"


class Do(Protocol):
    """Has a helper do a work item that an offer asks for. Raises what the helper failed with."""

    @overload
    def __call__(self, offer: pb.Offer, work: TrainerWork) -> TrainerResult: ...

    @overload
    def __call__(self, offer: pb.Offer, work: IngestWork) -> IngestResult: ...


class Actions:
    """Every public method is an action, named as in the table, and takes the offer that calls for it."""

    def __init__(self, held: Holdings, helpers: dict[str, Helper], do: Do, watch: Stopwatch) -> None:
        self.held, self.helpers, self.do, self.watch = held, helpers, do, watch

    # --- the run's beginning ---------------------------------------------------------------------------------------------------

    def judge(self, offer: pb.Offer) -> None:
        code, reason, plan_digest = None, "", offer.facts.plan_digest
        plan, rehearse = offer.plan, False
        try:
            parsed = parse_plan(offer.plan)
            plan, rehearse = parsed.canonical(), parsed.rehearse
            if parsed.digest != plan_digest:
                raise MessageError("the plan on offer is not the one its digest names")
            binding = self.held.settings.dataset(parsed.dataset)
            judge(self.held.policy, parsed)
            binding.check_labels(parsed)
            warm_start.check_offered(parsed, offer.parent)
            self.held.budget.reserve(offer.run, parsed, binding.declared_patients)
        except WardroundError as error:
            code, reason = error.code, one_line(error)
        self.held.state.judged(offer.run, plan, plan_digest, code, reason, rehearse, self.held.policy.approval == "manual")
        log.info("plan judged", run=offer.run, accepted=code is None, reason=reason)

    def refuse(self, offer: pb.Offer) -> None:
        """Of a run that has ended meanwhile nobody asks any more."""
        row = self.held.row(offer.run)
        reason = ASK_IT if row["code"] == UNUSABLE else row["reason"]
        body = pb.Refusal(run=offer.run, plan_digest=offer.facts.plan_digest, code=row["code"], reason=reason)
        if offer.phase not in (pb.COMPLETED, pb.FAILED, pb.ABORTED):
            self.held.post("refusal", run_ctx(self.held.federation, offer.run, offer.facts.plan_digest), body)
        self.held.state.set_stance(offer.run, Stance.REFUSED)

    def snapshot(self, offer: pb.Offer) -> None:
        run = self.held.run(offer.run)
        try:
            binding = self.held.settings.dataset(run.plan.dataset)
            work = ingest_work(binding, run.plan, self.held.keys.split_key, self.held.settings.snapshots)
            result = self.do(offer, work)
        except WardroundError as error:
            if error.retryable or type(error) is WardroundError:
                raise
            self._decline(run, error)
            return
        self.held.state.snapshot_made(run.id, result.snapshot, result.patients)
        self.helpers["ingest"].stop()  # its libraries hold 0.7 GB; a run needs it once
        log.info("snapshot", patients=result.patients, quarantined=result.quarantined)

    def initialize(self, offer: pb.Offer) -> None:
        run = self.held.run(offer.run)
        if run.plan.parent is None:
            values = self.do(offer, TrainerWork("initialize", run.plan)).values
        else:
            _, identities = self.held.members(offer.facts.roster_version)
            try:
                values = warm_start.parameters(run.plan, offer.parent, self.held.federation, identities, self.held.fetch_bundle)
            except (PlanError, MessageError, IntegrityError) as error:
                self._decline(run, error)
                return
        model, exponents, home = run.learning.begin(values)
        self.held.state.keep_home(run.id, 0, self.held.put_home(home))
        if run.plan.local_gain:
            self.held.state.keep_alone(run.id, self.held.spool.put(alone.begun(values)))
        self.held.keep_model(run, 0, model, exponents, [], model_mac(initial_digest_key(run.id), run.layout, model.parameters))

    def _decline(self, run: Run, error: WardroundError) -> None:
        """A run that was accepted cannot be joined after all."""
        code = UNUSABLE if error.stays else error.code
        self.held.state.refuse(run.id, code, shown(str(error)))
        log.warning("run declined", run=run.id, code=code, reason=shown(str(error)))

    def join(self, offer: pb.Offer) -> None:
        run = self.held.run(offer.run)
        statement = run.statement
        if statement is None:
            notes = [*run.plan.caveats, *warm_start.notes(offer.parent), *([SEEDED_NOTE] if self.held.seed is not None else [])]
            body = join(run, self.held, notes, per_silo_metrics=self.held.policy.metrics == "per_silo")
            signed = sign(
                "join", run_ctx(self.held.federation, run.id, run.plan.digest), body, self.held.silo, self.held.keys.identity
            )
            statement = signed.SerializeToString()
            self.held.state.keep_statement(run.id, statement)
        self.held.membership.dial().post(pb.Signed.FromString(statement))
        self.held.state.set_stance(run.id, Stance.JOINED)

    # --- key epochs ------------------------------------------------------------------------------------------------------------

    def make_keys(self, offer: pb.Offer) -> None:
        self.held.keyring.make(self.held.run(offer.run), offer.facts)

    def take_keys(self, offer: pb.Offer) -> None:
        signed = self.held.our_keys(offer)
        if signed is None:
            raise MessageError("the aggregator asks this silo to take keys and offers no box for it")
        self.held.keyring.take(self.held.run(offer.run), signed, acknowledge=offer.phase != pb.COMPLETED)

    def restore(self, offer: pb.Offer) -> None:
        """Take the model of a round this silo missed from the newest key epoch's checkpoint."""
        run, total = self.held.run(offer.run), offer.checkpoint
        row = self.held.state.epoch(run.id)
        if row is None:
            raise MessageError("the aggregator offers a checkpoint of a run whose keys this silo does not hold")
        keys = self.held.keyring.keys(run, row["number"])
        report = scrutiny.check_restorable(
            self.held.known(run, row["number"]), total, self.held.members(total.facts.roster_version)[1]
        )
        blob = self.held.fetch(total, checkpoint_bytes(run.layout))
        reported = Reported(total.facts.round, report.model_mac, report.bounds_digest)
        model, exponents = read_checkpoint(blob, reported, run.layout, keys)
        sources = {"ctx": total.facts.ctx, "sum_digest": report.sum_digest, "means": json.dumps(dict(report.means)), "reported": 1}
        told = report.progress
        progress = Progress(told.measured, told.best, told.waited, told.stopped_after) if run.plan.stop else None
        self.held.keep_model(run, total.facts.round, model, exponents, [], report.model_mac, progress, **sources)

    def halt(self, offer: pb.Offer) -> None:
        row = self.held.row(offer.run)
        self.held.membership.dial().post(pb.Signed.FromString(row["halt"]))
        self.close(offer)  # whatever the aggregator offers of this run from now on

    # --- a round ---------------------------------------------------------------------------------------------------------------

    def open_event(self, offer: pb.Offer) -> None:
        run = self.held.run(offer.run)
        _, identities = self.held.checked(run, offer.facts)
        # No patient is charged for a round whose cohort has not joined this very run.
        scrutiny.check_joins(self.held.known(run, offer.facts.key_epoch), offer.joins, offer.facts.cohort, identities)
        try:
            self.held.budgeted(run, offer.facts.round)
        except PolicyRefusal as refusal:
            self.held.keyring.halt(run, offer.facts, one_line(refusal))
            log.error("no budget, keys destroyed", run=run.id, round=offer.facts.round, reason=str(refusal))
            return
        if self.held.seed is None:
            key = os.urandom(32)
        else:
            key = derive(
                frame(b"seed", str(self.held.seed).encode()),
                run.plan.digest,
                self.held.silo.encode(),
                offer.facts.round.to_bytes(8, "big"),
            )
        self.held.state.open_event(run.id, offer.facts.round, key, seeded=self.held.seed is not None)

    def train(self, offer: pb.Offer) -> None:
        run, round_ = self.held.run(offer.run), offer.facts.round
        model, home = self.held.model(run, run.model_round), self.held.home(run, round_)
        event, key = accounting.round_event(run.plan), self.held.budgeted(run, round_)
        work = TrainerWork(
            "train",
            run.plan,
            round_,
            run.learning.parameters(model, home),
            None if run.plan.rehearse else self.held.snapshot_folder(run),
            key or derive(self.held.state.event(run.id, round_)["random_key"], b"wardround/training/1"),
            event.noise_multiplier if event else 0.0,
            self.held.settings.dataset(run.plan.dataset).declared_patients,
            run.learning.correction(model, home),
        )
        result = self.do(offer, work)
        if len(result.values) != len(work.parameters):
            raise MessageError(f"the trainer delivered {len(result.values)} bytes, the layout has {len(work.parameters)}")
        stays = self.held.put_home(run.learning.trained(result.values, model, home, run.rate(round_)))
        beside = self._trained_alone(offer, run, work) if run.plan.local_gain else None
        self.held.state.update_made(run.id, round_, self.held.spool.put(result.values), result.num_patients, stays, beside)
        self.held.budget.close_event(run, round_)

    def _trained_alone(self, offer: pb.Offer, run: Run, work: TrainerWork) -> str:
        """This round's steps of the model that meets no other: hex digest of its state."""
        own = self.held.alone(run)
        beside = alone.work_of(work, own, derive(work.random_key, b"wardround/alone/1"))
        return self.held.spool.put(alone.stepped(own, self.do(offer, beside).values, run.plan))

    def encode(self, offer: pb.Offer) -> None:
        run, facts = self.held.run(offer.run), offer.facts
        ctx, identities = self.held.checked(run, facts)
        declared = scrutiny.check_joins(self.held.known(run, facts.key_epoch), offer.joins, facts.cohort, identities)
        if facts.cap < max(declared.values()):
            raise IntegrityError(f"the aggregator's cap of {facts.cap} is below a silo's declared patients")
        model = self.held.state.model(run.id, run.model_round)
        encoded, scalars = None, []
        if (layout := run.layout_in(facts.round)) is not None:
            event = self.held.state.event(run.id, facts.round)
            trained = Round(run.rate(facts.round), event["num_patients"], facts.cap)
            share = run.learning.share(self.held.spool.get(event["update_digest"]), self.held.home(run, facts.round + 1), trained)
            rounding = derive(event["random_key"], b"wardround/rounding/1")
            weight = declared[self.held.silo] / facts.cap
            encoded = encode(share.values, layout, exponents_of(model), weight, rounding, run.he)
            scalars = [weight * scalar for scalar in share.scalars]
        metrics = json.loads(model["metrics"]) if (model["num_validation"] or 0) >= MIN_VALIDATION_PATIENTS else {}
        whole = metrics if metrics.keys() >= set(run.metrics) else None  # a class that no patient here has: no mean of it
        keys = self.held.keyring.keys(run, facts.key_epoch)
        control = control_chunk(
            run.control(facts.round), self.held.silo, declared[self.held.silo], encoded, whole, ctx, keys.secret, run.he, scalars
        )
        coefficients = upload_coefficients(control, encoded, run.he)
        with self.watch.timed("encrypt"):
            content = encrypt(run.he, keys.he_secret_key, coefficients)
        header = pb.UploadHeader(
            run=run.id,
            round=facts.round,
            attempt=facts.attempt,
            silo=self.held.silo,
            content_digest=bytes.fromhex(self.held.spool.put(content)),
            num_chunks=num_chunks(run.layout_in(facts.round)),
            content_bytes=len(content),
            declared_patients=declared[self.held.silo],
            cap=facts.cap,
            ledger_head=self.held.budget.head(run.plan),
        )
        signed = sign("upload", ctx, header, self.held.silo, self.held.keys.identity)
        self.held.state.encoded(run.id, attempt_of(offer), ctx, signed.SerializeToString(), header.content_digest)

    def upload(self, offer: pb.Offer) -> None:
        signed, header = self.held.own_header(offer)
        self.held.membership.dial().upload(signed, self.held.spool.get(header.content_digest.hex()))
        self.held.state.uploaded(offer.run, attempt_of(offer))

    def seal(self, offer: pb.Offer) -> None:
        run, facts = self.held.run(offer.run), offer.facts
        ctx, identities = self.held.checked(run, facts)
        known = self.held.known(run, facts.key_epoch)
        sealable = scrutiny.check_uploads(known, facts, ctx, offer.uploads, identities)
        self.held.saw_own_head(sealable)
        declared = scrutiny.check_joins(known, offer.joins, list(sealable.headers), identities)
        if sealable.declared != declared:
            raise IntegrityError("a silo's upload declares other patients than its Join")
        seal = scrutiny.make_seal(known, facts, ctx, sealable, self.held.own_header(offer)[1].content_digest)
        signed = sign("seal", ctx, seal, self.held.silo, self.held.keys.identity)
        kept = self.held.state.sealing(run.id, attempt_of(offer), signed.SerializeToString(), list(seal.u3))
        self.held.membership.dial().post(pb.Signed.FromString(kept))
        self.held.state.sealed(run.id, attempt_of(offer))

    def apply(self, offer: pb.Offer) -> None:
        run = self.held.run(offer.run)
        total = next(total for total in offer.sums if total.facts.round == run.model_round + 1)
        facts, known = total.facts, self.held.known(run, total.facts.key_epoch)
        ctx, identities = self.held.checked(run, facts)
        sealable = scrutiny.check_uploads(known, facts, ctx, total.uploads, identities)
        self.held.saw_own_head(sealable)
        self.held.check_sealed(run, facts, list(sealable.headers))
        layout = run.layout_in(facts.round)
        blob = self.held.fetch(total, run.he.sum_bytes(layout))
        keys = self.held.keyring.keys(run, facts.key_epoch)
        try:
            with self.watch.timed("decrypt"):
                coefficients = decrypt(run.he, keys.he_secret_key, blob)
            control = run.control(facts.round)
            checked = checked_sum(coefficients, layout, control, sealable.declared, ctx, keys.secret, run.he)
        except (IntegrityError, MessageError) as error:
            self.held.keyring.halt(run, facts, SUM_REFUSED)
            log.error("sum refused, keys destroyed", run=run.id, round=facts.round, reason=str(error))
            return
        exponents = exponents_of(self.held.state.model(run.id, run.model_round))
        model = self.held.model(run, run.model_round)
        if layout is not None:
            patients = list(sealable.declared.values())
            model = model.stepped(checked, run.layout, exponents, sealable.cap, patients, run.learning.algorithm)
            sizes = [array.size for array in layout.arrays]
            exponents = next_bounds(exponents, checked.saturations, checked.moments, sizes, len(sealable.headers))
        mac = model_mac(keys.digest_key, run.layout, model.parameters)
        try:
            scrutiny.check_reports(known, facts, ctx, total.reports, identities, mac)
        except IntegrityError as error:
            self.held.keyring.halt(run, facts, one_line(error))
            log.error("reports differ, keys destroyed", run=run.id, round=facts.round, reason=str(error))
            return
        saturated = sum(checked.saturations) / (run.layout.summed.num_parameters * len(sealable.headers))
        self.held.keep_model(
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
        before = self.held.state.progress(run.id)
        return advanced(run.plan.stop, before, round_, means) if round_ < run.plan.rounds else before

    def evaluate(self, offer: pb.Offer) -> None:
        run = self.held.run(offer.run)
        model = self.held.model(run, run.model_round)
        parameters = run.learning.parameters(model, self.held.home(run, run.model_round + 1))
        work = TrainerWork("evaluate", run.plan, run.model_round, parameters, self.held.snapshot_folder(run))
        result, beside = self.do(offer, work), None
        if run.model_round == run.last_round and self.held.state.num_trained(run.id) == run.last_round and run.plan.local_gain:
            own = self.do(offer, replace(work, parameters=alone.parameters_of(self.held.alone(run))))
            beside = json.dumps(own.metrics)
        self.held.state.evaluated(run.id, run.model_round, json.dumps(result.metrics), result.num_patients, beside)

    def report(self, offer: pb.Offer) -> None:
        run = self.held.run(offer.run)
        self.held.state.measured(run.id, run.model_round, json.dumps(self.watch.read()))
        self.watch.reset()
        model = self.held.state.model(run.id, run.model_round)
        released = release.signed_digest(
            run, lambda: self.held.model(run, run.model_round).parameters, self.held.policy, self.held.state.seeded(run.id)
        )
        body = report(run, self.held, self._own_metrics(run), released)
        signed = self.held.post("model-report", model["ctx"], body)
        self.held.state.reported(run.id, run.model_round, statement_digest(signed))

    def _own_metrics(self, run: Run) -> dict[str, float]:
        """What the hospital's policy lets the coordinator see of it alone."""
        if self.held.policy.metrics != "per_silo":
            return {}
        measured = self.held.state.model(run.id, run.model_round if run.plan.rounds else 0)["metrics"]  # without rounds: the start
        own: dict[str, float] = json.loads(measured or "{}")
        if own and run.model_round == run.last_round and (beside := self.held.state.alone(run.id)) is not None:
            own |= {f"{ALONE}{name}": value for name, value in json.loads(beside["metrics"] or "{}").items()}
        return own

    def release(self, offer: pb.Offer) -> None:
        """Make the bundle of the final model and send it, where plan and policy agree to that."""
        run = self.held.run(offer.run)
        if (why := release.withheld(run.plan, self.held.policy, self.held.state.seeded(run.id))) is not None:
            raise PolicyRefusal(f"the aggregator asks for the bundle of {run.id}: {why}; nothing is sent")
        if self.held.state.bundle(run.id) is None:
            ctx, parameters = (
                run_ctx(self.held.federation, run.id, run.plan.digest),
                self.held.model(run, run.model_round).parameters,
            )
            release.make_bundle(
                run, parameters, self.held.state, self.held.spool, lambda work: self.do(offer, work),
                lambda body: sign("bundle", ctx, body, self.held.silo, self.held.keys.identity),
            )  # fmt: skip
        row = self.held.state.bundle(run.id)
        if row is None:
            raise IntegrityError("the bundle that was just made is not in this silo's state")
        self.held.membership.dial().upload(pb.Signed.FromString(row["statement"]), self.held.spool.get(row["content"]))
        self.held.state.bundle_sent(run.id)

    def close(self, offer: pb.Offer) -> None:
        row = self.held.state.run(offer.run)
        self.held.budget.release(offer.run)
        failed = offer.phase in (pb.FAILED, pb.ABORTED)
        self.held.state.set_stance(offer.run, Stance.CLOSED, one_line(offer.message) if failed else "")
        self.held.spool.keep_only(self.held.state.needed(offer.run))
        self.helpers["trainer"].stop()  # frees the GPU for whoever is next
        log.info("run over", run=offer.run, how=pb.Phase.Name(offer.phase), model_round=None if row is None else row["model_round"])
