"""From three updates to one checked sum and one step; then every lie about a sum that a silo must notice."""

import numpy as np
import pytest

from silo_agent.secure_sum.check import PRIME, checked_sum, control_chunk, linear_check, upload_bytes
from silo_agent.secure_sum.global_model import GlobalModel, model_mac
from silo_agent.secure_sum.packing import derive, encode, keystream, words
from wardround.chunks import ControlMap, clear_bytes, clear_coefficients, gate
from wardround.errors import IntegrityError, MessageError
from wardround.layout import Array, Layout
from wardround.plan import Server

LAYOUT = Layout((Array("a", (50, 100)), Array("b", (5000,))))
CONTROL = ControlMap(2, ("dice", "hd95_mm"))
CTX, SECRET = b"c" * 32, bytes(32)
DECLARED = [100, 50, 200]
CAP = 200


def upload(silo: int, update: np.ndarray, metrics: dict[str, float] | None = None, ctx: bytes = CTX) -> bytes:
    encoded = encode(update, LAYOUT, (0, 0), DECLARED[silo] / CAP, bytes([silo]) * 32)
    return upload_bytes(control_chunk(CONTROL, DECLARED[silo], encoded, metrics, ctx, SECRET), encoded)


def updates() -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [generator.normal(0, 0.2, LAYOUT.num_parameters).astype(np.float32) for _ in DECLARED]


def add(contents: list[bytes]) -> np.ndarray:
    return sum((clear_coefficients(content, LAYOUT) for content in contents), np.zeros(1, np.uint64))


def honest() -> list[bytes]:
    measured = [{"dice": 0.5, "hd95_mm": 4.0}, None, {"dice": 0.7, "hd95_mm": 5.0}]
    return [upload(silo, update, metrics) for silo, (update, metrics) in enumerate(zip(updates(), measured, strict=True))]


def test_the_sum_is_the_weighted_mean_within_half_a_step() -> None:
    total = checked_sum(add(honest()), LAYOUT, CONTROL, DECLARED, CTX, SECRET)
    model = GlobalModel.initial(bytes(LAYOUT.num_bytes), LAYOUT)
    stepped = model.stepped(total, LAYOUT, (0, 0), CAP, DECLARED, Server())
    expected = sum(d * np.clip(u, -CAP / d, CAP / d) for d, u in zip(DECLARED, updates(), strict=True)) / sum(DECLARED)
    step = CAP / 32767 / sum(DECLARED)  # one quantisation step of one silo, in units of the mean
    assert np.abs(stepped.theta - expected).max() <= len(DECLARED) * step
    assert total.means == {"dice": 0.6, "hd95_mm": 4.5}  # over the two silos that measured


def test_every_upload_passes_the_gate_and_has_the_size_it_must() -> None:
    for silo, content in enumerate(honest()):
        assert len(content) == clear_bytes(LAYOUT)
        gate(content, LAYOUT, DECLARED[silo])


def test_a_doubled_fold_is_noticed() -> None:
    contents = honest()
    with pytest.raises(IntegrityError, match="counts 4 updates, 3 were sealed"):
        checked_sum(add([*contents, contents[0]]), LAYOUT, CONTROL, DECLARED, CTX, SECRET)


def test_a_chunk_without_one_silo_is_noticed() -> None:
    total = add(honest())
    total[1] -= clear_coefficients(honest()[1], LAYOUT)[1]
    with pytest.raises(IntegrityError, match="linear check"):
        checked_sum(total, LAYOUT, CONTROL, DECLARED, CTX, SECRET)


def test_swapped_chunks_are_noticed() -> None:
    total = add(honest())
    total[[1, 2]] = total[[2, 1]]
    with pytest.raises(IntegrityError):
        checked_sum(total, LAYOUT, CONTROL, DECLARED, CTX, SECRET)


