"""What `--reboot` and the settings say, and what systemd is told for it.

systemctl and systemd-run are programs that write down what they are told: no systemd runs here. Times are
read by the real systemd-analyze.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from immucore import process
from immucore.errors import ImmucoreError
from immucore.system import commands, reboot, reboot_lock, reboot_unit, settings, window
from immucore.system.console import Console
from immucore.system.reboot import InWindow, Locked, Now, Off
from immucore.system.reboot_unit import RebootError
from immucore.system.settings import SettingsError
from immucore.system.window import Window

NIGHT = Window(calendar="Sun 03:00", duration_sec=7200)
END = "expected the node content, but found '<stream end>'"
REFUSED = "cannot use etcd at http://127.0.0.1:1: Connection refused"
NOBODY = {"endpoints": ["http://127.0.0.1:1"]}  # nothing listens there
TIMER = ["--on-calendar=Sun 03:00", "--timer-property=AccuracySec=1s"]
RESUME = ["/usr/bin/immucore", "reboot", "--pending"]
STOPPED = ["systemctl", "stop", "--quiet", "immucore-reboot.timer", "immucore-reboot.service"]
REBOOTED = ["systemctl", "reboot"]
PROGRAM = """\
#!/usr/bin/python3
import json, os, sys
here = os.path.dirname(sys.argv[0])
words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with open(f"{here}/told", "a") as file:
    file.write(json.dumps(words) + "\\n")
for word in words:
    if os.path.exists(f"{here}/refuses-{word}"):
        sys.exit(f"no such thing\\nFailed to {word}: not today")
if "is-system-running" in words:
    print("running")
"""


class Systemd:
    """A machine's systemd, as far as it is told something."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("systemctl", "systemd-run"):
            (folder / name).write_text(PROGRAM)
            (folder / name).chmod(0o755)

    def told(self) -> list[list[str]]:
        file = self.folder / "told"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def refuse(self, word: str) -> None:
        (self.folder / f"refuses-{word}").touch()


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Systemd:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setitem(process.ENVIRONMENT, "PATH", f"{folder}:{process.ENVIRONMENT['PATH']}")
    monkeypatch.setattr(reboot_unit, "PENDING", str(tmp_path / "run/reboot.json"))
    monkeypatch.setattr(settings, "PATH", str(tmp_path / "upgrade.yaml"))
    (tmp_path / "machine-id").write_text("0123\n")
    monkeypatch.setattr(reboot_lock, "MACHINE_ID", str(tmp_path / "machine-id"))
    monkeypatch.setattr(reboot, "FELL_BACK", str(tmp_path / "upgrade_failure"))
    monkeypatch.setattr(reboot, "FIRST_PAUSE_SEC", 0.01)
    return Systemd(folder)


