"""The persistent paths of this boot, and how `immucore state` opens their trees.

A machine runs on them: whoever owns a directory may put a symlink there at any moment. So what is opened are
clones of the mounts without what is mounted in them, and what is below is reached through no symlink.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any

from immucore import manifest, observe, report, statedir, syscalls
from immucore.boot import INITRD_RELEASE
from immucore.doctor import as_object, items
from immucore.errors import CmdlineError, MountError
from immucore.execute import SUCCEEDED
from immucore.layouts.cos import OVERLAY_BASE
from immucore.log import printable
from immucore.merge import DIRECTORY
from immucore.plan import SYSROOT, as_booted, is_below
from immucore.values import Record

if TYPE_CHECKING:
    import argparse
    from collections.abc import Generator, Iterable
    from typing import TypeGuard

AS_LISTED = "name files as `immucore state PATH` lists them"
_STAGE = ".immucore.reset"  # in an overlay; beside a directory that is bound it is <name>.reset
_PLAIN = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_SYMLINKS
_OTHER_BOOT = "see what was booted: immucore doctor"


class Kept(Record):
    """A persistent path of this boot."""

    path: str  # as the booted system calls it
    place: str  # what keeps it, as the plan calls it: a directory, or what holds an overlay's upper
    overlay: bool
    lost: str = ""  # why it is not there in this boot
    note: str = ""  # what is not as it was asked for

    def name(self, below: str) -> str:
        """Name what is below it from the root."""
        return f"{self.path}/{below}" if below else self.path

    def shown(self, below: str = "", kind: str = "") -> str:
        """Give that name for a terminal, a directory's with a slash at its end."""
        return shown(self.name(below)) + ("/" if kind == DIRECTORY else "")

    def below(self, named: str) -> str:
        """Give what somebody names, in the persistent path or from the root, as a path below the former."""
        below = named
        if named.startswith("/"):
            if not is_below(named, self.path):
                raise CmdlineError(f"'{shown(named)}' is not in '{self.shown()}'", hint=AS_LISTED)
            below = named[len(self.path) :].strip("/")
        if below and not leads_down(below):
            raise CmdlineError(
                f"cannot take '{shown(named)}' for the name of a file: it may hold no '..', '.' or '//'",
                hint=AS_LISTED,
            )
        return below


def shown(text: str) -> str:
    """Give a name as one line of a terminal can show it."""
    return printable(text).replace("\n", "\\u000a")


def say(line: str) -> None:
    """Print a line, whatever the terminal's encoding lacks."""
    encoding = sys.stdout.encoding or "ascii"
    print(line.encode(encoding, "backslashreplace").decode(encoding))


def leads_down(path: str) -> bool:
    """Tell whether a path is made of names alone."""
    return all(map(manifest.is_name, path.split("/")))


def begin(arguments: argparse.Namespace) -> tuple[str, list[Kept]]:
    """Find where the root of this boot is, and its persistent paths."""
    if os.geteuid():
        raise MountError(
            "cannot look at what this machine keeps: that is for root alone", hint="sudo immucore state"
        )
    sys.setrecursionlimit(max(sys.getrecursionlimit(), statedir.RECURSION_LIMIT))
    root = arguments.root or (SYSROOT if os.path.exists(INITRD_RELEASE) else "/")
    return os.path.realpath(root), persistent(_record("steps.json"))


def find(paths: Iterable[Kept], named: str) -> Kept:
    """Give the persistent path that somebody names."""
    for kept in paths:
        if kept.path == named.rstrip("/"):
            return kept
    raise CmdlineError(
        f"'{shown(named)}' is no persistent path of this boot", hint="see which there are: immucore state"
    )


def persistent(record: dict[str, Any]) -> list[Kept]:
    """List the persistent paths of what steps.json records; of several attempts the last counts."""
    seeded: dict[str, object] = {}  # what was wrong with the directories of the state
    found: dict[str, Kept] = {}
    for step in items(record.get("steps")):
        operation, outcome = step.get("operation"), step.get("outcome")
        if not isinstance(operation, dict) or outcome == "undone":
            continue
        target, kind = operation.get("target"), operation.get("kind")
        place = operation.get("backing" if kind == "overlay" else "source")
        if not _is_path(target):
            continue
        if kind == "seed":
            seeded[target] = step.get("reason")
        if kind not in ("bind", "overlay") or not _is_path(place):
            continue
        if place not in seeded if kind == "bind" else is_below(place, OVERLAY_BASE):
            continue
        reason = str(seeded.get(place) or step.get("reason") or "")
        there = outcome in SUCCEEDED
        found[as_booted(target)] = Kept(
            path=as_booted(target),
            place=place,
            overlay=kind == "overlay",
            lost="" if there else reason or "it is not mounted in this boot",
            note=reason if there else "",
        )
    return [found[path] for path in sorted(found)]


