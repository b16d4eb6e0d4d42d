"""SIGKILL at every row of both tables: of the aggregator, of an agent, of a trainer. Nothing is lost, nothing counts twice, and the
same bits come out.

One federation goes through a story: a run that nobody disturbs, the same run with a death before and after every row, a hospital
that goes back to a backup, a run and hospitals that pause, hospitals that ask their IT and train at night, one that is away while
keys are agreed, a sum that holds an upload twice, a run that is aborted, runs that are refused. What only disagreeing or absent
silos bring about comes from fake silos at a second aggregator. The rows are the tables' own: a new one fails here until something
reaches it.
"""

import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from aggregator.folder import Opened
from aggregator.round import TABLE as AGGREGATOR_TABLE
from sandbox.federation import READY_S, free_port
from sandbox.processes import Program, Programs, wait_until
from silo_agent.round import TABLE as SILO_TABLE
from tests.federation.harness import NAMES, Haunted, copy_database, haunted, records
from tests.support.aggregator import TestAggregator
from tests.support.fake_silo import INITIAL_MAC, FakeSilo
from tests.support.identities import OPERATOR
from tests.support.kill_at import Deaths
from tests.support.plans import tiny
from wardround.audit import verify_file
from wardround.pb import federation_pb2 as pb
from wardround.plan import Plan
from wardround.roster import propose, sign_roster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SILO_ROWS = [row.name for row in SILO_TABLE]
AGGREGATOR_ROWS = [row.name for row in AGGREGATOR_TABLE]
AT_WORK = ("ingest.during.snapshot", "trainer.during.initialize", "trainer.during.evaluate", "trainer.during.train")
AGENT, AFTERWARDS, TRAINER = "charite", "leuven", "st-marys"  # where agents die before rows, after rows, and where helpers die
ONE_SILO = {"make keys": AGENT, "release": AGENT, "take keys": AFTERWARDS, "restore": TRAINER}  # rows that one silo alone comes to
# Where a row finds no trainer running, one is started to be lost.
DEATHS = [(AGENT, "agent.before"), (AFTERWARDS, "agent.after"), (TRAINER, "trainer.at")]
DUE = {
    silo: [f"{death}.{row}" for usual, death in DEATHS for row in SILO_ROWS if ONE_SILO.get(row, usual) == silo] for silo in NAMES
}
DUE[TRAINER] += AT_WORK
DUE["aggregator"] = [f"aggregator.{when}.{row}" for row in AGGREGATOR_ROWS for when in ("before", "after")]


@dataclass
class Story:
    """What the story left behind."""

    died: frozenset[str] = frozenset()
    models: dict[str, dict[str, dict[int, str]]] = field(default_factory=dict)  # run -> silo -> round -> state digest
    accepted: list[dict[str, Any]] = field(default_factory=list)  # the aggregator's records of uploads
    uploads: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # silo -> its own records of uploads
    updates: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    in_sums: list[tuple[str, ...]] = field(default_factory=list)  # of the disturbed run
    abandoned: int = 0
    late: set[str] = field(default_factory=set)
    verified: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    with haunted(tmp_path_factory.mktemp("kill")) as federation:
        yield _tell(federation, Story())


def _tell(federation: Haunted, story: Story) -> Story:
    for silo in NAMES:
        federation.deaths[silo].arm(name for name in DUE[silo] if name.endswith(".idle"))
    federation.set_up()
    federation.until(lambda: all(federation.deaths[silo].died for silo in (AGENT, TRAINER)), "the idle federation")
    quiet = federation.ask(tiny(release="registry"))
    federation.ended(quiet)
    for name, names in DUE.items():
        federation.deaths[name].arm(names)
    disturbed = federation.ask(tiny(release="registry"))
    federation.ended(disturbed)
    story.models = {run: {silo: federation.models(silo, run) for silo in NAMES} for run in (quiet, disturbed)}
    story.uploads = {silo: records(federation.silo_database(silo), "upload") for silo in NAMES}
    story.updates = {silo: records(federation.silo_database(silo), "update") for silo in NAMES}
    story.in_sums = [total.attempt.u3 for total in federation.opened.store.sums(disturbed)]
    story.abandoned = len(federation.opened.store.abandoned(disturbed))
    _restore(federation, "agent.before.join", "missed it")
    _restore(federation, "agent.before.judge", "not ours")
    _pause(federation)
    _ask_it(federation)
    story.late = _late(federation)
    _refuse_a_sum(federation)
    _abort(federation)
    _refuse(federation)
    for program in federation.all_programs():
        federation.end(program)
    story.accepted = records(federation.aggregator_database, "upload-accepted")
    story.died = frozenset().union(*(deaths.died for deaths in federation.deaths.values()))
    story.verified = [*(federation.verify(head_from=silo) for silo in NAMES), *(federation.verify(silo) for silo in NAMES)]
    return story


