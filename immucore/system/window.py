"""Maintenance windows: when a machine may reboot. What a time means is systemd's to say: systemd.time(7)."""

from __future__ import annotations

import re
from datetime import datetime

from immucore import process
from immucore.system.settings import SettingsError
from immucore.values import Record

DEFAULT_SEC = 3600
LEAST_SEC = 60  # a number without a unit means seconds
ENDLESS_USEC = (1 << 64) - 1
_HINT = "write a time as systemd.time(7) has it, and how long it lasts: 'Sun 03:00/2h', '*-*-* 02:00/45min'"
_USEC = re.compile(r"^\s*\S+s: (\d+)$", re.MULTILINE)
# The second line is there where the machine's zone is not UTC, and then it is the one that can be read.
_ELAPSE = re.compile(r"^ *(?:Next elapse|\(in UTC\)): \w+ (\S+ \S+) .*$", re.MULTILINE)


class Window(Record):
    """From each time that `calendar` names on, for so many seconds."""

    calendar: str
    duration_sec: int

    def opening(self, now: float) -> int | None:
        """Say when the window has opened that is open at `now`, else when the next one opens.

        Seconds since the epoch; None where there is none any more.
        """
        base_sec = max(0, int(now) - self.duration_sec)
        output = _analyze("calendar", self.calendar, f"--base-time=@{base_sec}")
        found = _ELAPSE.findall(output or "")
        return int(datetime.fromisoformat(f"{found[-1]}+00:00").timestamp()) if found else None

    def is_open(self, now: float) -> bool:
        """Tell whether the machine may reboot at that time."""
        opening = self.opening(now)
        return opening is not None and opening <= now


def parse(text: object) -> Window:
    """Read `CALENDAR[/DURATION]`. Raises SettingsError.

    A calendar expression may have slashes of its own (`*:0/15`, `Europe/Berlin`), so the last one is looked
    at only where the whole is none.
    """
    if not isinstance(text, str):  # YAML reads 13:00 as a number
        raise SettingsError(f"cannot read the window {text}: it is no text", hint="put it in quotes")
    if _analyze("calendar", text) is not None:
        return Window(calendar=text, duration_sec=DEFAULT_SEC)
    calendar, _, duration = text.rpartition("/")
    if _analyze("calendar", calendar) is None:
        raise SettingsError(f"cannot read the window '{text}': systemd knows no such time", hint=_HINT)
    span = _USEC.search(_analyze("timespan", duration) or "")
    if span is None or int(span[1]) == ENDLESS_USEC:
        raise SettingsError(f"cannot read the window '{text}': '{duration}' is no duration", hint=_HINT)
    duration_sec = int(span[1]) // 1_000_000
    if duration_sec < LEAST_SEC:
        raise SettingsError(
            f"cannot use the window '{text}': it is open for less than a minute",
            hint=f"give the duration a unit, such as '{calendar}/2h'",
        )
    return Window(calendar=calendar, duration_sec=duration_sec)


def _analyze(verb: str, text: str, *options: str) -> str | None:
    """Ask systemd-analyze; None where it does not understand. Raises SettingsError where it is not there."""
    try:
        done = process.run(["systemd-analyze", verb, *options, "--", text])
    except (OSError, ValueError) as error:  # ValueError: a NUL in the text
        reason = getattr(error, "strerror", None) or str(error)
        raise SettingsError(
            f"cannot read the window '{text}': systemd-analyze: {reason}", hint=_HINT
        ) from None
    return None if done.status else done.output
