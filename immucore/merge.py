"""The three-way merge of a directory that the image gives and people change (contract §4.2).

Pure: what the image gave last time, what is there now, what the image gives this time → what is to change.
What nobody has touched follows the image, what somebody has changed or deleted stays as it is, and what both
have changed stays too and is listed: OSTree's rule for /etc. Nothing here knows where the trees are.
"""

from __future__ import annotations

from immucore.values import Record

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

DIRECTORY = "directory"


class Entry(Record):
    """What makes two files the same, but for their place: neither their times nor their inodes."""

    kind: str  # directory, file, symlink, fifo, socket, character or block device
    mode: int  # permissions, as chmod(2) takes them
    uid: int
    gid: int
    content: str = ""  # digest of a file's data, target of a symlink, major:minor of a device
    xattrs: tuple[tuple[str, bytes], ...] = ()  # sorted; ACLs, capabilities and labels are among them


if TYPE_CHECKING:
    Tree = Mapping[str, Entry]  # by the path below the directory; the directory itself is ""


class Change(Record):
    """What has to be done to one path of the current tree: the image's version goes there, or nothing."""

    path: str
    entry: Entry | None  # None: remove it


class Conflict(Record):
    """A path of which the image has another version that was not taken; None is its being absent."""

    path: str
    ours: Entry | None  # what is there, and stays
    theirs: Entry | None  # what the image would have put there


class Merge(Record):
    """What a merge comes to."""

    # In an order in which they can be done: first what goes, children before parents.
    changes: tuple[Change, ...]
    conflicts: tuple[Conflict, ...]


def merge(before: Tree, now: Tree, image: Tree) -> Merge:
    """Merge what the image gives this time into what is there, knowing what the image gave last time.

    Every tree names the parent of each of its paths, and that is a directory; without the directory itself a
    tree is empty. Cost: linear in the number of paths, but for sorting them.
    """
    result = dict(now)
    conflicts: dict[str, Conflict] = {}
    for path in {*before, *now, *image}:
        old, ours, theirs = before.get(path), now.get(path), image.get(path)
        if theirs in (old, ours):
            continue
        if ours == old:
            _put(result, path, theirs)
        else:
            conflicts[path] = Conflict(path=path, ours=ours, theirs=theirs)
    # Each path is right now by itself, and may not fit what is around it.
    for path in _holding(
        path for path, entry in result.items() if entry == now.get(path) != image.get(path)
    ):
        if _is_directory(now.get(path)) and not _is_directory(result.get(path)):
            # What somebody has put here needs the directory that the image has taken away, or made a file.
            result[path] = now[path]
            if path in image:
                conflicts[path] = Conflict(path=path, ours=now[path], theirs=image[path])
    for path in sorted(result):  # parents first
        if path and not _is_directory(result.get(_parent(path))):
            # What the image puts here has no place: somebody has deleted the directory, or made it a file.
            del result[path]
            conflicts[path] = Conflict(path=path, ours=None, theirs=image[path])
    return Merge(
        changes=tuple(_changes(now, result)),
        conflicts=tuple(conflicts[path] for path in sorted(conflicts)),
    )


def _put(tree: dict[str, Entry], path: str, entry: Entry | None) -> None:
    if entry is None:
        tree.pop(path, None)
    else:
        tree[path] = entry


def _holding(paths: Iterable[str]) -> set[str]:
    """List every directory above the paths."""
    above: set[str] = set()
    for path in paths:
        while path and (path := _parent(path)) not in above:
            above.add(path)
    return above


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _is_directory(entry: Entry | None) -> bool:
    return entry is not None and entry.kind == DIRECTORY


def _changes(now: Tree, result: Tree) -> Iterator[Change]:
    """Order what turns one tree into the other: a directory goes before a file takes its place, and back."""
    for path in sorted(now, reverse=True):
        goes = result.get(path)
        if goes is None or _is_directory(goes) != _is_directory(now[path]):
            yield Change(path=path, entry=None)
    for path in sorted(result):
        if result[path] != now.get(path):
            yield Change(path=path, entry=result[path])