class Clock:
    """The time as the strategies see it (UTC); asleep it does something."""

    def __init__(self) -> None:
        self.now = 0.0
        self.asleep: Callable[[float], object] = time.sleep
        self.strftime = time.strftime
        self.localtime = time.gmtime

    def set(self, text: str) -> None:
        self.now = datetime.fromisoformat(f"{text}+00:00").timestamp()

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.asleep(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    clock.set("2026-11-28 12:00")
    monkeypatch.setitem(process.ENVIRONMENT, "TZ", "UTC")
    monkeypatch.setattr(reboot, "time", clock)
    return clock


def write(text: str) -> None:
    Path(settings.PATH).write_text(text)


def run(*words: str) -> int:
    return commands.main(words)


def scheduled(*timer: str) -> list[str]:
    return [
        *("systemd-run", "--quiet", "--no-ask-password", "--unit=immucore-reboot"),
        *("--description=Reboot into a new image", "--collect", "--service-type=exec"),
        *("--property=Restart=on-failure", "--property=RestartSec=60", *timer, *RESUME),
    ]


@pytest.mark.parametrize(
    ("text", "configured", "kind", "when"),
    [
        ("off", {}, Off, None),
        (False, {}, Off, None),  # reboot: off
        ("now", {"window": "Sun 03:00/2h"}, Now, None),
        ("window=Sun 03:00/2h", {}, InWindow, NIGHT),
        ("window=Sun 03:00/2h", {"window": "daily"}, InWindow, NIGHT),
        ("window", {"window": "Sun 03:00/2h"}, InWindow, NIGHT),
        ("etcd-lock", {"etcd": NOBODY}, Locked, None),
        ("etcd-lock", {"etcd": NOBODY, "window": "Sun 03:00/2h"}, Locked, NIGHT),
    ],
)
def test_ways_to_reboot(text: object, configured: dict[str, Any], kind: type, when: Window | None) -> None:
    strategy = reboot.parse(text, configured)
    assert type(strategy) is kind
    assert strategy.window == when
    assert strategy.text == ("off" if text is False else text)


USE = "use off, now, window, window=CALENDAR[/DURATION] or etcd-lock"


@pytest.mark.parametrize(
    ("text", "configured", "message", "hint"),
    [
        ("", {}, "cannot reboot by '': there is no such way", USE),
        ("later", {}, "cannot reboot by 'later': there is no such way", USE),
        ("now=1", {}, "cannot reboot by 'now=1': there is no such way", USE),
        ("etcd-lock=1", {}, "cannot reboot by 'etcd-lock=1': there is no such way", USE),
        (True, {}, "cannot reboot by 'True': there is no such way", USE),
        ("window", {}, "cannot reboot by 'window': no window is set", reboot._WINDOW),
        ("window=", {}, "cannot read the window '': systemd knows no such time", window._HINT),
        ("window", {"window": 780}, "cannot read the window 780: it is no text", "put it in quotes"),
        ("window=x", {}, "cannot read the window 'x': systemd knows no such time", window._HINT),
        (
            "window=2020-01-01",
            {},
            "cannot reboot in the window '2020-01-01': it does not open any more",
            "give a time that is still to come",
        ),
        (
            "etcd-lock",
            {"window": "2020-01-01", "etcd": NOBODY},
            "cannot reboot in the window '2020-01-01': it does not open any more",
            "give a time that is still to come",
        ),
    ],
)
def test_what_is_no_way_to_reboot(text: object, configured: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(SettingsError) as caught:
        reboot.parse(text, configured)
    assert (caught.value.message, caught.value.hint) == (message, hint)
    assert caught.value.exit_status == 2


def test_a_lock_needs_etcd() -> None:
    with pytest.raises(SettingsError, match=r"^cannot use 'etcd' of '.*': it is not there$"):
        reboot.parse("etcd-lock", {})


def test_what_systemd_is_to_run() -> None:
    assert reboot_unit.service("immucore-reboot", RESUME[1:], "Reboot into a new image") == scheduled()
    timer = reboot_unit.service("immucore-reboot", RESUME[1:], "Reboot into a new image", "Sun 03:00")
    assert timer == scheduled(*TIMER)


def test_off(systemd: Systemd, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("reboot", "off") == 0
    assert systemd.told() == [STOPPED]
    told = "this machine is not rebooted: a new image waits for its next reboot\n"
    assert capsys.readouterr().err == told


def test_now(systemd: Systemd, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("reboot", "now") == 0
    assert systemd.told() == [REBOOTED]
    assert capsys.readouterr().err == "rebooting\n"


def test_in_a_window_that_is_open(systemd: Systemd, clock: Clock) -> None:
    clock.set("2026-11-29 04:59:59")
    assert run("reboot", "window=Sun 03:00/2h") == 0
    assert systemd.told() == [STOPPED, REBOOTED]
    assert reboot_unit.pending() is None


def test_in_a_window_that_is_closed(
    systemd: Systemd, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("reboot", "window=Sun 03:00/2h") == 0
    assert systemd.told() == [STOPPED, STOPPED, scheduled(*TIMER)]
    assert reboot_unit.pending() == "window=Sun 03:00/2h"
    assert capsys.readouterr().err == (
        "this machine reboots at Sun 2026-11-29 03:00 GMT: systemctl list-timers immucore-reboot.timer\n"
    )

    clock.set("2026-11-29 02:59:59")  # the machine slept, and this is not the window
    assert run("reboot", "--pending") == 0
    assert capsys.readouterr().err == "not rebooting: the window is closed\n"
    assert systemd.told() == []

    clock.set("2026-11-29 03:00")
    assert run("reboot", "--pending") == 0
    assert capsys.readouterr().err == "rebooting: the window is open\n"
    assert systemd.told() == [REBOOTED]

    assert run("reboot", "off") == 0
    assert capsys.readouterr().err.splitlines() == [
        "the reboot that was pending (window=Sun 03:00/2h) is given up",
        "this machine is not rebooted: a new image waits for its next reboot",
    ]
    assert systemd.told() == [STOPPED]

    assert run("reboot", "--pending") == 0  # a timer that was already on its way
    assert capsys.readouterr().err == "no reboot is pending\n"
    assert systemd.told() == []


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", "\xff"])
def test_what_is_pending_cannot_be_read(systemd: Systemd, content: str) -> None:
    pending = Path(reboot_unit.PENDING)
    pending.parent.mkdir()
    pending.write_text(content, encoding="latin-1")
    assert run("reboot", "--pending") == 0
    assert systemd.told() == []


def test_a_window_of_the_settings_that_somebody_moves(systemd: Systemd, clock: Clock) -> None:
    write("window: Sun 03:00/2h")
    assert run("reboot", "window") == 0
    clock.set("2026-11-29 03:00")
    write("window: Mon 03:00/2h")
    systemd.told()
    assert run("reboot", "--pending") == 0
    assert systemd.told() == []


def test_with_a_lock(systemd: Systemd, capsys: pytest.CaptureFixture[str]) -> None:
    write(f"etcd: {json.dumps(NOBODY)}")
    assert run("reboot", "etcd-lock") == 0
    assert systemd.told() == [STOPPED, scheduled()]
    assert capsys.readouterr().err == (
        "this machine reboots with the reboot lock: journalctl -fu immucore-reboot\n"
    )
    assert run("reboot", "off") == 0
    assert systemd.told() == [STOPPED, ["systemctl", "is-system-running"]]
    assert capsys.readouterr().err.splitlines() == [
        "the reboot that was pending (etcd-lock) is given up",
        f"a slot of the reboot lock may still be taken: {REFUSED}",
        "this machine is not rebooted: a new image waits for its next reboot",
    ]


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (
            "2026-11-28 12:00",
            "waits for the reboot lock, and reboots, at Sun 2026-11-29 03:00 GMT: "
            "systemctl list-timers immucore-reboot.timer",
        ),
        (
            "2026-11-29 03:00",
            "reboots with the reboot lock: journalctl -fu immucore-reboot",
        ),
    ],
)
def test_with_a_lock_in_a_window(
    systemd: Systemd,
    clock: Clock,
    capsys: pytest.CaptureFixture[str],
    now: str,
    told: str,
) -> None:
    write(f"window: Sun 03:00/2h\netcd: {json.dumps(NOBODY)}")
    clock.set(now)
    assert run("reboot", "etcd-lock") == 0
    start = ["systemctl", "start", "--no-block", "immucore-reboot.service"]
    assert systemd.told() == [STOPPED, scheduled(*TIMER), *([start] if "journalctl" in told else [])]
    assert capsys.readouterr().err == f"this machine {told}\n"


def test_settings_that_are_corrected_while_a_machine_waits(
    systemd: Systemd, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    write(f"etcd: {json.dumps(NOBODY)}")
    assert run("reboot", "etcd-lock") == 0
    steps = iter(["etcd: {", "reboot: off", f"etcd: {json.dumps(NOBODY)}", None])

    def sleep(_: float) -> None:
        if step := next(steps):
            write(step)
        else:
            reboot_unit.cancel()

    clock.asleep = sleep
    capsys.readouterr()
    assert run("reboot", "--pending") == 0
    lines = [line.partition(" (")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        f"waiting: {REFUSED}",
        f"waiting: cannot read '{settings.PATH}': {END}, line 1",
        f"waiting: cannot use 'etcd' of '{settings.PATH}': it is not there",
        f"waiting: {REFUSED}",
        "no reboot is pending",
    ]


def test_the_same_reason_is_said_once(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(reboot, "FIRST_PAUSE_SEC", 5.0)
    clock.asleep = pauses.append
    reasons = iter([*["a"] * 6, "b", ""])
    reboot.persist(lambda: next(reasons), Console())
    assert capsys.readouterr().err == "waiting: a\nwaiting: b\n"
    for pause, longest in zip(pauses, [5, 10, 20, 40, 60, 60, 60], strict=True):
        assert longest / 2 <= pause <= longest


@pytest.mark.parametrize(
    ("word", "strategy"),
    [
        ("reboot", "now"),
        ("--unit=immucore-reboot", "window=Sun 03:00/2h"),
        ("--unit=immucore-reboot", "etcd-lock"),
    ],
)
def test_systemd_refuses(
    systemd: Systemd, clock: Clock, capsys: pytest.CaptureFixture[str], word: str, strategy: str
) -> None:
    write(f"etcd: {json.dumps(NOBODY)}")
    systemd.refuse(word)
    assert run("reboot", strategy) == 4
    program = "systemctl" if strategy == "now" else "systemd-run"
    assert capsys.readouterr().err.splitlines()[-2:] == [
        f"immucore: cannot reboot this machine: {program}: Failed to {word}: not today",
        "  hint: what was installed is in its place: systemctl reboot starts it",
    ]
    assert reboot_unit.pending() is None


def test_a_machine_without_systemd(
    systemd: Systemd, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(process.ENVIRONMENT, "PATH", "/nowhere")
    assert run("reboot", "off") == 0
    assert run("reboot", "now") == 4
    assert "cannot reboot this machine: systemctl: No such file or directory" in capsys.readouterr().err
    assert not reboot_unit.is_stopping()


def test_what_is_pending_cannot_be_written(systemd: Systemd, tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(RebootError) as caught:
        reboot.parse("window=Sun 03:00/2h", {}).reboot(Console())
    assert caught.value.message == f"cannot write '{reboot_unit.PENDING}': File exists"


def test_a_window_that_ends_while_systemd_does_not_reboot(
    systemd: Systemd,
    clock: Clock,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("reboot", "window=Sun 03:00/2h") == 0
    clock.set("2026-11-29 03:00")
    systemd.refuse("reboot")
    clock.asleep = lambda _: clock.set("2026-11-29 05:00")
    capsys.readouterr()
    assert run("reboot", "--pending") == 0
    assert capsys.readouterr().err.splitlines() == [
        "rebooting: the window is open",
        "waiting: cannot reboot this machine: systemctl: Failed to reboot: not today"
        " (what was installed is in its place: systemctl reboot starts it)",
        "not rebooting: the window is closed",
    ]


@pytest.mark.parametrize("text", ["", "reboot: now\n", "etcd: {", "[]"])
def test_release_says_what_is_wrong_and_raises_nothing(
    systemd: Systemd, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    write(text)
    reboot.release()
    assert systemd.told() == []
    wrong = text in ("etcd: {", "[]")
    assert ("the reboot lock is not given back: cannot read" in capsys.readouterr().err) == wrong


def test_release_is_left_to_a_service(systemd: Systemd, capsys: pytest.CaptureFixture[str]) -> None:
    write(f"etcd: {json.dumps(NOBODY)}")
    reboot.release()
    stopped, started = systemd.told()
    assert stopped == ["systemctl", "stop", "--quiet", "immucore-reboot-release.service"]
    assert started[:2] == ["systemd-run", "--quiet"]
    assert "--unit=immucore-reboot-release" in started
    assert started[-4:] == ["/usr/bin/immucore", "reboot-lock", "release", "--after-boot"]
    systemd.refuse("--unit=immucore-reboot-release")
    reboot.release(Console())
    assert "Failed to --unit=immucore-reboot-release: not today" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, {}),
        ("", {}),
        ("reboot: off\nwindow: 'Sun 03:00'\n", {"reboot": False, "window": "Sun 03:00"}),
    ],
)
def test_settings(systemd: Systemd, text: str | None, found: dict[str, Any]) -> None:
    if text is not None:
        write(text)
    assert settings.read() == found


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a: [\n", f"{END}, line 2"),
        (b"a: b: c\n", "mapping values are not allowed here, line 1"),
        (b"- a\n", "it is no mapping"),
        (b"\xff\xfe\xff", "it is no YAML"),
        (b"a: \x00\n", "it is no YAML"),
        (b"a: !!python/object:os.system {}\n", "could not determine a constructor for the tag"),
        (b"a: 2026-99-99\n", "it is no YAML"),
        (b"[" * 5000, "it is no YAML"),
    ],
)
def test_settings_that_cannot_be_read(systemd: Systemd, content: bytes, reason: str) -> None:
    Path(settings.PATH).write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        settings.read()
    assert caught.value.message.startswith(f"cannot read '{settings.PATH}': {reason}")
    assert isinstance(caught.value, ImmucoreError)


def test_settings_that_are_a_directory(systemd: Systemd) -> None:
    Path(settings.PATH).mkdir()
    with pytest.raises(SettingsError, match="Is a directory"):
        settings.read()


@pytest.mark.parametrize("words", [[], ["now", "--pending"]])
def test_what_to_do_has_to_be_said(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("reboot", *words)
    assert caught.value.code == 2
    assert "usage: immucore reboot" in capsys.readouterr().err


@pytest.mark.parametrize("slots", ["-1", "1000001"])
def test_how_many_slots_there_cannot_be(capsys: pytest.CaptureFixture[str], slots: str) -> None:
    assert run("reboot-lock", "set-max", "--", slots) == 2
    assert capsys.readouterr().err == (
        f"immucore: cannot set the number of slots to {slots}: it is less than none, or too many\n"
        "  hint: immucore reboot-lock set-max 1\n"
    )


def test_an_operator_who_does_not_want_to_wait(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(reboot_lock, "open_lock", interrupted)
    for words in (["status"], ["release", "red"], ["set-max", "2"]):
        assert run("reboot-lock", *words) == 4
        assert capsys.readouterr().err.splitlines() == [
            "immucore: stopped: etcd may have been told already",
            "  hint: immucore reboot-lock status says it",
        ]
