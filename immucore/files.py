"""Files with everything that makes them: copying, linking and removing trees, and their attributes.

Every kind of file, every attribute. A path is never followed if it is a symlink.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from immucore import syscalls
from immucore.values import Record

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from collections.abc import Callable

CHUNK_BYTES = 1 << 20
BLOCK_BYTES = 4096  # what even the smallest file or directory takes, more or less
_LONG = struct.calcsize("l") << 16  # linux/fs.h says long; the kernel reads and writes an int
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS = 0x80006601 | _LONG, 0x40006602 | _LONG
IMMUTABLE, APPEND, ENCRYPTED, CASEFOLD = 0x10, 0x20, 0x800, 0x40000000
# Those that people set (ioctl_iflags(2)): a c d A D i j S s t T u C. The others are the file system's own.
FLAGS = (
    0x1 | 0x2 | 0x4 | 0x8 | IMMUTABLE | APPEND | 0x40 | 0x80 | 0x4000 | 0x8000 | 0x10000 | 0x20000 | 0x800000
)
# Of a security policy: they are copied, and no reason to say that a file has changed.
LABELS = ("security.selinux", "security.SMACK64", "security.ima", "security.evm")
_NO_XATTRS = (errno.EOPNOTSUPP, errno.ENODATA, errno.EPERM)
_NO_FLAGS = (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL)


class Copied:
    """What belongs together in what was copied, and what is still to be done with it."""

    def __init__(self) -> None:
        self.first: dict[tuple[int, int], str] = {}  # of a file with several links, by device and inode
        self.immutable: list[tuple[str, int]] = []  # files, and their flags: no link can be made to one

    def finish(self) -> None:
        """Make immutable what has to be."""
        for path, flags in self.immutable:
            set_flags(path, flags)


def copy(source: str, target: str, copied: Copied) -> None:
    """Copy a file or a tree to `target`, which is not there yet; the end of it is `copied.finish()`.

    Modes, owners, times, extended attributes (ACLs, labels and capabilities are some), flags (chattr(1)),
    hard links, symlinks, devices and holes are kept. Raises OSError.
    """
    status = os.lstat(source)
    if stat.S_ISDIR(status.st_mode):
        os.mkdir(target, 0o700)
        for name in names(source):
            copy(f"{source}/{name}", f"{target}/{name}", copied)
        copy_all_attributes(source, target)  # last: what is put in changes the times
        return
    if status.st_nlink > 1:
        first = copied.first.setdefault((status.st_dev, status.st_ino), target)
        if first != target and link(first, target):
            return
    if stat.S_ISREG(status.st_mode):
        flags = _copy_file(source, target, status)
        if flags & (IMMUTABLE | APPEND):
            copied.immutable.append((target, flags))
        elif flags:
            set_flags(target, flags)
        return
    if stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(source), target)
    else:
        os.mknod(target, stat.S_IFMT(status.st_mode) | 0o600, status.st_rdev)
    copy_attributes(source, target)


def link(source: str, target: str) -> bool:
    """Give a file another name; False if it cannot have one: a directory, or chattr +i or +a."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EMLINK):
            raise
        return False
    return True


def link_tree(source: str, target: str, copied: Copied) -> None:
    """Make a tree at `target`, which is not there yet, of the very files of `source`. Raises OSError."""
    if link(source, target):  # most are files, and directories cannot be linked
        return
    if not stat.S_ISDIR(os.lstat(source).st_mode):
        copy(source, target, copied)
        return
    os.mkdir(target, 0o700)
    for name in names(source):
        link_tree(f"{source}/{name}", f"{target}/{name}", copied)
    copy_all_attributes(source, target)


def names(directory: str) -> list[str]:
    """List what is in a directory, in the order of the names."""
    with os.scandir(directory) as entries:
        return sorted([entry.name for entry in entries])


