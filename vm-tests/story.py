"""The story of a bad upgrade, told while it happens. `make demo SCENARIO=bad-upgrade` calls this."""

from __future__ import annotations

import time
from collections.abc import Callable

import derivative
import installed
from installed import JUDGED, upgrade
from machine import Guest
from report import Report
from rich.console import Console

LIMIT_S = 300.0
STATUS = "immucore boot status"
NOTICE = "cat /run/motd.d/*"
PANIC = "Kernel panic - not syncing"


def tell(console: Console) -> int:
    """Upgrade a machine to an image that panics, and show what becomes of it; 0 if it was saved."""
    work = derivative.CACHE / "story"
    derivative.remove(work)
    bad = installed.source("panics", more="rdinit=/none")
    machine = installed.machine(work, efi=True, sources=(bad,))
    began = time.monotonic()

    def line(text: str, style: str = "") -> None:
        console.print(f"[dim]{time.monotonic() - began:5.0f} s[/]  [{style or 'default'}]{text}[/]")

    def when(text: str, style: str = "") -> Callable[[Guest], None]:
        return lambda _guest: line(text, style)

    line("the machine starts: UEFI, GRUB, and the first image, in active")
    with console.status("booting in QEMU, without KVM"):
        first = machine.boot(limit_s=LIMIT_S, commands=(JUDGED, upgrade("panics")))
    if not came_up(console, first):
        return 1
    for step in first.commands[upgrade("panics")].output.splitlines():
        if "..." not in step and "%" not in step:
            console.print(f"         {step}", style="cyan", markup=False)
    line("the machine restarts into what it was upgraded to")
    tries = [
        (rf"(?s)({PANIC}.*){{{number}}}", when(f"try {number}: the kernel panics", "red"))
        for number in (1, 2, 3)
    ]
    with console.status("booting in QEMU, without KVM"):
        second = machine.boot(limit_s=LIMIT_S, commands=(JUDGED, STATUS, NOTICE), when=tries)
    if not came_up(console, second):
        return 1
    line(
        f"GRUB boots {second.result['mode_booted']}, where the first image is, and that is judged good",
        "green",
    )
    for command in (NOTICE, STATUS):
        console.print(f"\n[bold]{command}[/]")
        console.print(second.commands[command].output.rstrip(), markup=False)
    return 0 if second.result["mode_booted"] == "passive" else 1


def came_up(console: Console, report: Report) -> bool:
    """Tell whether a machine has reported; show the end of its console if not."""
    if report.stage != "system":
        console.print(report.console[-4000:], markup=False)
        console.print(f"[red]The machine did not come up[/]: {report.ended}")
    return report.stage == "system"
