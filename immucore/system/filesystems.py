"""Making the file systems of partitions straight into their place on a disk, which may be a file.

Nothing is mounted, so a file takes neither root nor a loop device, and a block device is done the same way.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from immucore.system import content, images
from immucore.system.partitions import MIB
from immucore.system.programs import run

if TYPE_CHECKING:
    from immucore.system.partitions import Partition

# As the images have it, which GRUB 2.06 reads, and what a file system needs that is written to, and grows.
EXT4_FEATURES = f"{images.EXT4_FEATURES},has_journal,resize_inode"
INODE_BYTES = 256
SMALL_MIB = 512  # below that mke2fs makes four times as many inodes
# (sectors at least, bits of a FAT entry, sectors of a cluster). UEFI wants FAT32 on a disk, but that has
# 65525 clusters at least, and FAT16 has 4085.
FATS = ((560_000, 32, 8), (70_000, 32, 1), (10_000, 16, 2), (0, 12, 4))
JOURNAL_MIB = (4, 1024)  # at least, at most


def journal_mib(size_mib: int) -> int:
    """Return the size of the journal of an ext4 file system: what mke2fs gives the large ones."""
    least, most = JOURNAL_MIB
    return max(least, min(size_mib // 128, most))


def _bytes_per_inode(size_mib: int) -> int:
    return 4096 if size_mib < SMALL_MIB else 16384


def room_bytes(size_mib: int) -> int:
    """Return how much is left of a partition for files: of ext4 all but its journal and tables.

    FAT, whose tables are smaller, has some more.
    """
    size_bytes = size_mib * MIB
    inodes = size_bytes // _bytes_per_inode(size_mib)
    return size_bytes - (journal_mib(size_mib) + 1) * MIB - inodes * INODE_BYTES - size_bytes // 200


def least_mib(needed_bytes: int) -> int:
    """Return the size of the smallest partition that has room for so much."""
    size_mib = needed_bytes // MIB + 1
    while room_bytes(size_mib) < needed_bytes:
        size_mib += 1
    return size_mib


def make(
    target: str, partition: Partition, directory: str, *, sector_bytes: int = 512, lazy: bool = False
) -> None:
    """Make the file system of a partition at its place on a disk, with what `directory` holds, if any.

    `lazy` is for ext4(). Raises ImageError.
    """
    label, size_mib, offset_bytes = partition.label, partition.size_mib, partition.offset_bytes
    place: Any = {"label": label, "size_mib": size_mib, "offset_bytes": offset_bytes, "directory": directory}
    if partition.fstype == "vfat":
        vfat(target, sector_bytes=sector_bytes, **place)
    elif partition.fstype == "ext4":
        ext4(target, lazy=lazy, **place)
        check_ext4(target, label, offset_bytes)


def ext4(
    target: str,
    *,
    label: str,
    size_mib: int,
    offset_bytes: int = 0,
    directory: str = "",
    uuid: str = "random",
    lazy: bool = False,
) -> None:
    """Make an ext4 file system, and in it what `directory` holds, at an offset of a block device or a file.

    `lazy` leaves the inode tables to the kernel to be cleared once it is mounted: on a large disk that takes
    minutes; in a file they are holes. Raises ImageError.
    """
    # One -E: a second one would replace the first.
    extended = (
        f"offset={offset_bytes},root_owner=0:0,nodiscard,lazy_journal_init=0,lazy_itable_init={lazy:d}"
    )
    argv = ["mke2fs", "-q", "-F", "-t", "ext4", "-O", EXT4_FEATURES, "-E", extended, "-L", label, "-U", uuid]
    argv += [
        "-b",
        str(content.BLOCK_BYTES),
        "-I",
        str(INODE_BYTES),
        "-i",
        str(_bytes_per_inode(size_mib)),
        "-m",
        "0",
    ]
    argv += ["-J", f"size={journal_mib(size_mib)}", *(["-d", directory] if directory else [])]
    run([*argv, target, f"{size_mib}M"], f"cannot make the file system '{label}' on '{target}'")


def check_ext4(target: str, label: str, offset_bytes: int = 0) -> None:
    """Let e2fsck look at what was made, and change nothing. Raises ImageError."""
    run(["e2fsck", "-f", "-n", f"{target}?offset={offset_bytes}"], f"cannot trust '{label}' on '{target}'")


def vfat(
    target: str,
    *,
    label: str,
    size_mib: int,
    offset_bytes: int = 0,
    directory: str = "",
    sector_bytes: int = 512,
) -> None:
    """Make a FAT file system, and in it what `directory` holds, at an offset. Raises ImageError."""
    failure = f"cannot make the file system '{label}' on '{target}'"
    # -I: a whole disk is meant; --mbr=n: without the table that a stick without partitions has
    argv = ["mkfs.vfat", "-I", "--mbr=n", "-n", label, "-S", str(sector_bytes)]
    # mkfs.vfat itself would go by the size of the whole disk
    sectors = size_mib * MIB // sector_bytes
    bits, cluster = next((bits, cluster) for least, bits, cluster in FATS if sectors >= least)
    argv += ["-F", str(bits), "-s", str(cluster)]
    argv += [f"--offset={offset_bytes // sector_bytes}", target, str(size_mib * 1024)]
    run(argv, failure)
    names = sorted(os.listdir(directory)) if directory else []
    if names:
        paths = [os.path.join(directory, name) for name in names]
        run(["mcopy", "-s", "-i", f"{target}@@{offset_bytes}", *paths, "::"], failure)
