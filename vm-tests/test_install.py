"""Images that are squashfs start by themselves: firmware, GRUB, its menu, the kernel inside of the image.

Those that are ext4 do so in test_never_brick.py.
"""

from __future__ import annotations

from pathlib import Path

import expect
import installed
import pytest

MENU = "The highlighted entry will be executed"
DOWN = "\x1b[B"
SLOTS = ("active", "passive", "recovery")  # as the menu has them
CMDLINE = "cat /proc/cmdline"


def menu_waits(oem: Path) -> None:
    """Let GRUB ask, and add nothing to a command line: as it is installed."""
    installed.set_environment(oem, timeout="", extra_cmdline="")


@pytest.mark.parametrize(("firmware", "slot"), [("efi", "active"), ("bios", "recovery")])
def test_installed_disk_boots(work: Path, firmware: str, slot: str) -> None:
    disk = installed.changed(work, "oem", menu_waits, filesystem="squashfs")
    choice = DOWN * SLOTS.index(slot) + "\r"

    report = installed.machine(work, efi=firmware == "efi", own=disk).boot(
        limit_s=150, when=[(MENU, lambda guest: guest.type(choice))], commands=[CMDLINE]
    )

    assert report.stage == "system", report.console[-3000:]
    assert (report.state, report.failed_units) == ("running", [])
    assert (report.result["outcome"], report.result["mode_booted"]) == ("ok", slot)
    image = report.backing_files[report.mount("/").source]
    assert report.mount("/").fstype == "squashfs"
    assert image == f"/run/initramfs/cos-state/cOS/{slot}.img"
    expect.volume(report, "/oem", disk.number("oem"))
    if slot != "recovery":
        expect.volume(report, "/usr/local", disk.number("persistent"))
    counting = "panic=10 rd.cos.onfail=reboot:10"
    assert (counting in report.output(CMDLINE)) is (slot != "recovery")
