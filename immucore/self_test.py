"""Whether this copy of the program is whole: every module imports, every library opens.

Run in a chroot of the built initramfs, where what the build forgot is missing: so nothing is expected of
/proc, /dev or /tmp, and everything that fails becomes a line of the answer.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from typing import TYPE_CHECKING, cast

import immucore

if TYPE_CHECKING:
    from collections.abc import Iterable

# Imported only by a boot that has to wait for a device, which no test of a healthy boot would notice.
_LAZY = ("pyroute2.netlink.uevent",)


def self_test() -> list[str]:
    """Answer what is wrong with this copy of the program; nothing, when it is whole."""
    problems = [problem for name in (*_modules(), *_LAZY) if (problem := _import(name))]
    if problem := _import("ctypes"):
        return [*problems, problem]  # nothing below can be tried without it
    problems += [problem for path in _libraries() if (problem := _open_library(path))]
    if not problems:
        problems += _listen_to_uevents()
    return problems


def _modules() -> list[str]:
    """Name every module of the package, from the frozen program's archive or from the source's folder."""
    if getattr(sys, "frozen", False):
        # pkgutil sees nothing inside PyInstaller's archive; the archive's own table of contents is complete.
        return sorted(name for name in _table() if name.split(".")[0] == immucore.__name__)
    found = pkgutil.walk_packages(immucore.__path__, f"{immucore.__name__}.")
    return sorted([immucore.__name__, *(module.name for module in found)])


def _table() -> Iterable[str]:
    """Answer the archive's table, which is that of frozen/bootstrap.py, or of PyInstaller's own importer."""
    for importer in sys.meta_path:
        if table := getattr(importer, "table", None):
            return cast("Iterable[str]", table)
    return cast("Iterable[str]", importlib.import_module("pyimod02_importers").pyz_archive.toc)


def _libraries() -> list[str]:
    """List the shared libraries that came with the frozen program."""
    bundle = getattr(sys, "_MEIPASS", None)
    if bundle is None:
        return []
    folders = os.walk(bundle)
    return sorted(
        os.path.join(folder, name) for folder, _, names in folders for name in names if ".so" in name
    )


def _import(name: str) -> str | None:
    """Import a module; whatever a module's own code raises is a problem of this copy, not of the test."""
    try:
        importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 - see above
        return f"cannot import '{name}': {type(error).__name__}: {error}"
    return None


def _open_library(path: str) -> str | None:
    """Load a library with everything it needs."""
    import ctypes

    try:
        ctypes.CDLL(path, mode=os.RTLD_NOW)
    except OSError as error:
        return f"cannot open '{path}': {error}"
    return None


def _listen_to_uevents() -> list[str]:
    """Open what a waiting boot listens on; the machinery under it imports more the first time it runs."""
    uevent = importlib.import_module("pyroute2.netlink.uevent")
    try:
        socket = uevent.UeventSocket()
        try:
            socket.bind()
        finally:
            socket.close()
    except Exception as error:  # noqa: BLE001 - pyroute2 does not say what it raises
        return [f"cannot listen to uevents: {type(error).__name__}: {error}"]
    return []
