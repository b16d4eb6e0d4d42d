"""From three updates to one checked sum and one step; then every lie about a sum that a silo must notice."""

import numpy as np
import pytest

from silo_agent.algorithms.fedavg import FedAvg
from silo_agent.secure_sum.check import PRIME, checked_sum, control_chunk, linear_check, upload_coefficients
from silo_agent.secure_sum.encryption import decrypt, encrypt, new_secret_key
from silo_agent.secure_sum.global_model import GlobalModel, model_mac
from silo_agent.secure_sum.packing import derive, encode, keystream, words
from wardround.chunks import ControlMap, num_chunks
from wardround.ciphertexts import check_upload, sum_chunks
from wardround.errors import IntegrityError, MessageError
from wardround.he import HeParameters, he_parameters
from wardround.layout import Array, Layout
from wardround.training import Server

LAYOUT = Layout((Array("a", (50, 100)), Array("b", (5000,))))
CONTROL = ControlMap(2, ("dice", "hd95_mm"))
CTX, SECRET = b"c" * 32, bytes(32)
DECLARED = {"charite": 100, "leuven": 50, "st-marys": 200}
PATIENTS = list(DECLARED.values())
CAP = 200
HE = he_parameters(max_silos=32, bits=16)


def upload(
    silo: str,
    update: np.ndarray,
    metrics: dict[str, float] | None = None,
    ctx: bytes = CTX,
    he: HeParameters = HE,
    patients: int | None = None,
) -> np.ndarray:
    """What a silo encrypts: uint64 [num_chunks, 4096]."""
    declared = patients or DECLARED[silo]
    encoded = encode(update, LAYOUT, (0, 0), declared / CAP, silo.ljust(32).encode(), he)
    return upload_coefficients(control_chunk(CONTROL, silo, declared, encoded, metrics, ctx, SECRET, he), encoded, he)


def updates() -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [generator.normal(0, 0.2, LAYOUT.num_parameters).astype(np.float32) for _ in DECLARED]


def add(contents: list[np.ndarray]) -> np.ndarray:
    return np.sum(contents, axis=0, dtype=np.uint64)


def honest(he: HeParameters = HE) -> list[np.ndarray]:
    measured = [{"dice": 0.5, "hd95_mm": 4.0}, None, {"dice": 0.7, "hd95_mm": 5.0}]
    return [upload(silo, update, metrics, he=he) for silo, update, metrics in zip(DECLARED, updates(), measured, strict=True)]


@pytest.mark.parametrize("he", [HE, he_parameters(1000, 12)], ids=["16 bits", "12 bits"])
def test_the_sum_is_the_weighted_mean_within_a_step_of_each_silo(he: HeParameters) -> None:
    total = checked_sum(add(honest(he)), LAYOUT, CONTROL, DECLARED, CTX, SECRET, he)
    model = GlobalModel.initial(bytes(LAYOUT.num_bytes), LAYOUT)
    stepped = model.stepped(total, LAYOUT, (0, 0), CAP, PATIENTS, FedAvg(None, Server()))
    expected = sum(d * np.clip(u, -CAP / d, CAP / d) for d, u in zip(PATIENTS, updates(), strict=True)) / sum(PATIENTS)
    step = CAP / he.zero_code / sum(PATIENTS)  # one quantisation step of one silo, in units of the mean
    assert np.abs(stepped.theta - expected).max() <= len(DECLARED) * step
    assert total.means == {"dice": 0.6, "hd95_mm": 4.5}  # over the two silos that measured


def test_an_encrypted_sum_is_the_same_numbers() -> None:
    key, contents = new_secret_key(HE), honest()
    uploads = [encrypt(HE, key, coefficients) for coefficients in contents]
    for content in uploads:
        check_upload(HE, content)
        assert len(content) == HE.upload_bytes(LAYOUT) == num_chunks(LAYOUT) * HE.upload_chunk_bytes
    size = HE.upload_chunk_bytes
    blob = b"".join(sum_chunks(HE, [content[at : at + size] for content in uploads]) for at in range(0, len(uploads[0]), size))
    assert len(blob) == HE.sum_bytes(LAYOUT) and (decrypt(HE, key, blob) == add(contents)).all()
    checked_sum(decrypt(HE, key, blob), LAYOUT, CONTROL, DECLARED, CTX, SECRET)


def test_a_sum_under_another_key_is_noticed() -> None:
    key, other = new_secret_key(HE), new_secret_key(HE)
    uploads = [encrypt(HE, other if index == 1 else key, coefficients[:1]) for index, coefficients in enumerate(honest())]
    with pytest.raises(IntegrityError):
        checked_sum(decrypt(HE, key, sum_chunks(HE, uploads)), None, ControlMap(0, ("dice", "hd95_mm")), DECLARED, CTX, SECRET)


def test_a_doubled_fold_is_noticed() -> None:
    contents = honest()
    with pytest.raises(IntegrityError, match="counts 4 updates, 3 were sealed"):
        checked_sum(add([*contents, contents[0]]), LAYOUT, CONTROL, DECLARED, CTX, SECRET)


