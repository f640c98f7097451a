"""`immucore reset`: active and passive made anew of the recovery image, from which the machine has to run.

COS_STATE keeps its file system, if it has one. One slot after the other gets its new image in one step, and
recovery is not touched: whenever this is cut off, the machine boots, and it can be done once more.
"""

from __future__ import annotations

import contextlib
import os
from functools import partial
from typing import TYPE_CHECKING

from immucore import files
from immucore.bootcount import ACTIVE, COUNTED, RECOVERY
from immucore.errors import AmbiguousError, CmdlineError, DeviceError
from immucore.system import (
    boot_state,
    booted,
    filesystems,
    images,
    slots,
    sources,
    state_file,
    steps,
    stopping,
)
from immucore.system.environment import Environment
from immucore.system.errors import ImageError, told
from immucore.system.making import Making, fstype_of
from immucore.system.state_file import Entry

if TYPE_CHECKING:
    from immucore.devices import Device
    from immucore.system.booted import Booted
    from immucore.system.console import Console
    from immucore.system.programs import Advance
    from immucore.system.steps import Step

_PARTITION = "PARTLABEL=state"  # contract §1
_KEPT = ("lost+found", "grubenv")  # of COS_OEM: what the boot loader reads and writes


class Reset:
    """One reset of a machine; `persistent` and `oem`: what people have put there goes too."""

    def __init__(self, console: Console, here: Booted, *, fstype: str, persistent: bool, oem: bool) -> None:
        if here.mode != RECOVERY:
            raise CmdlineError(
                f"cannot reset: this system was booted from {here.mode}",
                hint="boot recovery, and reset from there",
            )
        if fstype:
            images.check_fstype(fstype)
        self._console, self._here, self._fstype = console, here, fstype
        self._environment = Environment(here.environment)
        self._made: dict[str, Entry] = {}
        self._steps: list[Step] = [
            ("removing what earlier work has left", self._clean),
            ("looking at the recovery image, and for room", self._measure),
            ("unpacking the recovery image", self._unpack),
        ]
        for slot in COUNTED:
            self._steps += [
                (f"building {slot}", partial(self._build, slot)),
                (f"verifying {slot}", self._verify),
                (f"putting {slot} in its place", partial(self._put, slot)),
            ]
        self._steps.append((f"writing {state_file.NAME}", self._record))
        if persistent:
            self._persistent = here.partition(booted.PERSISTENT)
            self._steps.append(("removing all that is on COS_PERSISTENT", self._wipe_persistent))
        if oem:
            self._steps.append(("removing all that is on COS_OEM but grubenv", self._wipe_oem))

    def run(self) -> None:
        """Do it. Raises ImmucoreError."""
        try:
            with booted.writable(self._state(), "images") as self._top:
                directory = os.path.join(self._top, slots.DIRECTORY)
                os.makedirs(directory, exist_ok=True)
                fstype = fstype_of(os.path.join(directory, slots.FILES[ACTIVE]), self._fstype)
                self._making = Making(directory, self._source(), fstype)
                try:
                    steps.run(self._console, self._steps)
                finally:
                    stopping.hold()
                    steps.attempt(self._console, lambda: slots.clean(directory, 0))
        except OSError as error:
            raise ImageError(
                f"cannot reset: {told(error)}", hint="recovery is as it was: try again"
            ) from None
        made = {slot: entry.image_id for slot, entry in self._made.items()}
        found = [slots.Slot(name=slot, whole=True, image_id=image_id) for slot, image_id in made.items()]
        upcoming, told_next = slots.next_boot(self._environment.read(), *found)
        self._console.result(f"active and passive are what recovery is; {told_next}", **made, next=upcoming)

    def _state(self) -> Device:
        """Find COS_STATE; where its file system is lost, it gets one: what it holds is made anew anyway."""
        try:
            return self._here.partition(booted.STATE)
        except AmbiguousError:
            raise
        except DeviceError:
            found = self._here.devices.candidates(_PARTITION, near=self._here.holder, home_only=True)
            if len(found) != 1 or found[0].fstype:
                raise
        (lost,) = found
        with self._console.step(f"making the file system {booted.STATE} on {lost.path}, which has none"):
            filesystems.ext4(lost.path, label=booted.STATE, size_mib=lost.size_bytes >> 20, lazy=True)
        made: Device = lost.replace(fstype="ext4", label=booted.STATE)
        return made

    def _source(self) -> sources.Source:
        directory = os.path.join(booted.HOLDER, slots.DIRECTORY)
        names = (slots.FILES[RECOVERY], slots.EARLIER_RECOVERY)
        paths = [os.path.join(directory, name) for name in names]
        return sources.parse(f"file:{next((path for path in paths if os.path.exists(path)), paths[0])}")

    def _clean(self, _: Advance) -> bool:
        slots.clean(self._making.directory, 0)
        return True

    def _measure(self, _: Advance) -> bool:
        self._making.measure()
        return True

    def _unpack(self, advance: Advance) -> bool:
        self._making.unpack(advance)
        return True

    def _build(self, slot: str, advance: Advance) -> bool:
        self._making.build(slots.LABELS[slot], advance)
        return True

    def _verify(self, advance: Advance) -> bool:
        self._making.verify(advance)
        return True

    def _put(self, slot: str, _: Advance) -> bool:
        """Put a new image in the place of one that is given up; its tries are on the disk before."""
        making = self._making
        found = slots.survey(making.directory, self._environment.read())
        with slots.moving(self._environment, slots.after_fallback(found, boot_state.read()).values()):
            slots.arm(self._environment, making.image_id)
            slots.replace(making.directory, slot)
        slots.settle(making.directory)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(making.image)  # what was there before
        self._made[slot] = Entry(
            image_id=making.image_id,
            source=making.source.text,
            digest=making.content,
            label=slots.LABELS[slot],
            fs=making.fstype,
            date=state_file.now(),
            action="reset",
        )
        return True

    def _record(self, _: Advance) -> bool:
        state = state_file.read(booted.HOLDER)
        for slot, entry in self._made.items():
            state.record(slot, entry)
        state.failed = [each for each in state.failed if each != self._making.content]
        booted.record(self._console, self._here, self._top, booted.STATE, state)
        found = slots.survey(self._making.directory, {})
        steps.attempt(self._console, lambda: slots.forget(self._environment, found.values()))
        return True

    def _wipe_persistent(self, _: Advance) -> bool:
        with booted.writable(self._persistent, "persistent") as top:
            _wipe(top)
        return True

    def _wipe_oem(self, _: Advance) -> bool:
        _wipe(os.path.dirname(self._here.environment))
        return True


def _wipe(directory: str) -> None:
    for name in files.names(directory):
        if name not in _KEPT:
            files.remove(os.path.join(directory, name))
