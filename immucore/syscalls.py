"""The system calls that Python has no function for, through the C library. Every failure is an OSError."""

from __future__ import annotations

import ctypes
import os

RESOLVE_IN_ROOT = 0x10  # openat2(2)
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
    "lazytime": 1 << 25,
}  # mount(2), linux/mount.h
MS_BIND = 4096
_NR_OPENAT2 = 437  # on every architecture but alpha

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.syscall.restype = ctypes.c_long


def mount(source: str, target: str, fstype: str, flags: int, data: str) -> None:
    """Mount a file system, in the words of the manual page."""
    arguments = [os.fsencode(text) for text in (source, target, fstype, data)]
    if _libc.mount(arguments[0], arguments[1], arguments[2], flags, arguments[3]) < 0:
        _fail(target)


def openat2(directory: int, path: str, flags: int, resolve: int = RESOLVE_IN_ROOT) -> int:
    """Open `path` below `directory`, by default as if that were the root: no symlink, no `..` leads out."""
    how = (ctypes.c_uint64 * 3)(flags | os.O_CLOEXEC, 0, resolve)
    descriptor: int = _libc.syscall(
        ctypes.c_long(_NR_OPENAT2), ctypes.c_int(directory), os.fsencode(path), how, ctypes.c_size_t(24)
    )
    if descriptor < 0:
        _fail(path)
    return descriptor


def syncfs(descriptor: int) -> None:
    """Write out the file system that `descriptor` is on."""
    if _libc.syncfs(ctypes.c_int(descriptor)) < 0:
        _fail("")


def _fail(path: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), path)