def test_a_chunk_without_one_silo_is_noticed() -> None:
    total = add(honest())
    total[1] -= honest()[1][1]
    with pytest.raises(IntegrityError, match="linear check"):
        checked_sum(total, LAYOUT, CONTROL, DECLARED, CTX, SECRET)


@pytest.mark.parametrize("left_out", ["leuven", "st-marys"])
def test_one_silo_twice_in_place_of_another_is_noticed(left_out: str) -> None:
    """Count, patients and every check add up as if they were different silos."""
    alike = dict.fromkeys(DECLARED, 100)
    contents = {silo: upload(silo, update, patients=100) for silo, update in zip(alike, updates(), strict=True)}
    checked_sum(add(list(contents.values())), LAYOUT, CONTROL, alike, CTX, SECRET)
    contents[left_out] = contents["charite"]
    with pytest.raises(IntegrityError, match="linear check"):
        checked_sum(add(list(contents.values())), LAYOUT, CONTROL, alike, CTX, SECRET)


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
    contents[0] = upload("charite", updates()[0], ctx=b"d" * 32)
    with pytest.raises(IntegrityError, match="linear check"):
        checked_sum(add(contents), LAYOUT, CONTROL, DECLARED, CTX, SECRET)


def test_other_declared_patients_are_noticed() -> None:
    with pytest.raises(IntegrityError, match="350 declared patients"):
        checked_sum(add(honest()), LAYOUT, CONTROL, DECLARED | {"leuven": 60}, CTX, SECRET)


def test_fields_no_honest_sum_can_hold_are_noticed() -> None:
    total = add(honest())
    total[1, 0] = np.uint64(3 * 65534 + 1)
    with pytest.raises(IntegrityError, match="exceeds"):
        checked_sum(total, LAYOUT, CONTROL, DECLARED, CTX, SECRET)


def test_the_closing_round_sums_metrics_only() -> None:
    control = ControlMap(0, ("dice", "hd95_mm"))
    chunks = [control_chunk(control, silo, d, None, {"dice": 0.25, "hd95_mm": 2.0}, CTX, SECRET) for silo, d in DECLARED.items()]
    contents = [upload_coefficients(chunk, None) for chunk in chunks]
    assert contents[0].shape == (num_chunks(None), 4096) == (1, 4096)
    assert checked_sum(add(contents), None, control, DECLARED, CTX, SECRET).means == {"dice": 0.25, "hd95_mm": 2.0}


@pytest.mark.parametrize("at", [*range(3, 10), 4095])
def test_a_shifted_control_integer_is_noticed(at: int) -> None:
    total = add(honest())
    total[0, at] += np.uint64(1)
    with pytest.raises(IntegrityError, match=r"linear check|exceeds"):
        checked_sum(total, LAYOUT, CONTROL, DECLARED, CTX, SECRET)


def test_a_shifted_metric_is_noticed_in_the_closing_round() -> None:
    control = ControlMap(0, ("dice",))
    total = sum(control_chunk(control, silo, d, None, {"dice": 0.25}, CTX, SECRET) for silo, d in DECLARED.items())
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
    plain = zero.stepped(total, LAYOUT, (0, 0), CAP, PATIENTS, FedAvg(None, Server()))
    twice = zero.stepped(total, LAYOUT, (0, 0), CAP, PATIENTS, FedAvg(None, Server(learning_rate=0.5, momentum=0.9)))
    again = GlobalModel.load(twice.dump(), LAYOUT).stepped(
        total, LAYOUT, (0, 0), CAP, PATIENTS, FedAvg(None, Server(learning_rate=0.5, momentum=0.9))
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


SCALED = ControlMap(2, ("dice",), num_scalars=2)


def with_scalars(silo: str, scalars: list[float]) -> np.ndarray:
    encoded = encode(updates()[0], LAYOUT, (0, 0), DECLARED[silo] / CAP, silo.ljust(32).encode(), HE)
    chunk = control_chunk(SCALED, silo, DECLARED[silo], encoded, None, CTX, SECRET, HE, scalars)
    return upload_coefficients(chunk, encoded, HE)


def test_scalars_add_up_and_a_shifted_one_is_noticed() -> None:
    total = add([with_scalars(silo, [0.25, float(number)]) for number, silo in enumerate(DECLARED)])
    checked = checked_sum(total, LAYOUT, SCALED, DECLARED, CTX, SECRET)
    assert checked.scalars == pytest.approx((0.75, 3.0), abs=1e-10)
    for at in (8, 9):
        shifted = total.copy()
        shifted[0, at] += np.uint64(1)
        with pytest.raises(IntegrityError, match="linear check"):
            checked_sum(shifted, LAYOUT, SCALED, DECLARED, CTX, SECRET)
        shifted[0, at] = 3 * (2**37 - 1) + 1
        with pytest.raises(IntegrityError, match=f"control integer {at} .* exceeds"):
            checked_sum(shifted, LAYOUT, SCALED, DECLARED, CTX, SECRET)


@pytest.mark.parametrize("scalar", [-0.001, 4.001, float("nan")])
def test_a_scalar_beyond_its_place_is_not_sent(scalar: float) -> None:
    with_scalars("leuven", [0.0, 4.0])
    with pytest.raises(IntegrityError, match="too large for its place"):
        with_scalars("leuven", [0.0, scalar])