def test_a_shift_by_one_is_noticed() -> None:
    total = add(honest())
    total[1, 5] += np.uint64(1)
    with pytest.raises(IntegrityError, match="linear check"):
        checked_sum(total, LAYOUT, CONTROL, DECLARED, CTX, SECRET)


def test_an_upload_made_for_another_attempt_is_noticed() -> None:
    contents = honest()
    contents[0] = upload(0, updates()[0], ctx=b"d" * 32)
    with pytest.raises(IntegrityError, match="linear check"):
        checked_sum(add(contents), LAYOUT, CONTROL, DECLARED, CTX, SECRET)


def test_other_declared_patients_are_noticed() -> None:
    with pytest.raises(IntegrityError, match="350 declared patients"):
        checked_sum(add(honest()), LAYOUT, CONTROL, [100, 60, 200], CTX, SECRET)


def test_fields_no_honest_sum_can_hold_are_noticed() -> None:
    total = add(honest())
    total[1, 0] = np.uint64(3 * 65534 + 1)
    with pytest.raises(IntegrityError, match="exceeds"):
        checked_sum(total, LAYOUT, CONTROL, DECLARED, CTX, SECRET)


def test_the_closing_round_sums_metrics_only() -> None:
    control = ControlMap(0, ("dice", "hd95_mm"))
    contents = [upload_bytes(control_chunk(control, d, None, {"dice": 0.25, "hd95_mm": 2.0}, CTX, SECRET), None) for d in DECLARED]
    assert len(contents[0]) == clear_bytes(None)
    total = sum((clear_coefficients(content, None) for content in contents), np.zeros(1, np.uint64))
    assert checked_sum(total, None, control, DECLARED, CTX, SECRET).means == {"dice": 0.25, "hd95_mm": 2.0}


@pytest.mark.parametrize("size", [0, clear_bytes(LAYOUT) - 1, clear_bytes(LAYOUT) + 1])
def test_another_size_is_refused(size: int) -> None:
    with pytest.raises(MessageError, match="bytes of chunks"):
        gate(bytes(size), LAYOUT, 100)


def test_the_gate_refuses_a_field_or_a_count_that_would_spoil_the_sum() -> None:
    good = np.frombuffer(honest()[0], "<u8").reshape(-1, 4096)
    for at, value, why in [
        ((1, 0), 65535, "packed field"),
        ((0, 0), 2, "count"),
        ((0, 1), 101, "declared"),
        ((0, 5), 2**37, "too large"),
    ]:
        bad = good.copy()
        bad[at] = value
        with pytest.raises(MessageError, match=why):
            gate(bad.tobytes(), LAYOUT, 100)
    hidden = good.copy()
    hidden[1, 0] |= np.uint64(1 << 50)  # above both fields
    with pytest.raises(MessageError, match="packed field"):
        gate(hidden.tobytes(), LAYOUT, 100)


@pytest.mark.parametrize("at", [*range(3, 10), 4095])
def test_a_shifted_control_integer_is_noticed(at: int) -> None:
    total = add(honest())
    total[0, at] += np.uint64(1)
    with pytest.raises(IntegrityError, match=r"linear check|exceeds"):
        checked_sum(total, LAYOUT, CONTROL, DECLARED, CTX, SECRET)


def test_a_shifted_metric_is_noticed_in_the_closing_round() -> None:
    control = ControlMap(0, ("dice",))
    total = sum(control_chunk(control, d, None, {"dice": 0.25}, CTX, SECRET) for d in DECLARED)
    total[0, 4] += np.uint64(1)
    with pytest.raises(IntegrityError, match="linear check"):
        checked_sum(total, None, control, DECLARED, CTX, SECRET)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (ControlMap.CHECK, 3 * (PRIME - 1) + 1),
        (ControlMap.METRIC_SILOS, 4),
        (ControlMap.METRIC_SILOS, 2**42 - 1),
        (4, 3 * 5000 + 1),  # saturations of the first array
        (7, 3 * (2**37 - 1) + 1),  # second moments of the second
        (8, 2 * (2**37 - 1) + 1),  # a metric that two silos measured
        (10, 1),  # a place that nobody fills
    ],
)
def test_control_integers_no_honest_sum_can_hold_are_noticed(at: int, value: int) -> None:
    total = add(honest())
    total[0, at] = value
    with pytest.raises(IntegrityError, match=f"control integer {at} .* exceeds"):
        checked_sum(total, LAYOUT, CONTROL, DECLARED, CTX, SECRET)


