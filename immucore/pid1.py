"""The agent as the first process of an initramfs without another init (contract §9). Imported only then."""

from __future__ import annotations

import os
import time

from immucore import boot, onfail, process, report, syscalls
from immucore.plan import SYSROOT

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from typing import NoReturn

    from immucore.cmdline import Cmdline

# What every program expects of an initramfs, in the order in which it is needed.
API = (
    ("proc", "/proc", "proc", "nosuid,noexec,nodev"),
    ("sysfs", "/sys", "sysfs", "nosuid,noexec,nodev"),
    ("devtmpfs", "/dev", "devtmpfs", "nosuid"),
    ("tmpfs", "/run", "tmpfs", "nosuid,nodev"),
)


def run() -> NoReturn:
    """Boot, and become the init of the new root; a failed boot does what rd.cos.onfail says, or is a shell.

    Never returns, whatever happens: the end of PID 1 is a kernel panic.
    """
    try:
        prepare()
        this, error, _ = boot.once()
        if error:
            onfail.act(this)
        elif this.cmdline.engaged:
            switch_root(this.slot)
        else:
            report.to_consoles("immucore: this boot is not ours, and there is no other init to go on with")
    except Exception as failure:  # noqa: BLE001  see above
        report.to_consoles(f"immucore: cannot be the first process: {type(failure).__name__}: {failure}")
    while True:
        try:
            process.shell()
        except OSError as failure:
            report.to_consoles(f"immucore: cannot start a shell on the console: {failure.strerror}")
            time.sleep(60)
        time.sleep(1)  # a shell that ends at once must not take the machine


def prepare() -> None:
    """Mount /proc, /sys, /dev and /run where nobody has. Raises OSError."""
    for source, target, fstype, options in API:
        os.makedirs(target, 0o755, exist_ok=True)
        if os.stat(target).st_dev == os.stat("/").st_dev:
            flags = sum(syscalls.MS[option] for option in options.split(","))
            syscalls.mount(source, target, fstype, flags, "mode=0755" if fstype == "tmpfs" else "")


def switch_root(asked: Cmdline) -> None:
    """Become the init of the new root (switch_root(8)); returns only where there is no such program."""
    program = process.find("switch_root")
    if program is None:
        report.to_consoles(
            "immucore: cannot switch to the new root: there is no switch_root in the initramfs"
        )
        return
    init = asked.init or "/sbin/init"
    os.execve(program, [program, SYSROOT, init], process.ENVIRONMENT)  # noqa: S606  argv is a list
