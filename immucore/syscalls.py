"""The system calls that Python has no function for, through the C library. Every failure is an OSError."""

from __future__ import annotations

import _ctypes
import errno
import os
import struct

RESOLVE_IN_ROOT, RESOLVE_NO_SYMLINKS = 0x10, 0x04  # openat2(2)
ATTEMPTS = 1000  # of openat2: EAGAIN where something was renamed, anywhere, while it looked at a `..`
MS = {
    "ro": 1,
    "nosuid": 2,
    "nodev": 4,
    "noexec": 8,
    "sync": 16,
    "dirsync": 128,
    "nosymfollow": 256,
    "noatime": 1024,
    "nodiratime": 2048,
    "relatime": 1 << 21,
    "strictatime": 1 << 24,
    "silent": 1 << 15,
    "iversion": 1 << 23,
    "lazytime": 1 << 25,
}  # mount(2), linux/mount.h
MS_BIND = 4096
MS_REC, MS_SLAVE = 1 << 14, 1 << 19
MNT_DETACH = 2  # umount2(2)
# asm-generic/unistd.h, the same on every architecture but alpha
_NR_OPEN_TREE = 428
_NR_MOVE_MOUNT, _NR_FSOPEN, _NR_FSCONFIG, _NR_FSMOUNT, _NR_FSPICK, _NR_OPENAT2 = 429, 430, 431, 432, 433, 437
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING = 0, 1  # linux/mount.h, as what follows
_FSCONFIG_CMD_CREATE, _FSCONFIG_CMD_RECONFIGURE = 6, 7
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = _FSPICK_CLOEXEC = 1
_FSPICK_EMPTY_PATH = 8
_MOUNT_ATTR_RDONLY = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_OPEN_TREE_CLONE = 1
_AT_FDCWD = -100
_CLONE_NEWNS = 0x20000  # linux/sched.h
_RENAME_EXCHANGE = 2  # linux/fs.h


class _Function(_ctypes.CFuncPtr):
    """A function of the C library that answers an int: as ctypes has it, but importing that costs 1 ms."""

    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO


class _Long(_ctypes._SimpleCData):  # type: ignore[type-arg]  # it takes none before Python 3.13
    """An argument that is a long; a plain int is passed as a C int, bytes as a pointer to them."""

    _type_ = "l"


_program = _ctypes.dlopen(None, os.RTLD_NOW)  # type: ignore[arg-type]  # None is this program
_mount = _Function(_ctypes.dlsym(_program, "mount"))
_umount2 = _Function(_ctypes.dlsym(_program, "umount2"))
_syncfs = _Function(_ctypes.dlsym(_program, "syncfs"))
_reboot = _Function(_ctypes.dlsym(_program, "reboot"))
_syscall = _Function(_ctypes.dlsym(_program, "syscall"))


def mount(source: str, target: str, fstype: str, flags: int, data: str) -> None:
    """Mount a file system, in the words of the manual page."""
    arguments = [os.fsencode(text) for text in (source, target, fstype, data)]
    if _mount(arguments[0], arguments[1], arguments[2], _Long(flags), arguments[3]) < 0:
        raise _error(target)


def umount(target: str, flags: int = 0) -> None:
    """Take away what was mounted last on `target`."""
    if _umount2(os.fsencode(target), flags) < 0:
        raise _error(target)


def detached_mount(source: str, fstype: str, *, read_only: bool, options: tuple[str, ...] = ()) -> int:
    """Make a file system ready, mounted nowhere yet; closing the descriptor takes it back (fsmount(2)).

    `options` are flags of the file system, such as noload. One that is mounted already is only shared.
    """
    context = _call(_NR_FSOPEN, os.fsencode(fstype), _FSOPEN_CLOEXEC, path=source)
    try:
        _call(_NR_FSCONFIG, context, _FSCONFIG_SET_STRING, b"source", os.fsencode(source), 0, path=source)
        for option in ("ro", *options) if read_only else options:
            _call(_NR_FSCONFIG, context, _FSCONFIG_SET_FLAG, os.fsencode(option), None, 0, path=source)
        _call(_NR_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0, path=source)
        attributes = _MOUNT_ATTR_RDONLY if read_only else 0
        return _call(_NR_FSMOUNT, context, _FSMOUNT_CLOEXEC, attributes, path=source)
    finally:
        os.close(context)


def clone_mount(path: str) -> int:
    """Open a directory as it is without what is mounted below it (open_tree(2)); closing it is the end."""
    return _call(_NR_OPEN_TREE, _AT_FDCWD, os.fsencode(path), _OPEN_TREE_CLONE | os.O_CLOEXEC, path=path)


def reconfigure(descriptor: int, option: str) -> None:
    """Make the file system of a detached mount `rw` or `ro`; other mounts of it stay what they are."""
    picked = _call(_NR_FSPICK, descriptor, b"", _FSPICK_CLOEXEC | _FSPICK_EMPTY_PATH, path="")
    try:
        _call(_NR_FSCONFIG, picked, _FSCONFIG_SET_FLAG, os.fsencode(option), None, 0, path="")
        _call(_NR_FSCONFIG, picked, _FSCONFIG_CMD_RECONFIGURE, None, None, 0, path="")
    finally:
        os.close(picked)


def attach_mount(descriptor: int, target: str) -> None:
    """Put what detached_mount() made in its place (move_mount(2))."""
    where = os.fsencode(target)
    _call(_NR_MOVE_MOUNT, descriptor, b"", _AT_FDCWD, where, _MOVE_MOUNT_F_EMPTY_PATH, path=target)


def reboot(command: int) -> None:
    """Restart or halt at once, without another word to anybody (reboot(2)); needs CAP_SYS_BOOT."""
    if _reboot(_Long(command)) < 0:
        raise _error("")


def _call(number: int, *arguments: int | bytes | None, path: str) -> int:
    answer = int(_syscall(_Long(number), *[_Long(a) if isinstance(a, int) else a for a in arguments]))
    if answer < 0:
        raise _error(path)
    return answer


def openat2(directory: int, path: str, flags: int, resolve: int = RESOLVE_IN_ROOT) -> int:
    """Open `path` below `directory`, by default as if that were the root: no symlink, no `..` leads out."""
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, resolve)  # struct open_how: flags, mode, resolve
    for _attempt in range(ATTEMPTS):
        descriptor = _syscall(_Long(_NR_OPENAT2), directory, os.fsencode(path), how, _Long(len(how)))
        if descriptor >= 0:
            return int(descriptor)
        if _ctypes.get_errno() != errno.EAGAIN:
            break
    raise _error(path)


def exchange(one: str, other: str) -> None:
    """Give two paths of a file system each other's name in one step (renameat2(2), RENAME_EXCHANGE)."""
    renameat2 = _Function(_ctypes.dlsym(_program, "renameat2"))
    paths = os.fsencode(one), os.fsencode(other)
    if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) < 0:
        raise _error(other)


def leave_mounts() -> None:
    """Give this process mounts of its own: what it mounts from now on, nobody else sees (unshare(2))."""
    unshare = _Function(_ctypes.dlsym(_program, "unshare"))
    if unshare(_CLONE_NEWNS) < 0:
        raise _error("/")
    mount("none", "/", "none", MS_REC | MS_SLAVE, "")


def syncfs(descriptor: int) -> None:
    """Write out the file system that `descriptor` is on."""
    if _syncfs(descriptor) < 0:
        raise _error("")


def _error(path: str) -> OSError:
    number = _ctypes.get_errno()
    return OSError(number, os.strerror(number), path)
