"""What the agent asks of the privacy ledger, and when. A plan without `privacy` asks nothing and is charged nothing; a rehearsal
asks whether its plan would fit, and writes nothing."""

from silo_agent.custody.installation import now_ms
from silo_agent.custody.policy import Policy
from silo_agent.custody.state import State
from silo_agent.run import Run
from wardround import accounting
from wardround.canonical import frame, sha256
from wardround.plan import Plan


def _event(plan: Plan, declared_patients: int) -> accounting.Event | None:
    """What a round costs; None: nothing. Raises PlanError, DataError."""
    event = accounting.round_event(plan)
    if event is not None:
        accounting.batch_constant(event.sample_rate, declared_patients)
    return event


def would_fit(state: State, plan: Plan, declared_patients: int) -> None:
    """Raises what `reserve` would, and writes nothing. A hospital whose agent never ran has no ledger yet, and nothing spent."""
    event = _event(plan, declared_patients)
    if event is not None:
        with state.ledger() as ledger:
            if ledger.lines:
                ledger.check(plan.name, event, plan.rounds)


class Budget:
    """Each call is one transaction of the ledger and may simply be made again after a kill."""

    def __init__(self, state: State, policy: Policy, seed: int | None) -> None:
        """Raises SettingsError or IntegrityError when the ledger is not this hospital's, was cut or was edited."""
        self._state, self._seed = state, seed
        with state.ledger() as ledger:
            ledger.set_cap(policy.epsilon_cap, policy.delta, now_ms())

    def reserve(self, run: str, plan: Plan, declared_patients: int) -> None:
        """All rounds of a plan, before it is accepted. Raises PolicyRefusal with the ledger's sum, PlanError, DataError.

        Of a rehearsal: raises the same, reserves nothing."""
        event = _event(plan, declared_patients)
        if event is not None:
            with self._state.ledger() as ledger:
                if plan.rehearse:
                    ledger.check(run, event, plan.rounds)
                else:
                    ledger.reserve(run, event, plan.rounds, now_ms())

    def open_event(self, run: Run, round_: int, model_mac: bytes) -> bytes | None:
        """The noise key of a round's event, charged when it is new; None: it costs nothing. Raises PolicyRefusal at the cap."""
        if not run.plan.charged:
            return None
        inputs = sha256(frame(b"wardround/event/1", run.plan.digest, model_mac, str(run.snapshot).encode()))
        seeded = None
        if self._seed is not None:
            silo = self._state.meta("silo") or b""
            facts = (str(self._seed).encode(), silo, run.plan.digest, round_.to_bytes(8, "big"))
            seeded = sha256(frame(b"wardround/seeded-noise/1", *facts))
        with self._state.ledger() as ledger:
            return ledger.open_event(run.id, round_, inputs, now_ms(), seeded)

    def close_event(self, run: Run, round_: int) -> None:
        """Its one update is durable: the noise key goes."""
        if run.plan.charged:
            with self._state.ledger() as ledger:
                ledger.close_event(run.id, round_)

    def release(self, run: str) -> None:
        """The run is over: what never opened is free again."""
        with self._state.ledger() as ledger:
            ledger.release(run, now_ms())

    def head(self, plan: Plan) -> bytes:
        """For UploadHeader.ledger_head."""
        if not plan.charged:
            return b""
        with self._state.ledger() as ledger:
            return ledger.head

    def saw(self, heads: list[bytes]) -> None:
        """Heads that this silo signed, as others relay them: one that is not in the ledger says that a backup was restored."""
        if heads:
            with self._state.ledger() as ledger:
                for head in heads:
                    ledger.saw(head)
