"""The three-way merge of a directory that the image gives and people change (contract §4.2).

Pure: what the image gave last time, what is there now, what the image gives this time → what the directory
is to hold. What nobody has touched follows the image, what somebody has changed or deleted stays as it is,
and what both have changed stays too and is listed: OSTree's rule for /etc. Nothing here knows where the
trees are, and at no time is more of them held than the directories that lead to one path.
"""

from __future__ import annotations

from immucore.values import Record

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping
    from typing import Protocol

    class Given(Protocol):
        """What an image gives, or gave."""

        root: Entry

        def children(self, path: str) -> Mapping[str, Entry]:
            """Give what is in a directory, by name; asked for in the order of a walk, parents first."""

    class There(Protocol):
        """What is there now."""

        def kinds(self, path: str) -> Mapping[str, str]:
            """Give the kind of each thing in a directory, by name."""

        def entry(self, path: str) -> Entry:
            """Look closely at one thing, which may mean reading it."""


DIRECTORY = "directory"


class Entry(Record):
    """What makes two files the same, but for their place: neither their times nor their inodes."""

    kind: str  # directory, file, symlink, fifo, socket, character or block device
    mode: int  # permissions, as chmod(2) takes them
    uid: int
    gid: int
    content: str = ""  # size and digest of a file's data, target of a symlink, major:minor of a device
    flags: int = 0  # those of chattr(1) that people set
    xattrs: tuple[tuple[str, bytes], ...] = ()  # sorted; ACLs and capabilities are among them
    link: str = ""  # which file it is, if that has several paths; only of what an image gives

    @property
    def alone(self) -> Entry:
        """The same without what it is linked to."""
        lone: Entry = self.replace(link="") if self.link else self
        return lone


class Decision(Record):
    """What becomes of one path; a directory is decided on after what is in it.

    `whole`: with everything below it, which then has no decisions of its own.
    """

    path: str  # below the directory that is merged; that itself is ""
    whole: bool = True


class Keep(Decision):
    """What is there stays."""


class Take(Decision):
    """The image's version is put there."""


class Drop(Decision):
    """What is there goes, because the image has it no longer or has something else there."""


class Conflict(Record):
    """A path of which the image has another version that was not taken; None is its being absent."""

    path: str
    ours: Entry | None  # what is there, and stays
    theirs: Entry | None  # what the image would have put there


class Merge:
    """One merge: iterate over it for the decisions, then see what was in conflict.

    `before` is what the image gave last time, `image` what it gives now. `mine` is what somebody had made of
    paths of this very image when another took its place, None for deleted: where that is still there, it
    stays, so that going to another image and back changes nothing. Each tree has a directory at its root.
    """

    def __init__(
        self, before: Given, now: There, image: Given, mine: Mapping[str, Entry | None] | None = None
    ) -> None:
        self._before, self._now, self._image, self._mine = before, now, image, mine or {}
        self._missed = {path for path, entry in self._mine.items() if entry is None}
        self._above_missed = {path[:end] for path in self._missed for end in _slashes(path)}
        self.conflicts: list[Conflict] = []
        self.diverged: dict[str, Entry | None] = {}  # `mine` for the next time that `before` comes back

    def __iter__(self) -> Generator[Decision, None, bool]:
        return self._one("", self._before.root, DIRECTORY, self._image.root)

    def _below(self, path: str, old: bool, here: bool, new: bool) -> Generator[Decision, None, bool]:
        """Decide on what is in a directory, which each side has or not; tell whether anything is left."""
        before = self._before.children(path) if old else {}
        now = self._now.kinds(path) if here else {}
        image = self._image.children(path) if new else {}
        left = False
        for name in sorted({*before, *now, *image}):
            place = f"{path}/{name}" if path else name
            if here:
                left |= yield from self._one(place, before.get(name), now.get(name), image.get(name))
            else:
                yield from self._nowhere(place, before.get(name), image.get(name))
        return left

    def _nowhere(
        self, path: str, old: Entry | None, theirs: Entry | None
    ) -> Generator[Decision, None, bool]:
        """Note what the image gives below a directory that somebody has deleted or made a file."""
        self._note(path, old, None, theirs)
        return (yield from self._below(path, _is_directory(old), False, _is_directory(theirs)))

    def _one(
        self, path: str, old: Entry | None, kind: str | None, theirs: Entry | None
    ) -> Generator[Decision, None, bool]:
        """Decide on one path; tell whether there will be something."""
        if old is None and theirs is None:
            yield Keep(path=path)
            return True
        ours = None
        if old != theirs:
            ours = self._now.entry(path) if kind is not None else None
            untouched = ours == (old.alone if old else None)
            if untouched and not self._is_mine(path, ours):
                return (yield from self._follow(path, ours, theirs))
            if not untouched:
                self._note(path, old, ours, theirs)
        below = _is_directory(old), kind == DIRECTORY, _is_directory(theirs)
        if kind != DIRECTORY:
            if kind is not None:
                yield Keep(path=path)
            yield from self._below(path, *below)
            return kind is not None
        if below[0] or below[2]:
            yield from self._below(path, *below)
            yield Keep(path=path, whole=False)
        else:
            yield Keep(path=path)
        return True

    def _follow(
        self, path: str, ours: Entry | None, theirs: Entry | None
    ) -> Generator[Decision, None, bool]:
        """Have a path that nobody has touched follow the image."""
        if not _is_directory(ours):
            if ours is not None and theirs is None:
                yield Drop(path=path)
            elif theirs is not None:
                yield from self._take(path, theirs)
            return theirs is not None
        stays = yield from self._below(path, True, True, _is_directory(theirs))
        if _is_directory(theirs):
            yield Take(path=path, whole=False)
            return True
        if stays:  # what somebody has put here needs the directory that the image takes away
            if theirs is not None:
                self.conflicts.append(Conflict(path=path, ours=ours, theirs=theirs))
            yield Keep(path=path, whole=False)
            return True
        yield Drop(path=path)
        if theirs is not None:
            yield Take(path=path)
        return theirs is not None

    def _take(self, path: str, theirs: Entry) -> Iterator[Decision]:
        """Put there what the image has, without what somebody had deleted from it."""
        if path not in self._above_missed or not _is_directory(theirs):
            yield Take(path=path)
            return
        for name, entry in sorted(self._image.children(path).items()):
            if f"{path}/{name}" not in self._missed:
                yield from self._take(f"{path}/{name}", entry)
        yield Take(path=path, whole=False)

    def _note(self, path: str, old: Entry | None, ours: Entry | None, theirs: Entry | None) -> None:
        """Note what the image has another version of than before, and somebody too."""
        if (old.alone if old else None) == (theirs.alone if theirs else None):
            return  # what else it is linked to is nothing that somebody could have changed
        if ours != (old.alone if old else None):
            self.diverged[path] = ours
        if ours != (theirs.alone if theirs else None) and not self._is_mine(path, ours):
            self.conflicts.append(Conflict(path=path, ours=ours, theirs=theirs))

    def _is_mine(self, path: str, ours: Entry | None) -> bool:
        return path in self._mine and self._mine[path] == ours


def _is_directory(entry: Entry | None) -> bool:
    return entry is not None and entry.kind == DIRECTORY


def _slashes(path: str) -> Iterator[int]:
    return (index for index, character in enumerate(path) if character == "/")