def _died(federation: Haunted, row: str) -> bool:
    """Every hospital whose death at this row is due."""
    return all({name for name in DUE[silo] if name.endswith(f".{row}")} <= federation.deaths[silo].died for silo in NAMES)


def _pause(federation: Haunted) -> None:
    """Hospitals that take no new run; a run that opens no round; hospitals that train for none. Then all goes on."""

    def pause(reason: str) -> None:
        for silo in NAMES:
            federation.at_silo(silo, *(("pause", reason) if reason else ("resume",)))

    pause("the scanner moves")
    run = federation.ask(tiny())
    federation.opened.store.pause(run, "the protocol is read again", "tester")
    federation.until(lambda: _died(federation, "no new run"), "hospitals that take no new run")
    pause("")
    paused = {"aggregator.before.paused", "aggregator.after.paused"}
    federation.until(lambda: paused <= federation.deaths["aggregator"].died, "a run that opens no round")
    pause("the scanner moves")
    federation.opened.store.pause(run, "", "tester")
    federation.until(lambda: _died(federation, "paused"), "hospitals that train for no round")
    pause("")
    federation.ended(run)


def _ask_it(federation: Haunted) -> None:
    """Hospitals whose IT has the last word on a run, and then its hours; then all goes on."""

    later = datetime.now(UTC) + timedelta(hours=2)
    strict = f"approval: manual\nhours: {later:%H}:00-{later:%H}:01\ntime_zone: UTC\n"
    usual = {silo: federation.policy(silo).read_text() for silo in NAMES}
    for silo in NAMES:
        federation.restart_with(silo, usual[silo] + strict)
    run = federation.ask(tiny())
    federation.until(lambda: _died(federation, "approval"), "hospitals whose IT is asked")
    for silo in NAMES:
        federation.at_silo(silo, "plan", "approve", run)
    federation.until(lambda: _died(federation, "hours"), "hospitals that train at night")
    for silo, policy in usual.items():
        federation.restart_with(silo, policy)
    federation.ended(run)


def _late(federation: Haunted) -> set[str]:
    """The digests of the last model of a run that one hospital joined and then missed two rounds of: it restores."""
    federation.leave(AGENT)  # or else the run would start with the join that is waited for
    run = federation.ask(tiny({"min_silos": 2, "deadline_s": 30}))
    federation.until(lambda: TRAINER in federation.run(run).joins, "the join")
    federation.leave(TRAINER)
    federation.come_back(AGENT)

    def second_keys() -> bool:
        epoch = federation.run(run).epoch
        return epoch is not None and epoch.first_round == 3 and epoch.statement is not None

    federation.until(second_keys, "the second key epoch")
    federation.come_back(TRAINER)
    federation.ended(run)
    return {federation.models(silo, run)[3] for silo in NAMES}


def _refuse_a_sum(federation: Haunted) -> None:
    federation.deaths["aggregator"].arm(["aggregator.doubles.fold"])
    run = federation.ask(tiny())
    federation.ended(run, "failed")
    assert "halted the run in round 1" in federation.run(run).reason
    for silo in NAMES:
        assert federation.query(silo, "SELECT * FROM epochs WHERE run = ? AND secrets IS NOT NULL", run) == []


def _restore(federation: Haunted, death: str, row: str) -> None:
    """A hospital goes back to the backup of that moment; the row is what its agent then makes of the run that is over."""
    due = {f"trainer.at.{row}", f"agent.before.{row}", f"agent.after.{row}"}
    federation.end(federation.silos[AGENT])
    federation.deaths[AGENT].arm(due)
    copy_database(federation.backup(AGENT, death), federation.silo_database(AGENT))
    federation.silos[AGENT].restart()
    federation.until(lambda: due <= federation.deaths[AGENT].died, f"the row {row!r}")


def _abort(federation: Haunted) -> None:
    run = federation.ask(tiny())
    federation.until(lambda: len(federation.run(run).joins) == len(NAMES), "three joins")
    federation.opened.store.request_abort(run, "tester")
    federation.ended(run, "aborted")


def _refuse(federation: Haunted) -> None:
    """Each hospital alone refuses a dataset that only it lacks, which ends no run; then all refuse one, which does."""
    for silo in NAMES:
        run = federation.ask(tiny({"min_silos": 2}, name="lacking", dataset=f"without-{silo}"))
        due = {name for name in DUE[silo] if name.endswith(".refuse")}
        federation.until(lambda silo=silo, due=due: due <= federation.deaths[silo].died, f"the refusal of {silo}")
        federation.until(lambda silo=silo, run=run: silo in federation.run(run).refusals, "its arrival")
        federation.opened.store.request_abort(run, "tester")
        federation.until(lambda run=run: federation.run(run).phase == "aborted", "the end of the run")
    run = federation.ask(tiny(name="other", dataset="other"))
    federation.until(lambda: federation.run(run).phase == "failed", "a refused run")
    assert "refused: this hospital binds no dataset 'other'" in federation.run(run).reason
    refused = {"aggregator.before.refused", "aggregator.after.refused"}
    federation.until(lambda: refused <= federation.deaths["aggregator"].died, "the aggregator's deaths")


