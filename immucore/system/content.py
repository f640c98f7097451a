"""What is in a tree: its digest, where two trees differ, how much room it takes. Reads only."""

from __future__ import annotations

import errno
import os
import stat
from hashlib import blake2b
from itertools import zip_longest
from typing import TYPE_CHECKING

from immucore import files
from immucore.system import stopping
from immucore.system.programs import silent
from immucore.tree import Tree
from immucore.values import Record

if TYPE_CHECKING:
    from collections.abc import Iterator

    from immucore.merge import Entry
    from immucore.system.programs import Advance

IDENTITY = "usr/lib/cos/image.cfg"  # which image file it is, and no part of what is in it
_UNCOUNTED = (IDENTITY, os.path.dirname(IDENTITY))  # the directory is made where a source has none
DIGEST_BYTES = 8
BLOCK_BYTES = 4096
_OURS = "lost+found"  # mke2fs makes it, e2fsck wants it, and no source has it
_DIRECTORY_ENTRY_BYTES = 8  # before the name (ext4.h, struct ext4_dir_entry_2)
_INLINE_SYMLINK_BYTES = 59


def walk(tree: str) -> Iterator[tuple[str, Entry]]:
    """Give everything in a tree, each path with what makes it, in an order that does not change.

    A socket is left out: without its server it is nothing, and mke2fs makes none. Raises OSError.
    """
    there = Tree(tree)
    pending = [("", there.root)]
    while pending:
        stopping.point()
        path, entry = pending.pop()
        yield path, entry
        if entry.kind == "directory":
            below = there.children(path)
            pending += [
                (f"{path}/{name}" if path else name, below[name])
                for name in sorted(below, reverse=True)
                if below[name].kind != "socket" and (path or name != _OURS)
            ]


def digest(tree: str, advance: Advance = silent, total_bytes: int = 0) -> str:
    """Give 16 hexadecimal digits that two trees share only if their files are the same.

    Paths, kinds, modes, owners, extended attributes, data and hard links count; times do not, nor the labels
    of a security policy, nor IDENTITY. Raises OSError.
    """
    hashed, done = blake2b(digest_size=DIGEST_BYTES), 0
    for path, entry in walk(tree):
        if path in _UNCOUNTED:
            continue
        fields = (path, entry.kind, f"{entry.mode:o} {entry.uid} {entry.gid}", entry.content, entry.link)
        parts = [os.fsencode(field) for field in fields]
        for name, value in entry.xattrs:
            parts += [os.fsencode(name), value]
        hashed.update(b"%d\0" % len(parts) + b"".join(b"%d\0%b" % (len(part), part) for part in parts))
        if entry.kind == "file":
            done += int(entry.content.partition(" ")[0])
            advance(min(done, total_bytes), total_bytes)
    return hashed.hexdigest()


def difference(
    one: str, other: str, *, exact: bool = True, advance: Advance = silent, total_bytes: int = 0
) -> str:
    """Say where two trees differ first; empty where they do not.

    Not `exact` is what somebody who is not root can read back of an image: kinds, modes of files, data.
    Raises OSError.
    """
    done = 0
    pairs = zip_longest(_compared(one, exact), _compared(other, exact), fillvalue=("", None))
    for (path, entry), (there, found) in pairs:
        if path != there:
            return f"'/{path if entry and (not found or path < there) else there}' is only in one of them"
        if entry != found:
            return f"'/{path}' is not the same"
        if entry and entry.kind == "file":
            done += int(entry.content.partition(" ")[0])
            advance(min(done, total_bytes), total_bytes)
    return ""


def _compared(tree: str, exact: bool) -> Iterator[tuple[str, Entry | None]]:
    for path, entry in walk(tree):
        if exact:
            place = os.path.join(tree, path)
            labels = [
                (name, os.getxattr(place, name, follow_symlinks=False))
                for name in files.xattrs(place)
                if name in files.LABELS
            ]
            # An image has no flags of chattr(1).
            yield path, entry.replace(flags=0, xattrs=(*entry.xattrs, *sorted(labels)))
        elif entry.kind in ("file", "directory", "symlink"):
            mode = entry.mode & 0o777 if entry.kind == "file" else 0
            yield path, entry.replace(flags=0, link="", uid=0, gid=0, xattrs=(), mode=mode)


class Room(Record):
    """What the files of a tree take in a file system with blocks of 4096 bytes, without its own tables."""

    blocks: int
    inodes: int

    @property
    def bytes(self) -> int:
        """The same in bytes."""
        return self.blocks * BLOCK_BYTES


def room(tree: str) -> Room:
    """Measure a tree. Holes take no room, several names of a file take it once. Raises OSError."""
    blocks = inodes = 0
    seen: set[tuple[int, int]] = set()
    pending = [tree]
    while pending:
        directory = pending.pop()
        names_bytes = 0
        with os.scandir(directory) as entries:
            for entry in entries:
                names_bytes += _DIRECTORY_ENTRY_BYTES + -(-len(os.fsencode(entry.name)) // 4) * 4
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    pending.append(entry.path)
                    continue
                if status.st_nlink > 1:
                    if (status.st_dev, status.st_ino) in seen:
                        continue
                    seen.add((status.st_dev, status.st_ino))
                inodes += 1
                blocks += _blocks(entry.path, status)
        inodes += 1
        # An entry does not go over the end of a block: some of each stays empty.
        blocks += 1 + -(-names_bytes // (BLOCK_BYTES - 264)) + bool(files.xattrs(directory))
    return Room(blocks=blocks, inodes=inodes)


def _blocks(path: str, status: os.stat_result) -> int:
    xattrs = bool(files.xattrs(path))
    if stat.S_ISLNK(status.st_mode):
        return xattrs + (status.st_size > _INLINE_SYMLINK_BYTES)
    if not stat.S_ISREG(status.st_mode):
        return int(xattrs)
    size = status.st_size if status.st_blocks * 512 >= status.st_size else _data_bytes(path, status.st_size)
    return xattrs + -(-size // BLOCK_BYTES)


def _data_bytes(path: str, size_bytes: int) -> int:
    """Measure what is no hole, in whole blocks; a file system that compresses says less than there is."""
    found = position = 0
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        while position < size_bytes:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
            position = os.lseek(descriptor, start, os.SEEK_HOLE)
            found += -(-position // BLOCK_BYTES) * BLOCK_BYTES - start // BLOCK_BYTES * BLOCK_BYTES
    except OSError as error:
        if error.errno != errno.ENXIO:  # nothing but a hole is left
            raise
    finally:
        os.close(descriptor)
    return found
