"""A sum that is not the sum of the sealed uploads: a silo notices, destroys its keys before it says so, and the run ends.

The aggregator of these tests does what its code could do if someone changed it: it holds every ciphertext, and no key.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from tenseal import sealapi

from tests.aggregator.test_statements import records
from tests.attacks.federation import HE, PLAN, Hospitals
from wardround.ciphertexts import numbers, scratch, sum_chunks, wire

Lie = Callable[[list[bytes]], bytes]  # uploads of U3, in the order of names -> the sum to publish
CHUNKS = 4
CHUNK = HE.upload_chunk_bytes
LINEAR = "the sum fails its linear check: it is not the sum of the sealed uploads"


def chunk(upload: bytes, index: int) -> bytes:
    return upload[index * CHUNK :][:CHUNK]


def added(per_chunk: Sequence[list[bytes]]) -> bytes:
    """A sum whose chunk k is the sum of these upload chunks."""
    return b"".join(sum_chunks(HE, chunks) for chunks in per_chunk)


def honest(uploads: list[bytes]) -> list[list[bytes]]:
    return [[chunk(upload, index) for upload in uploads] for index in range(CHUNKS)]


def add_plain(data: bytes, index: int, shift: str) -> bytes:
    """`shift`, a polynomial as SEAL writes it (3E8x^5: 1000 in coefficient 5), added to chunk `index` of a sum, as anyone who knows
    the parameters can."""
    size = HE.sum_chunk_bytes
    with scratch(HE) as memory:
        ciphertext = sealapi.Ciphertext()
        memory.load_sum(ciphertext, numbers(HE, data[index * size : (index + 1) * size], "sum"))
        sealapi.Evaluator(memory.context).add_plain_inplace(ciphertext, sealapi.Plaintext(shift))
        changed = wire(HE, memory.saved_sum(ciphertext))
    return data[: index * size] + changed + data[(index + 1) * size :]


@dataclass
class Caught:
    """How an attack ended. `why`: what each silo wrote into its own log, and told nobody."""

    run: str
    why: set[str]


Attack = Callable[..., Caught]


@pytest.fixture
def attack(hospitals: Hospitals, monkeypatch: pytest.MonkeyPatch) -> Attack:
    """Publishes the lie in place of the next sum. No silo takes the step, none has a key left, and the run has failed."""
    written: list[str] = []
    monkeypatch.setattr("silo_agent.agent.log.error", lambda event, **facts: written.append(facts["reason"]), raising=False)

    def publish(lie: Lie, run: str = "", at: int = 0) -> Caught:
        run = run or hospitals.start()
        blobs = hospitals.aggregator.server.driver._blobs

        def fold(uploads: Sequence[bytes], *_: object) -> tuple[bytes, int]:
            return hospitals.put_sum(lie([blobs.whole(digest).read_bytes() for digest in uploads]))

        monkeypatch.setattr(hospitals.aggregator.server._folds, "fold", fold)
        reason = hospitals.failed(run)
        assert "halted the run in round" in reason and "destroyed" in reason
        hospitals.until(lambda: all(silo.stance(run) == "closed" for silo in hospitals.all))
        assert {silo.model_round(run) for silo in hospitals.all} == {at}
        assert all(silo.state.epoch(run)["secrets"] is None for silo in hospitals.all)
        assert [found.kind for found in records(hospitals.aggregator)].count("halt-received") >= 1
        return Caught(run, set(written))

    return publish


def test_the_honest_run_that_every_attack_is_one_step_away_from(hospitals: Hospitals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with the sums of this file's own making: what is noticed below is the lie, not the hand that adds."""
    blobs = hospitals.aggregator.server.driver._blobs

    def fold(uploads: Sequence[bytes], *_: object) -> tuple[bytes, int]:
        contents = [blobs.whole(digest).read_bytes() for digest in uploads]
        return hospitals.put_sum(added(honest(contents)[: len(contents[0]) // CHUNK]))

    monkeypatch.setattr(hospitals.aggregator.server._folds, "fold", fold)
    run = hospitals.start()
    hospitals.until(lambda: hospitals.aggregator.store.run(run).phase == "completed")
    last = {silo.state.model(run, PLAN.rounds + 1)["state"] for silo in hospitals.all}
    first = {silo.state.model(run, 0)["state"] for silo in hospitals.all}
    assert len(last) == len(first) == 1 and last != first


def test_a_shift_by_add_plain(attack: Attack) -> None:
    shift = "3E8x^5"  # a thousand steps of one parameter: no field's range notices
    assert attack(lambda uploads: add_plain(added(honest(uploads)), 1, shift)).why == {LINEAR}


def test_a_shift_of_the_bounds_in_the_control_chunk(attack: Attack) -> None:
    shift = "1x^4"  # one saturated value more
    assert attack(lambda uploads: add_plain(added(honest(uploads)), 0, shift)).why == {LINEAR}


def test_a_doubled_fold(attack: Attack) -> None:
    why = attack(lambda uploads: added(honest([*uploads, uploads[0]]))).why
    assert why == {"the sum counts 4 updates, 3 were sealed: a fold was doubled or left out"}


def test_one_silo_twice_in_place_of_another(attack: Attack) -> None:
    """Count and declared patients are right: only what each silo's check has of its own tells."""
    assert attack(lambda uploads: added(honest([uploads[0], uploads[0], uploads[2]]))).why == {LINEAR}


def test_a_chunk_without_one_silo(attack: Attack) -> None:
    def lie(uploads: list[bytes]) -> bytes:
        chunks = honest(uploads)
        chunks[1] = chunks[1][1:]
        return added(chunks)

    assert attack(lie).why == {LINEAR}


def test_swapped_chunks(attack: Attack) -> None:
    def lie(uploads: list[bytes]) -> bytes:
        chunks = honest(uploads)
        chunks[1], chunks[2] = chunks[2], chunks[1]
        return added(chunks)

    assert attack(lie).why == {LINEAR}


def test_the_chunks_of_one_silo_swapped(attack: Attack) -> None:
    def lie(uploads: list[bytes]) -> bytes:
        chunks = honest(uploads)
        chunks[1][0], chunks[2][0] = chunks[2][0], chunks[1][0]
        return added(chunks)

    assert attack(lie).why == {LINEAR}


def test_a_next_attempt_summed_with_an_upload_of_the_last_one(hospitals: Hospitals, attack: Attack) -> None:
    """The same update of the same silo, encrypted under the same keys, only for another attempt."""
    old: list[bytes] = []
    run = hospitals.start()
    hospitals.reach(run, 1, "open")
    late = hospitals.silos["st-marys"]
    hospitals.until(lambda: len(hospitals.uploaded(run)) == 2, *[silo for silo in hospitals.all if silo is not late])
    old.append(hospitals.spooled(run, "charite"))
    hospitals.pass_deadline()
    hospitals.until(lambda: hospitals.attempt(run)[:2] == (1, 2), *[silo for silo in hospitals.all if silo is not late])
    assert attack(lambda uploads: added(honest([old[0], *uploads[1:]])), run).why == {LINEAR}


def test_a_new_key_epoch_summed_with_an_upload_of_the_old_one(hospitals: Hospitals, attack: Attack) -> None:
    run = hospitals.start()
    hospitals.reach(run, 1, "sealed")
    old = hospitals.spooled(run, "charite")
    hospitals.enroll("utrecht")
    hospitals.aggregator.publish()
    hospitals.reach(run, 2, "open")
    assert hospitals.aggregator.store.run(run).epoch.number == 2  # another roster, other keys
    found = attack(lambda uploads: added(honest([old, *uploads[1:]])), run, at=1)
    assert len(found.why) >= 1  # the sum opens to numbers without meaning: which bound they break first is chance
