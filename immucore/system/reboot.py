"""When a machine reboots into its new image: off, now, window[=CALENDAR[/DURATION]], etcd-lock.

What has to wait is a unit of systemd's (reboot_unit.py) that runs `immucore reboot --pending`.
"""

from __future__ import annotations

import os
import random
import time
from typing import TYPE_CHECKING, Any

from immucore.errors import ImmucoreError
from immucore.system import reboot_unit, settings, window
from immucore.system.console import Console
from immucore.system.reboot_unit import RebootError, restart
from immucore.system.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from immucore.system.window import Window

FELL_BACK = "/run/cos/upgrade_failure"  # another slot was booted than the one that was to be
STRATEGIES = "off, now, window, window=CALENDAR[/DURATION] or etcd-lock"
_WINDOW = f"write `window: 'Sun 03:00/2h'` in {settings.PATH}, or use 'window=Sun 03:00/2h'"
FIRST_PAUSE_SEC, LAST_PAUSE_SEC = 5.0, 60.0


class Strategy:
    """When to reboot; `text` is what parse() makes it of, `window` the only time when it may be, if any."""

    def __init__(self, text: str, when: Window | None = None) -> None:
        self.text = text
        self.window = when

    def reboot(self, console: Console) -> None:
        """Reboot, or see to it that it happens in time. Raises RebootError and SettingsError."""
        raise NotImplementedError

    def resume(self, console: Console) -> str:
        """Try once what is pending; return what there is to wait for, or nothing. Raises ImmucoreError."""
        console.say(f"nothing is pending with '{self.text}'")
        return ""

    @property
    def calendar(self) -> str:
        """When the window opens, as systemd writes it; empty where any time is as good."""
        return self.window.calendar if self.window else ""

    def is_closed(self) -> bool:
        """Tell whether this is no time to reboot."""
        return self.window is not None and not self.window.is_open(time.time())

    def tell_when(self, console: Console, what: str) -> None:
        """Say what happens when the window opens."""
        opening = self.window.opening(time.time()) if self.window else None
        when = time.strftime("%a %Y-%m-%d %H:%M %Z", time.localtime(opening))
        timer = f"systemctl list-timers {reboot_unit.NAME}.timer"
        console.say(f"this machine {what} at {when}: {timer}", reboot=self.text, at=opening)


class Off(Strategy):
    """Somebody else reboots."""

    def reboot(self, console: Console) -> None:
        """Give up what is pending."""
        cancel(console)
        console.say("this machine is not rebooted: a new image waits for its next reboot", reboot="off")


class Now(Strategy):
    """At once."""

    def reboot(self, console: Console) -> None:
        """Reboot."""
        console.say("rebooting", reboot="now")
        restart()


class InWindow(Strategy):
    """As soon as the window is open."""

    def reboot(self, console: Console) -> None:
        """Reboot now, else have a timer do it."""
        cancel(console)
        if self.is_closed():
            reboot_unit.arrange(self.text, self.calendar)
            self.tell_when(console, "reboots")
        else:
            console.say("rebooting: the window is open", reboot="now")
            restart()

    def resume(self, console: Console) -> str:
        """Reboot, unless the machine slept through the window: the timer runs on to the next one."""
        if self.is_closed():
            console.say("not rebooting: the window is closed")
        else:
            console.say("rebooting: the window is open")
            restart()
        return ""


class Locked(Strategy):
    """With a slot of the lock that the machines of a fleet share, in the window if there is one."""

    def __init__(self, text: str, when: Window | None, etcd: object) -> None:
        from immucore.system import reboot_lock  # and with it all of TLS
        from immucore.system.etcd import access

        super().__init__(text, when)
        self._lock = reboot_lock.Lock(access(etcd))
        self._me = reboot_lock.this_machine()

    def reboot(self, console: Console) -> None:
        """Have a service wait for a slot; a timer starts it where the window is closed."""
        closed = self.is_closed()
        reboot_unit.arrange(self.text, self.calendar)
        if closed:
            self.tell_when(console, "waits for the reboot lock, and reboots,")
            return
        if self.calendar:
            reboot_unit.start()
        journal = f"journalctl -fu {reboot_unit.NAME}"
        console.say(f"this machine reboots with the reboot lock: {journal}", reboot=self.text)

    def resume(self, console: Console) -> str:
        """Take a slot and reboot. A slot that nothing came of is given back at the end of the window."""
        if self.is_closed():
            self.give_back()
            console.say("not rebooting: the window is closed")
            return ""
        if full := self._lock.acquire(self._me):
            holders = "".join(f", {each}" for each in full.holders)
            return f"all slots of the reboot lock are taken ({len(full.holders)} of {full.max}{holders})"
        console.say("rebooting: a slot of the reboot lock is taken")
        try:
            restart()
        except RebootError:
            self.give_back()
            raise
        return ""

    def give_back(self) -> None:
        """Give the slot back if this boot has taken one, perhaps without knowing. Raises EtcdError."""
        self._lock.release(self._me.machine, of_boot=self._me.boot)


