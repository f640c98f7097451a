"""The image's version of files given back: `immucore state reset PATH [FILE…]`.

What is to be changed is opened through no symlink, what is made new grows in a directory that only root can
enter, and takes its place in one step.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import sys
from typing import TYPE_CHECKING

from immucore import files, syscalls
from immucore.errors import CmdlineError, MountError
from immucore.merge import DIRECTORY
from immucore.state_changes import ADDED, CHANGED, DELETED, both, from_image, look_in_image
from immucore.state_paths import Opened, begin, dot, find, holding, inside, opened, say, shown

if TYPE_CHECKING:
    import argparse
    from collections.abc import Generator

_DOES = {CHANGED: "replace", ADDED: "remove", DELETED: "bring back"}
_DONE = {CHANGED: "replaced", ADDED: "removed", DELETED: "brought back"}
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def reset(arguments: argparse.Namespace) -> int:
    """Give the image's version of files back, or of all of a persistent path."""
    root, paths = begin(arguments)
    kept = find(paths, arguments.path)
    with opened(kept, root) as trees:
        if trees.image < 0:
            raise MountError(
                f"cannot reset '{kept.shown()}': the image that is booted has no such directory",
                hint="remove what is not wanted by hand",
            )
        places = [kept.below(named.rstrip("/") or named) for named in arguments.files] or [""]
        for place in places:
            both(trees, place)
        if "" in places and not arguments.yes and not _confirmed(trees):
            return 0
        with _stage(trees) as stage:
            for place in places:
                _bring_back(trees, stage, place)
    return 0


def _confirmed(trees: Opened) -> bool:
    """Say what is going to be done to all of a persistent path, and have somebody want it."""
    some = False
    for change in from_image(trees, ""):
        some = True
        say(f"{_DOES[change.what]} {trees.kept.shown(change.path, change.kind)}")
    path = trees.kept.shown()
    if not some:
        say(f"{path} is as the image has it")
        return False
    if not sys.stdin.isatty():
        raise CmdlineError(
            f"nothing was changed in '{path}': this is what would be done to all of it",
            hint="to do it: --yes; to do a part of it, name the files",
        )
    say(f"All of this is done to {path}, and cannot be undone. To go on, type yes:")
    if sys.stdin.readline().strip() != "yes":
        say("nothing was changed")
        return False
    return True


@contextlib.contextmanager
def _stage(trees: Opened) -> Generator[int]:
    """Open the directory in which what is new grows, and keep every other reset out of it."""
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(trees.stage, 0o700, dir_fd=trees.top)
        stage = os.open(trees.stage, _OPEN, dir_fd=trees.top)
    except OSError as error:
        raise _failure(trees.kept.shown(), error) from None
    try:
        status = os.fstat(stage)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) != 0o700:
            raise MountError(
                f"cannot use '{shown(trees.stage)}' in what is to be reset: it is somebody else's",
                hint="look at it, and remove it",
            )
        _lock(trees, stage)
        _clear(stage)  # what was left by one that was cut off
        try:
            yield stage
        finally:
            _clear(stage)
            with contextlib.suppress(OSError):  # the next one takes it
                os.rmdir(trees.stage, dir_fd=trees.top)
    finally:
        os.close(stage)


def _lock(trees: Opened, stage: int) -> None:
    """Keep others out; one that has just ended may have removed the directory after it was opened."""
    with contextlib.suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(stage, fcntl.LOCK_EX | fcntl.LOCK_NB)
        there = os.stat(trees.stage, dir_fd=trees.top, follow_symlinks=False)
        if os.path.samestat(there, os.fstat(stage)):
            return
    raise MountError(
        "cannot reset anything here: another reset is at work", hint="try again when that is done"
    )


def _failure(whole: str, error: OSError) -> MountError:
    why, hint = str(error.strerror), "look at what the kernel says: dmesg | tail"
    match error.errno:
        case errno.ELOOP:
            why = "a symlink is on the way to it"
        case errno.ENOENT:
            why, hint = "the directory that holds it is not there", "reset the directory that holds it"
        case errno.ENOTDIR:
            why, hint = "what holds it is no directory here", "reset the directory that holds it"
        case errno.ENOSPC | errno.EDQUOT:
            hint = "free space on the file system that holds it"
    return MountError(f"cannot reset '{whole}': {why}; it stays as it was", hint=hint)


