"""The system that runs: what it was booted from, and its partitions, writable for as long as work lasts.

COS_STATE and COS_RECOVERY stay read-only for everybody else: what is mounted for the work is in a mount
namespace of its own, and goes with the process, whatever ends it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import time
from typing import TYPE_CHECKING

from immucore import cmdline, files, observe, report, superblock, syscalls
from immucore.boot import INITRD_RELEASE
from immucore.errors import CmdlineError, DeviceError
from immucore.plan import SYSROOT
from immucore.system import state_file, steps
from immucore.system.errors import ImageError
from immucore.system.programs import run
from immucore.values import Record

if TYPE_CHECKING:
    from collections.abc import Iterator

    from immucore.devices import Device, Devices
    from immucore.system.console import Console

STATE, RECOVERY = "COS_STATE", "COS_RECOVERY"
PERSISTENT, OEM = "COS_PERSISTENT", "COS_OEM"
HOLDER = "/run/initramfs/cos-state"  # where the partition of the booted image is mounted
MODES = {"active": STATE, "passive": STATE, "recovery": RECOVERY}
LOCK = f"{report.DIRECTORY}/images.lock"
_BUSY_SEC, _PAUSE_SEC = 2.0, 0.02
_SENTINELS = "/run/cos"
_CMDLINE = "/proc/cmdline"
_LOOP_GET_STATUS64, _LOOP_INFO64_BYTES = 0x4C05, 232  # linux/loop.h


class Booted(Record):
    """What runs here."""

    mode: str  # active, passive or recovery
    inode: int  # of its image, on the partition that holds it
    root: str  # where the system is mounted
    holder: Device  # the partition that holds the image
    devices: Devices

    @property
    def environment(self) -> str:
        """The file of GRUB's environment block."""
        return os.path.join(self.root, "oem/grubenv")

    def running(self, label: str) -> int:
        """Give the inode of the image that runs, if that is on this partition; else 0."""
        return self.inode if label == MODES[self.mode] else 0

    def partition(self, label: str) -> Device:
        """Find a partition of this machine: on the disks of the image that runs. Raises DeviceError."""
        if label == MODES[self.mode]:
            return self.holder
        return self.devices.find(f"LABEL={label}", near=self.holder, home_only=True)


@contextlib.contextmanager
def at_work(what: str) -> Iterator[Booted]:
    """Find out what runs here, with nobody else at work on images, and mounts that are seen here alone.

    `what` is for the messages: upgrade. Raises CmdlineError where there is nothing of the kind to be done,
    ImageError and DeviceError.
    """
    if os.geteuid():
        raise ImageError(f"cannot {what}: that is for root alone", hint=f"sudo immucore {what}")
    os.makedirs(report.DIRECTORY, exist_ok=True)
    lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ImageError(
                f"cannot {what}: somebody else is at work on the images of this machine",
                hint=f"see who: fuser -v {LOCK}; try again when that is done",
            ) from None
        booted = look(what)
        syscalls.leave_mounts()
        yield booted
    finally:
        os.close(lock)


def look(what: str) -> Booted:
    """Find out what runs here. Raises CmdlineError where that is no image of a slot, and DeviceError."""
    found = [mode for mode in (*MODES, "live") if os.path.exists(f"{_SENTINELS}/{mode}_mode")]
    if found == ["live"]:
        raise CmdlineError(
            f"cannot {what}: this is a live system, which runs from no disk", hint="immucore install"
        )
    mounted = [mount for mount in observe.mounts() if mount.target == HOLDER]
    if len(found) != 1 or not mounted:
        raise CmdlineError(
            f"cannot {what}: this system was not booted from an image",
            hint="boot it with immucore; what happened in this boot says: immucore doctor",
        )
    root = SYSROOT if os.path.exists(INITRD_RELEASE) else "/"
    with open(_CMDLINE, "rb") as file:
        devices = observe.devices(cmdline.parse(file.read()).boot_disk)
    holder = next((each for each in devices.all if _number(each.path) == mounted[-1].device), None)
    if not holder:
        raise DeviceError(f"cannot find the device that is mounted on '{HOLDER}'", hint=f"findmnt {HOLDER}")
    return Booted(mode=found[0], inode=_backing(root), root=root, holder=holder, devices=devices)


