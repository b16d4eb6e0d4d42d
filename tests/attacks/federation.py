"""Real silo agents around a real aggregator, over real TLS: only what trains is a script. An attack replaces one step of one party;
everything else is the product."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml

from silo_agent.agent import Agent
from silo_agent.client import Credentials
from silo_agent.config import load_settings
from silo_agent.custody.enrollment import enroll_request, read_enrollment
from silo_agent.custody.keys import SiloKeys
from silo_agent.custody.policy import load_policy
from silo_agent.custody.state import State
from silo_agent.desk import Desk
from silo_agent.launch import Helper
from silo_agent.membership import connect
from silo_agent.round import Action, next_row
from silo_agent.secure_sum.epoch import EpochKeys
from silo_agent.work import IngestResult, TrainerResult, TrainerWork
from tests.support.aggregator import SILOS, TestAggregator, until
from tests.support.hospital import BINDING, LENIENT
from tests.support.plans import tiny
from wardround.canonical import sha256
from wardround.chunks import num_chunks
from wardround.errors import Disconnected, MessageError
from wardround.layout import layout_of
from wardround.measures import metric_names
from wardround.networks import UNet
from wardround.pb import federation_pb2 as pb
from wardround.plan import Plan

PLAN = tiny(model=UNet(network="UNet", channels=(48, 48), strides=(2,), norm_groups=2))
LAYOUT = layout_of(PLAN)
HE = PLAN.aggregation.he
assert num_chunks(LAYOUT) == 4, "a control chunk, two full ones to swap, and a rest"


class Script:
    """A desk whose trainer and ingest are done already: every silo's update is its own."""

    situation = ""

    def __init__(self, number: int) -> None:
        self._number = number
        self._work: Any = None

    def submit(self, work: Any) -> str:
        self._work = work
        return "x-1"

    def wait(self, work_id: str, timeout_s: float) -> Any:
        work = self._work
        if not isinstance(work, TrainerWork):
            return IngestResult("5" * 64, patients={"train": 12, "validation": 12})
        if work.kind == "export":
            return TrainerResult(values=b"model.pt", versions={"monai": "1.6.1", "numpy": "2.4.6", "torch": "2.13.0+cpu"})
        if work.kind == "evaluate":
            return TrainerResult(metrics={name: 0.5 for name in metric_names(PLAN)}, num_patients=12)
        values = np.linspace(-1, 1, LAYOUT.num_parameters) if work.kind == "initialize" else np.full(LAYOUT.num_parameters, 0.01)
        if work.kind == "train":
            values *= self._number
        return TrainerResult(values=values.astype("<f4").tobytes(), num_patients=12)

    def waited_s(self, work_id: str) -> float:
        return 0.0

    def ensure(self) -> bool:
        return False

    def stop(self) -> None:
        """Nothing runs."""


class Silo:
    """One hospital, enrolled as `silo-agent enroll` does it. `step` is one turn of its loop."""

    def __init__(self, folder: Path, number: int, letter: bytes) -> None:
        folder.mkdir()
        (folder / "letter.yaml").write_bytes(letter)
        (folder / "policy.yaml").write_text(yaml.safe_dump(LENIENT))
        settings = {"data": "data", "datasets": {"brain-t1": BINDING}, "policy": "policy.yaml", "roster_approval": "signed"}
        (folder / "silo-agent.yaml").write_text(yaml.safe_dump(settings))
        self.settings = load_settings(folder / "silo-agent.yaml")
        self.settings.data.mkdir()
        self.keys = SiloKeys.create(self.settings.data / "keys")
        self._enroll(folder / "letter.yaml")
        script = Script(number)
        self.agent = Agent(
            self.settings,
            load_policy(self.settings.policy),
            self.keys,
            self.state,
            cast(Desk, script),
            cast(dict[str, Helper], {"trainer": script, "ingest": script}),
            seed=None,
        )
        self.name = self.agent.held.silo
        self.did: list[str] = []
        self.silent = False

    def _enroll(self, letter: Path) -> None:
        enrollment = read_enrollment(letter)
        bootstrap = Credentials(enrollment.roots, enrollment.bootstrap_certificate, enrollment.bootstrap_key)
        client = connect(enrollment.target, bootstrap, self.settings)
        self.keys.install_certificate(client.enroll(enroll_request(enrollment, self.keys)), enrollment.federation, enrollment.silo)
        client.close()
        self.state = State(self.settings.data / "state.sqlite", self.keys.audit)
        facts = {"federation": enrollment.federation, "silo": enrollment.silo, "target": enrollment.target}
        keys = {"operator_key": enrollment.operator_key, "audit_key": self.keys.audit_public}
        self.state.enrolled({name: value.encode() for name, value in facts.items()} | keys)

    def close(self) -> None:
        self.agent.held.membership.hang_up()
        self.state.close()

    def poll(self) -> pb.Offer:
        client = self.agent.held.membership.dial()
        offer = client.poll(self.agent._request())
        self.agent.held.membership.attend(client, offer)
        self.agent.inbox.offer = offer
        return offer

    def obey(self, offer: pb.Offer) -> str:
        """The row that is due; it is performed, unless it is to wait."""
        row = next_row(self.agent._facts(offer.run), self.agent._offered(offer))
        if row.action is not Action.WAIT:
            self.agent.perform(row, offer)
            self.did.append(row.name)
        return row.name

    def step(self) -> None:
        if not self.silent:
            try:
                self.obey(self.poll())
            except Disconnected:  # a crowded machine: the agent's loop tries again, too
                return
            except MessageError as error:  # the run ended between the offer and the answer: the loop looks again
                if "takes no answers any more" not in str(error):
                    raise

    @contextmanager
    def waiting_before(self, action: Action) -> Iterator[None]:
        """It takes its other steps, and tries this one again and again."""

        def later(_offer: pb.Offer) -> None:
            raise Disconnected("not yet")

        assert callable(getattr(self.agent.actions, action.value))
        setattr(self.agent.actions, action.value, later)
        try:
            yield
        finally:
            delattr(self.agent.actions, action.value)

    def epoch_keys(self, run: str, number: int = 1) -> EpochKeys:
        return self.agent.held.keyring.keys(self.agent.held.run(run), number)

    def stance(self, run: str) -> str:
        return self.state.facts(run).stance.value

    def model_round(self, run: str) -> int:
        return self.state.facts(run).model_round


