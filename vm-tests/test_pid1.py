"""The agent as the only init of an initramfs: no systemd, no dracut, no udev (contract §9)."""

from __future__ import annotations

from collections.abc import Callable

import expect
from disk import Disk
from machine import Guest, Machine

# What the kernel cannot load by itself; everything else is the agent's business.
INIT = """\
#!/bin/sh
/sbin/modprobe -a virtio_pci virtio_blk ext4 squashfs loop overlay
exec /usr/lib/immucore/immucore boot
"""
GONE = "root=LABEL=COS_ACTIVE cos-img/filename=/cOS/gone.img quiet"


def test_becomes_the_init_of_the_image(machine: Callable[..., Machine], disk: Disk) -> None:
    only = machine(disk, f"{expect.ACTIVE} rdinit=/pid1", initramfs="shell", initramfs_files={"pid1": INIT})

    report = only.boot(limit_s=90)

    assert (report.stage, report.slot) == ("system", "active")
    assert report.mount("/usr/local").writable
    assert report.result["outcome"] == "ok"


def test_a_failed_boot_ends_in_a_shell_and_not_in_a_panic(
    machine: Callable[..., Machine], disk: Disk
) -> None:
    asked = f"{GONE} rd.cos.fallback=off rdinit=/pid1"
    only = machine(disk, asked, initramfs="shell", initramfs_files={"pid1": INIT})

    def ask(guest: Guest) -> None:
        guest.type_until("echo alive-$((40 + 2))\n", "alive-42")

    report = only.boot(limit_s=60, when=[("immucore doctor", ask), ("alive-42", lambda it: it.cut_power())])

    assert "cannot find the image '/run/initramfs/cos-state/cOS/gone.img'" in report.console
    assert "alive-42" in report.console
    assert "panic" not in report.console.partition("cannot find the image")[2]


def test_onfail_reboot_restarts_the_machine(machine: Callable[..., Machine], disk: Disk) -> None:
    asked = f"{GONE} rd.cos.fallback=off rdinit=/pid1"
    only = machine(
        disk, f"{asked} rd.cos.onfail=reboot:1", initramfs="shell", initramfs_files={"pid1": INIT}
    )

    report = only.boot(limit_s=60)

    assert report.ended == "guest-reset"
    assert "The machine restarts in 1 s" in report.console
