"""What people have made of the persistent paths, and the way back: `immucore state` (contract §4.2).

Three trees are looked at: what is there now, what its image gave (the manifest), and the image itself. None
is ever held whole. A machine runs on what is looked at: files come and go meanwhile, and whoever owns a
directory may put a symlink there at any moment. So what is to be changed is opened through no symlink, what
is made new grows in a directory that only root can enter, and takes its place in one step.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import json
import os
import stat
import sys
from typing import TYPE_CHECKING, Any

from immucore import files, manifest, observe, report, statedir, syscalls
from immucore.boot import INITRD_RELEASE
from immucore.doctor import as_object, items
from immucore.errors import CmdlineError, ImmucoreError, MountError
from immucore.execute import SUCCEEDED
from immucore.layouts.cos import OVERLAY_BASE
from immucore.merge import DIRECTORY, Conflict, Entry
from immucore.plan import SYSROOT, as_booted, is_below
from immucore.tree import Tree
from immucore.values import Record

if TYPE_CHECKING:
    import argparse
    from collections.abc import Generator, Iterable, Iterator
    from typing import TypeGuard

CHANGED, ADDED, DELETED, MISSING, CONFLICT = "changed", "added", "deleted", "missing", "conflict"
KINDS = (CHANGED, ADDED, DELETED, MISSING)
MAX_TEXT_BYTES = 1 << 18  # of a file that is compared line by line, which takes quadratic time
MAX_VALUE = 80  # characters of an extended attribute
STAGE = ".immucore.reset"  # in an overlay; beside a directory that is bound it is <name>.reset
_PLAIN = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_SYMLINKS
_GONE = (FileNotFoundError, NotADirectoryError)
_OTHER_BOOT = "see what was booted: immucore doctor"


class Kept(Record):
    """A persistent path of this boot."""

    path: str  # as the booted system calls it
    place: str  # what keeps it, as the plan calls it: a directory, or what holds an overlay's upper
    overlay: bool
    lost: str = ""  # why it is not there in this boot
    note: str = ""  # what is not as it was asked for


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


class Opened:
    """A persistent path whose trees are open, without what is mounted over or in them."""

    def __init__(self, kept: Kept, root: str, stack: contextlib.ExitStack) -> None:
        self.kept = kept
        self._stack = stack
        if kept.lost:
            raise MountError(f"cannot look at '{shown(kept.path)}': {kept.lost}", hint=_OTHER_BOOT)
        image = self._keep(_image(root))
        self.image = -1  # the image has no such directory
        with contextlib.suppress(FileNotFoundError):
            self.image = self._open(image, kept.path.lstrip("/"))
        mounted = self._below(root, SYSROOT + kept.path)
        if kept.overlay:
            self._check_overlay(root)
            self.top = self._clone(mounted)
            self.now, self.stage = self.top, STAGE
            self.upper = _name(self._below(root, f"{kept.place}/upper"))
        else:
            parent, _, name = kept.place.rpartition("/")
            self.top = self._clone(self._below(root, parent or "/"))
            self.now = self._open(self.top, name, syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_SYMLINKS)
            self.stage = f"{name.removesuffix(statedir.SUFFIX)}.reset"
            if not os.path.samestat(os.stat(mounted), os.stat(self.now)):
                raise MountError(
                    f"cannot look at '{shown(kept.path)}': something else is mounted there by now",
                    hint=f"see what it is: findmnt {shown(kept.path)}",
                )

    def views(self) -> tuple[View, View]:
        """Give the image's tree and the one that is there now."""
        return View(_name(self.image) if self.image >= 0 else ""), View(_name(self.now))

    def manifest(self) -> manifest.Reader:
        """Open what the image gave last time. Raises ValueError if that is no manifest."""
        name = f"{_name(self.top)}/{os.path.basename(statedir.manifest_of(self.kept.place))}"
        try:
            if not stat.S_ISREG(os.lstat(name).st_mode):
                raise ValueError("it is no file")
            return manifest.Reader(name)
        except FileNotFoundError:
            raise ValueError("it is not there") from None

    def _check_overlay(self, root: str) -> None:
        target = (root.rstrip("/") + self.kept.path) or "/"
        there = [mount for mount in observe.mounts() if mount.target == target]
        if not there or there[-1].fstype != "overlay":
            raise MountError(
                f"cannot look at '{shown(self.kept.path)}': no overlay is mounted there by now",
                hint=f"see what it is: findmnt {shown(self.kept.path)}",
            )

    def _below(self, root: str, path: str) -> int:
        """Open a directory of a plan where it is now; what is on a disk cannot lead out of it."""
        inside = is_below(path, SYSROOT)
        top = self._keep(os.open(root if inside else "/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        return self._open(top, (as_booted(path) if inside else path).lstrip("/"))

    def _open(self, directory: int, path: str, resolve: int = syscalls.RESOLVE_IN_ROOT) -> int:
        return self._keep(syscalls.openat2(directory, path or ".", os.O_PATH | os.O_DIRECTORY, resolve))

    def _clone(self, directory: int) -> int:
        return self._keep(syscalls.clone_mount(_name(directory)))

    def _keep(self, descriptor: int) -> int:
        self._stack.callback(os.close, descriptor)
        return descriptor


# What there is


def persistent(record: dict[str, Any]) -> list[Kept]:
    """List the persistent paths of what steps.json records; of several attempts the last counts."""
    seeds: dict[str, dict[str, Any]] = {}
    found: dict[str, Kept] = {}
    for step in items(record.get("steps")):
        operation, outcome = step.get("operation"), step.get("outcome")
        if not isinstance(operation, dict) or outcome == "undone":
            continue
        target, kind = operation.get("target"), operation.get("kind")
        place = operation.get("backing") if kind == "overlay" else operation.get("source")
        if not _is_path(target):
            continue
        if kind == "seed":
            seeds[target] = step
        if not _is_path(place) or kind not in ("bind", "overlay"):
            continue
        if place not in seeds if kind == "bind" else is_below(place, OVERLAY_BASE):
            continue
        why = seeds[place] if kind == "bind" and seeds[place].get("reason") else step
        reason = str(why.get("reason") or "")
        lost = "" if outcome in SUCCEEDED else reason or "it is not mounted in this boot"
        path = as_booted(target)
        found[path] = Kept(
            path=path, place=place, overlay=kind == "overlay", lost=lost, note="" if lost else reason
        )
    return [found[path] for path in sorted(found)]


def _is_path(value: object) -> TypeGuard[str]:
    """Tell whether something that was read is the name of a directory, and leads only down."""
    return (
        isinstance(value, str) and value.startswith("/") and all(map(manifest.is_name, value[1:].split("/")))
    )


def _record(name: str) -> dict[str, Any]:
    try:
        with open(f"{report.DIRECTORY}/{name}", encoding="utf-8", errors="replace") as file:
            return as_object(file.read())
    except OSError as error:
        raise MountError(
            f"cannot read '{error.filename}', what the boot has recorded: {error.strerror}",
            hint="boot this machine with immucore: rd.cos.disable is not to be on its command line",
        ) from None


def _image(root: str) -> int:
    """Open the image that is booted, whatever is mounted over its directories."""
    try:
        image = syscalls.clone_mount(root)
    except OSError as error:
        raise MountError(
            f"cannot read the image that is mounted on '{shown(root)}': {error.strerror}", hint=_OTHER_BOOT
        ) from None
    known, status = _record("result.json").get("root"), os.stat(image)
    if known != {"dev": f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}", "ino": status.st_ino}:
        os.close(image)
        raise MountError(
            f"cannot take what is mounted on '{shown(root)}' for the image: this boot has mounted another",
            hint="name where the system is mounted: --root DIR",
        )
    return image


def changes(opened: Opened) -> Iterator[Change]:
    """Find what is not as the image gave it; a directory comes after what is in it, or before."""
    image, now = opened.views()
    if not opened.kept.overlay:
        with opened.manifest() as reader:
            adopted = reader.memory().adopted
        with opened.manifest() as reader:
            yield from _since(reader, now, image if adopted else View(""))
    elif opened.kept.note:  # what changes is in memory, what was kept below it: two uppers
        yield from compare(image, now)
    else:
        yield from compare(image, now, upper=opened.upper)


def _since(given: manifest.Reader, now: View, image: View, path: str = "") -> Iterator[Change]:
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
        if ours is None:
            yield Change(what=DELETED, path=place, kind=old.kind)
            continue
        if ours != old.alone:
            yield Change(what=CHANGED, path=place, kind=ours.kind)
        if old.kind == ours.kind == DIRECTORY:
            yield from _since(given, now, image, place)


def compare(image: View, now: View, path: str = "", *, upper: str = "") -> Iterator[Change]:
    """Compare with the image, a directory after what is in it.

    With the name of an overlay's upper directory, only what that has is looked at.
    """
    theirs, ours = image.entry(path), now.entry(path)
    if theirs is not None and ours is not None and theirs.kind == ours.kind == DIRECTORY:
        names = View(upper).kinds("") if upper else {**image.kinds(path), **now.kinds(path)}
        for name in sorted(names):
            below = f"{upper}/{name}" if names[name] == DIRECTORY and _shines_through(upper, name) else ""
            yield from compare(image, now, f"{path}/{name}" if path else name, upper=below)
    kind = (ours or theirs or Entry(kind="", mode=0, uid=0, gid=0)).kind
    if ours is None and theirs is not None:
        yield Change(what=DELETED, path=path, kind=kind)
    elif theirs is None and ours is not None:
        yield Change(what=ADDED, path=path, kind=kind)
    elif theirs != ours:
        yield Change(what=CHANGED, path=path, kind=kind)


def _shines_through(upper: str, name: str) -> bool:
    """Tell whether the lower directory of the same name is seen through one of an overlay's upper."""
    if not upper:
        return False
    for attribute, seen in (("opaque", b"x"), ("redirect", None)):  # x: it holds whiteouts, and no more
        try:
            value = os.getxattr(f"{upper}/{name}", f"trusted.overlay.{attribute}", follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.ENOENT, errno.ENOTDIR):
                raise
        else:
            if value != seen:
                return False
    return True


def conflicts(opened: Opened) -> list[Conflict]:
    """List the conflicts of the last merge that are not settled: still there is not what the image has."""
    if opened.kept.overlay:
        return []
    with opened.manifest() as reader:
        listed = reader.memory().conflicts
    for each in listed:
        if each.path and not all(map(manifest.is_name, each.path.split("/"))):
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


# One path below a directory that others may write to


@contextlib.contextmanager
def _parent(directory: int, path: str) -> Generator[tuple[int, str]]:
    """Open the directory that holds `path`, through no symlink, and give the name in it."""
    above, _, name = path.rpartition("/")
    parent = syscalls.openat2(directory, above or ".", os.O_RDONLY | os.O_DIRECTORY, _PLAIN)
    try:
        yield parent, name or "."
    finally:
        os.close(parent)


def _look(directory: int, path: str) -> Entry | None:
    """Look closely at one thing, through no symlink. Raises OSError."""
    with contextlib.suppress(*_GONE), _parent(directory, path) as (parent, name):
        return Tree(f"{_descriptor(parent)}/{name}").root
    return None


def _look_in_image(opened: Opened, path: str) -> Entry | None:
    if opened.image < 0:
        return None
    try:
        return _look(opened.image, path)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return None  # the image has a symlink where a directory is now


def _descriptor(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"


def _name(descriptor: int) -> str:
    return f"{_descriptor(descriptor)}/."  # the directory, and not the link to it


def _place(opened: Opened, named: str) -> str:
    """Give what somebody names, in the persistent path or from the root, as a path below the former."""
    below = named
    if named.startswith("/"):
        if not is_below(named, opened.kept.path):
            raise CmdlineError(
                f"'{shown(named)}' is not in '{shown(opened.kept.path)}'",
                hint="name files as `immucore state PATH` lists them",
            )
        below = named[len(opened.kept.path) :].strip("/")
    if below and not all(map(manifest.is_name, below.split("/"))):
        raise CmdlineError(
            f"cannot take '{shown(named)}' for the name of a file: it may hold no '..', '.' or '//'",
            hint="name files as `immucore state PATH` lists them",
        )
    return below


def _both(opened: Opened, path: str) -> tuple[Entry | None, Entry | None]:
    """Look at a path in the image and at what is there now, which at least one of them has to have."""
    whole = _whole(opened.kept, path)
    try:
        ours = _look(opened.now, path)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise CmdlineError(
            f"cannot look at '{whole}': a symlink is on the way to it", hint="name the file by where it is"
        ) from None
    theirs = _look_in_image(opened, path)
    if ours is None and theirs is None:
        raise CmdlineError(
            f"cannot find '{whole}', neither in the image nor here",
            hint="name files as `immucore state PATH` lists them",
        )
    return theirs, ours


# Saying


def shown(text: str) -> str:
    """Give a name as one line of a terminal can show it."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def say(line: str) -> None:
    """Print a line, whatever the terminal's encoding lacks."""
    encoding = sys.stdout.encoding or "ascii"
    print(line.encode(encoding, "backslashreplace").decode(encoding))


def _whole(kept: Kept, path: str, kind: str = "") -> str:
    """Name a path from the root, a directory with a slash at its end."""
    return shown(_joined(kept, path)) + ("/" if kind == DIRECTORY else "")


def _joined(kept: Kept, path: str) -> str:
    return f"{kept.path}/{path}" if path else kept.path


def _facts(kept: Kept, root: str, *, listed: bool = False) -> dict[str, Any]:
    """Find out about one persistent path; `error` is there where that is not possible."""
    facts: dict[str, Any] = {
        "path": kept.path,
        "mode": "overlay" if kept.overlay else "bind",
        "kept_in": as_booted(kept.place),
        "image": None,
        "adopted": False,
        "note": kept.note,
        "error": None,
    }
    try:
        with contextlib.ExitStack() as stack:
            opened = Opened(kept, root, stack)
            if not kept.overlay:
                with opened.manifest() as reader:
                    facts["image"], facts["adopted"] = reader.image, reader.memory().adopted
            facts |= dict.fromkeys(KINDS, 0)
            facts["conflicts"] = [_joined(kept, each.path) for each in conflicts(opened)]
            if listed:
                facts["files"] = []
            for change in changes(opened):
                facts[change.what] += 1
                if listed:
                    name = _joined(kept, change.path)
                    facts["files"].append({"what": change.what, "path": name, "kind": change.kind})
    except (ImmucoreError, OSError, ValueError, RecursionError) as error:
        facts = {key: value for key, value in facts.items() if key not in (*KINDS, "files")}
        facts["error"] = _reason(kept, error).message
    return facts


def _reason(kept: Kept, error: Exception) -> ImmucoreError:
    """Say in one sentence what was wrong, whatever it was."""
    path = shown(kept.path)
    if isinstance(error, ImmucoreError):
        return error
    if isinstance(error, OSError):
        return MountError(
            f"cannot look at '{path}': {error.strerror or error}", hint="see the kernel's log: dmesg | tail"
        )
    name = shown(as_booted(statedir.manifest_of(kept.place)))
    return MountError(
        f"cannot tell what the image gave to '{path}': '{name}' is no manifest: {shown(str(error))}",
        hint="the next boot of another image writes it anew, and leaves every file as it is",
    )


def _lines(facts: dict[str, Any]) -> Iterator[str]:
    """Say what became of one persistent path."""
    yield f"{shown(facts['path'])}: {facts['mode']}, kept in {shown(facts['kept_in'])}"
    if facts["note"]:
        yield f"    in this boot: {shown(facts['note'])}"
    if facts["error"]:
        yield f"    {facts['error']}"
        return
    known = {None: "what the booted image has", "": "an image that is not known"}
    yield f"    follows {known.get(facts['image']) or 'image ' + shown(facts['image'])}"
    yield "    " + ", ".join(f"{facts[what]} {what}" for what in KINDS[:3])
    if facts["adopted"]:
        yield f"    was there before its first manifest (adopted): {facts[MISSING]} missing"
    for path in facts["conflicts"]:
        yield f"    in conflict: {shown(path)}"


# Commands


def show(arguments: argparse.Namespace) -> int:
    """List the persistent paths, or what is not as the image gave it in one of them."""
    root, paths = _begin(arguments)
    if arguments.path:
        kept = _named(paths, arguments.path)
        return _list(kept, root, as_json=arguments.json)
    wrong = False
    shown_facts = []
    for kept in paths:
        facts = _facts(kept, root)
        wrong = wrong or facts["error"] is not None
        shown_facts.append(facts)
        for line in () if arguments.json else _lines(facts):
            say(line)
    if arguments.json:
        print(json.dumps({"schema": report.SCHEMA, "paths": shown_facts}, indent=2))
    elif not paths:
        say("nothing is kept in this boot: no persistent path is mounted")
    return MountError.exit_status if wrong else 0


def _list(kept: Kept, root: str, *, as_json: bool) -> int:
    if as_json:
        facts = _facts(kept, root, listed=True)
        print(json.dumps({"schema": report.SCHEMA, "paths": [facts]}, indent=2))
        return MountError.exit_status if facts["error"] is not None else 0
    with _opened(kept, root) as opened:
        for each in conflicts(opened):
            say(f"{CONFLICT} {_whole(kept, each.path)}")
        for change in changes(opened):
            say(f"{change.what} {_whole(kept, change.path, change.kind)}")
    return 0


def diff(arguments: argparse.Namespace) -> int:
    """Show how a file differs from the image's version."""
    root, paths = _begin(arguments)
    named = os.path.normpath(arguments.file) if not _has_dots(arguments.file) else arguments.file
    holding = [kept for kept in paths if is_below(named, kept.path)]
    if not holding:
        raise CmdlineError(
            f"'{shown(arguments.file)}' is in no persistent path of this boot",
            hint="name it from the root; see which paths there are: immucore state",
        )
    with _opened(max(holding, key=lambda kept: len(kept.path)), root) as opened:
        path = _place(opened, named)
        theirs, ours = _both(opened, path)
        for line in _difference(opened, path, theirs, ours):
            say(line)
    return 0


def _has_dots(path: str) -> bool:
    return ".." in path.split("/")


def _difference(opened: Opened, path: str, theirs: Entry | None, ours: Entry | None) -> Iterator[str]:
    whole = _whole(opened.kept, path)
    if ours is None or theirs is None:
        there, other = (
            ("the image", "it was deleted here") if ours is None else ("this machine", "it was added")
        )
        kind = (ours or theirs or Entry(kind="", mode=0, uid=0, gid=0)).kind
        yield f"only {there} has {whole} ({kind}): {other}"
        return
    for what, image, here in _attributes(theirs, ours):
        yield f"{whole}: {what}: {image} in the image, {here} here"
    if ours.kind == theirs.kind == "file" and ours.content != theirs.content:
        yield from _content(opened, path, whole)
    if ours.kind == theirs.kind == DIRECTORY:
        below = [change for change in _against_image(opened, path) if change.path != path]
        yield from (f"{change.what} {_whole(opened.kept, change.path, change.kind)}" for change in below)
        same = ours == theirs and not below
    else:
        same = ours == theirs
    if same:
        yield f"{whole} is as the image has it"


def _attributes(theirs: Entry, ours: Entry) -> Iterator[tuple[str, str, str]]:
    """Give what differs but the data of files: its name, in the image, and here."""
    if theirs.kind != ours.kind:
        yield "type", theirs.kind, ours.kind
    for kind, what in (("symlink", "target"), ("character", "device"), ("block", "device")):
        if theirs.kind == ours.kind == kind and theirs.content != ours.content:
            yield what, shown(theirs.content), shown(ours.content)
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


def _content(opened: Opened, path: str, whole: str) -> Iterator[str]:
    """Compare the data of two files, line by line if they are texts."""
    (image, image_bytes), (here, here_bytes) = _read(opened.image, path), _read(opened.now, path)
    sizes = f"{image_bytes} bytes in the image, {here_bytes} bytes here"
    if max(image_bytes, here_bytes) > MAX_TEXT_BYTES:
        yield f"{whole}: the content differs, and is too large to be compared by lines: {sizes}"
        return
    texts = [_text(image), _text(here)]
    if texts[0] is None or texts[1] is None:
        yield f"{whole}: the content differs, and is binary: {sizes}"
        return
    for line in difflib.unified_diff(
        _split(texts[0]), _split(texts[1]), f"{whole} (image)", whole, "", "", 3, ""
    ):
        end = (
            ""
            if line.endswith("\n") or line.startswith(("---", "+++", "@@"))
            else "\n\\ No newline at end of file"
        )
        yield "\t".join(map(shown, line.removesuffix("\n").split("\t"))) + end


def _read(directory: int, path: str) -> tuple[bytes, int]:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    with _parent(directory, path) as (parent, name), open(os.open(name, flags, dir_fd=parent), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EBUSY, "it changes while it is looked at")
        return file.read(MAX_TEXT_BYTES + 1), status.st_size


def _text(content: bytes) -> str | None:
    try:
        return None if b"\0" in content else content.decode()
    except UnicodeDecodeError:
        return None


def _split(text: str) -> list[str]:
    """Split at line feeds alone; str.splitlines() knows ten more line ends."""
    lines = [f"{line}\n" for line in text.split("\n")]
    last = lines.pop()[:-1]
    return [*lines, last] if last else lines


def reset(arguments: argparse.Namespace) -> int:
    """Give the image's version of files back, or of all of a persistent path."""
    root, paths = _begin(arguments)
    kept = _named(paths, arguments.path)
    with _opened(kept, root) as opened:
        if opened.image < 0:
            path = shown(opened.kept.path)
            raise MountError(
                f"cannot reset '{path}': the image that is booted has no such directory",
                hint="remove what is not wanted by hand",
            )
        places = [_place(opened, named.rstrip("/") or named) for named in arguments.files] or [""]
        for place in places:
            _both(opened, place)
        if "" in places and not arguments.yes and not _confirmed(opened):
            return 0
        with _Reset(opened) as work:
            for place in places:
                if not work.run(place):
                    say(f"{_whole(kept, place)} is as the image has it")
    return 0


def _confirmed(opened: Opened) -> bool:
    """Say what is going to be done to all of a persistent path, and have somebody want it."""
    some = False
    for change in _against_image(opened, ""):
        some = True
        say(f"{_DOES[change.what]} {_whole(opened.kept, change.path, change.kind)}")
    path = shown(opened.kept.path)
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


_DOES = {CHANGED: "replace", ADDED: "remove", DELETED: "bring back"}
_DONE = {CHANGED: "replaced", ADDED: "removed", DELETED: "brought back"}


def _against_image(opened: Opened, path: str) -> Iterator[Change]:
    image, now = opened.views()
    guided = opened.kept.overlay and not opened.kept.note and not path
    for change in compare(image, now, path, upper=opened.upper if guided else ""):
        if change.path != opened.stage or not opened.kept.overlay:
            yield change


class _Reset:
    """Puts the image's version of one path after the other in place, each in one step."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._top, self._name = opened.top, opened.stage
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self._name, 0o700, dir_fd=self._top)
            self._stage = os.open(self._name, flags, dir_fd=self._top)
        except OSError as error:
            raise self._failed(shown(opened.kept.path), error) from None
        try:
            status = os.fstat(self._stage)
            if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) != 0o700:
                raise MountError(
                    f"cannot use '{shown(self._name)}' in what is to be reset: it is somebody else's",
                    hint="look at it, and remove it",
                )
            self._lock()
            self._clear()  # what was left by one that was cut off
        except BaseException:
            os.close(self._stage)
            raise

    def __enter__(self) -> _Reset:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._clear()
            with contextlib.suppress(OSError):  # the next one takes it
                os.rmdir(self._name, dir_fd=self._top)
        finally:
            os.close(self._stage)

    def _lock(self) -> None:
        """Keep others out; one that has just ended may have removed the directory after it was opened."""
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(self._stage, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there = os.stat(self._name, dir_fd=self._top, follow_symlinks=False)
            if os.path.samestat(there, os.fstat(self._stage)):
                return
        raise MountError(
            "cannot reset anything here: another reset is at work", hint="try again when that is done"
        )

    def _clear(self) -> None:
        for name in os.listdir(self._stage):
            _remove(self._stage, name)

    def run(self, place: str) -> bool:
        """Bring a path and all below it to what the image has; tell whether anything was to be done."""
        some = False
        for change in _against_image(self._opened, place):
            whole = _whole(self._opened.kept, change.path, change.kind)
            try:
                self._one(change.path)
            except BrokenPipeError:
                raise
            except OSError as error:
                raise self._failed(whole, error) from None
            some = True
            say(f"{_DONE[change.what]} {whole}")
        return some

    def _failed(self, whole: str, error: OSError) -> MountError:
        why = {
            errno.ELOOP: "a symlink is on the way to it",
            errno.ENOENT: "the directory that holds it is not there",
            errno.ENOTDIR: "what holds it is no directory here",
        }.get(error.errno or 0, error.strerror or str(error))
        hint = "look at what the kernel says: dmesg | tail"
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            hint = "reset the directory that holds it"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free space on the file system that holds it"
        return MountError(f"cannot reset '{whole}': {why}; it stays as it was", hint=hint)

    def _one(self, path: str) -> None:
        """Have one path be what it is in the image; a directory in both gets only its attributes."""
        with _parent(self._opened.now, path) as (parent, name):
            theirs = _look_in_image(self._opened, path)
            with contextlib.suppress(*_GONE):
                status = os.stat(name, dir_fd=parent, follow_symlinks=False)
                if theirs is not None and theirs.kind == DIRECTORY and stat.S_ISDIR(status.st_mode):
                    return self._attributes(parent, name, path)
            loose = self._copy(path) if theirs is not None else 0
            flags = files.flags_of_open(parent)
            try:
                self._put(parent, name, copied=theirs is not None)
            except PermissionError:  # the directory is immutable
                files.loosen(_name(parent))
                try:
                    self._put(parent, name, copied=theirs is not None)
                finally:
                    files.set_flags(_name(parent), flags)
            if loose & (files.IMMUTABLE | files.APPEND):
                files.set_flags(f"{_descriptor(parent)}/{name}", loose)
            os.fsync(parent)
        return self._clear()

    def _copy(self, path: str) -> int:
        """Copy the image's version, with all that makes it, to where only root can get at it.

        Return its flags, of which those are off that would keep it from being renamed.
        """
        self._clear()
        with _parent(self._opened.image, path) as (above, name):
            origin, new = f"{_descriptor(above)}/{name}", f"{_descriptor(self._stage)}/new"
            files.copy(origin, new, {})
            kind = os.lstat(new).st_mode
        if stat.S_ISREG(kind):
            files.fsync(new)
        elif stat.S_ISDIR(kind):
            syscalls.syncfs(self._stage)
        return files.loosen(new) if stat.S_ISREG(kind) or stat.S_ISDIR(kind) else 0

    def _put(self, parent: int, name: str, *, copied: bool) -> None:
        """Put the copy in place of what is there, if anything is; without one, remove that."""
        try:
            there = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
        except FileNotFoundError:
            there = 0
        if not copied:
            if there:
                _remove(parent, name)
            return
        if stat.S_ISREG(there) or stat.S_ISDIR(there):
            files.loosen(f"{_descriptor(parent)}/{name}")
        new = os.stat("new", dir_fd=self._stage, follow_symlinks=False).st_mode
        if there and (stat.S_ISDIR(there) or stat.S_ISDIR(new)):  # rename(2) replaces only like with like
            syscalls.exchange(f"{_descriptor(self._stage)}/new", f"{_descriptor(parent)}/{name}")
        else:
            os.rename("new", name, src_dir_fd=self._stage, dst_dir_fd=parent)

    def _attributes(self, parent: int, name: str, path: str) -> None:
        """Give a directory the attributes that it has in the image, and none besides."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        here = os.open(name, flags, dir_fd=parent)
        try:
            with _parent(self._opened.image, path) as (above, same):
                origin = f"{_descriptor(above)}/{same}"
                if files.loosen(_name(here)):
                    files.set_flags(_name(here), 0)
                for attribute in {*files.xattrs(_name(here))} - {*files.xattrs(origin)}:
                    os.removexattr(_name(here), attribute)
                files.copy_all_attributes(origin, _name(here))
            os.fsync(here)
        finally:
            os.close(here)


def _remove(parent: int, name: str) -> None:
    """Remove a tree, also where it is immutable, and follow no symlink that is put there meanwhile."""
    try:
        directory = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except NotADirectoryError:
        try:
            os.unlink(name, dir_fd=parent)
        except PermissionError:
            _loosen(parent, name)
            os.unlink(name, dir_fd=parent)
        return
    try:
        files.loosen(_name(directory))
        for each in os.listdir(directory):
            _remove(directory, each)
    finally:
        os.close(directory)
    os.rmdir(name, dir_fd=parent)


def _loosen(parent: int, name: str) -> None:
    if stat.S_ISREG(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
        files.loosen(f"{_descriptor(parent)}/{name}")


# What all of them begin with


def _begin(arguments: argparse.Namespace) -> tuple[str, list[Kept]]:
    """Find the persistent paths of this boot, and where its root is."""
    if os.geteuid():
        raise MountError(
            "cannot look at what this machine keeps: that is for root alone", hint="sudo immucore state"
        )
    sys.setrecursionlimit(max(sys.getrecursionlimit(), statedir.RECURSION_LIMIT))
    root = arguments.root or (SYSROOT if os.path.exists(INITRD_RELEASE) else "/")
    return os.path.realpath(root), persistent(_record("steps.json"))


def _named(paths: Iterable[Kept], named: str) -> Kept:
    found = next((kept for kept in paths if kept.path == (named.rstrip("/") or "/")), None)
    if found is None:
        raise CmdlineError(
            f"'{shown(named)}' is no persistent path of this boot",
            hint="see which there are: immucore state",
        )
    return found


@contextlib.contextmanager
def _opened(kept: Kept, root: str) -> Generator[Opened]:
    """Open one persistent path; whatever goes wrong with it is told in one sentence."""
    try:
        with contextlib.ExitStack() as stack:
            yield Opened(kept, root, stack)
    except (ImmucoreError, BrokenPipeError):
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise _reason(kept, error) from None