def copy_attributes(source: str, target: str) -> None:
    """Give `target` the owner, xattrs, mode and times of `source`, and no xattr that it has inherited."""
    status = os.lstat(source)
    os.chown(target, status.st_uid, status.st_gid, follow_symlinks=False)
    given = xattrs(source)
    _disinherit(target, given)
    for name in given:
        _set_xattr(target, name, os.getxattr(source, name, follow_symlinks=False), follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(target, stat.S_IMODE(status.st_mode))  # after chown(2), which takes set-user-ID away
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)


def copy_all_attributes(source: str, target: str) -> None:
    """Give a directory the flags of `source` too, which has to be the last: it may be immutable then.

    Raises OSError for one that is encrypted or ignores case: what is in it is not what it seems to be.
    """
    copy_attributes(source, target)
    descriptor = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        flags = _flags(descriptor)
    finally:
        os.close(descriptor)
    if flags & (ENCRYPTED | CASEFOLD):
        raise OSError(errno.EOPNOTSUPP, "an encrypted or casefolded directory cannot be taken over", source)
    set_flags(target, flags & FLAGS)


def _disinherit(target: str | int, given: list[str]) -> None:
    """Take away what a new file has of the directory that it is in, such as a default ACL (acl(5))."""
    for name in xattrs(target):
        if name not in given and name not in LABELS:
            os.removexattr(target, name, follow_symlinks=isinstance(target, int))


def _set_xattr(target: str | int, name: str, value: bytes, *, follow_symlinks: bool = True) -> None:
    try:
        os.setxattr(target, name, value, follow_symlinks=follow_symlinks)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP or not name.startswith("user."):
            raise  # before Linux 6.6 a tmpfs, which may hold an overlay's upper, has no user attributes


def copy_label(source: str, target: str) -> None:
    """Give `target` the SELinux label of `source`, if that has one: no policy is loaded that would do it."""
    if label := _label(source):
        os.setxattr(target, "security.selinux", label, follow_symlinks=False)


def make_directory(path: str) -> None:
    """Make a directory (0755) with the SELinux label of its parent, as the kernel does it under a policy.

    The parent keeps its own: where overlayfs copies that up, SELinux without a policy leaves the label out
    (selinux_inode_copy_up_xattr in security/selinux/hooks.c).
    """
    parent = os.path.dirname(path)
    label = _label(parent)
    os.mkdir(path, 0o755)
    if label:
        for each in (parent, path):
            os.setxattr(each, "security.selinux", label, follow_symlinks=False)


def _label(path: str) -> bytes:
    try:
        return os.getxattr(path, "security.selinux", follow_symlinks=False)
    except OSError as error:
        if error.errno in _NO_XATTRS:
            return b""
        raise


def xattrs(path: str | int) -> list[str]:
    """List the extended attributes, but not those that are overlayfs' own, of a lower layer."""
    try:
        found = os.listxattr(path, follow_symlinks=isinstance(path, int))
    except OSError as error:
        if error.errno in _NO_XATTRS:
            return []
        raise
    return [name for name in found if not name.startswith("trusted.overlay.")]


def flags_of(path: str) -> int:
    """Return the flags of a regular file or directory as people set them; 0 where there are none."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return flags_of_open(descriptor)
    finally:
        os.close(descriptor)


def flags_of_open(descriptor: int) -> int:
    """Return the flags of an open file."""
    return _flags(descriptor) & FLAGS


def _flags(descriptor: int) -> int:
    try:
        answer = fcntl.ioctl(descriptor, FS_IOC_GETFLAGS, bytes(8))
    except OSError as error:
        if error.errno in _NO_FLAGS:
            return 0
        raise
    return int(struct.unpack_from("=i", answer)[0])


def set_flags(path: str, flags: int) -> None:
    """Set the flags of a regular file or directory that people set, and leave the file system's own."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        there = struct.unpack_from("=i", fcntl.ioctl(descriptor, FS_IOC_GETFLAGS, bytes(8)))[0]
        if there & FLAGS != flags:
            fcntl.ioctl(descriptor, FS_IOC_SETFLAGS, struct.pack("=i4x", there & ~FLAGS | flags))
    except OSError as error:
        if error.errno not in _NO_FLAGS:  # a file system without this flag
            raise
    finally:
        os.close(descriptor)