def _bring_back(trees: Opened, stage: int, place: str) -> None:
    """Bring a path and all below it to what the image has."""
    some = False
    for change in from_image(trees, place):
        some = True
        whole = trees.kept.shown(change.path, change.kind)
        try:
            _one(trees, stage, change.path)
        except OSError as error:
            raise _failure(whole, error) from None
        say(f"{_DONE[change.what]} {whole}")
    if not some:
        say(f"{trees.kept.shown(place)} is as the image has it")


def _one(trees: Opened, stage: int, path: str) -> None:
    """Have one path be what it is in the image; a directory in both gets only its attributes."""
    with holding(trees.now, path) as (parent, name):
        theirs, place = look_in_image(trees, path), inside(parent, name)
        if theirs and theirs.kind == DIRECTORY and os.path.isdir(place) and not os.path.islink(place):
            return _attributes(trees, parent, path)
        loose = _copy(trees, stage, path) if theirs else 0
        try:
            _put(stage, parent, name, copied=theirs is not None)
        except PermissionError:  # the directory is immutable
            flags = files.loosen(dot(parent))
            try:
                _put(stage, parent, name, copied=theirs is not None)
            finally:
                files.set_flags(dot(parent), flags)
        if loose & (files.IMMUTABLE | files.APPEND):
            files.set_flags(place, loose)
        os.fsync(parent)
    return _clear(stage)


def _attributes(trees: Opened, parent: int, path: str) -> None:
    """Give a directory the attributes that it has in the image, and none besides."""
    with holding(trees.image, path) as (above, name):
        origin, here = inside(above, name), os.open(name, _OPEN, dir_fd=parent)
        try:
            if files.loosen(dot(here)):
                files.set_flags(dot(here), 0)
            for attribute in {*files.xattrs(dot(here))} - {*files.xattrs(origin)}:
                os.removexattr(dot(here), attribute)
            files.copy_all_attributes(origin, dot(here))
            os.fsync(here)
        finally:
            os.close(here)


def _copy(trees: Opened, stage: int, path: str) -> int:
    """Copy the image's version, with all that makes it, to where only root can get at it.

    Return its flags, of which those are off that would keep it from being renamed.
    """
    _clear(stage)
    new = inside(stage, "new")
    with holding(trees.image, path) as (above, name):
        copied = files.Copied()
        files.copy(inside(above, name), new, copied)
        copied.finish()
    kind = os.lstat(new).st_mode
    if stat.S_ISREG(kind):
        files.fsync(new)
    elif stat.S_ISDIR(kind):
        syscalls.syncfs(stage)
    return files.loosen(new)


def _put(stage: int, parent: int, name: str, *, copied: bool) -> None:
    """Put the copy in place of what is there, if anything is; without one, remove that."""
    new, place = inside(stage, "new"), inside(parent, name)
    if not os.path.lexists(place):
        if copied:
            os.rename(new, place)
    elif copied:
        files.loosen(place)
        syscalls.exchange(new, place)
    else:
        _remove(parent, name)


def _clear(stage: int) -> None:
    for name in os.listdir(stage):
        _remove(stage, name)


def _remove(parent: int, name: str) -> None:
    """Remove a tree, also where it is immutable, and follow no symlink that is put there meanwhile."""
    try:
        directory = os.open(name, _OPEN, dir_fd=parent)
    except NotADirectoryError:
        try:
            os.unlink(name, dir_fd=parent)
        except PermissionError:
            files.loosen(inside(parent, name))
            os.unlink(name, dir_fd=parent)
        return
    try:
        files.loosen(dot(directory))
        for each in os.listdir(directory):
            _remove(directory, each)
    finally:
        os.close(directory)
    os.rmdir(name, dir_fd=parent)
