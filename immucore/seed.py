"""Copying a directory of the image to where its state is kept.

Every attribute, every kind of file, whole or not at all.
"""

from __future__ import annotations

import errno
import os
import stat

from immucore import syscalls

CHUNK_BYTES = 1 << 20
_NO_XATTRS = (errno.EOPNOTSUPP, errno.ENODATA, errno.EPERM)


def copy_tree(source: str, target: str) -> None:
    """Copy `source` to `target`, which is not there yet; a power cut leaves no `target`, or all of it.

    The copy grows in a directory beside it, which a copy that was cut off before may have left. Modes,
    owners, times, extended attributes (ACLs, labels and capabilities are some), hard links, symlinks,
    devices and holes are kept. Raises OSError; what was copied is then removed.
    """
    growing = f"{target}.new"
    remove(growing)
    try:
        os.mkdir(growing, 0o700)
        _copy_directory(source, growing, {})
        directory = os.open(growing, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            syscalls.syncfs(directory)
        finally:
            os.close(directory)
        os.rename(growing, target)
    except OSError:
        remove(growing)
        raise
    fsync(os.path.dirname(target))


def fsync(directory: str) -> None:
    """Write a directory out to its disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_attributes(source: str, target: str) -> None:
    """Give `target` the owner, extended attributes, mode and times of `source`.

    Neither is followed if a symlink.
    """
    status = os.lstat(source)
    os.chown(target, status.st_uid, status.st_gid, follow_symlinks=False)
    for name in _xattrs(source):
        value = os.getxattr(source, name, follow_symlinks=False)
        try:
            os.setxattr(target, name, value, follow_symlinks=False)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP or not name.startswith("user."):
                raise  # before Linux 6.6 a tmpfs, which may hold an overlay's upper, has no user attributes
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(target, stat.S_IMODE(status.st_mode))  # after chown(2), which takes set-user-ID away
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)


def _xattrs(path: str) -> list[str]:
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno in _NO_XATTRS:
            return []
        raise
    return [
        name for name in names if not name.startswith("trusted.overlay.")
    ]  # overlayfs' own, of a lower layer


def _copy_directory(source: str, target: str, links: dict[tuple[int, int], str]) -> None:
    with os.scandir(source) as entries:
        names = sorted(entry.name for entry in entries)
    for name in names:
        _copy(f"{source}/{name}", f"{target}/{name}", links)
    copy_attributes(source, target)  # last: what is put in changes the times


def _copy(source: str, target: str, links: dict[tuple[int, int], str]) -> None:
    status = os.lstat(source)
    if stat.S_ISDIR(status.st_mode):
        os.mkdir(target, 0o700)
        _copy_directory(source, target, links)
        return
    if status.st_nlink > 1:
        first = links.setdefault((status.st_dev, status.st_ino), target)
        if first != target:
            os.link(first, target, follow_symlinks=False)
            return
    if stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(source), target)
    elif stat.S_ISREG(status.st_mode):
        _copy_file(source, target, status.st_size)
    else:
        os.mknod(target, stat.S_IFMT(status.st_mode) | 0o600, status.st_rdev)
    copy_attributes(source, target)


def _copy_file(source: str, target: str, size_bytes: int) -> None:
    """Copy the data of a regular file and leave its holes out (lseek(2), SEEK_DATA)."""
    read = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    write = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
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
    finally:
        os.close(read)
        os.close(write)


def remove(path: str) -> None:
    """Remove a tree, if there is one, without following symlinks."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(status.st_mode):
        os.unlink(path)
        return
    with os.scandir(path) as entries:
        names = [entry.name for entry in entries]
    for name in names:
        remove(f"{path}/{name}")
    os.rmdir(path)