class Hospitals:
    """Three of them and their aggregator; `silos` by name."""

    def __init__(self, folder: Path, aggregator: TestAggregator) -> None:
        self.folder, self.aggregator = folder, aggregator
        self.silos: dict[str, Silo] = {}
        for name in SILOS:
            self.enroll(name)
        aggregator.publish()

    def enroll(self, name: str) -> Silo:
        silo = Silo(self.folder / name, len(self.silos) + 1, self.aggregator.token(name))
        self.silos[name] = silo
        return silo

    def close(self) -> None:
        for silo in self.silos.values():
            silo.close()

    @property
    def all(self) -> list[Silo]:
        return list(self.silos.values())

    def until(self, condition: Any, *silos: Silo) -> None:
        """Step these (all of them) until it holds."""
        until(condition, cast(Any, list(silos) or self.all), timeout_s=120)

    def start(self, plan: Plan = PLAN) -> str:
        return self.aggregator.submit(plan)

    def attempt(self, run: str) -> tuple[int, int, str]:
        """(round, attempt, phase)."""
        found = self.aggregator.store.run(run).attempt
        return (0, 0, "") if found is None else (found.round, found.attempt, found.phase)

    def reach(self, run: str, round_: int, phase: str, *silos: Silo) -> None:
        def reached() -> bool:
            state = self.aggregator.store.run(run)
            assert state.phase in ("pending", "running"), state.reason
            found = self.attempt(run)
            return (found[0], found[2]) == (round_, phase)

        self.until(reached, *silos)

    def reach_first_sum(self, run: str) -> None:
        """It is published, and nobody has taken it yet."""
        with ExitStack() as waiting:
            for silo in self.all:
                waiting.enter_context(silo.waiting_before(Action.APPLY))
            self.reach(run, 1, "evaluating")

    def failed(self, run: str) -> str:
        """Why the run failed, once it has."""
        self.until(lambda: self.aggregator.store.run(run).phase not in ("pending", "running"))
        state = self.aggregator.store.run(run)
        assert state.phase == "failed", state.phase
        return state.reason

    def uploaded(self, run: str) -> list[str]:
        """Who has delivered in the newest attempt."""
        return [silo for silo, upload in self.aggregator.store.run(run).uploads.items() if upload.state == "durable"]

    def spooled(self, run: str, silo: str) -> bytes:
        """A silo's upload of the newest attempt, as the aggregator keeps it until the sum is published."""
        digest = self.aggregator.store.run(run).uploads[silo].content_digest
        return (self.aggregator.settings.data / "spool" / digest.hex()).read_bytes()

    def pass_deadline(self) -> None:
        """Of whatever the run waits for now: the aggregator's clock goes on by more than the plan's `deadline_s`."""
        store, later = self.aggregator.store, 2000 * PLAN.aggregation.deadline_s
        now_ms = store.now_ms
        store.now_ms = lambda: now_ms() + later
        self.aggregator.server.bell.driver.set()

    def put_sum(self, data: bytes) -> tuple[bytes, int]:
        """A sum blob where the aggregator keeps its own."""
        digest = sha256(data)
        (self.aggregator.settings.data / "spool" / digest.hex()).write_bytes(data)
        return digest, len(data)
