"""The programs that make images: each runs to its end, tells how far it is, and fails with one sentence."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from immucore import process
from immucore.log import printable
from immucore.system import stopping
from immucore.system.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    Advance = Callable[[int, int], None]  # how much is done, of how much; 0: nobody knows

TELL_SEC = 0.5
FAKEROOT = "FAKEROOTKEY"  # fakeroot(1): root for the C library, and not for the kernel
_FAKEROOT = (FAKEROOT, "LD_PRELOAD", "FAKED_MODE")
_TOGETHER = ("setpriv", "--pdeathsig", "KILL", "--")
_LINES = 3  # of what a program has said, the last ones
_PACKAGES = {
    "debugfs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "grub-mkimage": "grub-common",
    "mcopy": "mtools",
    "mke2fs": "e2fsprogs",
    "mkfs.vfat": "dosfstools",
    "mksquashfs": "squashfs-tools",
    "partx": "util-linux",
    "sfdisk": "fdisk",
    "unsquashfs": "squashfs-tools",
    "wipefs": "util-linux",
}


def together(argv: Sequence[str]) -> list[str]:
    """Have a program end with this process, whatever ends that."""
    return [*(_TOGETHER if process.find(_TOGETHER[0]) else ()), *argv]


def silent(_done: int, _total: int) -> None:
    """Tell nobody."""


def run(
    argv: Sequence[str],
    failure: str,
    *,
    hint: str = "",
    advance: Advance = silent,
    total_bytes: int = 0,
    good: Sequence[int] = (0,),
    typed: str = "",
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run a program, and return what it said; `total_bytes` is what it will have read at its end.

    It ends with this process, whatever ends that: nobody writes on where the next one begins anew. Raises
    ImageError: `failure`, and the end of what the program said, or that it is not installed.
    """
    if not process.find(argv[0]):
        package = _PACKAGES.get(argv[0], argv[0])
        raise ImageError(f"{failure}: there is no {argv[0]}", hint=f"install {package}")

    def meanwhile(_sec: float) -> None:
        stopping.point()
        if total_bytes:
            advance(min(_read_bytes(), total_bytes), total_bytes)

    done = process.run(
        together(argv),
        typed=typed.encode(),
        environment={**_surroundings(), **(environment or {})},
        meanwhile=meanwhile,
        every_sec=TELL_SEC,
    )
    stopping.point()  # Ctrl-C ends a child, too
    if done.status not in good:
        said = [line.strip() for line in done.output.splitlines() if line.strip()][-_LINES:]
        reason = printable("; ".join(said)) or f"{argv[0]} ended with status {done.status}"
        raise ImageError(f"{failure}: {reason}", hint=hint)
    return done.output


def require(names: Iterable[str], failure: str) -> None:
    """See to it, before anything is done, that programs are installed. Raises ImageError."""
    missing = [name for name in names if process.find(name) is None]
    if missing:
        packages = sorted({_PACKAGES.get(name, name) for name in missing})
        raise ImageError(
            f"{failure}: there is no {', '.join(missing)}", hint=f"install {' '.join(packages)}"
        )


def _surroundings() -> dict[str, str]:
    """Give what fakeroot(1) needs in the environment of a child, where there is one."""
    if FAKEROOT not in os.environ:
        return {}
    kept = {name: os.environ[name] for name in _FAKEROOT if name in os.environ}
    # A frozen program has put its own folder there, and kept what was there before (PyInstaller).
    libraries = os.environ.get("LD_LIBRARY_PATH_ORIG", os.environ.get("LD_LIBRARY_PATH", ""))
    return {**kept, "LD_LIBRARY_PATH": libraries}


def _read_bytes() -> int:
    """Tell how much the children of this thread have read so far (proc(5), `io`)."""
    found = 0
    try:
        with open("/proc/thread-self/children", encoding="ascii") as file:
            children = file.read().split()
        for child in children:
            with open(f"/proc/{child}/io", encoding="ascii") as file:
                found += int(file.readline().split()[1])
    except (OSError, ValueError, IndexError):  # one that has ended just now; a kernel without
        return 0
    return found
