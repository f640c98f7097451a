"""One directory of the state beside what the image gives: seeded, adopted, merged (contract §4.2).

Beside a directory `etc.bind` stands its manifest, `etc.manifest`: what the image gave last time. While it
changes there are `etc.bind.new`, in which the next state grows, and `etc.manifest.new`. A boot that is cut
off leaves the old state or the new one, whole, and the next boot knows which: the manifest has the inode of
the directory that it belongs to.

    make etc.bind.new of links to what stays and copies of what the image gives, and etc.manifest.new
    write both to the disk
    exchange etc.bind and etc.bind.new (renameat2(2), RENAME_EXCHANGE): the one moment in which it changes
    remove etc.bind.new, which is the old state now
    rename etc.manifest.new to etc.manifest
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys

from immucore import files, manifest, observe, syscalls
from immucore.errors import MakeshiftError, MountError
from immucore.manifest import Memory
from immucore.merge import Conflict, Decision, Drop, Entry, Keep, Merge, Take
from immucore.plan import is_below
from immucore.tree import Tree
from immucore.values import Record

TYPE_CHECKING = False  # importing typing would cost 9 ms
if TYPE_CHECKING:
    from collections.abc import Mapping

SUFFIX = ".bind"
REMEMBERED = 4  # images that have left: both slots' and a few before them
RECURSION_LIMIT = 10_000  # a path (PATH_MAX) is at most 2047 directories deep
_FULL = (errno.ENOSPC, errno.EDQUOT)
_HINT = "free space on the file system that holds it"
_LOOK = "look at what the kernel says: dmesg | tail"
_HINTS = {
    errno.EXDEV: "it has another file system or a subvolume in it: move that elsewhere",
    errno.ENAMETOOLONG: "a path in it is longer than 4095 bytes: move what is there further up",
    errno.EOPNOTSUPP: "it has an encrypted or casefolded directory in it: move that elsewhere",
}


class Outcome(Record):
    """What was done with a directory."""

    done: str  # seeded, adopted, merged, or finished: what an earlier boot had begun
    taken: int = 0  # paths that follow the image; a directory that is new is one
    dropped: int = 0
    conflicts: tuple[Conflict, ...] = ()

    def __str__(self) -> str:
        if self.done != "merged":
            return self.done
        return f"merged: {self.taken} taken, {self.dropped} removed, {len(self.conflicts)} in conflict"


def manifest_of(directory: str) -> str:
    """Name the manifest of a directory of the state."""
    return f"{directory.removesuffix(SUFFIX)}.manifest"


def refuse_what_is_in_use(directory: str, mounted: str) -> None:
    """Raise MakeshiftError for a directory that is bound already, or in which something is mounted.

    As after a boot that failed further on and is repaired: what is mounted would be taken for what is kept,
    or stay on the old state.
    """
    if not os.path.isdir(directory):
        return
    bound = os.path.isdir(mounted) and os.path.samefile(mounted, directory)
    if bound or any(is_below(mount.target, directory) for mount in observe.mounts()):
        raise MakeshiftError(
            f"cannot bring '{directory}' to what this image gives: it is in use",
            hint="restart: the next boot does it",
        )


def follow(source: str, directory: str, image: str) -> Outcome:
    """Have a directory of the state follow what the image of that identity gives at `source`.

    Raises OSError and MountError where there is no directory then, MakeshiftError where the old state stays.
    """
    sys.setrecursionlimit(max(sys.getrecursionlimit(), RECURSION_LIMIT))
    exists = os.path.isdir(directory) and not os.path.islink(directory)
    step = _Step(source, directory, image)
    try:
        finished = step.recover()
        if finished is not None:
            return Outcome(done="finished", conflicts=finished)
        if not exists:
            return step.seed()
        try:
            return step.merge()
        except FileNotFoundError as error:
            if error.filename != step.manifest:
                raise
            return step.adopt()
        except ValueError:  # a manifest that is none: nothing that is there is given up for it
            return step.adopt()
    except OSError as error:
        reason = step.give_up(error)
        if exists:
            if step.exchanged:
                raise MakeshiftError(
                    f"cannot remove what '{directory}' was before it followed this image: {reason}",
                    hint=_LOOK,
                ) from None
            raise MakeshiftError(
                f"cannot bring '{directory}' to what this image gives: {reason}; it stays as it was",
                hint=_HINT if error.errno in _FULL else _HINTS.get(error.errno or 0, _LOOK),
            ) from None
        if error.errno in _FULL:
            raise MountError(f"cannot seed '{directory}': {reason}", hint=_HINT) from None
        raise


class _Step:
    """One step of one directory, from one image to another."""

    def __init__(self, source: str, directory: str, image: str) -> None:
        self.source, self.directory, self.image = source, directory, image
        self.parent = os.path.dirname(directory)
        self.growing = f"{directory}.new"
        self.manifest = manifest_of(directory)
        self.next_manifest = f"{self.manifest}.new"
        self.lacks = ""  # how much space, where that is what is wrong
        self.taken = self.dropped = 0
        self.exchanged = False

    def recover(self) -> tuple[Conflict, ...] | None:
        """Take up what a boot that was cut off has left; give the conflicts if that was all to be done."""
        try:
            with manifest.Reader(self.next_manifest) as new:
                image, memory = new.image, new.memory()
            done = memory.inode == os.lstat(self.directory).st_ino
        except (FileNotFoundError, ValueError):
            done = False
        if done:
            self._settle()
            return memory.conflicts if image == self.image else None
        files.remove(self.growing)
        files.remove(self.next_manifest)
        return None

    def give_up(self, error: OSError) -> str:
        """Remove what was begun, unless it has taken effect; say what was wrong."""
        with contextlib.suppress(OSError):  # the next boot tries again
            self.recover()
        if error.errno in _FULL and not self.lacks:
            self._measure(error, files.size(self.manifest), files.free(self.parent))
        what = f" ({error.filename})" if error.errno in _HINTS and error.filename else ""
        return f"{error.strerror or error}{self.lacks}{what}"

    def seed(self) -> Outcome:
        """Copy what the image gives."""
        with manifest.write(self.next_manifest, self.image, Tree(self.source)) as writer:
            free, copied = files.free(self.parent), files.Copied()
            try:
                files.copy(self.source, self.growing, copied)
                copied.finish()
            except OSError as error:
                self._measure(error, files.size(self.source), free)
                raise
            writer.finish(Memory(inode=os.lstat(self.growing).st_ino))
        files.sync_file_system(self.parent)
        os.rename(self.growing, self.directory)
        self._settle()
        return Outcome(done="seeded")

    def adopt(self) -> Outcome:
        """Write the first manifest of a directory that is there, and nothing else.

        What it lacks of the image comes with the next one: whoever filled it did so at every boot, so that
        nothing can have been deleted for good.
        """
        there = Tree(self.directory)
        with manifest.write(self.next_manifest, self.image, Tree(self.source), there) as writer:
            writer.finish(Memory(inode=os.lstat(self.directory).st_ino, adopted=True))
        self._settle()
        return Outcome(done="adopted")

    def merge(self) -> Outcome:
        """Take over what has changed in the image and was not touched here."""
        with manifest.Reader(self.manifest) as old:
            earlier, memory = old.image, old.memory()
        left = {image: dict(what) for image, what in memory.left if image not in (self.image, earlier)}
        mine = dict(dict(memory.left).get(self.image, ()))
        conflicts, inode = memory.conflicts, os.lstat(self.directory).st_ino
        with manifest.write(self.next_manifest, self.image, Tree(self.source)) as writer:
            if not manifest.same(self.manifest, self.next_manifest):
                merge = self._merge(mine)
                if self.taken or self.dropped:
                    inode = os.lstat(self.growing).st_ino
                conflicts = tuple(sorted(merge.conflicts, key=lambda each: each.path))
                # What is somebody's here was so in the images before, where they are the same as this.
                left = {image: {**merge.diverged, **dict(what)} for image, what in left.items()}
                left[earlier] = merge.diverged
            writer.finish(
                Memory(
                    inode=inode,
                    conflicts=conflicts,
                    adopted=memory.adopted,
                    left=tuple((image, tuple(sorted(what.items()))) for image, what in left.items())[
                        -REMEMBERED:
                    ],
                )
            )
        if self.taken or self.dropped:
            files.sync_file_system(self.parent)
            syscalls.exchange(self.growing, self.directory)
            self.exchanged = True
        self._settle()
        return Outcome(done="merged", taken=self.taken, dropped=self.dropped, conflicts=conflicts)

    def _merge(self, mine: Mapping[str, Entry | None]) -> Merge:
        """Decide, and if anything is to change, decide once more and let the next state grow."""
        for act in (False, True):
            with manifest.Reader(self.manifest) as before, manifest.Reader(self.next_manifest) as image:
                merge = Merge(before, Tree(self.directory), image, mine)
                if act:
                    self._grow(merge)
                elif any(isinstance(decision, Take | Drop) for decision in merge):
                    continue
                break
        return merge

    def _grow(self, merge: Merge) -> None:
        """Make the next state beside the one that is there.

        With a full disk the rest is only looked at, to say how much is missing.
        """
        made: set[str] = set()  # directories that are not complete: no more than a path is deep
        copied = files.Copied()
        needed, free = files.Size(bytes=0, inodes=0), files.free(self.parent)
        full: OSError | None = None
        for decision in merge:
            if isinstance(decision, Drop):
                self.dropped += 1
                continue
            takes = isinstance(decision, Take)
            self.taken += takes
            origin = _join(self.source if takes else self.directory, decision.path)
            if takes:
                needed += files.size(origin, whole=decision.whole)
            if full is None:
                try:
                    self._put(decision, origin, made, copied)
                except OSError as error:
                    if error.errno not in _FULL:
                        raise
                    full = error
        if full is not None:
            self._measure(full, needed, free)
            raise full
        copied.finish()

    def _put(self, decision: Decision, origin: str, made: set[str], copied: files.Copied) -> None:
        path, place = decision.path, _join(self.growing, decision.path)
        if not decision.whole:  # a directory whose content is complete now
            _make(self.growing, path, made)
            files.copy_all_attributes(origin, place)
            made.discard(path)
            return
        _make(self.growing, path.rpartition("/")[0], made)
        if isinstance(decision, Keep):
            files.link_tree(origin, place, copied)
        else:
            files.copy(origin, place, copied)

    def _measure(self, error: OSError, needed: files.Size, free: files.Size) -> None:
        if error.errno in _FULL:
            missing = max(needed.bytes - free.bytes, files.BLOCK_BYTES)
            self.lacks = f": {-(-missing // 1024)} KiB more are needed"
            if needed.inodes > free.inodes:
                self.lacks = f": {needed.inodes - free.inodes} inodes more are needed"

    def _settle(self) -> None:
        """Let the manifest follow the directory that it is of, once that is on the disk."""
        files.fsync(self.parent)
        files.remove(self.growing)
        os.rename(self.next_manifest, self.manifest)
        files.fsync(self.parent)


def _make(root: str, path: str, made: set[str]) -> None:
    """Make a directory below `root`, and those above it, unless that was done before."""
    if path in made:
        return
    if path:
        _make(root, path.rpartition("/")[0], made)
    os.mkdir(_join(root, path), 0o700)
    made.add(path)


def _join(root: str, path: str) -> str:
    return f"{root}/{path}" if path else root