# --- what only fake silos do ---------------------------------------------------------------------------------------------------


class ProcessAggregator(TestAggregator):
    """TestAggregator's silos and settings around the real program in a process that may die."""

    def __init__(self, folder: Path, programs: Programs) -> None:
        super().__init__(folder, port=free_port())
        self.settings = self.settings.model_copy(update={"listen_port": self.settings.port})
        self.port = self.settings.port
        self.opened = Opened.of(self.settings)
        self.deaths = Deaths(folder / "deaths")
        file = folder / "aggregator.yaml"
        file.write_text(yaml.safe_dump(self.settings.model_dump(mode="json")))
        command = ["-m", "tests.support.kill_at", str(folder / "deaths"), "aggregator", "--config", str(file), "serve"]
        self.program: Program = programs.start("aggregator", [sys.executable, *command], folder / "aggregator.log")

    def enroll(self, name: str, number: int) -> FakeSilo:
        silo = Stubborn.enrolled(name, number, self.port, self.token(name))
        assert isinstance(silo, Stubborn)
        silo.revive = self.revive
        self._silos.append(silo)
        return silo

    def submit(self, plan: Plan) -> str:
        """As the command line does: another process, whose change the program finds by itself."""
        return self.store.submit(plan, "tester")

    def revive(self) -> None:
        if not self.program.alive:
            assert self.program.process.returncode == -9, self.program.last_lines(30)
            self.program.restart()

    def until(self, condition: Callable[[], bool], silos: list[FakeSilo], timeout_s: float = 120.0) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            self.revive()
            for silo in silos:
                try:
                    silo.step()
                except grpc.RpcError as error:
                    assert _away(error), error
            assert time.monotonic() < end, f"it never came true\n{self.program.last_lines(20)}"
            time.sleep(0.05)


class Stubborn(FakeSilo):
    """Posts until it has an answer: a fake silo has no database that would remind it."""

    revive: Callable[[], None]

    def post(self, signed: pb.Signed) -> pb.Receipt:
        while True:
            try:
                return super().post(signed)
            except grpc.RpcError as error:
                if not _away(error):
                    raise
                self.revive()
                time.sleep(0.1)


def _away(error: grpc.RpcError) -> bool:
    return error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


def joins_differ(aggregator: ProcessAggregator, silos: list[FakeSilo]) -> None:
    silos[0].initial_mac = bytes(32)
    run = aggregator.submit(tiny())
    aggregator.until(lambda: aggregator.store.run(run).phase == "failed", silos)
    silos[0].initial_mac = INITIAL_MAC


def reports_differ(aggregator: ProcessAggregator, silos: list[FakeSilo]) -> None:
    silos[0].lie_about_model = True
    run = aggregator.submit(tiny())
    aggregator.until(lambda: aggregator.store.run(run).phase == "failed", silos)
    silos[0].lie_about_model = False


def too_few(aggregator: ProcessAggregator, silos: list[FakeSilo]) -> None:
    silos[0].uploads = False
    run = aggregator.submit(tiny({"deadline_s": 4}))
    aggregator.until(lambda: len(aggregator.store.abandoned(run)) > 0, silos)
    silos[0].uploads = True
    aggregator.until(lambda: aggregator.store.run(run).phase == "completed", silos)
    assert aggregator.store.abandoned(run)[0].reason == "no upload of charite by the deadline; the plan demands 3 silos"


def too_few_keys(aggregator: ProcessAggregator, silos: list[FakeSilo]) -> None:
    silos[0].keys = False  # first by name, it is asked to make them
    run = aggregator.submit(tiny({"deadline_s": 4}))
    aggregator.until(lambda: _maker(aggregator, run) == "leuven", silos)
    silos[0].keys = True
    aggregator.until(lambda: aggregator.store.run(run).phase == "completed", silos)


def too_few_seals(aggregator: ProcessAggregator, silos: list[FakeSilo]) -> None:
    silos[0].seals = False
    run = aggregator.submit(tiny({"deadline_s": 4}))
    aggregator.until(lambda: len(aggregator.store.abandoned(run)) > 0, silos)
    silos[0].seals = True
    aggregator.until(lambda: aggregator.store.run(run).phase == "completed", silos)


