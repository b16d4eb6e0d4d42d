"""The aggregator as a whole, with fake silos over real mutual TLS."""

import numpy as np

from aggregator.views import run_view
from tests.support.aggregator import SILOS, TestAggregator, until
from tests.support.plans import tiny
from wardround.audit import verify_file
from wardround.chunks import CLEAR_CHUNK_BYTES, FIELD_BITS, ControlMap


def test_two_rounds_and_the_closing_one(aggregator: TestAggregator) -> None:
    silos = aggregator.hospitals()
    run = aggregator.submit(tiny())
    assert run == "tiny-1"
    until(lambda: all(silo.closed == "COMPLETED" for silo in silos), silos)
    assert all(silo.did == ["join", *["upload", "seal", "report"] * 3] for silo in silos)
    state = aggregator.store.run(run)
    assert state.phase == "completed" and state.attempt is not None and (state.attempt.round, state.attempt.attempt) == (3, 1)
    first, second, closing = aggregator.store.sums(run)
    assert first.attempt.u3 == SILOS and first.attempt.cohort == SILOS
    # 1 + 2 + 3 in every field, by hand; 3 silos of 20 patients.
    data = aggregator.server.driver._blobs.read(first.attempt.sum_digest or b"", 0, 1 << 30)
    fields = np.frombuffer(data[CLEAR_CHUNK_BYTES:], dtype="<u8")
    assert set(fields.tolist()) == {6 | 6 << FIELD_BITS}
    control = np.frombuffer(data[:CLEAR_CHUNK_BYTES], dtype="<u8")
    assert (control[ControlMap.COUNT], control[ControlMap.DECLARED]) == (3, 60)
    assert closing.attempt.sum_bytes == CLEAR_CHUNK_BYTES
    assert second.attempt.facts.previous_model_mac != first.attempt.facts.previous_model_mac
    # Uploads are gone once their sum is out; sums stay.
    names = {path.name for path in (aggregator.settings.data / "spool").iterdir()}
    assert names == {(one.attempt.sum_digest or b"").hex() for one in (first, second, closing)}
    aggregator.stop()
    head, _ = verify_file(aggregator.settings.data / "aggregator.sqlite")
    assert head is not None and head.seq >= max(kept.seq for silo in silos for kept in silo.heads)
    aggregator.start()
    view = run_view(aggregator.store, run)
    assert [one.round for one in view.rounds] == [1, 2, 3] and view.rounds[0].cohort_size == 3
