"""When training may begin, at explicit instants: over midnight, over the week, over both changes of the clock."""

from datetime import UTC, datetime, timedelta

import pytest

from silo_agent.custody.hours import WEEK, Hours, in_words, parse_hours
from silo_agent.custody.policy import Policy, parse_policy
from wardround.errors import SettingsError

BRUSSELS = "Europe/Brussels"


def night(days: tuple[str, ...] = WEEK, hours: str = "22:00-06:00", zone: str = BRUSSELS) -> Hours:
    return parse_hours(hours, zone, days)


def opens(hours: Hours, utc: str) -> str | None:
    """Both in UTC."""
    found = hours.opens(datetime.fromisoformat(utc).replace(tzinfo=UTC))
    return None if found is None else f"{found.astimezone(UTC):%Y-%m-%d %H:%M}"


def test_a_night_over_midnight() -> None:
    """Brussels is one hour ahead in winter."""
    for utc in ("2026-11-30 21:00", "2026-11-30 22:59", "2026-11-30 23:00", "2026-12-01 04:59"):
        assert opens(night(), utc) is None, utc
    assert opens(night(), "2026-11-30 20:59") == "2026-11-30 21:00"
    assert opens(night(), "2026-12-01 05:00") == "2026-12-01 21:00"
    assert opens(night(), "2026-12-01 12:00") == "2026-12-01 21:00"


def test_a_day_names_the_evening_on_which_a_night_begins() -> None:
    weekdays = night(("mon", "tue", "wed", "thu", "fri"))
    assert opens(weekdays, "2026-12-05 04:00") is None  # Saturday morning belongs to Friday
    assert opens(weekdays, "2026-12-05 05:00") == "2026-12-07 21:00"  # Saturday 06:00 there: until Monday evening
    assert opens(weekdays, "2026-12-07 00:00") == "2026-12-07 21:00"  # Monday 01:00 belongs to Sunday, which is not named
    assert opens(night(("tue",)), "2026-12-02 05:00") == "2026-12-08 21:00"  # a week later, to the minute after it closed


def test_a_whole_day_and_its_neighbour() -> None:
    weekend = night(("sat", "sun"), "00:00-24:00")
    assert opens(weekend, "2026-12-04 22:59") == "2026-12-04 23:00"
    assert opens(weekend, "2026-12-05 22:59") is None and opens(weekend, "2026-12-05 23:00") is None  # no gap at midnight
    assert opens(weekend, "2026-12-06 23:00") == "2026-12-11 23:00"


def test_spring_takes_an_hour_out_of_the_night() -> None:
    """2026-03-29 in Brussels: 01:59 CET is followed by 03:00 CEST."""
    assert opens(night(), "2026-03-29 03:59") is None  # 05:59 CEST
    assert opens(night(), "2026-03-29 04:00") == "2026-03-29 20:00"  # 06:00 CEST; 22:00 is 20:00 UTC from now on
    skipped = night(hours="02:30-05:00")
    assert opens(skipped, "2026-03-29 01:29") == "2026-03-29 01:30" and opens(skipped, "2026-03-29 01:30") is None  # 03:30 CEST
    assert opens(skipped, "2026-03-29 02:59") is None and opens(skipped, "2026-03-29 03:00") == "2026-03-30 00:30"


def test_autumn_shows_an_hour_twice_and_the_night_is_not_reopened() -> None:
    """2026-10-25 in Brussels: 02:59 CEST (00:59 UTC) is followed by 02:00 CET."""
    assert opens(night(), "2026-10-25 04:59") is None and opens(night(), "2026-10-25 05:00") == "2026-10-25 21:00"
    early = night(hours="22:00-02:30")
    assert opens(early, "2026-10-25 00:29") is None  # 02:29 CEST
    assert opens(early, "2026-10-25 00:30") == opens(early, "2026-10-25 01:15") == "2026-10-25 21:00"  # 02:15 again, and closed
    late = night(hours="02:30-04:00")
    assert opens(late, "2026-10-25 00:30") is None and opens(late, "2026-10-25 01:00") is None  # open through the second 02:00
    assert opens(late, "2026-10-25 03:00") == "2026-10-26 01:30"


def test_what_opens_tells_is_the_first_instant_that_is_open() -> None:
    """Every quarter of an hour of the two weeks in which clocks change, there and on the other side of the world."""
    for zone, hours in (
        (BRUSSELS, "22:00-06:00"),
        (BRUSSELS, "01:15-02:45"),
        ("Australia/Lord_Howe", "01:00-02:15"),
        ("UTC", "09:00-17:00"),
    ):
        window = night(("mon", "sat", "sun"), hours, zone)
        for start in (datetime(2026, 3, 26, tzinfo=UTC), datetime(2026, 10, 22, tzinfo=UTC)):
            for quarter in range(7 * 96):
                now = start + timedelta(minutes=15 * quarter)
                if (found := window.opens(now)) is not None:
                    assert found > now and window.opens(found) is None, (zone, hours, now)
                    assert window.opens(found - timedelta(minutes=1)) is not None, (zone, hours, now)


def test_it_is_said_in_the_hospitals_own_time() -> None:
    found = night().opens(datetime(2026, 12, 1, 12, tzinfo=UTC))
    assert found is not None and in_words(found) == "Tue 01 Dec 22:00 (Europe/Brussels)"


def test_a_policy_with_hours() -> None:
    policy = parse_policy(b"{hours: '22:00-06:00', time_zone: Europe/Brussels, days: [mon, tue]}")
    assert policy.opens(datetime(2026, 12, 1, 23, tzinfo=UTC)) is None and policy.opens(datetime(2026, 12, 1, 12, tzinfo=UTC))
    assert Policy().opens(datetime(2026, 12, 1, 12, tzinfo=UTC)) is None  # the default: always


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{hours: '22:00-06:00'}", "time_zone: hours needs the name of a zone, e.g. Europe/Brussels"),
        ("{hours: '22:00-06:00', time_zone: Europe/Bruxelles}", "'Europe/Bruxelles' is none that this machine's tzdata knows"),
        ("{hours: '22:00-06:00', time_zone: ../../etc/passwd}", "time_zone: "),
        ("{hours: '22-06', time_zone: UTC}", "hours: "),
        ("{hours: '24:00-06:00', time_zone: UTC}", "hours: "),
        ("{hours: '22:00-22:00', time_zone: UTC}", "begins where it ends"),
        ("{hours: 22:00-06:00, time_zone: UTC, days: []}", "days: none is named"),
        ("{hours: 22:00-06:00, time_zone: UTC, days: [monday]}", "days.0: "),
        ("{time_zone: UTC}", "hours is missing"),
        ("{days: [mon]}", "hours is missing"),
        ("{approval: by-post}", "approval: "),
    ],
)
def test_hours_that_do_not_hold_are_refused(text: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        parse_policy(text.encode())