def removed(aggregator: ProcessAggregator, silos: list[FakeSilo]) -> None:
    silos = [*silos, aggregator.enroll("utrecht", 8)]
    aggregator.publish()
    for silo in silos:
        silo.seals = False
    run = aggregator.submit(tiny())
    aggregator.until(lambda: _phase(aggregator, run) == "sealed", silos)
    current = aggregator.store.newest_roster()
    assert current is not None
    members = [one.model_copy(update={"status": "removed"}) if one.name == "utrecht" else one for one in current.silos]
    aggregator.store.publish_roster(sign_roster(propose("neuro", current, members), OPERATOR))
    for silo in silos:
        silo.seals = True
    aggregator.until(lambda: aggregator.store.run(run).phase == "completed", silos[:3])
    reason = aggregator.store.abandoned(run)[0].reason
    assert reason == "utrecht was removed from the federation after its upload was sealed"


def _maker(aggregator: ProcessAggregator, run: str) -> str:
    epoch = aggregator.store.run(run).epoch
    return epoch.maker if epoch else ""


def _phase(aggregator: ProcessAggregator, run: str) -> str:
    attempt = aggregator.store.run(run).attempt
    return attempt.phase if attempt else ""


SCENARIOS = {
    "joins differ": joins_differ,
    "reports differ": reports_differ,
    "too few": too_few,
    "too few keys": too_few_keys,
    "too few seals": too_few_seals,
    "removed": removed,
}


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def disagreements(tmp_path_factory: pytest.TempPathFactory) -> frozenset[str]:
    """The deaths died in the scenarios."""
    folder = tmp_path_factory.mktemp("disagreements")
    with Programs() as programs:
        aggregator = ProcessAggregator(folder, programs)
        try:
            wait_until(lambda: _answers(aggregator.port), "the aggregator's port to open", READY_S, programs)
            silos = aggregator.hospitals()
            for row, scenario in SCENARIOS.items():
                aggregator.deaths.arm([f"aggregator.before.{row}", f"aggregator.after.{row}"])
                scenario(aggregator, silos)
        finally:
            aggregator.close()
    records = verify_file(folder / "data" / "aggregator.sqlite", None, None)[0]
    assert records is not None and all(silo.heads[-1].seq <= records.seq for silo in silos)
    return aggregator.deaths.died


# --- what must hold ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", SILO_ROWS)
def test_a_silo_survives_death_at(row: str, story: Story) -> None:
    assert {f"agent.before.{row}", f"agent.after.{row}", f"trainer.at.{row}"} <= story.died


@pytest.mark.parametrize("death", AT_WORK)
def test_a_silo_survives_the_death_of_a_helper_with_work_in_its_hands(death: str, story: Story) -> None:
    assert death in story.died


@pytest.mark.parametrize("row", AGGREGATOR_ROWS)
def test_the_aggregator_survives_death_at(row: str, story: Story, disagreements: frozenset[str]) -> None:
    assert {f"aggregator.before.{row}", f"aggregator.after.{row}"} <= story.died | disagreements


def test_the_same_bits_come_out(story: Story) -> None:
    """Every round's model, at every silo, of the run with some eighty deaths in it and of the run without."""
    quiet, disturbed = story.models.values()
    assert quiet == disturbed
    assert all(sorted(models) == [0, 1, 2, 3] for models in quiet.values())
    assert len({tuple(models.values()) for models in quiet.values()}) == 1
    assert len(set(quiet[AGENT].values())) == 3  # each round moved the model; the closing one moves nothing


def test_a_hospital_that_was_away_has_the_same_model(story: Story) -> None:
    assert len(story.late) == 1


def test_no_update_counts_twice(story: Story) -> None:
    """One upload per silo and attempt was made, was accepted once, and every sum is of each silo once, in the first attempt."""
    accepted = Counter((one["run"], one["round"], one["attempt"], one["silo"]) for one in story.accepted)
    assert set(accepted.values()) == {1}
    assert {key[1:3] for key in accepted if key[0] in story.models} == {(1, 1), (2, 1), (3, 1)}
    assert story.in_sums == [tuple(sorted(NAMES))] * 3 and story.abandoned == 0
    contents = {(one["run"], one["round"], one["silo"]): one["content"] for one in story.accepted}
    for silo in NAMES:
        made = {(one["run"], one["attempt"][0], silo): one["content"] for one in story.uploads[silo]}
        assert len(made) == len(story.uploads[silo]) == 6  # two runs of three rounds
        assert made.items() <= contents.items()
        assert len({(one["run"], one["round"]) for one in story.updates[silo]}) == len(story.updates[silo]) == 4


def test_every_chain_verifies_against_every_head_that_a_silo_kept(story: Story) -> None:
    assert all(facts["verified"] for facts in story.verified)
    assert [facts["kept_heads_compared"] > 0 for facts in story.verified] == [True] * 3 + [False] * 3
