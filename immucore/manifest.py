"""What an image gave to a directory of the state, in a file beside that (contract §4.2).

Lines of JSON (RFC 8259), so that a person can read it and no tree is ever held in memory whole: the image,
then each directory in the order of a walk, its name and an entry for each thing in it, and last what else is
to be remembered. A file without that last line was not finished. It lies on a disk that anybody may have
written to: what is not as it has to be is a ValueError, and no name leads anywhere.
"""

from __future__ import annotations

import binascii
import itertools
import json
import os
import stat

# The function that json itself quotes strings with: most lines are written without the rest of it.
from _json import encode_basestring_ascii as quote

from immucore.image import manifest_head
from immucore.merge import DIRECTORY, Conflict, Entry
from immucore.values import Record

TYPE_CHECKING = False  # importing typing would cost 9 ms
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import BinaryIO

    from immucore.merge import Given, There

    Json = list[object] | dict[str, object] | str | int | None

_END = b"null\n"  # after the last directory
MAX_LINE_BYTES = 1 << 20  # a symlink and some extended attributes of 64 KiB


class Memory(Record):
    """What a manifest remembers besides what the image gave."""

    inode: int  # of the directory that it belongs to: a power cut may leave one of the two exchanged
    conflicts: tuple[Conflict, ...] = ()  # of the last merge
    adopted: bool = False  # the directory was there before its first manifest
    # What somebody had made of an image's files when another took its place, by image: see merge.Merge.
    left: tuple[tuple[str, tuple[tuple[str, Entry | None], ...]], ...] = ()


class Reader:
    """A manifest that is read once, from its beginning to its end. Raises ValueError and OSError."""

    def __init__(self, path: str) -> None:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise ValueError("it is no file")
        self._file: BinaryIO = open(descriptor, "rb")  # noqa: SIM115  closed by close()
        try:
            match self._line():
                case {"image": str(image)}:
                    self.image = image
                case other:
                    raise ValueError(f"{other!r:.100} is no first line")
            self.root = _entry(self._line())
            self._next = self._line()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def children(self, path: str) -> dict[str, Entry]:
        """Give what the image gave in a directory, which comes after those that were asked for before."""
        while self._next != path:
            if self._next is None:
                raise ValueError(f"the directory '{path}' is not where it has to be")
            self._next = self._line()
        found = {}
        while isinstance(line := self._line(), list):
            name = line[0] if line else None
            if not isinstance(name, str) or not is_name(name):
                raise ValueError(f"{name!r:.100} is no name")
            found[name] = _entry(line[1:])
        self._next = line
        return found

    def memory(self) -> Memory:
        """Read on to the end, and give what else is remembered."""
        while self._next is not None:
            self._next = self._line()
        conflicts: list[Conflict] = []
        left: dict[str, dict[str, Entry | None]] = {}
        while isinstance(line := self._line(), list):
            match line:
                case ["conflict", str(path), ours, theirs]:
                    conflicts.append(Conflict(path=path, ours=_optional(ours), theirs=_optional(theirs)))
                case ["left", str(image)]:
                    left[image] = {}
                case ["left", str(image), str(path), entry]:
                    left.setdefault(image, {})[path] = _optional(entry)
                case _:
                    raise ValueError(f"{line!r:.100} is nothing to remember")
        match line:
            case {"inode": int(inode), "adopted": bool(adopted)}:
                return Memory(
                    inode=inode,
                    adopted=adopted,
                    conflicts=tuple(conflicts),
                    left=tuple((image, tuple(files.items())) for image, files in left.items()),
                )
        raise ValueError(f"{line!r:.100} is no last line")

    def lines(self) -> Iterator[bytes]:
        """Give the lines of the directories, but for the first, as they are."""
        while (line := self._raw()) != _END:
            yield line

    def _line(self) -> Json:
        try:
            found: Json = json.loads(self._raw())
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        return found

    def _raw(self) -> bytes:
        line = self._file.readline(MAX_LINE_BYTES)
        if not line.endswith(b"\n"):
            raise ValueError("its end is missing")
        return line


def is_name(text: str) -> bool:
    """Tell whether a file can be called so."""
    return text not in ("", ".", "..") and "/" not in text and "\0" not in text


