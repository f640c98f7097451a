"""After a failed boot: what rd.cos.onfail and rd.cos.fallback=reboot ask for. Imported only then.

Where systemd runs, restarting is its business: immucore-generator has told it so (FailureAction=), which
works too when the agent could not even start. Elsewhere, for halting, which systemd has as an action only
since version 255, and where the boot loader has been told to boot something else, the agent does it itself.
"""

from __future__ import annotations

import os
import time

from immucore import report, syscalls

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from immucore.boot import Boot

RESTART, HALT = 0x01234567, 0xCDEF0123  # linux/reboot.h
SYSTEMD = "/run/systemd/system"  # sd_booted(3)


def sentence(boot: Boot) -> str:
    """Say what happens next, as the end of the summary."""
    action, _, seconds = boot.cmdline.onfail.partition(":")
    if boot.next_entry:
        return f"The machine restarts: the boot loader is to boot its entry '{boot.next_entry}'."
    if action == "reboot":
        return f"The machine restarts in {seconds or 0} s (rd.cos.onfail)."
    if action == "halt":
        return "The machine is halted (rd.cos.onfail)."
    return "The boot stops here."


def act(boot: Boot) -> None:
    """Restart or halt, or return where a shell is to come, or where systemd does all that."""
    action, _, seconds = boot.cmdline.onfail.partition(":")
    if boot.next_entry:
        _end(boot, RESTART)
    elif action == "reboot":
        time.sleep(int(seconds or 0))
        if not os.path.isdir(SYSTEMD):
            _end(boot, RESTART)
    elif action == "halt":
        _end(boot, HALT)


def _end(boot: Boot, command: int) -> None:
    """Unmount what this boot has mounted, because nobody else will, and end the machine."""
    boot.take_back()
    os.sync()
    try:
        syscalls.reboot(command)
    except OSError as error:
        report.to_consoles(f"immucore: cannot restart or halt the machine: {error.strerror}")
