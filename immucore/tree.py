"""A directory as the merge sees it: what makes each file what it is.

Reads only. Times and inodes do not count, and of the extended attributes not those that label a file for a
security policy: relabelling a system is nobody's change of its files.
"""

from __future__ import annotations

import errno
import os
import stat

# The hashlib module would bring OpenSSL; this is its blake2b.
from _blake2 import blake2b

from immucore import files
from immucore.merge import DIRECTORY, Entry

_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: DIRECTORY,
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character",
    stat.S_IFBLK: "block",
}
_CHUNK_BYTES = 1 << 16  # what is hashed at once; a hole of this size is not
_ZEROS = bytes(_CHUNK_BYTES)
_DIGEST_BYTES = 20


class Tree:
    """A directory on a file system, as both sides of a merge."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._links: dict[tuple[int, int], str] = {}
        self.root = self.entry("")

    def kinds(self, path: str) -> dict[str, str]:
        """Give the kind of each thing in a directory, by name. Raises OSError."""
        with os.scandir(self._place(path)) as found:
            return {each.name: _kind(each) for each in found}

    def children(self, path: str) -> dict[str, Entry]:
        """Give what is in a directory, by name; what is one file under several names says so."""
        return {
            name: self._look(f"{path}/{name}" if path else name, linked=True)
            for name in files.names(self._place(path))
        }

    def entry(self, path: str) -> Entry:
        """Give one thing, without what it is linked to; a file's data is read. Raises OSError."""
        return self._look(path, linked=False)

    def _place(self, path: str) -> str:
        return f"{self._path}/{path}" if path else self._path

    def _look(self, path: str, *, linked: bool) -> Entry:
        place = self._place(path)
        status = os.lstat(place)
        mode = status.st_mode
        content, flags, link = "", 0, ""
        if stat.S_ISREG(mode):
            content, flags = _data(place, status.st_size)
        elif stat.S_ISDIR(mode):
            flags = files.flags_of(place)
        elif stat.S_ISLNK(mode):
            content = os.readlink(place)
        elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            content = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        if linked and status.st_nlink > 1 and not stat.S_ISDIR(mode):
            first = self._links.setdefault((status.st_dev, status.st_ino), path)
            link = f"{status.st_nlink} {first}"
        return Entry(
            kind=_kind_of(mode),
            mode=stat.S_IMODE(mode),
            uid=status.st_uid,
            gid=status.st_gid,
            content=content,
            flags=flags,
            xattrs=tuple(
                (name, os.getxattr(place, name, follow_symlinks=False))
                for name in sorted(files.xattrs(place))
                if name not in files.LABELS
            ),
            link=link,
        )


def _kind(found: os.DirEntry[str]) -> str:
    if found.is_symlink():
        return "symlink"
    if found.is_dir(follow_symlinks=False):
        return DIRECTORY
    if found.is_file(follow_symlinks=False):
        return "file"
    return _kind_of(found.stat(follow_symlinks=False).st_mode)


def _kind_of(mode: int) -> str:
    return _KINDS[stat.S_IFMT(mode)]


def _data(path: str, size_bytes: int) -> tuple[str, int]:
    """Return size and digest of a file's data, and its flags.

    What is zero is not hashed, so that a file is the same with holes and without, and one of a terabyte of
    nothing takes no time.
    """
    hashed = blake2b(digest_size=_DIGEST_BYTES)
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        flags = files.flags_of_open(descriptor)
        position = 0
        while position < size_bytes:
            chunk = os.pread(descriptor, _CHUNK_BYTES, position)
            if not chunk:
                break
            if chunk != _ZEROS[: len(chunk)]:
                hashed.update(position.to_bytes(8, "little"))
                hashed.update(chunk)
                position += len(chunk)
            else:
                position = _next_data(descriptor, position + len(chunk), size_bytes)
    finally:
        os.close(descriptor)
    return f"{size_bytes} {hashed.hexdigest()}", flags


def _next_data(descriptor: int, position: int, size_bytes: int) -> int:
    """Skip a hole, to the beginning of the chunk in which it ends."""
    if position >= size_bytes:
        return size_bytes
    try:
        found = os.lseek(descriptor, position, os.SEEK_DATA)
    except OSError as error:
        return size_bytes if error.errno == errno.ENXIO else position  # nothing but a hole is left
    return max(position, found // _CHUNK_BYTES * _CHUNK_BYTES)