def _backing(root: str) -> int:
    """Give the inode of the file that the loop device of the root shows (loop(4)); 0 where it is none."""
    number = os.stat(root).st_dev
    try:
        name = os.readlink(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").rpartition("/")[2]
        device = os.open(f"/dev/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        status = fcntl.ioctl(device, _LOOP_GET_STATUS64, bytes(_LOOP_INFO64_BYTES))
    except OSError:
        return 0
    finally:
        os.close(device)
    return int(struct.unpack_from("=QQ", status)[1])  # lo_device, lo_inode


def _number(path: str) -> str:
    try:
        number = os.stat(path).st_rdev
    except OSError:
        return ""
    return f"{os.major(number)}:{os.minor(number)}"


@contextlib.contextmanager
def readable(device: Device, name: str) -> Iterator[str]:
    """Mount a partition for reading, at a path that is given. Raises OSError."""
    target = f"{report.DIRECTORY}/{name}"
    os.makedirs(target, mode=0o700, exist_ok=True)
    mounted = syscalls.detached_mount(device.path, device.fstype, read_only=True)
    try:
        syscalls.attach_mount(mounted, target)
    finally:
        os.close(mounted)
    try:
        yield target
    finally:
        syscalls.umount(target)


@contextlib.contextmanager
def writable(device: Device, name: str) -> Iterator[str]:
    """Mount a partition for writing, at a path that is given; whoever has it mounted has it as before.

    `name` is what the directory is called. Raises ImageError and OSError.
    """
    number = _number(device.path)
    others = [mount for mount in observe.mounts() if mount.device == number]
    read_only = [mount for mount in others if "ro" in mount.superblock_options.split(",")]
    if any("rw" in mount.options.split(",") for mount in read_only):
        raise ImageError(
            f"cannot write to '{device.path}': the kernel has made it read-only because of errors",
            hint=f"restart, and look at what the kernel says: dmesg | grep {os.path.basename(device.path)}",
        )
    if not others:
        _check(device)
    # Whoever was killed in the middle of work has left it writable below a mount that is read-only.
    closed = bool(others) and all("ro" in mount.options.split(",") for mount in others)
    target = f"{report.DIRECTORY}/{name}"
    os.makedirs(target, mode=0o700, exist_ok=True)
    mounted = syscalls.detached_mount(
        device.path, device.fstype, read_only=False, options=("ro",) if read_only else ()
    )
    try:
        if read_only:
            syscalls.reconfigure(mounted, "rw")
        syscalls.attach_mount(mounted, target)
        try:
            yield target
            files.sync_file_system(target)
        finally:
            syscalls.umount(target, syscalls.MNT_DETACH)
    except BaseException:
        with contextlib.suppress(ImageError):  # what has happened before is what is told
            _close(mounted, device, read_only=closed)
        raise
    _close(mounted, device, read_only=closed)


def _close(mounted: int, device: Device, *, read_only: bool) -> None:
    deadline = time.monotonic() + _BUSY_SEC
    try:
        while read_only:
            try:
                return syscalls.reconfigure(mounted, "ro")
            except OSError as error:
                # The kernel lets an image that was mounted, and is removed by now, go a moment later.
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise ImageError(
                        f"cannot make '{device.path}' read-only again: {error.strerror}",
                        hint="the next boot does it",
                    ) from None
                time.sleep(_PAUSE_SEC)
    finally:
        os.close(mounted)


def record(console: Console, here: Booted, top: str, label: str, state: state_file.State) -> None:
    """Write state.yaml to COS_STATE and COS_RECOVERY; `label` is that of the two that is mounted at `top`.

    What it records has taken effect already: a failure is a warning.
    """

    def elsewhere() -> None:
        with writable(here.partition(RECOVERY if label == STATE else STATE), "other") as other:
            state_file.write(other, state)

    steps.attempt(console, lambda: state_file.write(top, state))
    steps.attempt(console, elsewhere)


def _check(device: Device) -> None:
    if device.fstype in superblock.EXT:
        argv = ["e2fsck", "-p", device.path]
        run(argv, f"cannot repair '{device.path}'", hint=f"e2fsck -f {device.path}", good=(0, 1))
