"""Splits: near their shares, and nobody moves."""

from collections import Counter

from silo_agent.imaging.deidentify import TEST_SHARE, VALIDATION_SHARE, pseudonym, split_of, study_key

KEY = bytes(range(32))


def test_shares_are_near_what_they_say() -> None:
    counts = Counter(split_of(KEY, f"P{i}") for i in range(4000))
    # four standard deviations of a binomial: 4 * sqrt(4000 * 0.15 * 0.85) = 90
    assert abs(counts["test"] - 4000 * TEST_SHARE) < 90
    assert abs(counts["validation"] - 4000 * VALIDATION_SHARE) < 90


def test_a_split_depends_on_the_key_and_the_patient_alone() -> None:
    first = [split_of(KEY, f"P{i}") for i in range(50)]
    assert [split_of(KEY, f"P{i}") for i in range(100)][:50] == first
    assert [split_of(bytes(32), f"P{i}") for i in range(50)] != first


def test_pseudonyms_are_keyed_and_apart_from_record_keys() -> None:
    assert len(pseudonym(KEY, "P1")) == len(study_key(KEY, "P1")) == 32
    assert len({pseudonym(KEY, "P1"), pseudonym(KEY, "P2"), pseudonym(bytes(32), "P1"), study_key(KEY, "P1")}) == 4
