"""The lock on the desk: which token opens for whom, how often, and what survives the agent."""

from pathlib import Path

import pytest

from silo_agent.custody.door import Door, new_secret
from wardround.errors import IdentityError, SettingsError


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    for name, data in new_secret().items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def opened(secret: Path) -> Door:
    return Door.open(secret, secret / "kept")


def test_a_resident_token_opens_for_its_program_again_and_again(secret: Path) -> None:
    door = opened(secret)
    for program in ("trainer", "ingest"):
        token = (secret / f"{program}.token").read_text()
        assert [door.admit(token, instance) for instance in ("a", "b")] == [program, program]


@pytest.mark.parametrize("token", ["", "x", "0.", "1." + "0" * 64])
def test_a_token_nobody_made_opens_nothing(secret: Path, token: str) -> None:
    door = opened(secret)
    door.next_lease()
    with pytest.raises(IdentityError):
        door.admit(token, "a")


def test_a_lease_opens_for_one_process_also_after_the_agents_restart(secret: Path) -> None:
    door = opened(secret)
    token = door.lease_token(door.next_lease())
    assert door.admit(token, "first") == "trainer"
    for again in (door, opened(secret)):
        assert again.admit(token, "first") == "trainer"
        with pytest.raises(IdentityError, match="opens once"):
            again.admit(token, "second")


def test_an_older_lease_is_void(secret: Path) -> None:
    door = opened(secret)
    old = door.lease_token(door.next_lease())
    door.admit(old, "a")
    new = door.lease_token(door.next_lease())
    with pytest.raises(IdentityError, match="newer trainer"):
        door.admit(old, "a")
    assert door.admit(new, "b") == "trainer"


def test_a_lease_not_given_yet_is_void(secret: Path) -> None:
    door = opened(secret)
    with pytest.raises(IdentityError):
        door.admit(door.lease_token(1), "a")


def test_a_secret_that_is_not_whole(secret: Path) -> None:
    (secret / "trainer.token").unlink()
    with pytest.raises(SettingsError, match="not whole"):
        opened(secret)
