"""What an operator asks for at the boot menu: rd.cos.break, rd.cos.safe, rd.cos.nopersist."""

from __future__ import annotations

from collections.abc import Callable

import derivative
import expect
import pytest
from disk import Disk
from machine import Machine


@pytest.mark.parametrize("initramfs", ["systemd", "shell"])
def test_a_shell_before_a_step(machine: Callable[..., Machine], disk: Disk, initramfs: str) -> None:
    """Exit, and the boot goes on."""
    asked = machine(disk, f"{expect.ACTIVE} rd.cos.break=/etc", initramfs=initramfs)
    look = 'case "$(cat /proc/self/mountinfo)" in *" /sysroot/etc "*) n=1;; *) n=0;; esac; echo etc=$n\n'

    report = asked.boot(
        limit_s=120,
        until="initramfs" if initramfs == "systemd" else "system",
        when=[
            ("type exit to go on", lambda guest: guest.type_until(look, r"etc=\d")),
            (r"etc=\d", lambda guest: guest.type_until("exit\n", r"Power down|Power off")),
        ],
    )

    assert "etc=0" in report.console
    assert report.slot == "active"
    assert report.result["outcome"] == "ok"
    assert report.mount("/sysroot/etc" if report.stage == "initramfs" else "/etc").fstype == "overlay"


def test_safe(machine: Callable[..., Machine], cos_disk: Callable[..., Disk]) -> None:
    """Neither OEM nor the user's layout nor a volume: the root, and what is writable by default."""
    nonsense = "RW_PATHS '/etc'\n"
    image = derivative.edited(
        derivative.images("bookworm")["active.img"], {"etc/cos/cos-layout.env": nonsense}
    )
    disk = cos_disk(state={"cOS/active.img": image}, oem={"cos-layout.env": nonsense})

    report = machine(disk, f"{expect.ACTIVE} rd.cos.safe").boot(limit_s=90)

    assert (report.stage, report.slot, report.state) == ("system", "active", "running")
    assert report.result["outcome"] == "ok"
    expect.overlaid(report, *expect.RW_PATHS)
    sources = {mount.source for mount in report.mountinfo}
    assert f"/dev/vda{disk.number('oem')}" not in sources
    assert f"/dev/vda{disk.number('persistent')}" not in sources


def test_without_the_persistent_volume_on_purpose(
    machine: Callable[..., Machine], cos_disk: Callable[..., Disk]
) -> None:
    disk = cos_disk(without=("persistent",), oem={"cos-layout.env": "PERSISTENT_STATE_PATHS=/home\n"})

    report = machine(disk, f"{expect.ACTIVE} rd.cos.nopersist").boot(
        limit_s=240, until="initramfs", commands=(expect.UPTIME,), icount_shift=1
    )

    assert (report.stage, report.slot) == ("initramfs", "active"), report.console[-3000:]
    assert (report.result["outcome"], report.result["waits"]) == ("ok", [])
    assert report.mount("/sysroot/usr/local").fstype == "overlay"
    assert report.mount("/sysroot/home").fstype == "overlay"
    expect.soon(report)
