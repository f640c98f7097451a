"""What others have done at an upgrade: executables in HOOKS/<stage>.d, in the order of their names.

One of /etc stands for one of the same name in /usr/lib. The first that fails stops the upgrade, in which
nothing has taken effect until all of them have ended well.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from immucore import process, syscalls
from immucore.log import printable
from immucore.system import stopping
from immucore.system.errors import ImageError
from immucore.system.programs import TELL_SEC, together

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

LIBRARY, MACHINE = (
    "usr/lib/immucore/hooks",
    "etc/immucore/hooks",
)  # what the image brings; what this machine has
BEFORE, CHROOT, AFTER = "before-upgrade", "after-upgrade-chroot", "after-upgrade"
LIMIT_SEC = 1800.0
_SAID = 300  # characters of what one has printed, the last ones
_SHARED = ("dev", "proc", "sys", "run")
_BOUND = "/run/immucore/hooks"  # where a tree finds those of this machine


def run(stage: str, root: str, environment: Mapping[str, str]) -> list[str]:
    """Run the hooks of a stage that the system at `root` has, and name them. Raises ImageError."""
    done = []
    for path in _found(stage, f"{root}/{LIBRARY}", f"{root}/{MACHINE}"):
        _run([path], path, stage, environment)
        done.append(path)
    return done


def run_in(tree: str, stage: str, root: str, environment: Mapping[str, str]) -> list[str]:
    """Run the hooks of a stage with `tree` as their root: its own, and those of the machine at `root`.

    Raises ImageError and OSError.
    """
    done: list[str] = []
    machine = f"{root}/{MACHINE}"
    found = _found(stage, f"{tree}/{LIBRARY}", machine)
    if not found:
        return done
    with _shared(tree, f"{machine}/{stage}.d"):
        for path in found:
            inside = path.removeprefix(tree)
            if path.startswith(f"{machine}/"):
                inside = f"{_BOUND}/{os.path.basename(path)}"
            _run(["chroot", tree, inside], inside, stage, environment)
            done.append(inside)
    return done


def _found(stage: str, *directories: str) -> list[str]:
    found: dict[str, str] = {}
    for directory in directories:
        with (
            contextlib.suppress(FileNotFoundError, NotADirectoryError),
            os.scandir(f"{directory}/{stage}.d") as all_,
        ):
            found |= {
                each.name: each.path for each in all_ if not (each.name.startswith(".") or each.is_dir())
            }
    return [found[name] for name in sorted(found) if os.access(found[name], os.X_OK)]


def _run(argv: list[str], path: str, stage: str, environment: Mapping[str, str]) -> None:
    try:
        done = process.run_apart(
            together(argv),
            timeout_sec=LIMIT_SEC,
            environment={"HOME": "/root", "IMMUCORE_STAGE": stage, **environment},
            meanwhile=lambda _sec: stopping.point(),
            every_sec=TELL_SEC,
        )
    except OSError as error:
        raise ImageError(f"cannot run the hook '{path}': {error.strerror}", hint="correct it") from None
    if done.status:
        said = "; ".join(line.strip() for line in done.output.splitlines() if line.strip())[-_SAID:]
        raise ImageError(
            f"the hook '{path}' of {stage} ended with status {done.status}{printable(said and ': ' + said)}",
            hint="correct it, or what it complains of",
        )


@contextlib.contextmanager
def _shared(tree: str, machine: str) -> Iterator[None]:
    """Show /dev, /proc, /sys and /run in a tree, and in its /run the hooks of this machine."""
    mounted: list[str] = []
    os.makedirs(_BOUND, exist_ok=True)
    top = os.open(tree, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for source, inside in [*((f"/{name}", name) for name in _SHARED), (machine, _BOUND[1:])]:
            if not os.path.isdir(source):
                continue
            try:
                target = syscalls.openat2(top, inside, os.O_PATH | os.O_DIRECTORY)
            except FileNotFoundError:
                raise ImageError(
                    f"cannot run a hook in the new image: it has no /{inside}",
                    hint="correct the source of the image",
                ) from None
            try:
                syscalls.mount(source, f"/proc/self/fd/{target}", "", syscalls.MS_BIND, "")
                mounted.append(os.readlink(f"/proc/self/fd/{target}"))
            finally:
                os.close(target)
        yield
    finally:
        for target_path in reversed(mounted):
            syscalls.umount(target_path, syscalls.MNT_DETACH)  # what a hook has left behind may use it
        os.close(top)
