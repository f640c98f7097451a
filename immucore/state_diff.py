"""How a file differs from the image's version: `immucore state diff FILE`."""

from __future__ import annotations

import difflib
import errno
import os
import stat
from typing import TYPE_CHECKING

from immucore.errors import CmdlineError
from immucore.merge import DIRECTORY, Entry
from immucore.plan import is_below
from immucore.state_changes import both, from_image
from immucore.state_paths import Opened, begin, holding, opened, say, shown

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

MAX_TEXT_BYTES = 1 << 18  # of a file that is compared line by line, which takes quadratic time
MAX_VALUE = 80  # characters of an extended attribute


def diff(arguments: argparse.Namespace) -> int:
    """Show how a file differs from the image's version."""
    root, paths = begin(arguments)
    named = arguments.file
    if ".." not in named.split("/"):
        named = os.path.normpath(named)
    around = [kept for kept in paths if is_below(named, kept.path)]
    if not around:
        raise CmdlineError(
            f"'{shown(arguments.file)}' is in no persistent path of this boot",
            hint="name it from the root; see which paths there are: immucore state",
        )
    with opened(max(around, key=lambda kept: len(kept.path)), root) as trees:
        for line in _difference(trees, trees.kept.below(named)):
            say(line)
    return 0


def _difference(trees: Opened, path: str) -> Iterator[str]:
    whole = trees.kept.shown(path)
    theirs, ours = both(trees, path)
    if theirs is None or ours is None:
        if ours:
            yield f"only this machine has {whole} ({ours.kind}): it was added"
        if theirs:
            yield f"only the image has {whole} ({theirs.kind}): it was deleted here"
        return
    for what, image, here in _attributes(theirs, ours):
        yield f"{whole}: {what}: {image} in the image, {here} here"
    below = []
    if ours.kind == theirs.kind == "file" and ours.content != theirs.content:
        yield from _content(trees, path, whole)
    elif ours.kind == theirs.kind == DIRECTORY:
        below = [change for change in from_image(trees, path) if change.path != path]
        yield from (f"{change.what} {trees.kept.shown(change.path, change.kind)}" for change in below)
    if ours == theirs and not below:
        yield f"{whole} is as the image has it"


def _attributes(theirs: Entry, ours: Entry) -> Iterator[tuple[str, str, str]]:
    """Give what differs but the data of files: its name, in the image, and here."""
    if theirs.kind != ours.kind:
        yield "type", theirs.kind, ours.kind
    elif theirs.content != ours.content and ours.kind != "file":
        yield "target" if ours.kind == "symlink" else "device", shown(theirs.content), shown(ours.content)
    if theirs.mode != ours.mode:
        yield "mode", f"{theirs.mode:04o}", f"{ours.mode:04o}"
    if (theirs.uid, theirs.gid) != (ours.uid, ours.gid):
        yield "owner", f"{theirs.uid}:{theirs.gid}", f"{ours.uid}:{ours.gid}"
    if theirs.flags != ours.flags:
        yield "flags (chattr)", f"{theirs.flags:#x}", f"{ours.flags:#x}"
    image, here = dict(theirs.xattrs), dict(ours.xattrs)
    for name in sorted({*image, *here}):
        if image.get(name) != here.get(name):
            yield f"attribute {shown(name)}", _value(image.get(name)), _value(here.get(name))


def _value(value: bytes | None) -> str:
    if value is None:
        return "none"
    text = repr(value)[1:]
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}... ({len(value)} bytes)"


def _content(trees: Opened, path: str, whole: str) -> Iterator[str]:
    """Compare the data of two files, line by line if they are texts."""
    (image, image_bytes), (here, here_bytes) = _read(trees.image, path), _read(trees.now, path)
    sizes = f"{image_bytes} bytes in the image, {here_bytes} bytes here"
    if max(image_bytes, here_bytes) > MAX_TEXT_BYTES:
        yield f"{whole}: the content differs, and is too large to be compared by lines: {sizes}"
        return
    theirs, ours = _text(image), _text(here)
    if theirs is None or ours is None:
        yield f"{whole}: the content differs, and is binary: {sizes}"
        return
    yield from _by_lines(theirs, ours, whole)


def _read(directory: int, path: str) -> tuple[bytes, int]:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    with holding(directory, path) as (parent, name), open(os.open(name, flags, dir_fd=parent), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EBUSY, "it changes while it is looked at")
        return file.read(MAX_TEXT_BYTES + 1), status.st_size


def _text(content: bytes) -> str | None:
    try:
        return None if b"\0" in content else content.decode()
    except UnicodeDecodeError:
        return None


def _by_lines(theirs: str, ours: str, whole: str) -> Iterator[str]:
    for line in difflib.unified_diff(_split(theirs), _split(ours), f"{whole} (image)", whole):
        yield "\t".join(map(shown, line.removesuffix("\n").split("\t")))
        if not line.endswith("\n"):
            yield "\\ No newline at end of file"


def _split(text: str) -> list[str]:
    """Split at line feeds alone; str.splitlines() knows ten more line ends."""
    lines = [f"{line}\n" for line in text.split("\n")]
    last = lines.pop()[:-1]
    return [*lines, last] if last else lines
