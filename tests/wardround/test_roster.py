import json

import pytest

from tests.support.identities import OPERATOR, OPERATOR_PUBLIC, chain, ed25519, member
from wardround.canonical import canonical_json
from wardround.errors import IdentityError, MessageError, SettingsError
from wardround.roster import (
    MAX_ROSTER_BYTES,
    Roster,
    changes,
    check_succeeds,
    draft,
    operator_words,
    parse_draft,
    parse_roster,
    propose,
    read_public_key,
    sign_roster,
    write_public_key,
)

CHARITE, LEUVEN, MARYS = member("charite", 1), member("leuven", 2), member("st-marys", 3)
V1, V2, V3 = chain([CHARITE, LEUVEN], [CHARITE, LEUVEN, MARYS], [CHARITE, member("leuven", 2, "removed"), MARYS])


def tampered(data: bytes, **changed: object) -> bytes:
    return canonical_json(json.loads(data) | changed)


def test_what_is_signed_comes_back():
    assert parse_roster(sign_roster(V2, OPERATOR), OPERATOR_PUBLIC) == V2
    # JSON in any spelling: the signature covers the value.
    assert parse_roster(json.dumps(json.loads(sign_roster(V2, OPERATOR)), indent=2).encode(), OPERATOR_PUBLIC) == V2


def test_active_and_member():
    assert list(V3.active()) == ["charite", "st-marys"]
    assert V3.member("charite") == CHARITE
    with pytest.raises(IdentityError, match="leuven was removed"):
        V3.member("leuven")
    with pytest.raises(IdentityError, match="oslo is not in roster version 3"):
        V3.member("oslo")


SIGNED = sign_roster(V2, OPERATOR)
SILOS = json.loads(SIGNED)["silos"]


@pytest.mark.parametrize(
    "data",
    [
        tampered(SIGNED, federation="cardio"),
        tampered(SIGNED, version=3),
        tampered(SIGNED, previous="00" * 32),
        tampered(SIGNED, silos=SILOS[:2]),
        tampered(SIGNED, silos=[SILOS[0], SILOS[1] | {"status": "removed"}, SILOS[2]]),
        tampered(SIGNED, silos=[SILOS[0], SILOS[1] | {"identity": "07" * 32}, SILOS[2]]),
        tampered(SIGNED, silos=[SILOS[0], SILOS[1] | {"sealing": "07" * 32}, SILOS[2]]),
        tampered(SIGNED, silos=[SILOS[0], SILOS[1] | {"name": "lyon"}, SILOS[2]]),
        tampered(SIGNED, signature="00" * 64),
        tampered(SIGNED, signature=None),
        tampered(SIGNED, signature="not hexadecimal"),
        sign_roster(V2, ed25519(201)),
        tampered(SIGNED, signature=json.loads(sign_roster(V1, OPERATOR))["signature"]),
    ],
)
def test_a_tampered_roster_or_a_foreign_operator_is_refused(data):
    with pytest.raises(IdentityError, match="not signed by this federation's operator key"):
        parse_roster(data, OPERATOR_PUBLIC)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "is JSON"),
        (b"\xff", "is JSON"),
        (b"[" * 100_000, "is JSON"),
        (b"[]", "is a list"),
        (b" " * (MAX_ROSTER_BYTES + 1), "at most"),
        (tampered(SIGNED, extra=1), "extra: unknown key"),
        (tampered(SIGNED, version="2"), "version"),
        (tampered(SIGNED, version=True), "version"),
        (tampered(SIGNED, version=1), "version 1 has none"),
        (tampered(SIGNED, previous=None), "version 1 has none"),
        (tampered(SIGNED, silos=[SILOS[1], SILOS[0]]), "each name once, sorted"),
        (tampered(SIGNED, silos=[SILOS[0], SILOS[0]]), "each name once, sorted"),
        (tampered(SIGNED, silos=[SILOS[0], SILOS[1] | {"identity": SILOS[0]["identity"]}]), "the same identity key"),
        (tampered(SIGNED, silos=[SILOS[0], SILOS[1] | {"sealing": SILOS[0]["sealing"]}]), "the same sealing key"),
        (tampered(SIGNED, silos=[SILOS[0] | {"identity": "AB" * 32}]), "64 lower-case hexadecimal digits"),
        (tampered(SIGNED, silos=[SILOS[0] | {"status": "guest"}]), "status"),
        (tampered(SIGNED, silos=[SILOS[0] | {"name": "../x"}]), "name"),
    ],
)
def test_a_malformed_roster_says_what_is_wrong(data, told):
    with pytest.raises(MessageError, match=told):
        parse_roster(data, OPERATOR_PUBLIC)


