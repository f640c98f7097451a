"""What the first blocks of a device or an image say about the file system in it. Forks nothing.

The fields are those of Linux: ext4.h, squashfs/squashfs_fs.h, erofs/erofs_fs.h, xfs/libxfs/xfs_format.h,
uapi/linux/btrfs_tree.h, uapi/linux/msdos_fs.h. What is on a disk can be anything: nothing is believed beyond
its bounds, and no answer is an exception but for what cannot be read.
"""

from __future__ import annotations

import os
import struct

from immucore.values import Record

HEAD_BYTES = 4096
EXT = ("ext2", "ext3", "ext4")
CHECKED = (*EXT, "vfat")  # xfs and btrfs have no mark: what they can repair, they repair at mounting
BTRFS_OFFSET = 0x10000
EXT_OFFSET = 1024
EXT_VALID, EXT_ERROR, EXT_ORPHAN = 1, 2, 4  # s_state
EXT_64BIT = 0x80  # s_feature_incompat
FAT_DIRTY = 1  # the state byte of the boot sector


class Superblock(Record):
    """What a file system says of itself; an empty `fstype` is none we know."""

    fstype: str = ""  # ext4 stands for ext2 and ext3 too: its driver mounts them
    block_bytes: int = 0
    claimed_bytes: int = 0  # how much of its device it uses; 0: it does not say


def identify(path: str) -> Superblock:
    """Tell the file system of an image or device by its superblock, not by its name. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = parse(os.pread(descriptor, HEAD_BYTES, 0))
        return found if found.fstype else _btrfs(os.pread(descriptor, HEAD_BYTES, BTRFS_OFFSET))
    finally:
        os.close(descriptor)


def claimed_bytes(path: str) -> int:
    """Return the size that the file system at `path` says it has; 0 if none is known. Raises OSError."""
    size_bytes: int = identify(path).claimed_bytes
    return size_bytes


def damage(path: str, fstype: str, now_sec: float) -> str:
    """Say why the file system on a device has to be checked before it is mounted; "" if it has not.

    What its driver repairs at mounting, a journal that was not replayed, is no damage. Raises OSError.
    """
    if fstype not in CHECKED:
        return ""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        head = os.pread(descriptor, HEAD_BYTES, 0)
    finally:
        os.close(descriptor)
    return fat_damage(head) if fstype == "vfat" else ext_damage(head[EXT_OFFSET:], now_sec)


def ext_errors(path: str) -> bool:
    """Tell whether an ext2/3/4, mounted or not, is marked as damaged, or is none. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        block = os.pread(descriptor, 1024, EXT_OFFSET)
    finally:
        os.close(descriptor)
    return not _is_ext(block) or bool(_ext_state(block) & EXT_ERROR)


def parse(head: bytes) -> Superblock:
    """Read the first 4096 bytes of an image or device: any type but btrfs, whose superblock lies deeper."""
    if len(head) < HEAD_BYTES:
        return Superblock()
    if head.startswith(b"hsqs"):
        block_bytes, used = *_u32(head, 12), *_u64(head, 40)
        return Superblock(fstype="squashfs", block_bytes=block_bytes, claimed_bytes=used)
    if head.startswith(b"XFSB"):
        block_bytes, blocks = struct.unpack_from(">IQ", head, 4)
        return Superblock(fstype="xfs", block_bytes=block_bytes, claimed_bytes=block_bytes * blocks)
    block = head[EXT_OFFSET:]
    if block.startswith(b"\xe2\xe1\xf5\xe0"):
        block_bytes, (blocks,) = 1 << min(block[12], 31), _u32(block, 36)
        return Superblock(fstype="erofs", block_bytes=block_bytes, claimed_bytes=block_bytes * blocks)
    return _ext(block) if _is_ext(block) else Superblock()


def _is_ext(block: bytes) -> bool:
    return len(block) >= 1024 and block[56:58] == b"\x53\xef"


def _ext_state(block: bytes) -> int:
    state: int = struct.unpack_from("<H", block, 58)[0]
    return state


def _ext(block: bytes) -> Superblock:
    (blocks,), (incompat,) = _u32(block, 4), _u32(block, 96)
    if incompat & EXT_64BIT:
        blocks |= _u32(block, 336)[0] << 32
    block_bytes = 1024 << min(_u32(block, 24)[0], 16)
    return Superblock(fstype="ext4", block_bytes=block_bytes, claimed_bytes=block_bytes * blocks)


def _btrfs(block: bytes) -> Superblock:
    if len(block) < HEAD_BYTES or block[64:72] != b"_BHRfS_M":
        return Superblock()
    (sector_bytes,), (on_this_device,) = _u32(block, 144), _u64(block, 209)  # dev_item.total_bytes
    return Superblock(fstype="btrfs", block_bytes=sector_bytes, claimed_bytes=on_this_device)


def ext_damage(block: bytes, now_sec: float) -> str:
    """Say why an ext2/3/4 superblock wants a check, in the words of e2fsck's check_if_skip().

    A clock that is behind the last check is not believed: a board without one would check at every boot.
    """
    if not _is_ext(block):
        return "has no superblock of ext2/3/4 where it has to be"
    mounts, max_mounts = struct.unpack_from("<Hh", block, 52)
    state = _ext_state(block)
    last_check, interval_sec = struct.unpack_from("<II", block, 64)
    last_check |= block[0x277] << 32  # s_lastcheck_hi
    days = (int(now_sec) - last_check) // 86400
    reasons = (
        (state & EXT_ERROR, "contains a file system with errors"),
        (not state & EXT_VALID, "was not cleanly unmounted"),
        (state & EXT_ORPHAN, "was left while orphaned inodes were recovered"),
        (0 < max_mounts <= mounts, f"has been mounted {mounts} times without being checked"),
        (0 < interval_sec <= now_sec - last_check, f"has gone {days} days without being checked"),
    )
    return next((reason for wrong, reason in reasons if wrong), "")


def fat_damage(head: bytes) -> str:
    """Say why a FAT12/16/32 boot sector wants a check: its dirty bit is set while it is mounted rw."""
    if len(head) < 512:
        return "has no boot sector"
    (sectors_per_fat16,) = struct.unpack_from("<H", head, 22)
    state = head[37] if sectors_per_fat16 else head[65]
    return "was not cleanly unmounted" if state & FAT_DIRTY else ""


def _u32(data: bytes, offset: int) -> tuple[int]:
    return struct.unpack_from("<I", data, offset)


def _u64(data: bytes, offset: int) -> tuple[int]:
    return struct.unpack_from("<Q", data, offset)