def test_the_check_is_linear_and_matches_its_definition() -> None:
    head = np.zeros(4096, np.uint64)
    head[:8] = 1, 100, 77, 1, 3, 2**37, 2**36 + 5, 9
    fields = np.arange(20_000, dtype=np.uint64) * np.uint64(419)  # up to 2^23
    r = words(keystream(derive(SECRET, b"wardround/check/1", CTX)), 24_096)
    assert fields.max() < 2**23
    terms = [0 if j == ControlMap.CHECK else int(f) for j, f in enumerate(np.concatenate([head, fields]))]
    expected = sum(int(word) * term for word, term in zip(r, terms, strict=True)) % PRIME
    assert linear_check(head, fields, CTX, SECRET) == expected
    half, other = np.uint64(2) * head, fields[::-1] // np.uint64(2)
    single = linear_check(head, fields // np.uint64(2), CTX, SECRET), linear_check(half, other, CTX, SECRET)
    assert linear_check(head + half, fields // np.uint64(2) + other, CTX, SECRET) == sum(single) % PRIME


def test_the_largest_fields_do_not_overflow_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("silo_agent.secure_sum.check.words", lambda stream, size: np.full(size, 2**32 - 1, "<u4"))
    fields = np.full(20_000, 2**23 - 1, np.uint64)
    expected = 20_000 * (2**32 - 1) * (2**23 - 1) % PRIME
    assert linear_check(np.zeros(4096, np.uint64), fields, CTX, SECRET) == expected


def test_server_momentum_by_hand_and_a_model_survives_its_file() -> None:
    total = checked_sum(add(honest()), LAYOUT, CONTROL, DECLARED, CTX, SECRET)
    zero = GlobalModel.initial(bytes(LAYOUT.num_bytes), LAYOUT)
    plain = zero.stepped(total, LAYOUT, (0, 0), CAP, DECLARED, Server())
    twice = zero.stepped(total, LAYOUT, (0, 0), CAP, DECLARED, Server(learning_rate=0.5, momentum=0.9))
    again = GlobalModel.load(twice.dump(), LAYOUT).stepped(
        total, LAYOUT, (0, 0), CAP, DECLARED, Server(learning_rate=0.5, momentum=0.9)
    )
    assert (twice.theta == 0.5 * plain.theta).all()
    assert np.allclose(again.theta, 0.5 * plain.theta + 0.5 * 1.9 * plain.theta, rtol=1e-12)


def test_what_is_not_finite_never_becomes_a_model() -> None:
    bad = np.zeros(LAYOUT.num_parameters, "<f4")
    bad[3] = np.nan
    with pytest.raises(IntegrityError, match="NaN or infinity"):
        GlobalModel.initial(bad.tobytes(), LAYOUT)
    with pytest.raises(MessageError, match="bytes of parameters"):
        GlobalModel.initial(bytes(4), LAYOUT)


def test_the_mac_depends_on_layout_parameters_and_key() -> None:
    parameters = bytes(LAYOUT.num_bytes)
    other = Layout((Array("a", (100, 50)), Array("b", (5000,))))
    macs = {
        model_mac(b"k" * 32, LAYOUT, parameters),
        model_mac(b"l" * 32, LAYOUT, parameters),
        model_mac(b"k" * 32, other, parameters),
        model_mac(b"k" * 32, LAYOUT, b"\1" + parameters[1:]),
    }
    assert len(macs) == 4
