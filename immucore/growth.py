"""Growing a mounted file system to the size of its device. Imported only by a boot that is asked to."""

from __future__ import annotations

import fcntl
import os
import struct

from immucore import superblock
from immucore.errors import MountError

EXT4_IOC_RESIZE_FS = 0x40086610  # linux/ext4.h; a __u64: blocks
XFS_IOC_FSGEOMETRY_V1 = 0x80705864  # xfs_fs.h; struct xfs_fsop_geom_v1
XFS_IOC_FSGROWFSDATA = 0x4010586E  # struct xfs_growfs_data: __u64 blocks, __u32 imaxpct
BTRFS_IOC_RESIZE = 0x50009403  # linux/btrfs.h; struct btrfs_ioctl_vol_args: __s64, char[4088]


def grow(source: str, mounted: str) -> bool:
    """Let the file system of the device `source`, mounted at `mounted`, fill it; False: it does already.

    Raises OSError in the kernel's words, MountError for a file system that cannot grow.
    """
    fstype = superblock.identify(source).fstype
    if fstype not in _GROW:
        raise MountError(
            f"cannot grow '{mounted}': its file system is none of ext4, xfs and btrfs",
            hint="remove x-systemd.growfs from its options",
        )
    device = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    directory = os.open(mounted, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _GROW[fstype](source, os.lseek(device, 0, os.SEEK_END), directory)
    finally:
        os.close(device)
        os.close(directory)


def _ext4(source: str, size_bytes: int, directory: int) -> bool:
    found = superblock.identify(source)
    blocks = size_bytes // found.block_bytes
    if found.claimed_bytes >= blocks * found.block_bytes:
        return False
    fcntl.ioctl(directory, EXT4_IOC_RESIZE_FS, struct.pack("=Q", blocks))
    return True


def _xfs(_source: str, size_bytes: int, directory: int) -> bool:
    # Its superblock on the disk may be older than the journal; the mounted file system knows.
    geometry = fcntl.ioctl(directory, XFS_IOC_FSGEOMETRY_V1, bytes(112))
    block_bytes, inode_percent, has_blocks = struct.unpack("=I24xIQ", geometry[:40])
    blocks = size_bytes // block_bytes
    if has_blocks >= blocks:
        return False
    fcntl.ioctl(directory, XFS_IOC_FSGROWFSDATA, struct.pack("=QI4x", blocks, inode_percent))
    return True


def _btrfs(source: str, size_bytes: int, directory: int) -> bool:
    found = superblock.identify(source)
    if found.claimed_bytes > size_bytes - found.block_bytes:
        return False
    # A buffer of more than 1024 bytes has to be a mutable one.
    fcntl.ioctl(directory, BTRFS_IOC_RESIZE, bytearray(struct.pack("=q4088s", 0, b"max")))
    return True


_GROW = {"ext4": _ext4, "xfs": _xfs, "btrfs": _btrfs}
