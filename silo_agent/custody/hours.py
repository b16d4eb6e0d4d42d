"""The hours in which a hospital begins to train: pure functions of the policy's words and an instant. No clock is read here."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
WEEK: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_MIN = 24 * 60
HOURS = re.compile(r"^([01][0-9]|2[0-3]):([0-5][0-9])-([01][0-9]|2[0-3]):([0-5][0-9])$|^([01][0-9]|2[0-3]):([0-5][0-9])-24:00$")


@dataclass(frozen=True)
class Hours:
    """Every named day from `begin_min` to `end_min`, in minutes after that day's midnight on the wall clock of `zone`.

    `end_min` is after `begin_min`; above 1440 it lies on the day after, which need not be named. When clocks change:

    | the wall clock                | a window that begins there | a window that ends there |
    |-------------------------------|----------------------------|--------------------------|
    | skips the minute (spring)     | begins as much later       | ends as much later       |
    | shows the minute twice (autumn) | begins at the first      | ends at the first        |
    """

    begin_min: int
    end_min: int
    zone: ZoneInfo
    days: frozenset[int]  # 0 is Monday

    def opens(self, now: datetime) -> datetime | None:
        """When training may begin next, in the hospital's own time; None: it may now. `now` knows its zone."""
        today = now.astimezone(self.zone).date()
        for offset in range(-1, 8):  # yesterday's window may still be open, and one of the next seven days is named
            day = today + timedelta(days=offset)
            if day.weekday() not in self.days:
                continue
            begin, end = self._at(day, self.begin_min), self._at(day, self.end_min)
            if now < begin:
                return begin.astimezone(self.zone)
            if now < end:
                return None
        raise AssertionError("a week has every named day")

    def _at(self, day: date, minutes: int) -> datetime:
        """In UTC, for Python compares times of one zone by their wall clock."""
        day, minutes = day + timedelta(days=minutes // DAY_MIN), minutes % DAY_MIN
        return datetime.combine(day, time(minutes // 60, minutes % 60), self.zone).astimezone(UTC)


def parse_hours(hours: str, time_zone: str, days: Sequence[Day]) -> Hours:
    """`22:00-06:00`, a zone of the IANA database, the days it begins on. Raises ValueError that says what was expected."""
    if HOURS.match(hours) is None:
        raise ValueError(f"hours: expected HH:MM-HH:MM, e.g. 22:00-06:00, got {hours!r}")
    begin, end = (int(word[:2]) * 60 + int(word[3:]) for word in hours.split("-"))
    if begin == end:
        raise ValueError(f"hours: {hours} begins where it ends; 00:00-24:00 is the whole day, and leaving hours out is always")
    if not days:
        raise ValueError("days: none is named, so nothing would ever train; refuse plans with tasks: [] instead")
    try:
        zone = ZoneInfo(time_zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(
            f"time_zone: hours needs the name of a zone, e.g. Europe/Brussels (a pod's own clock is UTC); {time_zone!r} is none "
            "that this machine's tzdata knows"
        ) from None
    return Hours(begin, end if end > begin else end + DAY_MIN, zone, frozenset(WEEK.index(day) for day in days))


def in_words(opens: datetime) -> str:
    """`Mon 30 Nov 22:00 (Europe/Brussels)`."""
    return f"{opens:%a %d %b %H:%M} ({opens.tzinfo})"
