"""How many machines of a fleet may be on their way through a reboot at once: a semaphore in etcd.

One key has it, as JSON, and is changed by compare-and-swap. A machine takes a slot before it reboots, and
gives it back when the next boot has turned out well. No slot is ever given back by time: a machine that
does not come back keeps it, so that an upgrade that is no good stops with so many machines as there are
slots, until a person has looked at it.
"""

from __future__ import annotations

import json
import platform
import random
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from immucore.system import settings
from immucore.system.etcd import Access, Client, EtcdError, access
from immucore.values import Record

if TYPE_CHECKING:
    from collections.abc import Callable

PREFIX = "immucore/reboot-lock"
MACHINE_ID = "/etc/machine-id"
BOOT_ID = "/proc/sys/kernel/random/boot_id"
MAX_SLOTS = 1_000_000
TRIES = 30  # of a change that others come in between


class Holder(Record):
    """A machine that has taken a slot, in which of its boots, and when: people want to know."""

    machine: str
    boot: str = ""
    host: str = ""
    since: str = ""

    def __str__(self) -> str:
        return f"{self.host or self.machine} since {self.since or 'some time'}"


class Semaphore(Record):
    """What the key has. There may be more holders than slots: `max` was made smaller."""

    max: int = 1
    holders: tuple[Holder, ...] = ()

    def taken(self, me: Holder) -> Semaphore:
        """Give a slot to a machine, if there is one. One that holds a slot keeps it."""
        others = self.without(me.machine).holders
        held = [each for each in self.holders if each.machine == me.machine]
        if self.holds(me) or (not held and len(others) >= self.max):
            return self
        return Semaphore(max=self.max, holders=(*others, me))

    def holds(self, me: Holder) -> bool:
        """Tell whether a machine has taken a slot in this boot of it."""
        return any((each.machine, each.boot) == (me.machine, me.boot) for each in self.holders)

    def without(self, machine: str, *, of_boot: str = "", not_of_boot: str = "") -> Semaphore:
        """Take a machine's slot from it, where it is that boot's that took it, or is not."""
        kept = [
            each
            for each in self.holders
            if each.machine != machine
            or (of_boot and each.boot != of_boot)
            or (not_of_boot and each.boot == not_of_boot)
        ]
        return Semaphore(max=self.max, holders=tuple(kept))


def read(text: str) -> Semaphore:
    """Read what the key has, which anybody may have written. Raises ValueError with what is wrong."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("it is no JSON") from None
    slots, holders = (found.get("max"), found.get("holders")) if isinstance(found, dict) else (None, None)
    if type(slots) is not int or not 0 <= slots <= MAX_SLOTS:  # True is an int
        raise ValueError("'max' is no number of slots")
    if not isinstance(holders, list):
        raise ValueError("'holders' is no list")
    return Semaphore(max=slots, holders=tuple(_holder(each) for each in holders))


def _holder(found: Any) -> Holder:
    texts = (
        {name: found.get(name, "") for name in ("machine", "boot", "host", "since")}
        if isinstance(found, dict)
        else {}
    )
    if not texts.get("machine") or not all(isinstance(t, str) and t.isprintable() for t in texts.values()):
        raise ValueError("one of 'holders' is no machine")
    return Holder(**texts)


def written(semaphore: Semaphore) -> str:
    """Write what read() reads."""
    return json.dumps({"max": semaphore.max, "holders": [dict(each.items()) for each in semaphore.holders]})


def this_machine() -> Holder:
    """Say who this machine is. Raises SettingsError where it has no machine-id."""
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    host = platform.node()
    return Holder(
        machine=_identity(MACHINE_ID),
        boot=_identity(BOOT_ID),
        host=host if host.isprintable() else "",  # the kernel takes any bytes
        since=now,
    )


def _identity(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            found = file.read().strip()
        reason = "it has none" if found.isprintable() else "it is no text"
    except (OSError, ValueError) as error:
        found, reason = "", getattr(error, "strerror", None) or "it is no text"
    if found in ("", "uninitialized") or not found.isprintable():  # machine-id(5)
        raise settings.SettingsError(
            f"cannot read who this machine is in '{path}': {reason}", hint="systemd-machine-id-setup"
        )
    return found


class Lock:
    """The semaphore of a group of machines."""

    def __init__(self, found: Access) -> None:
        self.key = f"{PREFIX}/{found.group}"
        self._client = Client(found)

    def look(self) -> Semaphore:
        """Return what the key has; one slot where it is not there. Raises EtcdError."""
        return self._look()[0]

    def acquire(self, me: Holder) -> Semaphore | None:
        """Take a slot, or keep the one that this machine has; else return who has them. Raises EtcdError."""
        _, now = self._change(lambda found: found.taken(me))
        return None if now.holds(me) else now

    def release(self, machine: str, *, of_boot: str = "", not_of_boot: str = "") -> bool:
        """Give the slot of a machine back (Semaphore.without); False where it has none. Raises EtcdError."""
        before, now = self._change(
            lambda found: found.without(machine, of_boot=of_boot, not_of_boot=not_of_boot)
        )
        return before != now

    def resize(self, slots: int) -> int:
        """Set the number of slots, and return what it was. Raises EtcdError."""
        return self._change(lambda found: found.replace(max=slots))[0].max

    def _look(self) -> tuple[Semaphore, int]:
        text, revision = self._client.get(self.key)
        if text is None:
            return Semaphore(), revision
        try:
            return read(text), revision
        except ValueError as error:
            raise EtcdError(
                f"cannot read '{self.key}' in etcd: {error}",
                hint=f"when no machine is rebooting: etcdctl del {self.key}",
            ) from None

    def _change(self, change: Callable[[Semaphore], Semaphore]) -> tuple[Semaphore, Semaphore]:
        """Return what was there at first, which may have been changed by this already, and what is now."""
        first = None
        for _ in range(TRIES):
            before, revision = self._look()
            first = first or before
            after = change(before)
            if after == before or self._client.swap(self.key, written(after), revision):
                return first, after
            time.sleep(random.uniform(0, 0.1))  # noqa: S311  those that came in between are changing it too
        raise EtcdError(f"cannot change '{self.key}' in etcd: others do, again and again", hint="try again")


def open_lock() -> Lock:
    """Return the lock that the settings name. Raises SettingsError."""
    return Lock(access(settings.read().get("etcd")))