def _is_path(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and value.startswith("/") and leads_down(value[1:])


def _record(name: str) -> dict[str, Any]:
    try:
        with open(f"{report.DIRECTORY}/{name}", encoding="utf-8", errors="replace") as file:
            return as_object(file.read())
    except OSError as error:
        raise MountError(
            f"cannot read '{error.filename}', what the boot has recorded: {error.strerror}",
            hint="boot this machine with immucore: rd.cos.disable is not to be on its command line",
        ) from None


@contextlib.contextmanager
def opened(kept: Kept, root: str) -> Generator[Opened]:
    """Open a persistent path; whatever goes wrong with it is told in one sentence."""
    try:
        with contextlib.ExitStack() as stack:
            yield Opened(kept, root, stack)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _refusal(kept, error.strerror or str(error), "see the kernel's log: dmesg | tail") from None
    except (ValueError, RecursionError) as error:
        name = shown(as_booted(statedir.manifest_of(kept.place)))
        why = f"'{name}' is no manifest: {shown(str(error))}"
        raise MountError(
            f"cannot tell what the image gave to '{kept.shown()}': {why}",
            hint="the next boot of another image writes it anew, and leaves every file as it is",
        ) from None


def _refusal(kept: Kept, why: str, hint: str) -> MountError:
    return MountError(f"cannot look at '{kept.shown()}': {why}", hint=hint)


class Opened:
    """A persistent path whose trees are open: the image's and, in `top`, the one that is there now."""

    def __init__(self, kept: Kept, root: str, stack: contextlib.ExitStack) -> None:
        self.kept = kept
        self._root, self._stack = root, stack
        if kept.lost:
            raise _refusal(kept, kept.lost, _OTHER_BOOT)
        image = self._image()
        self.image = -1  # the image has no such directory
        with contextlib.suppress(FileNotFoundError):
            self.image = self._open(image, kept.path.lstrip("/"))
        self.upper = ""  # where to look for what was changed, if one directory has all of it
        mounted = self._below(SYSROOT + kept.path)
        if kept.overlay:
            last = {mount.target: mount.fstype for mount in observe.mounts()}
            if last.get(root.rstrip("/") + kept.path) != "overlay":
                raise self._other("no overlay")
            self.top = self.now = self._clone(mounted)
            self.stage = _STAGE
            if not kept.note:  # else what changes is in memory, and what was kept is below it
                self.upper = dot(self._below(f"{kept.place}/upper"))
            return
        above, _, name = kept.place.rpartition("/")
        self.top = self._clone(self._below(above))
        self.now = self._open(self.top, name, _PLAIN)
        self.stage = f"{name.removesuffix(statedir.SUFFIX)}.reset"
        if not os.path.samestat(os.stat(mounted), os.stat(self.now)):
            raise self._other("something else")

    def manifest(self) -> manifest.Reader:
        """Open what the image gave last time. Raises ValueError if that is no manifest."""
        name = f"{dot(self.top)}/{os.path.basename(statedir.manifest_of(self.kept.place))}"
        try:
            return manifest.Reader(name)
        except FileNotFoundError:
            raise ValueError("it is not there") from None

    def _image(self) -> int:
        """Open the image that is booted, whatever is mounted over its directories."""
        where = f"mounted on '{shown(self._root)}'"
        try:
            image = self._keep(syscalls.clone_mount(self._root))
        except OSError as error:
            raise MountError(
                f"cannot read the image that is {where}: {error.strerror}", hint=_OTHER_BOOT
            ) from None
        known, status = _record("result.json").get("root"), os.stat(image)
        if known != {"dev": f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}", "ino": status.st_ino}:
            raise MountError(
                f"cannot take what is {where} for the image: this boot has mounted another",
                hint="name where the system is mounted: --root DIR",
            )
        return image

    def _other(self, what: str) -> MountError:
        hint = f"see what it is: findmnt {self.kept.shown()}"
        return _refusal(self.kept, f"{what} is mounted there by now", hint)

    def _below(self, path: str) -> int:
        """Open a directory of a plan where it is now; what is on a disk cannot lead out of it."""
        root = self._root if is_below(path, SYSROOT) else "/"
        top = self._keep(os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        return self._open(top, as_booted(path).lstrip("/"))

    def _open(self, directory: int, path: str, resolve: int = syscalls.RESOLVE_IN_ROOT) -> int:
        return self._keep(syscalls.openat2(directory, path or ".", os.O_PATH | os.O_DIRECTORY, resolve))

    def _clone(self, directory: int) -> int:
        return self._keep(syscalls.clone_mount(dot(directory)))

    def _keep(self, descriptor: int) -> int:
        self._stack.callback(os.close, descriptor)
        return descriptor


@contextlib.contextmanager
def holding(directory: int, path: str) -> Generator[tuple[int, str]]:
    """Open the directory that holds `path`, through no symlink, and give the name in it."""
    above, _, name = path.rpartition("/")
    parent = syscalls.openat2(directory, above or ".", os.O_RDONLY | os.O_DIRECTORY, _PLAIN)
    try:
        yield parent, name or "."
    finally:
        os.close(parent)


def inside(descriptor: int, name: str) -> str:
    """Name what is in a directory that is open."""
    return f"/proc/self/fd/{descriptor}/{name}"


def dot(descriptor: int) -> str:
    """Name a directory that is open, and not the link to it."""
    return inside(descriptor, ".")
