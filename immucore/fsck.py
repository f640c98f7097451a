"""Checking and repairing file systems that are about to be mounted rw (contract §5).

A healthy boot never imports this: superblock.damage() has nothing to say about its file systems.

What e2fsck(8) does in preen mode (1.47), which is why it is called as it is here: it refuses a superblock
whose magic or checksum is wrong (status 8), but repairs all of it when it is told where a backup is
(`-b`, status 1). Damage that can cost files (group descriptors, the root directory) it leaves to a person
(status 4) unless fsck.repair=yes.
"""

from __future__ import annotations

import os
import struct

from immucore import observe, process, superblock
from immucore.devices import describe, split
from immucore.errors import MountError
from immucore.superblock import EXT_64BIT, EXT_OFFSET, HEAD_BYTES
from immucore.values import Record

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from collections.abc import Sequence

    from immucore.devices import Device, Devices, Wanted
    from immucore.log import Log
    from immucore.process import Finished

REPAIRED, REBOOT, LEFT, OPERATIONAL = 1, 2, 4, 8  # exit bits of fsck(8)
LIMIT_SEC = 3600.0  # a disk that takes longer needs a person; a killed e2fsck has damaged nothing more
LAST_WORDS_CHARACTERS = 300
EXT_OPTIONS = {"preen": "-p", "yes": "-y", "no": "-n"}
FAT_OPTIONS = {"preen": "-a", "yes": "-a", "no": "-n"}
FAT_PROGRAMS = ("fsck.vfat", "fsck.fat", "dosfsck")
META_BG, METADATA_CSUM = 0x10, 0x400  # s_feature_incompat, s_feature_ro_compat

checked: dict[int, MountError | None] = {}  # by device number: once a boot, whatever comes of it
rescued: set[int] = set()  # by device number, too: what rescue() has looked at, whatever came of it


def check(device: str, fstype: str, reason: str, repair: str, log: Log) -> bool:
    """Check the file system on a device and repair it as `repair` (preen, yes or no) allows.

    False: it cannot be checked here, which the log says, or is mounted; True: it is fine now. Raises
    MountError when it is not, also when it is asked once more.
    """
    number = os.stat(device).st_rdev
    name = f"{os.major(number)}:{os.minor(number)}"
    if any(mount.device == name for mount in observe.mounts()):
        return False
    if number in checked:
        failure = checked[number]
        if failure is not None:
            raise failure
        return False
    checked[number] = None
    argv = _argv(fstype, repair)
    if not argv:
        program = "fsck.vfat" if fstype == "vfat" else "e2fsck"
        log.warning(f"{device} {reason}, and there is no {program} in the initramfs: it is mounted as it is")
        return False
    log.warning(f"{device} {reason}: checking it with {' '.join(argv)}")
    try:
        finished = _run([*argv, device], device, log)
        if fstype != "vfat" and finished.status & OPERATIONAL and (spare := _spare_of(device)):
            log.warning(f"{device} has a broken superblock: using the backup in block {spare.block}")
            finished = _run([*argv, *spare.options, device], device, log)
        if fstype != "vfat" and finished.status & REBOOT:
            # A reboot would clear what the kernel has in memory of a mounted file system. Nothing is mounted
            # from this one, so that it is enough to see whether it is whole now.
            finished = _run([*argv, device], device, log)
        _judge(finished, argv, device, repair)
    except MountError as error:
        checked[number] = error
        raise
    log.warning(
        f"{device}: repaired" if finished.status & REPAIRED else f"{device}: nothing had to be repaired"
    )
    return True


def _argv(fstype: str, repair: str) -> list[str]:
    """Give the program and its options; none if the initramfs has no program for it."""
    if fstype == "vfat":
        program = next(filter(None, map(process.find, FAT_PROGRAMS)), None)
        return [program, FAT_OPTIONS[repair]] if program else []
    program = process.find("e2fsck")
    return [program, "-f", EXT_OPTIONS[repair]] if program else []


