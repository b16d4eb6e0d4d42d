import pytest

from silo_agent.custody.roster import approve, check_own_entry, receive, stand
from tests.support.identities import OPERATOR, OPERATOR_PUBLIC, chain, ed25519, member
from wardround.errors import IdentityError, MessageError, PolicyRefusal
from wardround.roster import sign_roster

CHARITE, LEUVEN, MARYS, OSLO = member("charite", 1), member("leuven", 2), member("st-marys", 3), member("oslo", 4)
LEUVEN_GONE, LEUVEN_REKEYED = member("leuven", 2, "removed"), member("leuven", 9)
FOUNDING = [CHARITE, LEUVEN, MARYS]
V1, V2, V3 = chain(FOUNDING, [CHARITE, LEUVEN, OSLO, MARYS], [CHARITE, LEUVEN_GONE, OSLO, MARYS])


def signed(*rosters, key=OPERATOR):
    return [sign_roster(roster, key) for roster in rosters]


def names(standing):
    return sorted(standing.members), [one.name for one in standing.waiting]


# --- what is received ---------------------------------------------------------------------------------------------------------


def test_a_chain_is_received_from_its_beginning_or_from_what_is_known():
    assert receive(None, signed(V1, V2, V3), OPERATOR_PUBLIC, "neuro") == (V1, V2, V3)
    assert receive(V1, signed(V2, V3), OPERATOR_PUBLIC, "neuro") == (V2, V3)
    assert receive(V3, [], OPERATOR_PUBLIC, "neuro") == ()


@pytest.mark.parametrize(
    ("newest", "data", "told"),
    [
        (None, signed(V1, key=ed25519(201)), "not signed"),
        (None, signed(V2), "expected version 1 of the roster of neuro, got version 2"),
        (None, signed(*chain(FOUNDING, federation="cardio")), "got version 1 of cardio"),
        (V1, signed(V3), "expected roster version 2, got version 3"),
        (V3, signed(V1), "expected roster version 4, got version 1"),
        (V3, signed(V3), "expected roster version 4, got version 3"),
        (V1, signed(V2, V2), "expected roster version 3, got version 2"),
        (V1, signed(chain([CHARITE], FOUNDING)[1]), "two chains"),
        (V1, signed(V2, V3, key=ed25519(201)), "not signed"),
    ],
)
def test_replayed_skipped_forked_and_foreign_rosters_are_refused_whole(newest, data, told):
    with pytest.raises(IdentityError, match=told):
        receive(newest, data, OPERATOR_PUBLIC, "neuro")


def test_one_bad_roster_spoils_the_list():
    with pytest.raises(MessageError):
        receive(V1, [*signed(V2), b"{}"], OPERATOR_PUBLIC, "neuro")


# --- who counts ---------------------------------------------------------------------------------------------------------------


def test_before_any_approval_nobody_counts():
    assert names(stand(None, [V1], "manual")) == ([], ["charite", "leuven", "st-marys"])
    assert stand(None, [], "manual") == stand(None, [], "signed")


def test_signed_mode_trusts_the_operator():
    standing = stand(None, [V1, V2, V3], "signed")
    assert names(standing) == (["charite", "oslo", "st-marys"], [])
    assert standing.approved == V3


def test_an_addition_waits_and_makes_no_round_smaller():
    standing = stand(V1, [V2], "manual")
    assert names(standing) == (["charite", "leuven", "st-marys"], ["oslo"])
    assert standing.approved == V1


def test_a_removal_acts_at_once_while_an_addition_still_waits():
    standing = stand(V1, [V2, V3], "manual")
    assert names(standing) == (["charite", "st-marys"], ["oslo"])
    assert standing.approved == V1


def test_a_version_that_only_removes_is_approved_by_itself():
    _, removing = chain(FOUNDING, [CHARITE, LEUVEN_GONE, MARYS])
    standing = stand(V1, [removing], "manual")
    assert names(standing) == (["charite", "st-marys"], [])
    assert standing.approved == removing


def test_a_member_left_out_is_removed_as_well():
    _, removing = chain(FOUNDING, [CHARITE, MARYS])
    assert names(stand(V1, [removing], "manual")) == (["charite", "st-marys"], [])


def test_changed_keys_are_an_addition_and_the_old_ones_end_at_once():
    _, rekeyed = chain(FOUNDING, [CHARITE, LEUVEN_REKEYED, MARYS])
    standing = stand(V1, [rekeyed], "manual")
    assert names(standing) == (["charite", "st-marys"], ["leuven"])
    assert standing.waiting == (LEUVEN_REKEYED,)


@pytest.mark.parametrize("also", [[], [OSLO]])
def test_who_was_removed_and_comes_back_waits(also):
    # With the same keys, whether or not another addition held the removal back.
    _, removing, readmitting = chain(FOUNDING, [CHARITE, LEUVEN_GONE, *also, MARYS], [*FOUNDING, *also])
    standing = stand(V1, [removing, readmitting], "manual")
    assert sorted(standing.members) == ["charite", "st-marys"]
    assert [one.name for one in standing.waiting] == ["leuven", *(one.name for one in also)]


def test_keys_that_changed_and_changed_back_wait():
    _, rekeyed, back = chain(FOUNDING, [CHARITE, LEUVEN_REKEYED, MARYS], FOUNDING)
    assert names(stand(V1, [rekeyed, back], "manual")) == (["charite", "st-marys"], ["leuven"])


def test_nothing_newer_changes_nothing():
    assert names(stand(V2, [], "manual")) == (["charite", "leuven", "oslo", "st-marys"], [])


# --- what IT approves ---------------------------------------------------------------------------------------------------------


def test_it_approves_what_it_compared():
    assert approve(V1, [V2], V2.digest) == V2
    assert approve(None, [V1], V1.digest) == V1
    assert approve(V2, [], V2.digest) == V2


@pytest.mark.parametrize("digest", [V2.digest, V1.digest, bytes(32)])
def test_it_cannot_approve_what_is_outdated_or_unknown(digest):
    with pytest.raises(PolicyRefusal, match="the newest roster is version 3"):
        approve(V1, [V2, V3], digest)


def test_there_may_be_nothing_to_approve():
    with pytest.raises(PolicyRefusal, match="no roster"):
        approve(None, [], bytes(32))


def test_the_roster_must_name_this_silo_with_its_own_keys():
    check_own_entry(V1, "leuven", LEUVEN.identity, LEUVEN.sealing)
    for identity, sealing in ((OSLO.identity, LEUVEN.sealing), (LEUVEN.identity, OSLO.sealing)):
        with pytest.raises(IdentityError, match="names other keys for leuven"):
            check_own_entry(V1, "leuven", identity, sealing)
    with pytest.raises(IdentityError, match="leuven was removed"):
        check_own_entry(V3, "leuven", LEUVEN.identity, LEUVEN.sealing)
    with pytest.raises(IdentityError, match="oslo is not in roster"):
        check_own_entry(V1, "oslo", OSLO.identity, OSLO.sealing)