class Writer:
    """A manifest that is being written: each directory in the order of a walk, then what is remembered."""

    def __init__(self, path: str, image: str, root: Entry) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = open(os.open(path, flags, 0o600), "wb")  # noqa: SIM115  closed by close()
        self._file.write(manifest_head(image))
        self._write(_shown(root))

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, finished or not."""
        self._file.close()

    def directory(self, path: str, children: Mapping[str, Entry]) -> None:
        """Write what is in a directory."""
        self._write(path)
        for name, entry in sorted(children.items()):
            quoted = quote(name), quote(entry.kind), quote(entry.content)
            line = f"[{quoted[0]}, {quoted[1]}, {entry.mode}, {entry.uid}, {entry.gid}, {quoted[2]}"
            for more in _more(entry):
                line += f", {json.dumps(more)}"
            self._file.write(f"{line}]\n".encode())

    def end(self) -> None:
        """Write that this was all; from now on it can be read."""
        self._file.write(_END)
        self._file.flush()

    def finish(self, memory: Memory) -> None:
        """Write what is to be remembered, the last line, and all of it to the disk."""
        for each in memory.conflicts:
            self._write(["conflict", each.path, _shown(each.ours), _shown(each.theirs)])
        for image, files in memory.left:
            self._write(["left", image])
            for path, entry in files:
                self._write(["left", image, path, _shown(entry)])
        self._write({"inode": memory.inode, "adopted": memory.adopted})
        self._file.flush()
        os.fsync(self._file.fileno())

    def _write(self, value: object) -> None:
        self._file.write(json.dumps(value).encode() + b"\n")


def write(path: str, image: str, given: Given, there: There | None = None) -> Writer:
    """Write what an image gives, but for the last line. With `there`, only of what is there too.

    Raises OSError.
    """

    def directory(below: str, here: Mapping[str, str] | None) -> None:
        children = given.children(below)
        if here is not None:
            children = {name: entry for name, entry in children.items() if name in here}
        writer.directory(below, children)
        for name, entry in sorted(children.items()):
            if entry.kind == DIRECTORY:
                place = f"{below}/{name}" if below else name
                directory(place, _kinds(there, place, here.get(name)) if there and here else None)

    writer = Writer(path, image, given.root)
    try:
        directory("", there.kinds("") if there else None)
    except BaseException:
        writer.close()
        raise
    writer.end()
    return writer


def _kinds(there: There, path: str, kind: str | None) -> Mapping[str, str]:
    return there.kinds(path) if kind == DIRECTORY else {}


def same(one: str, other: str) -> bool:
    """Tell whether two images gave the same. Raises ValueError and OSError."""
    with Reader(one) as first, Reader(other) as second:
        return first.root == second.root and all(
            line == also for line, also in itertools.zip_longest(first.lines(), second.lines())
        )


def _shown(entry: Entry | None) -> list[object] | None:
    if entry is None:
        return None
    return [entry.kind, entry.mode, entry.uid, entry.gid, entry.content, *_more(entry)]


def _more(entry: Entry) -> list[object]:
    """Give what few files have."""
    if not (entry.flags or entry.xattrs or entry.link):
        return []
    xattrs = {name: binascii.b2a_base64(value, newline=False).decode() for name, value in entry.xattrs}
    return [entry.flags, xattrs, entry.link]


def _entry(shown: object) -> Entry:
    match shown:
        case [str(kind), int(mode), int(uid), int(gid), str(content), *more]:
            match more:
                case []:
                    return Entry(kind=kind, mode=mode, uid=uid, gid=gid, content=content)
                case [int(flags), dict(xattrs), str(link)]:
                    return Entry(
                        kind=kind,
                        mode=mode,
                        uid=uid,
                        gid=gid,
                        content=content,
                        flags=flags,
                        xattrs=tuple(
                            (name, binascii.a2b_base64(str(value))) for name, value in xattrs.items()
                        ),
                        link=link,
                    )
    raise ValueError(f"{shown!r:.100} is no entry")


def _optional(shown: object) -> Entry | None:
    return None if shown is None else _entry(shown)