def _run(argv: Sequence[str], device: str, log: Log) -> Finished:
    def tell(taken_sec: float) -> None:
        log.info(f"checking {device}, {taken_sec:.0f} s so far (at most {LIMIT_SEC:.0f} s)")

    finished = process.run(argv, timeout_sec=LIMIT_SEC, meanwhile=tell)
    for line in finished.output.splitlines():
        log.debug(f"{argv[0].rpartition('/')[2]}: {line}")
    return finished


def _judge(finished: Finished, argv: Sequence[str], device: str, repair: str) -> None:
    if finished.status in (0, REPAIRED):
        return
    program = argv[0].rpartition("/")[2]
    by_hand = f"{program} {'-f ' if program == 'e2fsck' else ''}{device}"
    hint = f"type {by_hand} and answer its questions"
    if repair != "yes":
        hint += ", or boot once with fsck.repair=yes, which says yes to all of them"
    raise MountError(
        f"cannot repair '{device}': {' '.join(argv)} ended with status {finished.status}:"
        f" {last_words(finished.output)}",
        hint=hint,
    )


def last_words(output: str) -> str:
    """Give the end of what a program said, as one line."""
    words = [line.strip() for line in output.splitlines() if line.strip()]
    kept: list[str] = []
    for line in reversed(words):
        if kept and len(" ".join(kept)) + len(line) > LAST_WORDS_CHARACTERS:
            break
        kept.insert(0, line)
    return " ".join(kept)[-LAST_WORDS_CHARACTERS:] or "it said nothing"


class Spare(Record):
    """A backup of an ext2/3/4 superblock, in block group 1."""

    block: int
    block_bytes: int
    label: str
    uuid: bytes

    @property
    def options(self) -> tuple[str, ...]:
        """What tells e2fsck to use it."""
        return ("-b", str(self.block), "-B", str(self.block_bytes))


def spares(device: str) -> list[Spare]:
    """List the backups that belong to what lies on the device now. Raises OSError.

    A file system that was there before may have left its own: that is not believed unless the group
    descriptors at the start of the device are those of the backup.
    """
    found = []
    descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size_bytes = os.lseek(descriptor, 0, os.SEEK_END)
        for block_bytes in (1024, 2048, 4096):
            first = int(block_bytes == 1024)  # s_first_data_block
            block = first + 8 * block_bytes  # group 1 begins where the bitmap of group 0, one block, ends
            copy = os.pread(descriptor, 1024, block * block_bytes)
            if not _is_backup(copy, block_bytes, size_bytes):
                continue
            descriptors = os.pread(descriptor, block_bytes, (first + 1) * block_bytes)
            if _tables(copy, descriptors) == _tables(
                copy, os.pread(descriptor, block_bytes, (block + 1) * block_bytes)
            ):
                label = copy[120:136].partition(b"\0")[0].decode("utf-8", "surrogateescape")
                found.append(
                    Spare(block=block, block_bytes=block_bytes, label=label, uuid=bytes(copy[104:120]))
                )
    finally:
        os.close(descriptor)
    return found


def _is_backup(copy: bytes, block_bytes: int, size_bytes: int) -> bool:
    """Tell whether a block is the superblock of group 1 of a file system with default geometry."""
    if len(copy) < 1024 or copy[56:58] != b"\x53\xef":
        return False
    claims = superblock.parse(bytes(EXT_OFFSET) + copy + bytes(HEAD_BYTES - EXT_OFFSET - 1024))
    (group,) = struct.unpack_from("<H", copy, 90)
    (per_group,) = struct.unpack_from("<I", copy, 32)
    (incompat,) = struct.unpack_from("<I", copy, 96)
    return (
        claims.block_bytes == block_bytes
        and claims.claimed_bytes <= size_bytes
        and group == 1
        and per_group == 8 * block_bytes
        and not incompat & META_BG
        and _checksum_is_right(copy)
    )


