"""What an algorithm keeps at a silo: it never leaves, it survives a death between any two durable writes, and it counts once.

One silo's agent in the scripted world of world.py, under SCAFFOLD with its norms at home, which keeps all there is to keep. Its
trainer is a script too, and its update depends on everything it is given: another start or correction gives other bits."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silo_agent.custody.spool import Spool
from silo_agent.custody.state import State
from silo_agent.learning import Learning
from silo_agent.run import exponents_of
from silo_agent.secure_sum.encryption import decrypt
from silo_agent.secure_sum.packing import unpack
from silo_agent.work import TrainerResult, TrainerWork
from tests.silo_agent.world import HE, MODEL, RUN, Helpers, World
from tests.support.plans import TINY
from wardround.canonical import canonical_json
from wardround.chunks import MAX_SCALAR
from wardround.ciphertexts import sum_chunks
from wardround.errors import IntegrityError, MessageError
from wardround.layout import layout_of, trained_layout
from wardround.pb import federation_pb2 as pb
from wardround.plan import Plan, parse_plan

ROUNDS = (1, 2)


def plan(training: str) -> Plan:
    """TINY with another training section, for two silos at least."""
    text = (
        TINY.replace("algorithm: fedprox, mu: 0.01", training)
        .replace("min_silos: 3", "min_silos: 2")
        .replace("rounds: 2", "rounds: 4")
    )
    return parse_plan(text.encode())


SCAFFOLD = plan("algorithm: scaffold, at_home: norms")


class Trainer(Helpers):
    """Never a process. An update is drawn from the hash of the work."""

    def wait(self, work_id: str, timeout_s: float) -> Any:
        work = self.works[-1]
        if not isinstance(work, TrainerWork) or work.kind != "train":
            return super().wait(work_id, timeout_s)
        given = hashlib.sha256(work.parameters + b"|" + work.correction + b"|" + work.random_key).digest()
        values = np.random.default_rng(list(given)).normal(0, 0.01, MODEL.size).astype("<f4")
        return TrainerResult(values=values.tobytes(), num_patients=12)

    @property
    def trained(self) -> list[TrainerWork]:
        return [work for work in self.works if isinstance(work, TrainerWork) and work.kind == "train"]


def world_of(folder: Path, of: Plan) -> World:
    folder.mkdir(exist_ok=True)
    world = World(folder, plan=of)
    world.helpers = Trainer()
    world.start()
    return world


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = world_of(tmp_path, SCAFFOLD)
    yield world
    world.state.close()


def model(world: World, round_: int) -> Any:
    return world.agent.held.model(world.agent.held.run(RUN), round_)


def home(world: World, after_round: int) -> Any:
    return world.agent.held.home(world.agent.held.run(RUN), after_round + 1)


def test_three_rounds_of_scaffold_with_norms_at_home(world: World) -> None:
    """Against the algorithm by hand, from what the trainer was given and gave."""
    world.joined()
    arrays = trained_layout(SCAFFOLD).arrays
    norms = np.repeat([array.norm for array in arrays], [array.size for array in arrays])
    layers, variate = MODEL[norms], None
    for round_ in (1, 2, 3):
        before = model(world, round_ - 1)
        world.sum_round(round_)
        work = world.helpers.trained[-1]
        whole = np.frombuffer(work.parameters, "<f4")
        assert (whole[~norms] == before.theta.astype("<f4")).all() and (whole[norms] == layers).all()
        given = np.frombuffer(work.correction, "<f4")
        if variate is None:
            assert given.size == 0
        else:
            assert (given[norms] == 0).all() and given[~norms].any()
            assert given[~norms] == pytest.approx((before.moments[1] - variate) / 0.1, abs=1e-6)  # one step at rate 0.1
        update = np.frombuffer(given_back(work), "<f4")
        layers = layers + update[norms]
        variate = -update[~norms] + (0.0 if variate is None else variate - before.moments[1])
        kept = home(world, round_)
        assert (kept.layers == layers).all() and kept.variate == pytest.approx(variate)
        evaluated = np.frombuffer(world.helpers.works[-1].parameters, "<f4")
        assert (evaluated[norms] == layers).all() and (evaluated[~norms] == model(world, round_).theta.astype("<f4")).all()


def given_back(work: TrainerWork) -> bytes:
    """The same work gives the same update."""
    trainer = Trainer()
    trainer.submit(work)
    values: bytes = trainer.wait("x-1", 0).values
    return values


# --- death between any two durable writes ----------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing of the process is left; what was durable is."""


