"""Growing the last partition of a disk, and the file system on it, as a step of a stage asks for it.

With sfdisk, which has to be in the initramfs; nothing is started where there is nothing to gain.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import struct
import time

from immucore import assemble, growth, observe, superblock, syscalls
from immucore.devices import HOME_ONLY, Wanted
from immucore.stage_tools import StepError, command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from immucore.devices import Device, Devices

SECTOR_BYTES = 512  # sysfs counts in these, whatever the disk's own are
BLKPG, BLKPG_RESIZE_PARTITION = 0x1269, 3  # linux/blkpg.h; struct blkpg_ioctl_arg, blkpg_partition
BY_LABEL = "/dev/disk/by-label/"  # udev's, which may be of any disk
WAIT_SEC = 30  # from the start of the initramfs
MIB = 1 << 20
TABLE_BYTES = 2 * MIB  # what the start of the disk, the backup of its table and alignment may take


def expand(asked: tuple[str, str, int], find: Callable[[str], Device | None]) -> str:
    """Grow a partition, named by (label or path, value, MiB or 0 for all there is).

    `find` gives the one with a label. Returns what somebody should know of what was not done. Raises
    StepError.
    """
    kind, value, size_mib = asked
    if value.startswith(BY_LABEL):
        kind, value = "label", observe.decode(value.removeprefix(BY_LABEL))
    if kind == "label":
        found = find(value)
        if found is None:
            return ""
        value = found.path
    source = os.path.realpath(value)
    name = os.path.basename(source)
    place = os.path.realpath(f"/sys/class/block/{name}")
    if not os.path.exists(f"{place}/partition"):
        raise StepError(f"{source} is no partition")
    disk = os.path.dirname(place)
    number, has = _number(f"{place}/partition"), _number(f"{place}/size") * SECTOR_BYTES
    end = _number(f"{place}/start") * SECTOR_BYTES + has
    free = _number(f"{disk}/size") * SECTOR_BYTES - end
    wanted = size_mib * MIB if size_mib else has + free
    if free > TABLE_BYTES and wanted > has:
        _refuse_all_but_the_last(disk, name, end)
        # --no-reread: other partitions of the disk are in use, and the kernel is told of this one alone.
        size = f"{size_mib}MiB" if size_mib else "+"
        options = ("--no-reread", "--no-tell-kernel", "--force", "--quiet")
        device = f"/dev/{os.path.basename(disk)}"
        command("sfdisk", *options, "-N", str(number), device, typed=f",{size}\n")
        _tell_kernel(device, number)
    return _grow_file_system(source)


def labelled(
    label: str, state: Wanted, look: Callable[[], Devices], wait: Callable[[Wanted], Devices] | None
) -> Device | None:
    """Choose the partition with a label as a boot does, and only on the disks of the partition `state`.

    None where it is in a LUKS container there, which is not grown. Raises DeviceError and StepError.
    """
    wanted = Wanted(spec=f"LABEL={label}", timeout_sec=WAIT_SEC, near=state.spec, home=HOME_ONLY)
    devices = look()
    if any(assemble.containers(devices, (wanted,))):
        return None
    if wait and devices.unsettled(wanted):
        devices = wait(wanted)
    near = devices.answers(state)
    if len(near) != 1:
        raise StepError(f"nobody knows the disk that {label} has to be on: there is no one {state.spec}")
    if any(assemble.containers(devices, (wanted,))):
        return None
    found: Device = devices.find(wanted.spec, near=near[0], home_only=True)
    return found


def _number(path: str) -> int:
    return int(observe.text(path, missing="0"))


def _refuse_all_but_the_last(disk: str, name: str, end: int) -> None:
    with os.scandir(disk) as entries:
        others = [each.path for each in entries if each.name != name]
    for other in others:
        if os.path.exists(f"{other}/partition") and _number(f"{other}/start") * SECTOR_BYTES >= end:
            raise StepError(f"{os.path.basename(other)} lies behind {name}: it cannot grow")


def _tell_kernel(device: str, number: int) -> None:
    """Resize the kernel's partition to what the table says; it stays the same device, mounted or not."""
    table = command("sfdisk", "--dump", device)
    entry = re.search(rf"^\S*\D{number} : start= *(\d+), size= *(\d+)", table, re.MULTILINE)
    unit = re.search(r"^sector-size: (\d+)$", table, re.MULTILINE)
    if entry is None:
        raise StepError(f"sfdisk shows no partition {number} of {device}")
    start, length = (int(text) * int(unit[1] if unit else SECTOR_BYTES) for text in entry.groups())
    partition = ctypes.create_string_buffer(struct.pack("=qqi132x", start, length, number))
    argument = struct.pack(
        "iiiP", BLKPG_RESIZE_PARTITION, 0, len(partition) - 1, ctypes.addressof(partition)
    )
    disk = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(disk, BLKPG, argument)
    except OSError as error:
        error.filename = device
        raise
    finally:
        os.close(disk)


def _grow_file_system(source: str) -> str:
    """Let a file system fill its partition, by a mount that nobody sees; say why it is left as it is."""
    found = superblock.identify(source)
    if not found.fstype:
        raise StepError(f"no file system is known on {source}")
    if found.claimed_bytes > _size_bytes(source) - found.block_bytes:
        return ""
    if why := superblock.damage(source, found.fstype, time.time()):
        return f"{source} {why}: it is not grown before it was checked"
    tree = syscalls.detached_mount(source, found.fstype, read_only=False)
    try:
        growth.grow(source, f"/proc/self/fd/{tree}")
    except OSError as error:
        error.filename = source
        raise
    finally:
        os.close(tree)
    return ""


def _size_bytes(source: str) -> int:
    descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)