def _tables(copy: bytes, descriptors: bytes) -> list[bytes]:
    """Give where each group has its bitmaps and inodes: what no mounting, writing or checking changes."""
    (incompat,) = struct.unpack_from("<I", copy, 96)
    (size,) = struct.unpack_from("<H", copy, 254) if incompat & EXT_64BIT else (32,)
    (blocks, per_group) = (struct.unpack_from("<I", copy, 4)[0], struct.unpack_from("<I", copy, 32)[0])
    if not 32 <= size <= 1024:
        return [copy]
    count = min(-(-blocks // per_group), len(descriptors) // size)
    return [descriptors[at : at + 12] for at in range(0, count * size, size)]


def _checksum_is_right(block: bytes) -> bool:
    """Tell whether a superblock is as it was written; one without a checksum is believed."""
    (ro_compat,) = struct.unpack_from("<I", block, 100)
    (written,) = struct.unpack_from("<I", block, 1020)
    return not ro_compat & METADATA_CSUM or crc32c(block[:1020]) == written


def crc32c(data: bytes) -> int:
    """Compute the CRC of RFC 3720 as ext4 writes it: not inverted at the end."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc


def _spare_of(device: str) -> Spare | None:
    """Return the backup for a device whose own superblock e2fsck refuses because it is broken."""
    descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        primary = os.pread(descriptor, 1024, EXT_OFFSET)
    finally:
        os.close(descriptor)
    if len(primary) == 1024 and primary[56:58] == b"\x53\xef" and _checksum_is_right(primary):
        return None  # something else is wrong with it
    found = spares(device)
    return found[0] if len(found) == 1 else None


def rescue(wanted: Sequence[Wanted], devices: Devices, repair: str, log: Log) -> dict[str, str]:
    """Repair superblocks that are so broken that udev sees no file system where a wanted one has to be.

    Each partition is tried once a boot. Returns what was tried: the spelling of the device, and why it could
    not be repaired, "" if it was; udev looks again at what was written to.
    """
    tried = {}
    for each in wanted:
        device = _broken(each, devices)
        if device is None:
            continue
        try:
            number = os.stat(device.path).st_rdev
        except OSError:  # it has left; the wait looks again
            continue
        if number in rescued or number in checked:
            continue
        rescued.add(number)
        try:
            tried[each.spec] = _rescue(each, device.path, repair, log)
        except OSError as error:
            tried[each.spec] = f"cannot read '{device.path}': {error.strerror}"
        if tried[each.spec]:
            log.warning(tried[each.spec])
    return tried


def _rescue(each: Wanted, device: str, repair: str, log: Log) -> str:
    kind, label = split(each.spec)
    known = f"no file system is known on {device}, the partition '{each.partlabel}'"
    found = spares(device)
    if len(found) != 1 or kind != "LABEL" or found[0].label != label:
        return f"cannot find {describe(each.spec)}: {known}, and no backup of its superblock is there"
    argv = _argv("ext4", repair)
    if not argv or repair == "no":
        why = "fsck.repair=no forbids to repair it" if argv else "the initramfs has no e2fsck"
        return f"cannot find {describe(each.spec)}: {known}, and {why}"
    try:
        check(device, "ext4", f"has a broken superblock, and '{label}' in its backup", repair, log)
    except MountError as error:
        return error.message
    name = os.path.realpath(device).removeprefix("/dev/").replace("/", "!")
    with open(f"/sys/class/block/{name}/uevent", "w", encoding="ascii") as file:
        file.write("change")  # have udev look at it again, also where it does not watch it
    return ""


def _broken(each: Wanted, devices: Devices) -> Device | None:
    """Return the partition that should hold a wanted file system, if udev knows none on it."""
    near = devices.candidates(each.near) if each.near else ()
    if not each.partlabel or len(near) != 1 or any(it.is_on(near[0].disks) for it in devices.answers(each)):
        return None
    found = [
        device
        for device in devices.candidates(f"PARTLABEL={each.partlabel}")
        if device.is_on(near[0].disks) and not device.fstype
    ]
    return found[0] if len(found) == 1 else None