@dataclass
class Deaths:
    """Dies right after the `at`-th durable write: a file in the spool, or a transaction of the database."""

    at: int | None = None
    writes: int = 0

    def wrote(self) -> None:
        self.writes += 1
        if self.writes == self.at:
            raise Killed


@pytest.fixture
def deaths(monkeypatch: pytest.MonkeyPatch) -> Deaths:
    deaths = Deaths()

    def after(write: Callable[..., Any]) -> Callable[..., Any]:
        def writes(*given: Any, **more: Any) -> Any:
            found = write(*given, **more)
            deaths.wrote()
            return found

        return writes

    monkeypatch.setattr(Spool, "put", after(Spool.put))
    for name in (
        "open_event",
        "update_made",
        "encoded",
        "uploaded",
        "sealing",
        "sealed",
        "model_made",
        "keep_home",
        "evaluated",
        "reported",
    ):
        monkeypatch.setattr(State, name, after(getattr(State, name)))
    return deaths


def go(world: World, deaths: Deaths) -> int:
    """ROUNDS of one silo, however often it dies: how many rows were performed."""
    rows = 0
    for round_ in ROUNDS:
        for offered, last in ((world.open, "upload"), (world.sealed, "seal"), (world.published, "report")):
            row = ""
            while row != last:
                try:
                    row = world.step(offered(round_=round_))
                    rows += 1
                except Killed:
                    world.start()
                    if world.due(offered(round_=round_)) == "nothing to do":
                        break  # it had done the last of them
    return rows


def left(world: World) -> tuple[list[str], list[str], list[bytes]]:
    """Every model and every state at home by round, and every work of the trainer that counted, each by its digest."""
    models = [world.state.model(RUN, round_)["state"] for round_ in range(3)]
    homes = [str(world.state.home(RUN, round_ + 1)) for round_ in range(3)]
    updates = [world.state.event(RUN, round_)["update_digest"].encode() for round_ in ROUNDS]
    return models, homes, updates


def test_a_death_after_any_durable_write_changes_no_bit(tmp_path: Path, deaths: Deaths) -> None:
    quiet = world_of(tmp_path / "quiet", SCAFFOLD)
    quiet.joined()
    before = deaths.writes
    go(quiet, deaths)
    total, expected = deaths.writes - before, left(quiet)
    quiet.state.close()
    assert total >= 20 and len(set(expected[1])) == 3, "every round leaves something else at home"
    for at in range(1, total + 1):
        deaths.at = None
        world = world_of(tmp_path / f"killed-{at}", SCAFFOLD)
        world.joined()
        deaths.writes, deaths.at = 0, at
        go(world, deaths)
        assert left(world) == expected, f"after write {at} of {total}"
        assert world.state.needed(RUN) <= {file.name for file in world.agent.held.spool._folder.iterdir()}
        world.state.close()


# --- what it must not do -------------------------------------------------------------------------------------------------------


