"""Extensions of the system (systemd-sysext(8)): images in the state, linked to where systemd looks."""

from __future__ import annotations

import os

from immucore.plan import SYSROOT, as_booted, is_below

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from immucore.linux import Kernel

KINDS = ("extensions", "confexts")  # both below the state and below /run
DROP_IN = "systemd/system/systemd-sysext.service.d/immucore.conf"


def link(kernel: Kernel, source: str, run: str, sets: tuple[str, ...], spared: tuple[str, ...]) -> bool:
    """Link the images of each set, first come first served; tell whether any was not linked before.

    Raises OSError.
    """
    where = kernel.path(source)
    new = False
    for kind in KINDS:
        names = {name: each for each in reversed(sets) for name in _images(f"{where}/{kind}/{each}")}
        for name, each in sorted(names.items()):
            link_name = f"{kernel.directory(f'{run}/{kind}')}/{name}"
            if not os.path.lexists(link_name):
                os.symlink(f"{as_booted(source)}/{kind}/{each}/{name}", link_name)
                new = True
        if names and kind == "extensions":
            kernel.write_file(f"{run}/{DROP_IN}", drop_in(_hierarchies(kernel.path(SYSROOT), spared)))
    return new


def drop_in(hierarchies: list[str]) -> str:
    """Keep systemd-sysext from laying an overlay over all of /usr: that would hide what is mounted in it."""
    return f'# Of immucore.\n[Service]\nEnvironment="SYSTEMD_SYSEXT_HIERARCHIES={":".join(hierarchies)}"\n'


def _images(directory: str) -> list[str]:
    """List the images in a directory: files called *.raw, and directories, but no links out of it."""
    try:
        with os.scandir(directory) as found:
            return sorted(
                each.name
                for each in found
                if each.is_dir(follow_symlinks=False)
                or (each.name.endswith(".raw") and each.is_file(follow_symlinks=False))
            )
    except (FileNotFoundError, NotADirectoryError):
        return []


def _hierarchies(root: str, spared: tuple[str, ...]) -> list[str]:
    """Name each directory of /usr, and /opt, below and at which nothing is mounted that is to be seen."""
    with os.scandir(f"{root}/usr") as found:
        names = sorted(each.name for each in found if each.is_dir(follow_symlinks=False))
    candidates = [*(f"/usr/{name}" for name in names if not set(name) & set(': "\\')), "/opt"]
    return [
        path
        for path in candidates
        if not any(is_below(each, path) or is_below(path, each) for each in spared)
    ]
