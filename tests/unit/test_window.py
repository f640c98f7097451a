"""Maintenance windows, as systemd itself reads them."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from immucore import process
from immucore.system import window
from immucore.system.settings import SettingsError
from immucore.system.window import Window

NIGHT = Window(calendar="Sun 03:00", duration_sec=7200)


def at(text: str, zone: str = "UTC") -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


@pytest.fixture
def zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(process.ENVIRONMENT, "TZ", request.param)
    return str(request.param)


@pytest.mark.parametrize(
    ("text", "calendar", "duration_sec"),
    [
        ("Sun 03:00/2h", "Sun 03:00", 7200),
        ("Sun 03:00", "Sun 03:00", 3600),
        ("*-*-* 02:00", "*-*-* 02:00", 3600),
        ("*-*-* 02:00/1h 30min", "*-*-* 02:00", 5400),
        ("daily/1d", "daily", 86400),
        ("Sun 03:00/3600", "Sun 03:00", 3600),
        ("Sun 03:00/30", "Sun 03:00/30", 3600),  # for systemd every half hour from then on
        ("*:0/15", "*:0/15", 3600),
        ("*:0/15/5min", "*:0/15", 300),
        ("Sun 03:00 Europe/Berlin", "Sun 03:00 Europe/Berlin", 3600),
        ("Sun 03:00 Europe/Berlin/2h", "Sun 03:00 Europe/Berlin", 7200),
        ("Mon..Fri *-*-1..7 03:00:00.5/90min", "Mon..Fri *-*-1..7 03:00:00.5", 5400),
    ],
)
def test_what_is_the_calendar_and_what_the_duration(text: str, calendar: str, duration_sec: int) -> None:
    assert window.parse(text) == Window(calendar=calendar, duration_sec=duration_sec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read the window '': systemd knows no such time"),
        ("never", "cannot read the window 'never': systemd knows no such time"),
        ("never/2h", "cannot read the window 'never/2h': systemd knows no such time"),
        ("--help", "cannot read the window '--help': systemd knows no such time"),
        ("Sun 03:00/", "cannot read the window 'Sun 03:00/': '' is no duration"),
        ("Sun 03:00/ages", "cannot read the window 'Sun 03:00/ages': 'ages' is no duration"),
        ("Sun 03:00/-2h", "cannot read the window 'Sun 03:00/-2h': '-2h' is no duration"),
        ("Sun 03:00/infinity", "cannot read the window 'Sun 03:00/infinity': 'infinity' is no duration"),
        ("daily/2", "cannot use the window 'daily/2': it is open for less than a minute"),
        ("daily/0", "cannot use the window 'daily/0': it is open for less than a minute"),
        (780, "cannot read the window 780: it is no text"),  # window: 13:00
        (None, "cannot read the window None: it is no text"),
        ("Sun\0", "cannot read the window 'Sun\0': systemd-analyze: embedded null byte"),
    ],
)
def test_what_is_no_window(text: object, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        window.parse(text)
    assert caught.value.message == message
    assert caught.value.hint


def test_without_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(process.ENVIRONMENT, "PATH", "/nowhere")
    with pytest.raises(SettingsError, match="systemd-analyze: No such file or directory"):
        window.parse("daily")


@pytest.mark.parametrize(
    ("now", "opening", "is_open"),
    [
        ("2026-11-28T12:00:00", "2026-11-29T03:00:00", False),
        ("2026-11-29T02:59:59", "2026-11-29T03:00:00", False),
        ("2026-11-29T03:00:00", "2026-11-29T03:00:00", True),
        ("2026-11-29T04:59:59", "2026-11-29T03:00:00", True),
        ("2026-11-29T05:00:00", "2026-12-06T03:00:00", False),
    ],
)
@pytest.mark.parametrize(
    "zone", ["UTC", "Europe/Berlin", "Africa/Abidjan", "Europe/London", "Asia/Kolkata"], indirect=True
)
def test_when_it_is_open(zone: str, now: str, opening: str, is_open: bool) -> None:
    assert NIGHT.opening(at(now, zone)) == at(opening, zone)
    assert NIGHT.is_open(at(now, zone)) == is_open


@pytest.mark.parametrize("zone", ["Europe/Berlin"], indirect=True)
def test_a_zone_in_the_calendar_counts(zone: str) -> None:
    tokyo = window.parse("Sun 03:00 Asia/Tokyo/1h")
    assert tokyo.opening(at("2026-11-28T12:00:00")) == at("2026-11-29T03:00:00", "Asia/Tokyo")


@pytest.mark.parametrize("zone", ["Europe/Berlin"], indirect=True)
def test_the_night_in_which_the_clocks_change(zone: str) -> None:
    nightly = Window(calendar="*-*-* 01:30", duration_sec=7200)
    opening = at("2026-10-25T01:30:00", zone)
    assert nightly.is_open(opening + 7199)  # 02:29 for the second time
    assert not nightly.is_open(opening + 7200)


def test_a_fraction_of_a_second_is_not_too_early() -> None:
    assert NIGHT.is_open(at("2026-11-29T03:00:00") + 0.001)
    assert not NIGHT.is_open(at("2026-11-29T03:00:00") - 0.001)


def test_a_window_that_overlaps_the_next_is_always_open() -> None:
    hourly = Window(calendar="hourly", duration_sec=2 * 3600)
    assert all(hourly.is_open(at("2026-11-29T03:00:00") + minute * 60) for minute in (0, 1, 59, 60, 61))


def test_a_window_that_was() -> None:
    last = Window(calendar="2026-11-29 03:00", duration_sec=3600)
    assert last.is_open(at("2026-11-29T03:59:59"))
    assert last.opening(at("2026-11-29T04:00:00")) is None
    assert not last.is_open(at("2026-11-29T04:00:00"))


def test_a_duration_longer_than_time_itself() -> None:
    ages = window.parse("2020-01-01/100y")
    assert ages.is_open(at("2026-11-29T03:00:00"))
    assert not ages.is_open(at("2019-12-31T23:59:59"))