def test_another_state_at_home_is_another_event_of_the_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers at home are an input of a private round: with others the same noise would be used on two different gradients."""
    value = json.loads(plan("algorithm: fedprox, at_home: norms").canonical())
    value["training"] |= {"batch_size": 0}
    value["privacy"] = {"unit": "patient", "epsilon": 8.0, "delta": 1e-5, "max_grad_norm": 1.0, "sample_rate": 0.5}
    world, seen = world_of(tmp_path, parse_plan(canonical_json(value))), []
    world.joined()
    monkeypatch.setattr(world.agent.held.budget, "open_event", lambda run, round_, mac: seen.append(mac))
    for _ in range(2):
        world.agent.held.budgeted(world.agent.held.run(RUN), 1)
    world.state.keep_home(RUN, 0, "0" * 64)
    world.agent.held.budgeted(world.agent.held.run(RUN), 1)
    assert seen[0] == seen[1] != seen[2]
    world.state.close()


def test_what_stays_at_home_of_another_size_is_refused(world: World) -> None:
    world.joined()
    world.state.keep_home(RUN, 0, world.agent.held.spool.put(b"1234"))
    with pytest.raises(IntegrityError, match="has another size than the 4 bytes in the spool"):
        home(world, 0)


@pytest.mark.parametrize("training", ["fedprox, mu: 0.01", "fednova", "fedadam, server_learning_rate: 0.1"])
def test_algorithms_that_keep_nothing_leave_nothing_at_home(tmp_path: Path, training: str) -> None:
    of = plan(f"algorithm: {training}")
    world = world_of(tmp_path, of)
    world.joined()
    world.sum_round()
    assert world.state.home(RUN, 99) is None and all(work.correction == b"" for work in world.helpers.trained)
    assert len(model(world, 1).moments) == of.training.moments
    world.state.close()


def opened(world: World, of: Plan) -> tuple[np.ndarray, np.ndarray]:
    """What the newest upload holds: its control chunk and its fields, read with the key that every silo has."""
    content, size = world.client.uploads[-1], HE.upload_chunk_bytes
    chunks = [sum_chunks(HE, [content[at : at + size]]) for at in range(0, len(content), size)]
    coefficients = decrypt(HE, world.epochs[1].he_secret_key, b"".join(chunks))
    return coefficients[0], unpack(coefficients[1:], layout_of(of).summed.num_parameters, HE)


def test_an_upload_holds_nothing_that_stays_at_home(world: World) -> None:
    """Every place of it is accounted for: the control map's, then what is federated, then its variates, and zeros."""
    world.joined()
    bounds = exponents_of(world.state.model(RUN, 0))
    world.upload()
    head, fields = opened(world, SCAFFOLD)
    summed, trained = layout_of(SCAFFOLD).summed, trained_layout(SCAFFOLD)
    assert not head[world.agent.held.run(RUN).control(1).used :].any()
    steps = np.repeat([2.0**bound for bound in bounds], [array.size for array in summed.arrays]) / HE.zero_code
    norms = np.repeat([array.norm for array in trained.arrays], [array.size for array in trained.arrays])
    update = np.frombuffer(given_back(world.helpers.trained[-1]), "<f4")[~norms]
    sent = (fields.astype(np.float64) - HE.zero_code) * steps
    assert np.abs(sent - np.concatenate([update, -update])).max() < steps.max()  # the first variate is minus the update
    assert summed.num_parameters == 2 * (trained.num_parameters - int(norms.sum()))


def test_a_number_of_steps_is_in_the_sum_and_nowhere_else(tmp_path: Path) -> None:
    """12 training patients of 20 declared: 12 steps where the reference has 20, as one encrypted integer; the header is as ever."""
    value = json.loads(plan("algorithm: fednova").canonical())
    value["training"] |= {"steps": 0, "epochs": 2.0}
    of = parse_plan(canonical_json(value))
    world = world_of(tmp_path, of)
    world.joined()
    world.upload()
    head, _ = opened(world, of)
    (scalar,) = head[world.agent.held.run(RUN).control(1).scalars]
    assert int(scalar) == round(12 / 20 / MAX_SCALAR * HE.max_control)
    header = pb.UploadHeader.FromString(world.client.headers[-1].body)
    assert header.declared_patients == 20 and header.content_bytes == HE.upload_bytes(layout_of(of))
    assert 12 not in [value for _, value in header.ListFields() if isinstance(value, int)]
    world.state.close()


def test_what_a_trainer_may_not_deliver() -> None:
    learning = Learning(SCAFFOLD)
    with pytest.raises(MessageError, match=f"expected {MODEL.nbytes} bytes of parameters, got {MODEL.nbytes - 4}"):
        learning.begin(MODEL.tobytes()[4:])
    model_, _, home_ = learning.begin(MODEL.tobytes())
    for at in (0, 40):  # federated, and a norm's scale
        update = np.zeros_like(MODEL)
        update[at] = np.nan
        with pytest.raises(IntegrityError, match="what stays at home would hold NaN"):
            learning.trained(update.tobytes(), model_, home_, 0.1)
