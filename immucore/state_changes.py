"""What is not as the image has it, or gave it, in a persistent path (`immucore state`).

Three trees are looked at: what is there now, what its image gave (the manifest), and the image itself. None
is ever held whole, and files come and go meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

from immucore.errors import CmdlineError
from immucore.merge import DIRECTORY, Conflict, Entry
from immucore.state_paths import AS_LISTED, dot, holding, inside, leads_down
from immucore.tree import Tree
from immucore.values import Record

if TYPE_CHECKING:
    from collections.abc import Iterator

    from immucore.manifest import Reader
    from immucore.state_paths import Opened

CHANGED, ADDED, DELETED, MISSING = "changed", "added", "deleted", "missing"
KINDS = (CHANGED, ADDED, DELETED, MISSING)
_GONE = (FileNotFoundError, NotADirectoryError)


class Change(Record):
    """A path that is not as the image gave it; a directory that is new or gone stands for all in it."""

    what: str
    path: str  # below the persistent path, which is ""
    kind: str  # of what is there, or of what is not there any more


class View:
    """A tree that may change while one looks: what is not there any more is nothing."""

    def __init__(self, directory: str) -> None:
        self._tree: Tree | None = None
        with contextlib.suppress(*_GONE):
            self._tree = Tree(directory) if directory else None

    def kinds(self, path: str) -> dict[str, str]:
        """Give the kind of each thing in a directory, by name."""
        with contextlib.suppress(*_GONE):
            return self._tree.kinds(path) if self._tree else {}
        return {}

    def entry(self, path: str) -> Entry | None:
        """Look closely at one thing."""
        with contextlib.suppress(*_GONE):
            return self._tree.entry(path) if self._tree else None
        return None


def _views(opened: Opened) -> tuple[View, View]:
    return View(dot(opened.image) if opened.image >= 0 else ""), View(dot(opened.now))


def changes(opened: Opened) -> Iterator[Change]:
    """Find what is not as the image gave it; a directory comes after what is in it, or before."""
    image, now = _views(opened)
    if opened.kept.overlay:
        yield from _compare(image, now, upper=opened.upper)
        return
    with opened.manifest() as reader:
        adopted = reader.memory().adopted
    with opened.manifest() as reader:
        yield from _since(reader, now, image if adopted else View(""))


def from_image(opened: Opened, path: str) -> Iterator[Change]:
    """Find what is not as the booted image has it, a directory after what is in it."""
    for change in _compare(*_views(opened), path, upper="" if path else opened.upper):
        if change.path != opened.stage or not opened.kept.overlay:
            yield change


def _since(given: Reader, now: View, image: View, path: str = "") -> Iterator[Change]:
    """Compare with what the image gave; with `image`, what it has and was never there is missing."""
    before, here, lacks = given.children(path), now.kinds(path), image.kinds(path)
    if not path and given.root != now.entry(""):
        yield Change(what=CHANGED, path="", kind=DIRECTORY)
    for name in sorted({*before, *here, *lacks}):
        place = f"{path}/{name}" if path else name
        old = before.get(name)
        if old is None:
            what, kind = (ADDED, here[name]) if name in here else (MISSING, lacks[name])
            yield Change(what=what, path=place, kind=kind)
            continue
        ours = now.entry(place) if name in here else None
        if ours != old.alone:
            what, kind = (CHANGED, ours.kind) if ours else (DELETED, old.kind)
            yield Change(what=what, path=place, kind=kind)
        if ours and old.kind == ours.kind == DIRECTORY:
            yield from _since(given, now, image, place)


def _compare(image: View, now: View, path: str = "", *, upper: str = "") -> Iterator[Change]:
    """Compare with the image; with the name of an overlay's upper, only what that has is looked at."""
    theirs, ours = image.entry(path), now.entry(path)
    if theirs and ours and theirs.kind == ours.kind == DIRECTORY:
        names = View(upper).kinds("") if upper else {**image.kinds(path), **now.kinds(path)}
        for name in sorted(names):
            guided = upper and names[name] == DIRECTORY and _shines_through(f"{upper}/{name}")
            below = f"{path}/{name}" if path else name
            yield from _compare(image, now, below, upper=f"{upper}/{name}" if guided else "")
    if ours and theirs != ours:
        yield Change(what=CHANGED if theirs else ADDED, path=path, kind=ours.kind)
    elif theirs and not ours:
        yield Change(what=DELETED, path=path, kind=theirs.kind)


def _shines_through(directory: str) -> bool:
    """Tell whether the lower directory of the same name is seen through one of an overlay's upper."""
    with contextlib.suppress(*_GONE):
        names = os.listxattr(directory, follow_symlinks=False)
        if "trusted.overlay.redirect" in names:
            return False
        if "trusted.overlay.opaque" in names:  # x: it holds whiteouts, and no more
            return os.getxattr(directory, "trusted.overlay.opaque", follow_symlinks=False) == b"x"
    return True


def conflicts(opened: Opened) -> list[Conflict]:
    """List the conflicts of the last merge that are not settled: still there is not what the image has."""
    if opened.kept.overlay:
        return []
    with opened.manifest() as reader:
        listed = reader.memory().conflicts
    for each in listed:
        if each.path and not leads_down(each.path):
            raise ValueError(f"'{each.path:.100}' is no path")
    return [each for each in listed if _is_open(opened, each)]


def _is_open(opened: Opened, conflict: Conflict) -> bool:
    theirs = conflict.theirs.alone if conflict.theirs else None
    try:
        return _look(opened.now, conflict.path) != theirs
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return True  # somebody has a symlink where the image has a directory


def both(opened: Opened, path: str) -> tuple[Entry | None, Entry | None]:
    """Look at a path in the image and at what is there now, which at least one of them has to have."""
    whole = opened.kept.shown(path)
    try:
        ours = _look(opened.now, path)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise CmdlineError(
            f"cannot look at '{whole}': a symlink is on the way to it", hint="name the file by where it is"
        ) from None
    theirs = look_in_image(opened, path)
    if ours is None and theirs is None:
        raise CmdlineError(f"cannot find '{whole}', neither in the image nor here", hint=AS_LISTED)
    return theirs, ours


def look_in_image(opened: Opened, path: str) -> Entry | None:
    """Look closely at what the image has in a place."""
    try:
        return _look(opened.image, path) if opened.image >= 0 else None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return None  # the image has a symlink where a directory is now


def _look(directory: int, path: str) -> Entry | None:
    """Look closely at one thing, through no symlink. Raises OSError."""
    with contextlib.suppress(*_GONE), holding(directory, path) as (parent, name):
        return Tree(inside(parent, name)).root
    return None