def parse(text: object, configured: Mapping[str, Any]) -> Strategy:
    """Read what `--reboot`, or the setting `reboot`, says; `configured` are the settings (settings.read()).

    All that can be wrong with it is found here. Raises SettingsError.
    """
    strategy = _strategy(text, configured)
    if strategy.window and strategy.window.opening(time.time()) is None:
        raise SettingsError(
            f"cannot reboot in the window '{strategy.window.calendar}': it does not open any more",
            hint="give a time that is still to come",
        )
    return strategy


def _strategy(text: object, configured: Mapping[str, Any]) -> Strategy:
    text = "off" if text is False else str(text)  # YAML reads off as a boolean
    name, inline, given = text.partition("=")
    if name == "window":
        if not inline and "window" not in configured:
            raise SettingsError("cannot reboot by 'window': no window is set", hint=_WINDOW)
        return InWindow(text, window.parse(given if inline else configured["window"]))
    match text:
        case "off":
            return Off(text)
        case "now":
            return Now(text)
        case "etcd-lock":
            when = window.parse(configured["window"]) if "window" in configured else None
            return Locked(text, when, configured.get("etcd"))
    raise SettingsError(f"cannot reboot by '{text}': there is no such way", hint=f"use {STRATEGIES}")


def resume(console: Console) -> None:
    """Do what is pending: what the unit runs. Never reboots a machine for which that was given up."""
    strategy, made_of = None, None

    def attempt() -> str:
        nonlocal strategy, made_of
        text = reboot_unit.pending()
        if text is None:
            console.say("no reboot is pending")
            return ""
        now = text, settings.read()  # somebody corrects them while this waits
        if strategy is None or now != made_of:
            strategy, made_of = _strategy(*now), now
        return strategy.resume(console)

    persist(attempt, console)


def persist(attempt: Callable[[], str], console: Console) -> None:
    """Call it until it has nothing to wait for, and say what that is whenever it changes."""
    pause_sec, told = FIRST_PAUSE_SEC, ""
    while True:
        try:
            reason = attempt()
        except ImmucoreError as error:
            reason = f"{error.message}{f' ({error.hint})' if error.hint else ''}"
        if not reason:
            return
        if reason != told:
            console.say(f"waiting: {reason}")
            told = reason
        time.sleep(pause_sec * random.uniform(0.5, 1))  # noqa: S311  so that a fleet does not ask all at once
        pause_sec = min(2 * pause_sec, LAST_PAUSE_SEC)


def cancel(console: Console) -> None:
    """Give up what is pending, and a slot of the reboot lock that was taken for it."""
    text = reboot_unit.cancel()
    if text is None:
        return
    console.say(f"the reboot that was pending ({text}) is given up")
    try:
        strategy = _strategy(text, settings.read())
        if isinstance(strategy, Locked) and not reboot_unit.is_stopping():
            strategy.give_back()
    except ImmucoreError as error:
        console.say(f"a slot of the reboot lock may still be taken: {error.message}")


def release(console: Console | None = None) -> None:
    """Give the slot back that this machine has rebooted with; to be called when its health is good.

    That is left to a service, which asks until etcd answers: the network may be late. Raises nothing: no
    machine is unhealthy because of etcd.
    """
    try:
        if "etcd" in settings.read():
            reboot_unit.start_release()
    except ImmucoreError as error:
        (console or Console()).say(f"the reboot lock is not given back: {error.message}")


def release_after_boot(console: Console) -> None:
    """Give the slot back that an earlier boot has taken: what the service of release() runs.

    Not where the machine fell back to another slot: an upgrade that is no good stops the fleet here.
    """
    from immucore.system import reboot_lock

    def attempt() -> str:
        lock, me = reboot_lock.open_lock(), reboot_lock.this_machine()
        if os.path.exists(FELL_BACK):
            if any(each.machine == me.machine for each in lock.look().holders):
                console.say("the slot stays taken: this machine had to boot another image than it was to")
        elif lock.release(me.machine, not_of_boot=me.boot):
            console.say("the slot of the reboot lock is given back")
        return ""

    persist(attempt, console)
