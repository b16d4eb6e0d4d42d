"""The boundary. What leaves the DICOM side is what these functions return: arrays and keyed hashes, never a header.

De-identification is by construction: nothing is removed from a header, because no header is carried. Faces are not removed
from head scans; a snapshot stays inside the hospital like the images it is made of.
"""

import hashlib
import hmac

from silo_agent.snapshot import Split
from wardround.canonical import frame

PSEUDONYM_BYTES = 16
# 15 % each: with 20 patients a silo still tests about 3 and validates about 3, and the model loses few to learn from.
TEST_SHARE = 0.15
VALIDATION_SHARE = 0.15


def _hash(split_key: bytes, purpose: bytes, identifier: str) -> bytes:
    return hmac.new(split_key, frame(purpose, identifier.encode()), hashlib.sha256).digest()


def pseudonym(split_key: bytes, patient_id: str) -> str:
    """32 hex digits that stand for a patient inside this hospital: HMAC-SHA256 under its split key. Others cannot recompute it.

    IssuerOfPatientID plays no part: two people who share a PatientID share a split, which can leak nothing from train to test.
    """
    return _hash(split_key, b"wardround/patient/1", patient_id)[:PSEUDONYM_BYTES].hex()


def study_key(split_key: bytes, series_uid: str) -> str:
    """32 hex digits that name a record; their order says nothing about dates or people."""
    return _hash(split_key, b"wardround/series/1", series_uid)[:PSEUDONYM_BYTES].hex()


def split_of(split_key: bytes, patient_id: str) -> Split:
    """The split of a patient: a keyed hash as a uniform number in [0, 1). It depends on nobody else: new patients move no one."""
    draw = int.from_bytes(_hash(split_key, b"wardround/split/1", patient_id)[:8], "big") / 2**64
    if draw < TEST_SHARE:
        return "test"
    return "validation" if draw < TEST_SHARE + VALIDATION_SHARE else "train"