def _copy_file(source: str, target: str, status: os.stat_result) -> int:
    """Copy a regular file; return its flags, which have to be the last.

    What does not have to be looked up by its name is not: ten thousand files are copied at a first boot.
    """
    read = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        write = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if status.st_size > CHUNK_BYTES or status.st_blocks * 512 < status.st_size:
                _copy_extents(read, write, status.st_size)
            else:
                _copy_data(read, write)
            os.chown(write, status.st_uid, status.st_gid)
            given = xattrs(read)
            _disinherit(write, given)
            for name in given:
                _set_xattr(write, name, os.getxattr(read, name))
            os.chmod(write, stat.S_IMODE(status.st_mode))  # after chown(2), which takes set-user-ID away
            os.utime(write, ns=(status.st_atime_ns, status.st_mtime_ns))
            flags = flags_of_open(read)
            if flags_of_open(write) & ~flags:  # inherited: chattr +A of the directory that it is in
                set_flags(target, 0)
            return flags
        finally:
            os.close(write)
    finally:
        os.close(read)


def _copy_data(read: int, write: int) -> None:
    while content := os.read(read, CHUNK_BYTES):
        while content:
            content = content[os.write(write, content) :]


def _copy_extents(read: int, write: int, size_bytes: int) -> None:
    """Copy data and leave holes out (lseek(2), SEEK_DATA)."""
    position = 0
    while position < size_bytes:
        try:
            position = os.lseek(read, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole is left
                break
            raise
        end = os.lseek(read, position, os.SEEK_HOLE)
        os.lseek(write, position, os.SEEK_SET)
        while position < end and (
            sent := os.sendfile(write, read, position, min(CHUNK_BYTES, end - position))
        ):
            position += sent
    os.ftruncate(write, size_bytes)


def remove(path: str) -> None:
    """Remove a tree, if there is one, also where it is immutable."""
    try:
        _remove_one(path, os.unlink)
    except FileNotFoundError:
        return
    except IsADirectoryError:
        for name in names(path):
            remove(f"{path}/{name}")
        _remove_one(path, os.rmdir)


def _remove_one(path: str, away: Callable[[str], None]) -> None:
    try:
        away(path)
    except PermissionError:
        loosen(path)
        loosen(os.path.dirname(path))
        away(path)


def loosen(path: str) -> int:
    """Let a file be changed (chattr -ia); return the flags that it had, which only few kinds can have."""
    if stat.S_IFMT(os.lstat(path).st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
        return 0
    if (flags := flags_of(path)) & (IMMUTABLE | APPEND):
        set_flags(path, flags & ~(IMMUTABLE | APPEND))
    return flags


class Size(Record):
    """How much a tree takes on a disk, or how much there is."""

    bytes: int
    inodes: int

    def __add__(self, other: Size) -> Size:
        return Size(bytes=self.bytes + other.bytes, inodes=self.inodes + other.inodes)


def size(path: str, *, whole: bool = True) -> Size:
    """Measure a file, or a directory with or without what is in it; what is not there takes nothing.

    Raises OSError.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return Size(bytes=0, inodes=0)
    found = Size(bytes=-(-status.st_blocks * 512 // BLOCK_BYTES) * BLOCK_BYTES, inodes=1)
    if stat.S_ISDIR(status.st_mode):
        found = Size(bytes=BLOCK_BYTES, inodes=1)
        for name in names(path) if whole else ():
            found += size(f"{path}/{name}")
    return found


def free(directory: str) -> Size:
    """Tell how much there is for root on the file system of a directory. Raises OSError."""
    status = os.statvfs(directory)
    inodes = status.f_ffree if status.f_files else 1 << 62  # btrfs does not count them
    return Size(bytes=status.f_bfree * status.f_frsize, inodes=inodes)


def fsync(path: str) -> None:
    """Write a file or a directory out to its disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file_system(directory: str) -> None:
    """Write the file system out that a directory is on (syncfs(2))."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syscalls.syncfs(descriptor)
    finally:
        os.close(descriptor)