def test_versions_form_one_chain():
    check_succeeds(V2, V1)
    check_succeeds(V3, V2)


@pytest.mark.parametrize(
    ("new", "old", "told"),
    [
        (V1, V2, "expected roster version 3, got version 1"),
        (V2, V2, "expected roster version 3, got version 2"),
        (V3, V1, "expected roster version 2, got version 3"),
        (chain([MARYS], [MARYS, LEUVEN])[1], V1, "two chains"),
        (chain([CHARITE, LEUVEN], [CHARITE], federation="cardio")[1], V1, "of the federation cardio"),
    ],
)
def test_replayed_skipped_forked_and_foreign_versions_are_refused(new, old, told):
    with pytest.raises(IdentityError, match=told):
        check_succeeds(new, old)


def test_changes_name_whom_a_person_must_ask_about():
    other_keys = member("leuven", 9)
    assert changes(V1, None) == [("added", CHARITE), ("added", LEUVEN)]
    assert changes(V2, V1) == [("added", MARYS)]
    assert changes(V3, V2) == [("removed", LEUVEN)]
    assert changes(propose("neuro", V2, [CHARITE, other_keys]), V2) == [("keys changed", other_keys), ("removed", MARYS)]
    assert changes(propose("neuro", V3, [CHARITE, LEUVEN, MARYS]), V3) == [("added", LEUVEN)]


def test_words_depend_on_the_name_and_both_keys():
    renamed, resealed = MARYS.model_copy(update={"name": "lyon"}), MARYS.model_copy(update={"sealing": LEUVEN.sealing})
    variants = [MARYS, member("st-marys", 4), renamed, resealed]
    assert len({variant.words for variant in variants}) == 4
    assert len(MARYS.words.split()) == len(operator_words(OPERATOR_PUBLIC).split()) == 8


def test_a_draft_carries_the_signed_current_roster():
    assert parse_draft(draft(V1, None), OPERATOR_PUBLIC) == (V1, None)
    assert parse_draft(draft(V2, sign_roster(V1, OPERATOR)), OPERATOR_PUBLIC) == (V2, V1)


def test_the_operator_is_not_shown_a_forged_past():
    with pytest.raises(IdentityError, match="not signed"):
        parse_draft(draft(V2, sign_roster(V1, ed25519(201))), OPERATOR_PUBLIC)
    with pytest.raises(IdentityError, match="needs the signed version before it"):
        parse_draft(draft(V2, None), OPERATOR_PUBLIC)
    with pytest.raises(IdentityError, match="expected roster version 2"):
        parse_draft(draft(V3, sign_roster(V1, OPERATOR)), OPERATOR_PUBLIC)
    with pytest.raises(MessageError, match="keys current and proposed"):
        parse_draft(sign_roster(V1, OPERATOR), OPERATOR_PUBLIC)


def test_propose_sorts_and_refuses_what_cannot_be():
    assert propose("neuro", None, [LEUVEN, CHARITE]) == V1
    with pytest.raises(MessageError, match="the same identity key"):
        propose("neuro", None, [LEUVEN, LEUVEN.model_copy(update={"name": "lyon"})])


def test_a_frozen_roster():
    with pytest.raises(ValueError, match="frozen"):
        V1.version = 7
    assert V1.digest != V2.digest
    assert Roster.model_validate_json(V1.canonical()) == V1


@pytest.mark.parametrize("text", ["", "ed25519:", "ed25519:AAAA", "x25519:" + "A" * 43 + "=", "ed25519:" + "!" * 44])
def test_public_keys_as_text(text):
    assert read_public_key(write_public_key(OPERATOR_PUBLIC) + "\n") == OPERATOR_PUBLIC
    with pytest.raises(SettingsError):
        read_public_key(text)
