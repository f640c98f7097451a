"""Files with owners, for who is not root: under fakeroot(1) the C library knows them, and mke2fs asks it."""

from __future__ import annotations

import os
import shutil
import stat
import sys

from immucore import process
from immucore.system.errors import ImageError
from immucore.system.programs import FAKEROOT


def enter(failure: str) -> None:
    """Start this program once more under fakeroot(1), where it is not run by root; else do nothing.

    Raises ImageError, with `failure` first, where it is not installed.
    """
    if FAKEROOT in os.environ or os.geteuid() == 0:
        return
    path = process.find("fakeroot")
    if path is None:
        raise ImageError(
            f"{failure}: who is not root needs fakeroot, for the owners of files",
            hint="install fakeroot, or run it as root",
        )
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(path, [path, "--", sys.executable, *sys.orig_argv[1:]])  # noqa: S606


def mend(directory: str) -> None:
    """Have fakeroot know again which files in a tree are files. Raises OSError.

    tar makes what has extended attributes by mknod(2) with no type, which is a file for the kernel, and
    nothing at all for fakeroot (1.31). It cannot be told; a copy in the place of the file is new to it.
    """
    done: dict[int, str] = {}
    for top, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(top, name)
            status = os.lstat(path)
            if stat.S_IFMT(status.st_mode):
                continue
            copy = f"{path}.immucore"
            if status.st_ino in done:
                os.link(done[status.st_ino], copy)
            else:
                _copy(path, copy, status)
                done[status.st_ino] = path
            os.replace(copy, path)


def _copy(path: str, copy: str, status: os.stat_result) -> None:
    shutil.copyfile(path, copy)
    os.chown(copy, status.st_uid, status.st_gid)
    os.chmod(copy, stat.S_IMODE(status.st_mode))
    for name in os.listxattr(path):
        os.setxattr(copy, name, os.getxattr(path, name))
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
