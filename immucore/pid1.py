"""The agent as the first process of an initramfs without another init (contract §9). Imported only then."""

from __future__ import annotations

import os

from immucore import process, report, syscalls
from immucore.plan import SYSROOT

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from immucore.cmdline import Cmdline

# What every program expects of an initramfs, in the order in which it is needed.
API = (
    ("proc", "/proc", "proc", "nosuid,noexec,nodev"),
    ("sysfs", "/sys", "sysfs", "nosuid,noexec,nodev"),
    ("devtmpfs", "/dev", "devtmpfs", "nosuid"),
    ("tmpfs", "/run", "tmpfs", "nosuid,nodev"),
)


def prepare() -> None:
    """Mount /proc, /sys, /dev and /run where nobody has. Raises OSError."""
    for source, target, fstype, options in API:
        os.makedirs(target, 0o755, exist_ok=True)
        if os.stat(target).st_dev == os.stat("/").st_dev:
            flags = sum(syscalls.MS[option] for option in options.split(","))
            syscalls.mount(source, target, fstype, flags, "mode=0755" if fstype == "tmpfs" else "")


def switch_root(asked: Cmdline) -> None:
    """Become the init of the new root (switch_root(8)); returns only if that cannot be done."""
    program = process.find("switch_root")
    if program is None:
        report.to_consoles(
            "immucore: cannot switch to the new root: there is no switch_root in the initramfs"
        )
        return
    os.execve(program, [program, SYSROOT, asked.init or "/sbin/init"], process.ENVIRONMENT)  # noqa: S606  argv is a list
